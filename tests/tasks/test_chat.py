import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fingpt_lightning.data.batch import IGNORED_LABEL
from fingpt_lightning.data.instruction_batches import Batching, Collate
from fingpt_lightning.data.instruction_rows import InstructionRow, InstructionRows, encode_rows
from fingpt_lightning.models.formats.tokenizer import (
    chat_template_in_use,
    read_tokenizer,
    use_chat_template,
    uses_chat_template,
)
from fingpt_lightning.tasks import Example, find_task, task_names
from fingpt_lightning.tasks.chat import choose_chat_template
from fingpt_lightning.tasks.encoding import (
    TooLong,
    encode_conversations,
    encode_examples,
    encode_message,
    encode_prompts,
    end_tokens,
)
from fingpt_lightning.tasks.examples import Shot, Turn
from tests.tasks.chat_templates import (
    BRACKETS,
    CHATML,
    FORGETFUL,
    MARKED,
    PLAIN,
    TEMPLATES,
    chat_tokenizer,
)
from tests.tasks.sample_rows import ROWS, examples, only_example

_ANY_LENGTH = 10**6
Messages = list[dict[str, str]]


def _turns(*contents: str, system: bool = False) -> tuple[Turn, ...]:
    """Turns of user and assistant."""
    roles = ("user", "assistant") * len(contents)
    turns = tuple(Turn(role, text) for role, text in zip(roles, contents, strict=False))
    return (Turn("system", "Be brief."), *turns) if system else turns


def _conversation(turns: Sequence[Turn]) -> Example:
    return Example("", ("",), ("",), 0, 5, "", turns=tuple(turns))


def _rendered(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn], asks: bool = False
) -> list[int]:
    messages = [turn._asdict() for turn in turns]
    found: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=asks, return_dict=True
    )
    tokens: list[int] = found["input_ids"]
    return tokens


def _labels(row: InstructionRow) -> list[int | None]:
    """Of each token that is predicted, its id where it counts."""
    data = InstructionRows([row], 0)[0]
    assert data["input_ids"].tolist() == list(row.tokens[:-1])
    return [None if x == IGNORED_LABEL else x for x in data["labels"].tolist()]


def _end(name: str, tokenizer: PreTrainedTokenizerFast) -> int:
    ends = {"trimmed": "<|eot|>", "brackets": "<end>", "plain": None}
    token = ends.get(name, "<|im_end|>")
    return -1 if token is None else int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("task", task_names())
