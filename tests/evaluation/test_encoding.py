from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.evaluation.encoding import encode_rows
from fingpt_lightning.tasks import Example, find_task
from tests.evaluation.tiny_language import examples_of, tiny_tokenizer


@pytest.mark.parametrize("name", ["fpb", "nwgi7", "piqa", "winogrande", "lambada", "headline"])
def test_tokens_are_those_of_the_joined_text(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("<begin>")
    examples = examples_of(tmp_path, name)
    # More rows than are looked at before answers are taken to be alike.
    rows = encode_rows(tokenizer, examples * 9, 10_000)
    assert len(rows) > 16
    for example, row in zip(examples * 9, rows, strict=True):
        assert not row.is_cut
        assert len(row.texts) == len(example.choices)
        for index, text in enumerate(row.texts):
            prompt = example.prefix + example.prompts[index if len(example.prompts) > 1 else 0]
            assert list(text.tokens) == tokenizer.encode(prompt + example.choices[index])
            assert list(text.tokens[: text.first_scored]) == tokenizer.encode(prompt)
            assert text.tokens[0] == 1


def test_an_answer_that_is_merged_into_its_prompt_is_an_error() -> None:
    examples = [
        Example("", (prompt,), (" negative", "ative"), 0, row, "")
        for row, prompt in enumerate(("Answer:", "and neg"))
    ]
    with pytest.raises(ValueError, match="row 1: the tokenizer merges the answer 'ative'"):
        encode_rows(tiny_tokenizer(), examples, 999)


def _decoded(tokenizer: PreTrainedTokenizerFast, tokens: tuple[int, ...]) -> str:
    (text,) = tokenizer.batch_decode([list(tokens)], skip_special_tokens=True)
    return text


def test_a_long_text_loses_its_end_and_no_other_word(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("<begin>")
    text = " ".join(f"word{number}" for number in range(60))
    (short,) = examples_of(tmp_path, "fpb")[:1]
    prompt = find_task("fpb").templates[0].render({"text": text})
    long = short._replace(prompts=(prompt,), text=text)
    kept, cut = encode_rows(tokenizer, [short, long], 150)
    assert (kept.is_cut, cut.is_cut) == (False, True)
    assert max(len(own.tokens) for own in cut.texts) - 1 == 150
    for choice, own in zip(long.choices, cut.texts, strict=True):
        written = _decoded(tokenizer, own.tokens)
        before, after = long.prefix + "Input: ", "\nAnswer:" + choice
        assert written.startswith(before)
        assert written.endswith(after)
        assert text.startswith(written.removeprefix(before).removesuffix(after))


def test_where_the_text_ends_the_prompt_its_beginning_goes() -> None:
    tokenizer = tiny_tokenizer("<begin>")
    text = " ".join(f"word{number}" for number in range(60))
    (row,) = encode_rows(tokenizer, [Example("", (text,), (" Foo",), 0, 1, text + " Foo")], 40)
    assert row.is_cut
    assert len(row.texts[0].tokens) - 1 == 40
    assert row.texts[0].tokens[0] == 1
    written = _decoded(tokenizer, row.texts[0].tokens)
    assert (text + " Foo").endswith(written)


def test_a_prompt_that_is_too_long_without_its_text_is_an_error(tmp_path: Path) -> None:
    examples = examples_of(tmp_path, "fpb")
    with pytest.raises(ValueError, match="row 1: instruction and answer leave no room"):
        encode_rows(tiny_tokenizer(), examples, 20)


def test_an_empty_prompt_begins_with_the_end_token() -> None:
    (row,) = encode_rows(tiny_tokenizer(), [Example("", ("",), (" Foo",), 0, 1, "")], 40)
    assert row.texts[0].tokens[0] == 0
    assert row.texts[0].first_scored == 1
