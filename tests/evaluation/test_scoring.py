import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fingpt_lightning.evaluation.generation import generate
from fingpt_lightning.evaluation.scoring import DROPPED, Prediction, score
from fingpt_lightning.models.formats.tokenizer import use_chat_template
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.tasks import Example
from fingpt_lightning.tasks.encoding import TooLong
from fingpt_lightning.tasks.examples import Shot
from tests.evaluation.plain import plain_scores
from tests.evaluation.tiny_language import examples_of, tiny_network, tiny_tokenizer
from tests.tasks.chat_templates import ENDED

NETWORKS = ("llama", "gpt2", "low_rank")
TASKS = ("fpb", "nwgi7", "piqa", "winogrande", "lambada")


def _relative(scores: list[float]) -> list[float]:
    return torch.tensor(scores, dtype=torch.float64).log_softmax(0).tolist()


def _scores(predictions: list[Prediction]) -> list[float]:
    return [score for prediction in predictions for score in prediction.scores]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_scores_are_those_of_each_whole_text_alone(kind: str, name: str, tmp_path: Path) -> None:
    network, tokenizer = tiny_network(kind).double(), tiny_tokenizer("<begin>")
    examples = examples_of(tmp_path, name)
    plain = [plain_scores(network, tokenizer, example) for example in examples]
    for relative in (False, True) if name in ("fpb", "nwgi7") else (False,):
        predictions = score(network, tokenizer, examples, relative=relative, batch_tokens=60)
        for prediction, (scores, greedy) in zip(predictions, plain, strict=True):
            expected = _relative(scores) if relative else scores
            assert prediction.scores == pytest.approx(expected, rel=0, abs=1e-10)
            likeliest: int | None = scores.index(max(scores))
            if len(scores) == 1 and not all(greedy):
                likeliest = None
            assert prediction.choice == likeliest


@pytest.mark.parametrize("name", ["fpb", "piqa", "winogrande"])
@pytest.mark.parametrize("num_shots", [0, 2])
def test_scores_of_chats_are_those_of_each_rendered_text_alone(
    name: str, num_shots: int, tmp_path: Path
) -> None:
    network, tokenizer = tiny_network("llama").double(), tiny_tokenizer("<begin>")
    use_chat_template(tokenizer, ENDED)
    examples = examples_of(tmp_path, name)
    shots = [Shot(f"Is it {i}?", " yes") for i in range(num_shots)]
    before = "".join(f"user:\n{shot.prompt}<end>assistant:\nyes<end>" for shot in shots)
    rendered = [
        Example(
            "",
            tuple(
                f"{before}user:\n{(example.prefix + prompt).strip()}<end>assistant:\n"
                for prompt in example.prompts
            ),
            tuple(choice.strip() for choice in example.choices),
            *example[3:6],
        )
        for example in examples
    ]
    found = score(
        network, tokenizer, [example._replace(shots=tuple(shots)) for example in examples]
    )
    for prediction, example in zip(found, rendered, strict=True):
        plain, _ = plain_scores(network, tiny_tokenizer(), example)
        assert prediction.scores == pytest.approx(plain, rel=0, abs=1e-10)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_size_of_the_batches_changes_nothing(kind: str, tmp_path: Path) -> None:
    network, tokenizer = tiny_network(kind), tiny_tokenizer()
    for name in ("fpb", "nwgi7", "piqa"):
        examples = examples_of(tmp_path, name)
        one_by_one = score(network, tokenizer, examples, batch_tokens=1)
        for batch_tokens in (70, 100_000):
            together = score(network, tokenizer, examples, batch_tokens=batch_tokens)
            assert [p.choice for p in together] == [p.choice for p in one_by_one]
            assert _scores(together) == pytest.approx(_scores(one_by_one), rel=0, abs=1e-5)


def test_a_last_word_is_right_if_it_would_be_written(tmp_path: Path) -> None:
    network, tokenizer = tiny_network("llama"), tiny_tokenizer()
    (example, _) = examples_of(tmp_path, "lambada")
    ids = torch.tensor([tokenizer.encode(example.prompts[0])])
    with torch.no_grad():
        (written,) = tokenizer.batch_decode([[int(network(ids).logits[0, -1].argmax())]])
    found = score(network, tokenizer, [example._replace(choices=(written,)), example])
    assert [prediction.choice for prediction in found] == [0, None]
    assert found[0].scores[0] > found[1].scores[0]


def test_relative_scores_are_of_a_distribution_over_the_choices(tmp_path: Path) -> None:
    network, tokenizer = tiny_network("gpt2"), tiny_tokenizer()
    for prediction in score(network, tokenizer, examples_of(tmp_path, "nwgi7"), relative=True):
        assert sum(map(math.exp, prediction.scores)) == pytest.approx(1)