def test_prompt_and_answer_are_the_tokens_that_transformers_renders(task: str, name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    made = [e for row in ROWS[task] for e in examples(task, row) if e is not None and not e.turns]
    assert made
    for example, row in zip(made, encode_rows(tokenizer, made, _ANY_LENGTH).kept, strict=True):
        gold = example.gold or 0
        prompt = example.prompts[gold if len(example.prompts) > 1 else 0]
        asked = example.message[0] if example.message else (example.prefix + prompt).strip()
        turns = _turns(asked, example.choices[gold].strip())
        whole = _rendered(tokenizer, turns)
        end = _end(name, tokenizer)
        whole = whole[: max((i + 1 for i, x in enumerate(whole) if x == end), default=len(whole))]
        assert list(row.tokens) == whole
        before = _rendered(tokenizer, turns[:1], asks=True)
        assert list(row.tokens[: row.num_context]) == before[: row.num_context]
        assert 0 <= len(before) - row.num_context <= (name in ("plain", "brackets"))
        scored = encode_examples(tokenizer, [example], _ANY_LENGTH)[0]
        assert scored is not None
        for choice, text in zip(example.choices, scored.texts, strict=True):
            again = _rendered(tokenizer, [*turns[:1], Turn("assistant", choice.strip())])
            if len(example.prompts) == 1:
                assert list(text.tokens) == again[: len(text.tokens)]
        (asking,) = encode_prompts(
            tokenizer,
            [example._replace(prompts=(prompt,), spans=example.spans[:1])],
            _ANY_LENGTH,
            1,
        )
        assert asking is not None
        assert list(asking.texts[0].tokens) == before


@pytest.mark.parametrize("name", ["chatml", "trimmed", "brackets", "plain"])
@settings(max_examples=30)
@given(
    contents=st.lists(
        st.text("ab .\n<|", min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=3
    ),
    data=st.data(),
)
def test_labels_are_the_assistants_turns_by_incremental_rendering(
    name: str, contents: list[str], data: st.DataObject
) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    system = name != "brackets" and data.draw(st.booleans())
    texts = [text.strip() for content in contents for text in (f"{content}?", content)]
    turns = _turns(*texts, system=system)
    (row,) = encode_rows(tokenizer, [_conversation(turns)], _ANY_LENGTH).kept
    whole = _rendered(tokenizer, turns)
    assert list(row.tokens) == whole[: len(row.tokens)]
    expected: set[int] = set()
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            before = _rendered(tokenizer, turns[:place], asks=True)
            after = _rendered(tokenizer, turns[: place + 1])
            num_equal = next(
                (i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y),
                len(before),
            )
            end = _end(name, tokenizer)
            last = max((i for i, x in enumerate(after) if x == end), default=len(after) - 1)
            expected |= set(range(num_equal, last + 1))
    labelled = {place + 1 for place, label in enumerate(_labels(row)) if label is not None}
    assert labelled == expected


def test_marked_answers_are_those_that_transformers_returns() -> None:
    tokenizer = chat_tokenizer(MARKED)
    turns = _turns("Up?", "Yes.", "Down?", "No, not that.", system=True)
    (row,) = encode_rows(tokenizer, [_conversation(turns)], _ANY_LENGTH).kept
    found: Any = tokenizer.apply_chat_template(
        [turn._asdict() for turn in turns], return_dict=True, return_assistant_tokens_mask=True
    )
    tokens, marks = found["input_ids"], found["assistant_masks"]
    pairs = list(zip(tokens, marks, strict=True))[: len(row.tokens)]
    assert _labels(row) == [x if mark else None for x, mark in pairs[1:]]
    assert not any(marks[len(row.tokens) :])
    assert row.others
    unmarked = encode_rows(chat_tokenizer(CHATML), [_conversation(turns)], _ANY_LENGTH).kept
    assert [x for x in _labels(unmarked[0]) if x] == [x for x in _labels(row) if x]


def test_a_template_that_marks_less_than_a_turn_is_followed() -> None:
    bare = MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
        1,
    )
    assert bare != MARKED
    tokenizer = chat_tokenizer(bare)
    turns = _turns("Up?", "Yes.", "Down?", "No.")
    (row,) = encode_rows(tokenizer, [_conversation(turns)], _ANY_LENGTH).kept
    labelled = [x for x in _labels(row) if x is not None]
    assert tokenizer.decode(labelled) == "Yes.No."


def test_rows_of_several_turns_are_packed_as_they_are_padded() -> None:
    tokenizer = chat_tokenizer(CHATML)
    made = [_conversation(_turns(*["Up?", "Yes."] * number, system=True)) for number in (3, 1, 2)]
    made.append(only_example("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}))
    rows = encode_rows(tokenizer, made, _ANY_LENGTH).kept
    data = InstructionRows(rows, 0)
    items = [data[place] for place in range(len(rows))]
    counts = {}
    for batching in Batching:
        batch = Collate(batching, 0)(list(items))
        labels = batch["labels"]
        counts[batching] = sorted(labels[labels != IGNORED_LABEL].tolist())
    assert counts[Batching.PADDED] == counts[Batching.PACKED] == counts[Batching.SHARED_PREFIX]
    assert len(counts[Batching.PADDED]) == sum(x is not None for row in rows for x in _labels(row))


def test_a_template_that_is_not_prefix_stable_is_refused_by_name() -> None:
    tokenizer = chat_tokenizer(FORGETFUL)
    tokenizer.name_or_path = "models/qwen"
    message = (
        r"^row 5: the chat template of models/qwen renders turn 2 otherwise where others follow,"
    )
    with pytest.raises(ValueError, match=message):
        encode_rows(tokenizer, [_conversation(_turns("a", "b", "c", "d"))], _ANY_LENGTH)
    (row,) = encode_rows(tokenizer, [_conversation(_turns("a", "b"))], _ANY_LENGTH).kept
    assert "<think></think>b" in str(tokenizer.decode(list(row.tokens)))


def test_what_a_template_cannot_render_is_one_line() -> None:
    tokenizer = chat_tokenizer(BRACKETS)
    with pytest.raises(ValueError, match=r"cannot render a conversation \(no system turn\)$"):
        encode_rows(tokenizer, [_conversation(_turns("a", "b", system=True))], _ANY_LENGTH)
    with pytest.raises(ValueError, match=r"^row 5: conversations need a chat template, and none"):
        encode_rows(chat_tokenizer(None), [_conversation(_turns("a", "b"))], _ANY_LENGTH)
    upper = "{% for m in messages %}{{ m['content'] | replace('b', 'c') }}<|im_end|>{% endfor %}"
    made = only_example("fpb", ROWS["fpb"][0])
    with pytest.raises(ValueError, match=r"^row 1: the chat template .* changes the text of a m"):
        encode_rows(chat_tokenizer(upper), [made._replace(prompts=("bb",), spans=())], _ANY_LENGTH)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_conversation_that_is_too_long_keeps_whole_turns_from_its_beginning(
    template: str,
) -> None:
    tokenizer = chat_tokenizer(template)
    example = _conversation(_turns("Up?", "Yes.", "Down?", "No."))
    (whole,) = encode_conversations(tokenizer, [example], _ANY_LENGTH)
    (short,) = encode_conversations(tokenizer, [_conversation(example.turns[:2])], _ANY_LENGTH)
    assert whole is not None
    assert short is not None
    for length in range(1, len(whole.tokens) + 1):
        (found,) = encode_conversations(tokenizer, [example], length)
        if length >= len(whole.tokens) - 1:
            assert found == whole
        elif length >= len(short.tokens) - 1:
            assert found == short._replace(is_cut=True)
        else:
            assert found is None
    fits = len(short.tokens) - 1
    assert encode_conversations(tokenizer, [example], fits, too_long=TooLong.DROP) == [None]
    with pytest.raises(ValueError, match=rf"row 5: {len(whole.tokens) - 1} tokens, which are more"):
        encode_conversations(tokenizer, [example], fits, too_long=TooLong.ERROR)
    assert encode_rows(tokenizer, [example], fits).num_cut == 1


@pytest.mark.parametrize("name", ["chatml", "trimmed", "brackets"])
def test_a_long_text_is_cut_within_its_message(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    long = only_example("alpaca", {"instruction": "Add.", "input": "1 2 " * 50, "output": "3"})
    short = only_example("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"})
    length = len(encode_rows(tokenizer, [short], _ANY_LENGTH).kept[0].tokens) + 5
    (row,) = encode_rows(tokenizer, [long], length).kept
    assert len(row.tokens) - 1 <= length
    text = str(tokenizer.decode(list(row.tokens)))
    (uncut,) = encode_rows(tokenizer, [long], _ANY_LENGTH).kept
    whole = str(tokenizer.decode(list(uncut.tokens)))
    begin, end = whole.index("Add."), whole.rindex(" 2")
    assert text.startswith(whole[: begin + 9])
    assert text.endswith(whole[end + 2 :])


@pytest.mark.parametrize("name", ["chatml", "brackets"])
def test_of_a_task_with_an_instruction_only_the_text_is_cut(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    long = only_example("fpb", {"text": "rose " * 60, "label": "positive"})
    (whole,) = encode_rows(tokenizer, [long], _ANY_LENGTH).kept
    (row,) = encode_rows(tokenizer, [long], len(whole.tokens) - 21).kept
    assert len(row.tokens) == len(whole.tokens) - 20
    text, uncut = (str(tokenizer.decode(list(found.tokens))) for found in (row, whole))
    own = r"Input:[ rose]*"
    assert re.sub(own, "", text) == re.sub(own, "", uncut)


@pytest.mark.parametrize("name", [None, "chatml", "brackets"])
def test_examples_before_a_question_are_turns_or_texts_before_it(name: str | None) -> None:
    tokenizer = chat_tokenizer(None if name is None else TEMPLATES[name])
    example = only_example("fpb", {"text": "Profit rose", "label": "positive"})
    shots = (Shot("Q: Foo fell\nAnswer:", " negative"), Shot("Q: Foo\nAnswer:", " neutral"))
    (row,) = encode_examples(tokenizer, [example._replace(shots=shots)], _ANY_LENGTH)
    assert row is not None
    question = example.prefix + example.prompts[0]
    if name is None:
        before = "Q: Foo fell\nAnswer: negative\n\nQ: Foo\nAnswer: neutral\n\n"
        assert list(row.texts[2].tokens) == tokenizer.encode(f"{before}{question} positive")
    else:
        said = [text.strip() for shot in shots for text in shot]
        turns = _turns(*said, question, "positive")
        whole = _rendered(tokenizer, turns)
        assert list(row.texts[2].tokens) == whole[: len(row.texts[2].tokens)]
        assert len(row.texts[2].tokens) > len(_rendered(tokenizer, turns[:-1], asks=True))


def test_what_ends_an_answer_is_the_end_of_the_turn_too() -> None:
    assert end_tokens(chat_tokenizer(None)) == [0]
    tokenizer = chat_tokenizer(CHATML)
    assert end_tokens(tokenizer) == [0, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert end_tokens(chat_tokenizer(PLAIN)) == [0]


def test_a_prompt_to_go_on_from_is_what_the_user_says() -> None:
    tokenizer = chat_tokenizer(CHATML)
    assert encode_message(tokenizer, "Up?") == _rendered(tokenizer, _turns("Up?"), asks=True)
    plain = chat_tokenizer(None)
    assert encode_message(plain, "Up?") == plain.encode("Up?")


def test_what_is_chosen_is_stored_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(None)
    assert uses_chat_template(tokenizer) is None
    for template in (CHATML, None):
        use_chat_template(tokenizer, template)
        tokenizer.save_pretrained(tmp_path / "a")
        again = read_tokenizer(tmp_path / "a")
        assert uses_chat_template(again) is (template is not None)
        assert chat_template_in_use(again) == template
        other = AutoTokenizer.from_pretrained(tmp_path / "a")
        assert other("Up?")["input_ids"] == tokenizer("Up?")["input_ids"]


def _unset(template: str | None, eos_token: str = "<end>") -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer(None, eos_token)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("model", "template", "eos", "used", "line"),
    [
        (
            "m/tiny-Instruct",
            CHATML,
            "<end>",
            True,
            "own, for tiny-Instruct is an instruct model",
        ),
        ("m/gemma-2b-it/", PLAIN, "<end>", True, "own, for gemma-2b-it is an instruct model"),
        ("m/base", CHATML, "<|im_end|>", True, "for its turns end with <|im_end|>, as the model's"),
        ("m/base", CHATML, "<end>", False, "none, for nothing says that m/base is an instruct mod"),
        ("m/base-with-bits", CHATML, "<end>", False, "none, for nothing says that m/base-with-bi"),
        ("m/base-instruct", None, "<end>", False, None),
    ],
)
def test_auto_takes_the_template_of_an_instruct_model(
    model: str, template: str | None, eos: str, used: bool, line: str | None
) -> None:
    tokenizer = _unset(template, eos)
    found = choose_chat_template(tokenizer, "auto", model)
    assert (found is None) == (line is None)
    assert line is None or line in str(found)
    assert (chat_template_in_use(tokenizer) is not None) is used
    assert choose_chat_template(tokenizer, "none", model) == (
        "chat template: none, as set" if template else None
    )
    assert chat_template_in_use(tokenizer) is None


def test_the_name_of_an_adapters_base_tells_too() -> None:
    tokenizer = _unset(CHATML)
    line = choose_chat_template(tokenizer, "auto", "runs/a/adapter", "models/Foo-7B-Instruct")
    assert "for Foo-7B-Instruct is an instruct model by its name" in str(line)


def test_auto_takes_what_the_model_was_trained_with() -> None:
    tokenizer = _unset(CHATML)
    use_chat_template(tokenizer, None)
    line = choose_chat_template(tokenizer, "auto", "tiny-instruct")
    assert line == "chat template: none, as that tiny-instruct was trained with"
    use_chat_template(tokenizer, MARKED)
    line = choose_chat_template(tokenizer, "auto", "base")
    assert line == "chat template: the one that base was trained with"
    assert chat_template_in_use(tokenizer) == MARKED


def test_a_file_is_taken_or_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer = _unset(None)
    (tmp_path / "chat.jinja").write_text(CHATML)
    file = str(tmp_path / "chat.jinja")
    assert choose_chat_template(tokenizer, file, "base") == f"chat template: {file}"
    assert chat_template_in_use(tokenizer) == CHATML
    for name, text, message in (
        ("a.jinja", "{% for %}", r"a\.jinja: the chat template .* cannot render a conversation \("),
        ("a.jinja", "{{ messages[0]['content'] }}", "does not go on after a question as it asks"),
        ("a.jinja", " \n", "a.jinja is empty"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            choose_chat_template(tokenizer, str(tmp_path / name), "base")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=re.escape("neither auto, none nor a file; the n")):
        choose_chat_template(tokenizer, str(tmp_path / "chta.jinja"), "base")


def test_instructions_are_said_without_alpacas_words() -> None:
    tokenizer = chat_tokenizer(CHATML)
    task = find_task("alpaca")
    assert task.kind == "instructions"
    made = only_example("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"})
    (row,) = encode_rows(tokenizer, [made], _ANY_LENGTH).kept
    assert "user\nAdd.\n\n1 2<|im_end|>" in str(tokenizer.decode(list(row.tokens)))
