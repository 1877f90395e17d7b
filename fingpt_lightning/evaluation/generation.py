"""Free-form answers: greedy decoding in batches, stop texts, the label that an answer names.

Axes: B rows, T tokens of a prompt, S keys, D width.
"""

import re
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.evaluation.batches import batches_of, default_batch_tokens, plan_batches
from fingpt_lightning.evaluation.forward import SharedPrefix, run_trees
from fingpt_lightning.evaluation.scoring import Prediction, kept_rows, unanswered
from fingpt_lightning.evaluation.token_tree import build_tree, num_common_tokens
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models.decoding import write_on
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.tokenizer import check_tokens
from fingpt_lightning.shards.options import Shard
from fingpt_lightning.tasks import Example
from fingpt_lightning.tasks.encoding import (
    Text,
    TooLong,
    encode_examples,
    encode_prompts,
    end_tokens,
)

_EXTRA_TOKENS = 6
"""Tokens of an answer beyond its longest label, for words such as "The answer is"."""


@torch.no_grad()
def generate(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    *,
    batch_tokens: int | None = None,
    too_long: TooLong = TooLong.CUT,
    on_answered: Callable[[int], None] | None = None,
    shard: Shard | None = None,
) -> list[Prediction]:
    """Writes an answer to every example, greedily, and reads the label in it.

    What all prompts begin with is run once. An answer ends with the tokenizer's end token or at
    the length of the longest label and some tokens. One that names no label has ``choice`` None.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        examples: Examples of one task of kind ``labels``.
        batch_tokens: Tokens of the prompts of a batch, padding included; None derives it from the
            device.
        too_long: Treatment of rows that do not fit, as in `score`.
        on_answered: Callback, called after each batch with the number of examples answered.
        shard: Share of the batches that is run, as in `score`.

    Raises:
        ValueError: As in `score`.
        FloatingPointError: As in `score`.
    """
    if not examples:
        return []
    labels = examples[0].choices
    (first,) = encode_examples(tokenizer, examples[:1], sys.maxsize)
    assert first is not None  # nothing is longer than that
    num_new = _EXTRA_TOKENS + max(len(text.tokens) - text.first_scored for text in first.texts)
    answered = write_answers(
        network,
        tokenizer,
        examples,
        num_new,
        batch_tokens=batch_tokens,
        too_long=too_long,
        on_answered=on_answered,
        shard=shard,
    )
    return [
        one
        if one.is_dropped or one.is_pending
        else one._replace(choice=read_label(one.answer, labels))
        for one in answered
    ]


def _is_written(prediction: Prediction) -> bool:
    return not prediction.is_dropped and not prediction.is_pending


@torch.no_grad()
@faster_products()
def write_answers(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    num_new: int,
    *,
    stop: Sequence[str] = (),
    batch_tokens: int | None = None,
    too_long: TooLong = TooLong.CUT,
    on_answered: Callable[[int], None] | None = None,
    shard: Shard | None = None,
) -> list[Prediction]:
    """Writes an answer to every example, greedily, in batches with a cache of keys and values.

    What all prompts begin with is run once. An answer ends before the tokenizer's end token or the
    first of the stop texts; a batch ends when all of its answers have.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        examples: Examples of one task, with one prompt each.
        num_new: Largest number of tokens of an answer.
        stop: Texts before which an answer ends.
        batch_tokens: Tokens of the prompts of a batch, as in `generate`.
        too_long: Treatment of rows that do not fit with their answer, as in `score`.
        on_answered: Callback, as in `generate`.
        shard: Share of the batches that is run, as in `score`.

    Returns:
        Predictions with ``answer`` and no ``choice``.

    Raises:
        ValueError: As in `score`.
        FloatingPointError: As in `score`.
    """
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(network.device.type)
    num_positions = max_positions(network.config)
    encoded = encode_prompts(tokenizer, examples, num_positions, num_new, too_long=too_long)
    places, rows = kept_rows(encoded)
    predictions = unanswered(len(encoded), places)
    if not rows:
        return predictions
    prompts = [row.texts[0].tokens for row in rows]
    for place, prompt in zip(places, prompts, strict=True):
        row = f"row {examples[place].row}"
        check_tokens(tokenizer, [prompt], network.config.vocab_size, row)
    num_shared = num_common_tokens([[Text(prompt, len(prompt))] for prompt in prompts])
    prefix = SharedPrefix(network, prompts[0][:num_shared])
    num_answered = 0
    batches = plan_batches([len(prompt) - num_shared for prompt in prompts], batch_tokens)
    for batch in batches_of(shard, batches):
        names = [f"row {examples[i].row}" for i in batch]
        of_batch = [prompts[i] for i in batch]
        written = _continue(network, tokenizer, of_batch, prefix, num_new, stop, names)
        for index, answer in zip(batch, written, strict=True):
            predictions[places[index]] = Prediction(None, (), rows[index].is_cut, answer)
        num_answered += len(batch)
        if on_answered is not None:
            on_answered(num_answered)
    return predictions


def read_label(answer: str, labels: Sequence[str]) -> int | None:
    """The label that an answer names first, as whole words in any case; the longest one there.

    >>> read_label("Mildly Negative, I think", ["negative", "mildly negative"])
    1
    >>> read_label("nonnegative", ["negative"]) is None
    True
    """
    words = {label.strip().casefold(): index for index, label in enumerate(labels)}
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    found = re.search(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)", answer.casefold())
    return None if found is None else words[found[1]]


def before_stop(text: str, stop: Sequence[str]) -> str:
    r"""The text up to the first of the stop texts in it.

    >>> before_stop("12.5 million\nQuestion", ["\n", "###"])
    '12.5 million'
    """
    ends = [place for one in stop if (place := text.find(one)) >= 0]
    return text[: min(ends)] if ends else text


class _StopTexts:
    """Finds the rows in whose new tokens a stop text shows.

    A stop text has at least as many bytes as tokens, so that as many of the last tokens hold one
    that ends there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._num_last = max(len(one.encode()) for one in stop) + 1

    def __call__(self, written_BN: Tensor) -> Tensor:
        last = written_BN[:, -self._num_last :].tolist()
        texts = self._tokenizer.batch_decode(last, skip_special_tokens=True)
        has_stop = [any(one in text for one in self._stop) for text in texts]
        return torch.tensor(has_stop, device=written_BN.device)


def _continue(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[tuple[int, ...]],
    prefix: SharedPrefix,
    num_new: int,
    stop: Sequence[str],
    names: Sequence[str],
) -> list[str]:
    device = network.device
    cache = prefix.cache(len(prompts))
    # A tree of one text does not run the text's last token: here one is appended that is not run.
    trees = [build_tree([Text((*prompt, 0), len(prompt))], prefix.num_tokens) for prompt in prompts]
    hidden_BTD = run_trees(network, trees, prefix, cache)
    lengths_B = torch.tensor([len(tree.tokens) for tree in trees], device=device)
    rows_B = torch.arange(len(prompts), device=device)
    padded_S = torch.arange(hidden_BTD.shape[1], device=device)
    allowed_BS = F.pad(padded_S < lengths_B[:, None], (prefix.num_tokens, num_new), value=True)
    tokens = write_on(
        network,
        hidden_BTD[rows_B, lengths_B - 1],
        prefix.num_tokens + lengths_B,
        cache,
        num_new,
        allowed=allowed_BS,
        end_tokens=end_tokens(tokenizer),
        has_stopped=_StopTexts(tokenizer, stop) if stop else None,
        names=names,
    )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [before_stop(text, stop) for text in texts]