def test_only_what_is_needed_is_computed(tmp_path: Path) -> None:
    network, tokenizer = tiny_network("llama"), tiny_tokenizer()
    examples = examples_of(tmp_path, "fpb")
    num_run = 0

    def count(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        nonlocal num_run
        num_run += kwargs["input_ids"].numel()

    network.base_model.register_forward_pre_hook(count, with_kwargs=True)
    network.lm_head.register_forward_hook(lambda *_: pytest.fail("all logits were made"))
    score(network, tokenizer, examples, relative=True, batch_tokens=1)
    prompts = [tokenizer.encode(e.prefix + e.prompts[0]) for e in examples]
    labels = {tuple(tokenizer.encode(choice)[:-1]) for choice in examples[0].choices}
    num_branch_tokens = len({tokens[:n] for tokens in labels for n in range(1, len(tokens) + 1)})
    num_shared = len(tokenizer.encode(examples[0].prefix + "Input:"))
    own_tokens = sum(len(prompt) - num_shared + num_branch_tokens for prompt in prompts)
    assert num_run <= num_shared + own_tokens


def test_eager_attention_gets_the_same_mask(tmp_path: Path) -> None:
    tokenizer, examples = tiny_tokenizer(), examples_of(tmp_path, "nwgi7")
    network = tiny_network("llama").double()
    eager = copy.deepcopy(network)
    eager.set_attn_implementation("eager")
    expected = _scores(score(network, tokenizer, examples))
    assert _scores(score(eager, tokenizer, examples)) == pytest.approx(expected, rel=0, abs=1e-5)


def test_an_attention_without_masks_is_refused(tmp_path: Path) -> None:
    network = tiny_network("llama")
    network.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask"):
        score(network, tiny_tokenizer(), examples_of(tmp_path, "lambada"))


@pytest.mark.parametrize("quantize", ["nf4", "int8", None])
def test_quantised_and_short_weights_are_scored_as_the_network_computes(
    quantize: str | None, tmp_path: Path
) -> None:
    network, tokenizer = tiny_network("llama"), tiny_tokenizer()
    network.save_pretrained(tmp_path / "model")
    dtype = torch.bfloat16 if quantize is None else torch.float32
    loaded = load_model(tmp_path / "model", quantize=quantize, dtype=dtype).network
    tolerance = {"nf4": 1e-4, "int8": 1e-4, None: 0.3}[quantize]
    for example in examples_of(tmp_path, "nwgi7"):
        (prediction,) = score(loaded, tokenizer, [example])
        expected, _ = plain_scores(loaded, tokenizer, example)
        assert prediction.scores == pytest.approx(expected, rel=0, abs=tolerance)


def test_a_cut_prompt_is_said_to_be_one(tmp_path: Path) -> None:
    network, tokenizer = tiny_network("gpt2"), tiny_tokenizer()
    example = examples_of(tmp_path, "fpb")[0]
    text = "Foo Corp rose " * 99
    prompts, spans = (f"Input: {text}\nAnswer:",), ((7, 7 + len(text)),)
    long = example._replace(prompts=prompts, text=text, spans=spans)
    found = score(network, tokenizer, [example, long, example], relative=True)
    assert [prediction.is_cut for prediction in found] == [False, True, False]
    assert found[0] == found[2]


@pytest.mark.parametrize("answer", [score, generate])
def test_a_row_that_does_not_fit_is_left_out_and_the_others_are_answered(
    answer: Callable[..., list[Prediction]], tmp_path: Path
) -> None:
    network, tokenizer = tiny_network("gpt2"), tiny_tokenizer()
    examples = examples_of(tmp_path, "fpb")
    long = examples[0]._replace(prompts=("Foo " * 999,), spans=())
    found = answer(network, tokenizer, [examples[0], long, *examples[1:]])
    assert found[1] == DROPPED
    assert [found[0], *found[2:]] == answer(network, tokenizer, examples)
    assert answer(network, tokenizer, [long]) == [DROPPED]
    with pytest.raises(ValueError, match=r"row 1: \d[\d,]* tokens, which are more than 330"):
        answer(network, tokenizer, [long], too_long=TooLong.ERROR)


@torch.no_grad()
def test_answers_that_merge_with_their_prompts_are_scored_from_the_same_place() -> None:
    network, tokenizer = tiny_network("llama").double(), tiny_tokenizer()
    labels = ("negative", "neutral", "ative")
    prompts = ["Foo fell"] * 20 + ["Foo and neg", "Foo and ", "Foo positive or n"]
    examples = [Example("", (prompt,), labels, 0, 1, "") for prompt in prompts]
    found = score(network, tokenizer, examples)
    num_merged = 0
    for prompt, prediction in zip(prompts, found, strict=True):
        whole = [tokenizer.encode(prompt + label) for label in labels]
        alone = tokenizer.encode(prompt)
        alike = zip(alone, *whole, strict=False)
        first = next((i for i, tokens in enumerate(alike) if len(set(tokens)) > 1), len(alone))
        num_merged += first < len(alone)
        for tokens, value in zip(whole, prediction.scores, strict=True):
            log_p = network(torch.tensor([tokens])).logits[0].log_softmax(1)
            expected = sum(float(log_p[i - 1, tokens[i]]) for i in range(first, len(tokens)))
            assert value == pytest.approx(expected, rel=0, abs=1e-10)
    assert num_merged


def test_no_examples_have_no_predictions() -> None:
    network: PreTrainedModel = tiny_network("gpt2")
    assert score(network, tiny_tokenizer(), []) == []
