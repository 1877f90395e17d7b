import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from fingpt_lightning import tasks
from fingpt_lightning.tasks import find_task, task_names
from fingpt_lightning.tasks.examples import Example, Turn
from fingpt_lightning.tasks.references import tagged_spans
from tests.tasks.sample_rows import (
    HEADLINE_ANSWERS,
    ROWS,
    SENTENCE,
    TOKENS,
    examples,
    only_example,
)

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[str, Any] = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama3": pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
}


def test_there_is_a_sample_of_every_shape_of_every_task() -> None:
    assert sorted(ROWS) == task_names()
    for name, rows in ROWS.items():
        for shape, row in zip(find_task(name).shapes, rows, strict=True):
            parts: Any = row[shape.each] if shape.each else [{}]
            known = {*row, *parts[0]}
            assert {column.split(".")[0] for column in shape.columns} <= known, name


@pytest.mark.parametrize("name", [name for name in task_names() if name != "alpaca"])
def test_all_shapes_of_a_task_give_equal_examples(name: str) -> None:
    first, *others = [examples(name, row) for row in ROWS[name]]
    assert first
    assert None not in first
    # A row of instructions is one question, where a headline or a sentence may have several.
    assert all(other in (first, first[:1]) for other in others)


@pytest.mark.parametrize("pre_tokenizer", _PRE_TOKENIZERS)
@pytest.mark.parametrize("name", task_names())
def test_the_prefix_and_the_prompt_end_where_tokenizers_split(
    name: str, pre_tokenizer: str
) -> None:
    for example in examples(name, ROWS[name][0]):
        assert example is not None
        for index, choice in enumerate(example.choices):
            prompt = example.prompts[index % len(example.prompts)]
            pieces = _PRE_TOKENIZERS[pre_tokenizer].pre_tokenize_str(
                example.prefix + prompt + choice
            )
            starts = {start for _, (start, _) in pieces}
            assert len(example.prefix) in starts
            assert len(example.prefix + prompt) in starts


def test_fpb_speaks_fingpts_words() -> None:
    assert only_example("fpb", ROWS["fpb"][0]) == Example(
        prefix="Instruction: What is the sentiment of this news? "
        "Please choose an answer from {negative/neutral/positive}.\n",
        prompts=(f"Input: {SENTENCE}\nAnswer:",),
        choices=(" negative", " neutral", " positive"),
        gold=2,
        row=1,
        text=SENTENCE,
        spans=((7, 7 + len(SENTENCE)),),
    )


@pytest.mark.parametrize(
    ("given_label", "gold"),
    [(0, 0), (1, 2), (2, 1), ("bearish", 0), ("Bullish", 2), ("neutral", 1), ("1", 2)],
)
def test_tfns_ids_are_bearish_bullish_neutral(given_label: int | str, gold: int) -> None:
    assert only_example("tfns", {"text": "x", "label": given_label}).gold == gold


@given(score=st.floats(-1, 1))
def test_fiqa_labels_follow_the_score(score: float) -> None:
    expected = 0 if score < -0.1 else 1 if score < 0.1 else 2
    row = {"text": "x", "kind": "headline", "score": score}
    assert only_example("fiqa_sa", row).gold == expected


def test_fiqa_bounds_belong_to_the_label_above() -> None:
    for score, gold in [(-0.1, 1), (math.nextafter(-0.1, -1), 0), (0.1, 2)]:
        row = {"text": "x", "kind": "headline", "score": score}
        assert only_example("fiqa_sa", row).gold == gold


def test_fiqa_asks_about_tweets_and_news() -> None:
    row = {"text": "x", "score": 0.5}
    assert only_example("fiqa_sa", row | {"kind": "post"}).prompts[0].startswith(" tweet? Please")
    assert only_example("fiqa_sa", row | {"kind": "headline"}).prompts[0].startswith(" news? ")


def test_nwgi_makes_mild_grades_neutral_and_nwgi7_keeps_them() -> None:
    row = {"text": "x", "label7": "mildly negative"}
    assert only_example("nwgi", row).gold == 1
    seven = only_example("nwgi7", row)
    assert seven.gold is not None
    assert seven.choices[seven.gold] == " mildly negative"
    assert len(seven.choices) == 7
    assert find_task("nwgi7").folder == "nwgi"


