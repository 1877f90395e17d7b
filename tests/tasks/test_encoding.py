import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fingpt_lightning import tasks
from fingpt_lightning.data.instruction_rows import encode_rows
from fingpt_lightning.models.formats.tokenizer import read_tokenizer
from fingpt_lightning.tasks import Example, find_task, task_names
from fingpt_lightning.tasks.encoding import (
    EncodedExample,
    TooLong,
    encode_examples,
    encode_prompts,
    length_remarks,
)
from tests.evaluation.tiny_language import metaspace_tokenizer, tiny_tokenizer
from tests.tasks.sample_rows import ROWS, examples, only_example

_ANY_LENGTH = 10**6


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    return metaspace_tokenizer() if name == "metaspace" else tiny_tokenizer("<begin>")


def _examples(name: str) -> list[Example]:
    """Examples of a task that differ in all their texts, more than a task has samples."""
    found = [example for row in ROWS[name] for example in examples(name, row)]
    made = [example for example in found if example is not None and not example.turns]
    others = [
        example._replace(prompts=tuple(f"{start} {prompt}" for prompt in example.prompts), row=2)
        for example in made
        for start in ("Gold", "Öl,", "2 %", "\n\n-", "香", "it's")
    ]
    return made + others


def _own(encoded: list[EncodedExample | None]) -> list[EncodedExample]:
    assert None not in encoded
    return [row for row in encoded if row is not None]


def _check_all(tokenizer: PreTrainedTokenizerFast, rows: list[Example]) -> None:
    end = (int(tokenizer.eos_token_id),)
    found = _own(encode_examples(tokenizer, rows, _ANY_LENGTH))
    trained_on = encode_rows(tokenizer, rows, _ANY_LENGTH)
    assert trained_on.num_cut == 0
    for example, row, trained in zip(rows, found, trained_on.kept, strict=True):
        assert not row.is_cut
        for index, (choice, text) in enumerate(zip(example.choices, row.texts, strict=True)):
            prompt = example.prefix + example.prompts[index if len(example.prompts) > 1 else 0]
            assert list(text.tokens) == tokenizer.encode(prompt + choice)
            assert list(text.tokens[: text.first_scored]) == tokenizer.encode(prompt)
        assert example.gold is not None
        right = row.texts[example.gold]
        assert trained.tokens == right.tokens + end
        assert trained.num_context == right.first_scored


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
@pytest.mark.parametrize("name", task_names())
def test_training_and_evaluation_have_the_tokens_of_the_joined_text(
    name: str, tokenizer: str
) -> None:
    _check_all(_tokenizer(tokenizer), _examples(name))


def test_they_do_with_the_tokenizer_of_gpt2(shared_data: Path) -> None:
    tokenizer = read_tokenizer(shared_data / "tokenizers" / "gpt2")
    for name in task_names():
        _check_all(tokenizer, _examples(name))


_LABELS = ("negative", "neutral", "ative", "e", " positive", "\nrose")
_ENDS = st.text("negativrou \n.", max_size=6)


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
@given(ends=st.lists(_ENDS, min_size=1, max_size=4))
def test_answers_that_merge_with_their_prompts_are_split_before_the_merged_token(
    tokenizer: str, ends: list[str]
) -> None:
    tokens_of = _tokenizer(tokenizer).encode
    prompts = [f"Say, and{end}" for end in ends]
    # Rows that are alike come first: a look at them alone tells nothing about the others.
    rows = [
        Example("", (prompt,), _LABELS, 1, number, "")
        for number, prompt in enumerate(["Answer:"] * 20 + prompts)
    ]
    found = _own(encode_examples(_tokenizer(tokenizer), rows, _ANY_LENGTH))
    trained_on = encode_rows(_tokenizer(tokenizer), rows, _ANY_LENGTH).kept
    for example, row, trained in zip(rows, found, trained_on, strict=True):
        (prompt,) = example.prompts
        whole = [tokens_of(prompt + choice) for choice in _LABELS]
        assert [list(text.tokens) for text in row.texts] == whole
        (first,) = {text.first_scored for text in row.texts}
        contexts = [tokens[: first + 1] for tokens in (tokens_of(prompt), *whole)]
        assert len({tuple(context[:first]) for context in contexts}) == 1
        assert first == len(tokens_of(prompt)) or len(set(map(tuple, contexts))) > 1
        assert trained.tokens[:-1] == row.texts[1].tokens
        assert first <= trained.num_context < len(trained.tokens) - 1
        own = tokens_of(prompt)[: trained.num_context]
        assert own == list(trained.tokens[: trained.num_context])


