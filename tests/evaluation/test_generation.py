from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.evaluation.generation import (
    before_stop,
    generate,
    read_label,
    write_answers,
)
from fingpt_lightning.models import decoding
from fingpt_lightning.models.decode_step import decode_step
from tests.evaluation.tiny_language import examples_of, tiny_network, tiny_tokenizer

_LABELS = (" negative", " neutral", " positive", " mildly negative")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "low_rank"])
@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_answers_are_those_of_greedy_decoding_one_by_one(
    kind: str, batch_tokens: int, tmp_path: Path
) -> None:
    network, tokenizer = tiny_network(kind).double(), tiny_tokenizer("<begin>")
    examples = examples_of(tmp_path, "nwgi7")
    found = generate(network, tokenizer, examples, batch_tokens=batch_tokens)
    longest = max(len(tokenizer.encode(choice)) - 1 for choice in examples[0].choices)
    for example, prediction in zip(examples, found, strict=True):
        tokens = tokenizer.encode(example.prefix + example.prompts[0])
        start = len(tokens)
        with torch.no_grad():
            while len(tokens) < start + longest + 6 and tokens[-1] != tokenizer.eos_token_id:
                tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert prediction.answer == tokenizer.decode(tokens[start:], skip_special_tokens=True)
        assert prediction.choice == read_label(prediction.answer, example.choices)
        assert not prediction.is_cut


def test_an_end_token_ends_an_answer(tmp_path: Path) -> None:
    network, tokenizer = tiny_network("llama"), tiny_tokenizer()
    examples = examples_of(tmp_path, "fpb")
    assert all(prediction.answer for prediction in generate(network, tokenizer, examples))
    prompt = tokenizer.encode(examples[0].prefix + examples[0].prompts[0])
    with torch.no_grad():
        hidden = network.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
        network.lm_head.weight[tokenizer.eos_token_id] = 99 * hidden
    ended = generate(network, tokenizer, examples)
    assert (ended[0].answer, ended[0].choice) == ("", None)


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_a_stop_text_ends_an_answer_and_the_batch(
    batch_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, tokenizer = tiny_network("llama").double(), tiny_tokenizer()
    examples = examples_of(tmp_path, "fpb")
    whole = write_answers(network, tokenizer, examples, 24, batch_tokens=batch_tokens)
    steps: list[int] = []

    def counted(*given: Any) -> Any:
        steps.append(1)
        return decode_step(*given)

    monkeypatch.setattr(decoding, "decode_step", counted)
    stop = whole[0].answer[6:8]
    found = write_answers(
        network, tokenizer, examples, 24, stop=["@@@", stop], batch_tokens=batch_tokens
    )
    for ended, one in zip(found, whole, strict=True):
        assert ended.answer == before_stop(one.answer, ["@@@", stop])
        assert ended.choice is None
    assert stop not in found[0].answer
    assert len(found[0].answer) <= 6
    num_steps = len(steps)
    steps.clear()
    write_answers(network, tokenizer, examples[:1], 24, stop=[stop], batch_tokens=batch_tokens)
    assert len(steps) < 23, "nothing is written after the stop text"
    assert num_steps <= 23 * len(examples)


def test_nothing_in_nothing_out() -> None:
    assert generate(tiny_network("gpt2"), tiny_tokenizer(), []) == []


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" positive", " positive"),
        ("It is NEUTRAL, not negative.", " neutral"),
        ("Mildly negative", " mildly negative"),
        ("positively", None),
        ("unpositive neutral", " neutral"),
        ("", None),
        ("I cannot say", None),
    ],
)
def test_the_first_label_that_is_a_word_of_its_own_is_read(answer: str, label: str | None) -> None:
    found = read_label(answer, _LABELS)
    assert (None if found is None else _LABELS[found]) == label


@given(before=st.text("ab ,.\n", max_size=9), label=st.sampled_from(_LABELS))
def test_a_label_after_any_words_is_read(before: str, label: str) -> None:
    assert read_label(f"{before} {label}.", _LABELS) == _LABELS.index(label)