def test_a_headline_becomes_six_questions() -> None:
    made = [example for example in examples("headline", ROWS["headline"][0]) if example]
    assert [example.gold for example in made] == list(HEADLINE_ANSWERS.values())
    assert len({example.prompts for example in made}) == len({e.text for e in made}) == 6
    assert made[0].prefix + made[0].prompts[0] + made[0].choices[1] == (
        "Instruction: Does the news headline talk about price going up? Please choose an answer "
        f"from {{Yes/No}}.\nInput: {SENTENCE}\nAnswer: Yes"
    )


def test_entities_become_questions_and_miscellaneous_ones_none() -> None:
    made = [example for example in examples("fin_ner_types", ROWS["fin_ner_types"][0]) if example]
    assert [example.gold for example in made] == [1, 0]
    assert made[0].prefix + made[0].prompts[0] + made[0].choices[1] == (
        "Instruction: What is the entity type of 'Silicon Valley Bank' in the input sentence.\n"
        f"Options: person, location, organization\nInput: {' '.join(TOKENS)}\nAnswer: organization"
    )


@given(tags=st.lists(st.sampled_from(["O", "I-PER", "B-PER", "I-ORG", "B-ORG"]), max_size=9))
def test_spans_hold_every_tagged_token_once_and_end_where_the_tag_changes(tags: list[str]) -> None:
    tokens = [str(place) for place in range(len(tags))]
    spans = tagged_spans(tokens, tags)
    covered = [token for entity, _ in spans for token in entity.split()]
    assert covered == [token for token, tag in zip(tokens, tags, strict=True) if tag != "O"]
    num_joints = sum(
        tag != "O" and tag[2:] == before[2:] and not tag.startswith("B")
        for before, tag in pairwise(tags)
    )
    assert len(spans) == len(covered) - num_joints
    for entity, tag in spans:
        assert {tags[int(token)][2:] for token in entity.split()} == {tag[2:]}


def test_general_prompts_are_those_of_lm_evaluation_harness() -> None:
    whole = {
        name: (example.prefix + example.prompts[0] + example.choices[0])
        for name in ("arc_easy", "boolq", "openbookqa", "piqa", "winogrande", "lambada")
        if (example := only_example(name, ROWS[name][0]))
    }
    assert whole == {
        "arc_easy": "Question: What is 1 kg?\nAnswer: heat",
        "boolq": "Ice\nmelts.\nQuestion: is it?\nAnswer: no",
        "openbookqa": "A stove gives heat",
        "piqa": "Question: dry paint\nAnswer: wait",
        "winogrande": "Al paid Bo so Al was rich.",
        "lambada": "He paid the bank its interest",
    }


def test_winogrande_scores_one_continuation_after_two_contexts() -> None:
    example = only_example("winogrande", ROWS["winogrande"][1])
    assert example.prompts == ("Al paid Bo so Al", "Al paid Bo so Bo")
    assert example.choices == (" was rich.", " was rich.")
    assert example.gold == 1


def test_lambada_scores_the_last_word() -> None:
    example = only_example("lambada", ROWS["lambada"][0])
    assert (example.prompts, example.choices, example.gold) == (
        ("He paid the bank its",),
        (" interest",),
        0,
    )


def test_hellaswag_is_cleaned() -> None:
    example = only_example("hellaswag", ROWS["hellaswag"][0])
    assert example.prompts == ("Cooking: How to fry an egg. Heat the pan. Then a cook",)
    assert example.choices == (" cracks it.", " sings. ", " runs.", " sleeps.")


def test_instructions_with_and_without_input_have_alpacas_two_prompts() -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    start = "Below is an instruction that describes a task"
    end = "appropriately completes the request.\n\n### Instruction:\nAdd."
    example = only_example("alpaca", row)
    assert example.prefix + example.prompts[0] + example.choices[0] == (
        f"{start}, paired with an input that provides further context. Write a response that {end}"
        "\n\n### Input:\n1 and 2\n\n### Response:\n3"
    )
    example = only_example("alpaca", row | {"input": " "})
    assert example.prefix + example.prompts[0] + example.choices[0] == (
        f"{start}. Write a response that {end}\n\n### Response:\n3"
    )
    assert examples("alpaca", row | {"output": " "}) == [None]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip))