def test_an_answer_without_a_token_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="row 8: the tokenizer has no token for the answer ''"):
        encode_examples(tokenizer, [Example("", ("Answer:",), ("",), 0, 8, "")], 99)


def test_an_empty_prompt_begins_with_the_end_token() -> None:
    example = Example("", ("",), (" Foo",), 0, 1, "")
    (row,) = _own(encode_examples(tiny_tokenizer(), [example], 40))
    assert row.texts[0].tokens[0] == 0
    assert row.texts[0].first_scored == 1


def test_prompts_alone_have_no_answer() -> None:
    tokenizer = _tokenizer("byte-level")
    example = Example("", ("and neg",), ("ative",), 0, 1, "")
    (row,) = _own(encode_prompts(tokenizer, [example], 99, 5))
    assert row.texts == ((tuple(tokenizer.encode("and neg")), len(tokenizer.encode("and neg"))),)


def _decoded(tokens: tuple[int, ...], name: str = "byte-level") -> str:
    text = _tokenizer(name).decode(list(tokens), skip_special_tokens=False)
    assert isinstance(text, str)
    for special in ("<begin>", "<end>", "<s>", "</s>"):
        text = text.replace(special, "")
    return text.removeprefix(" ")


_TEXT = " ".join(f"word{number}" for number in range(60))


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
def test_a_long_text_loses_its_end_and_no_other_word(tokenizer: str) -> None:
    short, long = (only_example("fpb", {"text": x, "label": "neutral"}) for x in ("Foo", _TEXT))
    kept, cut = _own(encode_examples(_tokenizer(tokenizer), [short, long], 250))
    assert (kept.is_cut, cut.is_cut) == (False, True)
    assert max(len(own.tokens) for own in cut.texts) - 1 == 250
    for choice, own in zip(long.choices, cut.texts, strict=True):
        written = _decoded(own.tokens, tokenizer)
        before, after = long.prefix + "Input: ", "\nAnswer:" + choice
        assert written.startswith(before)
        assert written.endswith(after)
        assert _TEXT.startswith(written.removeprefix(before).removesuffix(after))


def test_where_the_text_ends_the_prompt_its_beginning_goes() -> None:
    example = only_example("lambada", {"text": f"{_TEXT} Foo"})
    (row,) = _own(encode_examples(_tokenizer("byte-level"), [example], 40))
    assert row.is_cut
    assert len(row.texts[0].tokens) - 1 == 40
    assert row.texts[0].tokens[0] == 1
    assert f"{_TEXT} Foo".endswith(_decoded(row.texts[0].tokens))


_HOUSEHOLD = "word1 Name the wares of the mill.\n### Response:\nSo."


@pytest.mark.parametrize("tokenizer", ["byte-level", "metaspace"])
@given(num_words=st.integers(0, 60), max_length=st.integers(2, 900))
def test_an_instruction_loses_tokens_of_its_input_alone(
    tokenizer: str, num_words: int, max_length: int
) -> None:
    # The input begins as the instruction does, and is repeated in it.
    text = " ".join(["word1"] * num_words)
    fields = {"instruction": _HOUSEHOLD, "input": text, "output": "Rose."}
    example = only_example("alpaca", fields)
    whole = encode_rows(_tokenizer(tokenizer), [example], _ANY_LENGTH).kept[0]
    (row,) = encode_rows(_tokenizer(tokenizer), [example], max_length).rows
    if row is None:  # instruction and answer by themselves are too long
        bare = only_example("alpaca", fields | {"input": "word1" if text else ""})
        assert len(encode_rows(_tokenizer(tokenizer), [bare], 9999).kept[0].tokens) > max_length
        return
    assert len(row.tokens) - 1 == min(max_length, len(whole.tokens) - 1)
    before, _, after = _decoded(whole.tokens, tokenizer).partition(f"\n{text}\n\n### Response:\nR")
    written = _decoded(row.tokens, tokenizer)
    assert _HOUSEHOLD in written
    assert written.startswith(before)
    assert written.endswith(after)
    kept = written.removeprefix(before).removesuffix("\n\n### Response:\nRose.").strip()
    assert text.startswith(kept)


