"""The plain way to score: one whole text at a time, no cache, all logits."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.tasks import Example


@torch.no_grad()
def plain_scores(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, example: Example
) -> tuple[list[float], list[bool]]:
    """The log-probability of each choice, and whether greedy decoding would write it."""
    scores, greedy = [], []
    for index, choice in enumerate(example.choices):
        prompt = example.prefix + example.prompts[index if len(example.prompts) > 1 else 0]
        num_prompt_tokens = len(tokenizer.encode(prompt))
        tokens = tokenizer.encode(prompt + choice)
        logits = network(torch.tensor([tokens], device=network.device)).logits[0]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        answer = range(num_prompt_tokens, len(tokens))
        scores.append(sum(float(log_p[place - 1, tokens[place]]) for place in answer))
        greedy.append(all(int(log_p[place - 1].argmax()) == tokens[place] for place in answer))
    return scores, greedy