def test_a_text_stands_in_its_prompt_as_it_is_but_for_blanks_around_it(text: str) -> None:
    example = only_example("fpb", {"text": text, "label": "neutral"})
    assert example.text == text.strip()
    assert example.prompts == (f"Input: {text.strip()}\nAnswer:",)


def test_braces_in_a_text_are_no_fields() -> None:
    assert only_example("fpb", {"text": "{label}", "label": "neutral"}).prompts == (
        "Input: {label}\nAnswer:",
    )


@pytest.mark.parametrize("gold", [None, "", -1, "-1"])
def test_a_hidden_answer_is_none(gold: object) -> None:
    row = {"goal": "x", "sol1": "a", "sol2": "b", "label": gold}
    assert only_example("piqa", row).gold is None


def test_a_hidden_label_is_none() -> None:
    for label in (None, "", -1, "-1"):
        assert only_example("fpb", {"text": "x", "label": label}).gold is None
    assert only_example("fiqa_sa", {"text": "x", "kind": "post", "score": None}).gold is None


@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_empty_text_gives_no_example(text: str | None) -> None:
    assert examples("fpb", {"text": text, "label": "neutral"}) == [None]


_CHOICES = {"query": "Question: x", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("fpb", {"text": "x", "label": "postive"}, "label 'postive' is none of negative, neutral, "
         "positive; did you mean positive?"),
        ("fpb", {"text": "x", "lable": "neutral"}, "no field 'label'; did you mean lable?"),
        ("fpb", {"headline": "x", "mood": 1}, "the fields headline, mood are of none of the layouts"
         " text, label; sentence, label; context, target; instruction, input, output"),
        ("fpb", {"text": "x", "mood": 1}, "no field 'label'; the fields are text, mood"),
        ("fpb", {}, "no field 'text'; the fields are none"),
        ("fpb", {"text": {"a": 1}, "label": 1}, "field 'text' holds an object, not a text"),
        ("fpb", {"text": "\ud83d", "label": 1}, "'text': half a surrogate pair at character 0"),
        ("fpb", {"context": "Input: x", "target": "neutral"}, "field 'context' is not of the form"),
        ("fiqa_sa", {"text": "x", "kind": "blog", "score": 0}, "kind 'blog' is none of headline,"),
        ("fiqa_sa", {"text": "x", "kind": "post", "score": "high"}, "score 'high' is not a number"),
        ("fiqa_sa", {"text": "x", "kind": "post", "score": math.nan}, "'score' holds nan, which"),
        ("headline", {"text": "x", **HEADLINE_ANSWERS, "price_up": 2}, "label '2' is none of No,"),
        ("fin_ner_types", {"tokens": ["a"], "tags": []}, "tokens and tags must be lists of one l"),
        ("fin_ner_types", {"tokens": ["a"], "tags": ["I-DATE"]}, "label 'I-DATE' is none of pers"),
        ("fin_ner", {"tokens": ["a"], "tags": []}, "tokens and tags must be lists of one length"),
        ("fin_ner", {"tokens": "a", "tags": ["O"]}, "tokens and tags must be lists of one length"),
        ("fin_ner", {"tokens": ["a"], "tags": ["I-PERS"]}, "'I-PERS' is none of o, b-per, i-per"),
        ("fin_ner", {"text": "a", "answer": "Ann"}, "answer 'Ann' is not a name, a comma and one"),
        ("tatqa", {**ROWS["tatqa"][0], "scale": "milion"}, "scale 'milion' is none of thousand, m"),
        ("tatqa", {**ROWS["tatqa"][0], "table": ["a"]}, "'table' is not a list of rows of cells"),
        ("tatqa", {**ROWS["tatqa"][0], "table": 3}, "field 'table' holds a number, not a list"),
        ("tatqa", {**ROWS["tatqa"][0], "table": [[{}]]}, "field 'table': an object is not a text"),
        ("tatqa", {**ROWS["tatqa"][1], "questions": [
            {"question": "x", "answer": 1, "scale": "", "answer_type": "count"}, 3]},
         "field 'questions' is not a list of objects"),
        ("finqa", {**ROWS["finqa"][0], "qa": {"question": "x", "exe_ans": "up"}},
         "answer 'up' is neither a number nor yes or no"),
        ("ectsum", {"text": "a\nb", "label": [1]}, "'label' is not a list of 0 or 1 for each of t"),
        ("ectsum", {"text": "a\nb", "label": 1}, "field 'label' is not a list"),
        ("edtsum", {"text": "a", "answer": ["b"]}, "answer ('b',) is a list, not one text"),
        ("piqa", _CHOICES | {"gold": 2}, "gold '2' is none of 0, 1"),
        ("piqa", _CHOICES | {"choices": "ab"}, "choices 'ab' is not a list of two texts or more"),
        ("openbookqa", {"question_stem": "x", "choices": {"text": ["a", "b"], "label": ["A"]},
                        "answerKey": "A"}, "names ('A',) are not one for each of the 2 choices"),
        ("openbookqa", {"question_stem": "x", "choices": ["a", "b"], "answerKey": "A"},
         "no field 'choices.text'; did you mean choices?"),
        ("lambada", {"text": "word"}, "'word' is a single word"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_refused_in_one_line(
    task: str, row: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        examples(task, row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (["a", "b"], "a list"), (("a", "b"), "a list"), ({"a": 1}, "an object"), (True, "true"),
        (b"a", "bytes"), (math.nan, "nan, which"), (math.inf, "inf, which"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, "output"),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "3"}, "input"),
        ("tfns", {"text": "x", "label": 1}, "text"),
        ("tfns", {"text": "x", "label": 1}, "label"),
        ("headline", ROWS["headline"][0], "price_up"),
        ("fpb", {"context": "x", "target": "positive"}, "context"),
        ("fiqa_sa", {"text": "x", "kind": "post", "score": 0.1}, "score"),
        ("piqa", {"goal": "x", "sol1": "wait", "sol2": "run", "label": 0}, "sol1"),
        ("piqa", {"goal": "x", "sol1": "wait", "sol2": "run", "label": 0}, "label"),
    ],
)
def test_what_is_no_text_is_refused_by_its_field_and_type(
    name: str, row: dict[str, Any], field: str, value: object, kind: str
) -> None:
    with pytest.raises(ValueError, match=rf"field '{field}' holds {kind}"):
        examples(name, {**row, field: value})