@pytest.mark.parametrize("too_long", TooLong)
def test_a_row_that_is_too_long_is_cut_left_out_or_an_error(too_long: TooLong) -> None:
    texts = ("Foo", _TEXT, "Bar")
    rows = [only_example("fpb", {"text": text, "label": "neutral"}) for text in texts]
    rows[1] = rows[1]._replace(row=77)
    if too_long is TooLong.ERROR:
        with pytest.raises(ValueError, match=r"^row 77: \d+ tokens, which are more than 250; "):
            encode_examples(tiny_tokenizer(), rows, 250, too_long=too_long)
        return
    first, middle, last = encode_examples(tiny_tokenizer(), rows, 250, too_long=too_long)
    assert first is not None
    assert last is not None
    assert not first.is_cut
    assert (middle is None) == (too_long is TooLong.DROP)
    assert middle is None or middle.is_cut


def test_a_row_whose_text_is_too_short_is_left_out() -> None:
    rows = [only_example("fpb", {"text": "Foo", "label": "neutral"})] * 2
    assert encode_examples(tiny_tokenizer(), rows, 20) == [None, None]
    assert encode_prompts(tiny_tokenizer(), rows, 20, 3) == [None, None]


@pytest.mark.parametrize(
    ("name", "row", "kept"),
    [
        ("boolq", {"passage": _TEXT, "question": "is it", "answer": True}, "Question: is it?"),
        ("boolq", {"passage": "It.", "question": _TEXT, "answer": True}, None),
        ("fin_ner_types", {"tokens": ["Foo", *_TEXT.split()], "tags": ["I-ORG"] + ["O"] * 60},
         "'Foo'"),
        ("winogrande", {"sentence": f"{_TEXT} _ fell.", "option1": "Foo", "option2": "Corp",
                        "answer": "1"}, "Foo fell."),
    ],
)  # fmt: skip
def test_what_is_asked_about_a_text_is_never_cut(
    name: str, row: dict[str, object], kept: str | None
) -> None:
    (found,) = encode_examples(_tokenizer("byte-level"), [only_example(name, row)], 200)
    assert (found is None) == (kept is None)
    if found is not None and kept is not None:
        assert found.is_cut
        assert kept in _decoded(found.texts[0].tokens)


@given(st.integers(20, 60))
def test_no_character_is_cut_in_two(max_length: int) -> None:
    for name, text in (("fpb", "香港 " * 40), ("lambada", "香港 " * 40 + "Foo")):
        label = {"label": "neutral"} if name == "fpb" else {}
        (row,) = encode_examples(
            _tokenizer("byte-level"), [only_example(name, {"text": text, **label})], max_length + 99
        )
        assert row is not None
        assert row.is_cut
        assert "\N{REPLACEMENT CHARACTER}" not in _decoded(row.texts[0].tokens)


@pytest.mark.parametrize("text", ["a" * 200_000, "ab " * 66_667])
def test_a_long_text_of_repeats_is_cut_at_once(text: str) -> None:
    # The text of this task's tables has the passage after the question.
    row = only_example("boolq", {"passage": f"{text}.", "question": "is it", "answer": True})
    tokenizer = tiny_tokenizer()
    start_s = time.process_time()
    (found,) = encode_examples(tokenizer, [row], 300)
    assert time.process_time() - start_s < 3
    assert found is not None
    assert found.is_cut


def test_remarks_name_what_was_cut_and_what_was_left_out() -> None:
    assert length_remarks("fpb", 9, 0, 0, 512) == []
    assert length_remarks("fpb", 4102, 3, 1000, 1024) == [
        "fpb: 3 of 4,102 rows were cut to 1,024 tokens",
        "fpb: 1,000 of 4,102 rows do not fit 1,024 tokens and were left out",
    ]


def test_the_field_that_is_shortened_is_one_of_the_prompts(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    text = (Path(tasks.__file__).parent / "boolq.yaml").read_text()
    own.write_text(text.replace("shorten: passage", "shorten: pasage"))
    with pytest.raises(ValueError, match="shorten: no template has the field 'pasage'; did you"):
        find_task(own)