@pytest.mark.parametrize("value", [[["a"], "b"], [True, "b"], [math.nan, "b"]])
def test_what_is_no_text_is_refused_within_lists_too(value: list[object]) -> None:
    with pytest.raises(ValueError, match="field 'choices' holds"):
        examples("piqa", {"query": "Question: x", "choices": value, "gold": 0})


def test_a_truth_value_is_read_where_the_task_translates_it() -> None:
    row = {"passage": "Ice.", "question": "is it"}
    assert [only_example("boolq", {**row, "answer": x}).gold for x in (True, False)] == [1, 0]
    with pytest.raises(ValueError, match="field 'label' holds true"):
        examples("tfns", {"text": "x", "label": True})


def test_a_missing_value_is_an_empty_text_or_no_label() -> None:
    assert only_example("tfns", {"text": "x", "label": None}).gold is None
    assert examples("tfns", {"text": None, "label": 1}) == [None]


@pytest.mark.parametrize(
    ("name", "row", "field"),
    [
        ("tfns", {"text": "x"}, "label"),
        ("fpb", {"sentence": "x"}, "label"),
        ("piqa", {"goal": "x", "sol1": "wait", "sol2": "run"}, "label"),
        ("arc_easy", {"question": "x", "choices": {"text": ["a", "b"], "label": ["1", "2"]}},
         "answerKey"),
    ],
)  # fmt: skip
def test_a_whole_number_is_one_label_as_a_float_too(
    name: str, row: dict[str, Any], field: str
) -> None:
    golds = [only_example(name, {**row, field: x}).gold for x in (1, "1", 1.0, "1.0", "1.")]
    assert golds == [golds[0]] * 5
    assert golds[0] is not None
    with pytest.raises(ValueError, match=r"'1\.5' is none of"):
        examples(name, {**row, field: 1.5})
    assert only_example(name, {**row, field: -1.0}).gold is None


def test_labels_that_are_numbers_are_one_as_floats(tmp_path: Path) -> None:
    file = tmp_path / "stars.yaml"
    text = (Path(tasks.__file__).parent / "fomc.yaml").read_text()
    file.write_text(
        text.replace("[dovish, hawkish, neutral]", '["1", "2.0", "3"]').replace(
            "{0: dovish, 1: hawkish, 2: neutral}", '{"9.0": "3"}'
        )
    )
    for given_label, gold in ((1.0, 0), ("1", 0), (2, 1), ("2.0", 1), (9, 2), (9.0, 2)):
        row = {"sentence": "x", "label": given_label}
        assert only_example(file, row).gold == gold


def test_instructions_are_one_message_and_whole_prompts_stay_as_they_are() -> None:
    alpaca, bare, *chats, context, completion, response, query, question = (
        only_example("alpaca", row) for row in ROWS["alpaca"]
    )
    turns = (Turn("user", "Name a colour."), Turn("assistant", "Red."))
    assert alpaca == bare == question
    assert alpaca.message == ("Name a colour.", None)
    assert len(chats) == 3
    assert all(
        chat == Example("", ("",), ("",), 0, 1, turns[0].content, turns=turns) for chat in chats
    )
    assert context == completion == response == query
    assert (context.prefix, context.prompts, context.choices) == (
        *("", ("Name a colour.",), ("\nRed.",)),
    )
    spaced = only_example("alpaca", {"context": "Up? Answer:", "target": " yes"})
    assert spaced.prompts[0] + spaced.choices[0] == "Up? Answer: yes"


def test_the_input_of_a_message_is_what_may_be_cut_of_it() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert only_example("alpaca", row).message == ("Add.\n\n1 2", (6, 9))


def test_conversations_are_read_in_the_names_of_openai_and_sharegpt() -> None:
    openai = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Up"}, {"text": "?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "nobody answers"},
    ]
    sharegpt = [
        {"from": "human", "value": "Up?"},
        {"from": "gpt", "value": "Yes."},
    ]
    one = only_example("alpaca", {"messages": openai})
    other = only_example("alpaca", {"conversations": sharegpt, "system": "Be brief."})
    assert one == other
    assert [turn.role for turn in one.turns] == ["system", "user", "assistant"]
    assert one.turns[1].content == one.text == "Up?"
    assert examples("alpaca", {"messages": openai[:2]}) == [None]
    assert examples("alpaca", {"messages": []}) == [None]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "usr", "content": "x"}, "messages, turn 1: role 'usr' is not known; did you mean "
         "user?"),
        ({"from": "qqq", "value": "x"}, "turn 1: from 'qqq' is not known; there are system,"),
        ({"role": "user", "text": "x"}, "turn 1: no field 'content'; the fields are role, text"),
        ({"role": "user", "content": None}, "turn 1: 'content' holds nothing, not a text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "turn 1: a part of kind image_url"),
        ({"role": "user", "content": "\ud83d"}, "turn 1, content': half a surrogate pair"),
        ("x", "field 'messages' is not a list of objects"),
    ],
)  # fmt: skip
def test_a_wrong_turn_is_refused_in_one_line(turn: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        examples("alpaca", {"messages": [turn]})


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("fpb", {"messages": []}, "task fpb does not read conversations such as 'messages'; train"),
        ("piqa", {"context": "x", "target": "y"}, "rows of context and target have no choices to "
         "score, which task piqa needs; train on them as task alpaca or by data.train_files"),
        ("winogrande", {"instruction": "x", "input": "", "output": "y"}, "rows of instruction"),
        ("alpaca", {"foo": 1}, "the fields foo are of none of the layouts instruction, input, "),
    ],
)  # fmt: skip
def test_rows_in_a_layout_that_a_task_cannot_score_say_what_to_do(
    task: str, row: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        examples(task, row)


@pytest.mark.parametrize("score", ["-0.374", -0.374])
def test_a_published_fiqa_sentence_has_an_example_for_each_target(score: object) -> None:
    info = [{"target": "Foo", "sentiment_score": score}, {"target": "B", "sentiment_score": "0.5"}]
    row: dict[str, object] = {
        "sentence": "Foo fell, Bar rose",
        "info": info,
        "file": "headline.json",
    }
    made = [example for example in examples("fiqa_sa", row) if example]
    assert [example.gold for example in made] == [0, 2]
    assert {example.prompts[0].split("?")[0] for example in made} == {" news"}
    with pytest.raises(ValueError, match="field 'file' is not of the form"):
        examples("fiqa_sa", row | {"file": "train.json"})
    with pytest.raises(ValueError, match=r"no field 'sentiment_score'|no field 'text'"):
        examples("fiqa_sa", row | {"info": []})
