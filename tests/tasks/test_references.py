import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.tasks import find_task
from fingpt_lightning.tasks.references import (
    Reference,
    entities_of,
    entity_of,
    is_float,
    items_of,
    list_as_text,
    marked_lines,
    written,
)
from fingpt_lightning.tasks.task import Entities, Marked
from tests.tasks.sample_rows import ROWS, TOKENS, only_example

_ITEM = st.text(st.characters(codec="ascii", exclude_characters=";\r\n"), min_size=1, max_size=9)


@given(st.lists(_ITEM.map(str.strip).filter(bool), max_size=4))
def test_a_list_is_read_as_it_is_written(items: list[str]) -> None:
    if [item.rstrip(".").casefold() for item in items] != ["none"]:
        assert items_of(written(Reference(tuple(items)))) == tuple(items)


@pytest.mark.parametrize(
    ("item", "entity"),
    [
        ("Ann, person", ("Ann", "person")), ("Foo, Inc. , PERSON.", ("Foo, Inc.", "person")),
        ("Ann", None), (", person", None), ("Ann, planet", None), ("", None),
    ],
)  # fmt: skip
def test_an_entity_is_a_name_and_a_known_type(item: str, entity: tuple[str, str] | None) -> None:
    assert entity_of(item, ["person", "place"]) == entity


def test_entities_have_the_words_of_the_task_or_the_tags_own() -> None:
    tags = ["B-PER", "I-PER", "B-PER", "O", "B-GAAP"]
    tokens = ["Ann", "Foo", "Bob", "under", "Rule"]
    types = {"b-per": "person", "i-per": "person", "o": None, "b-gaap": None, "i-gaap": None}
    named = entities_of(Entities("tokens", "tags", types), tokens, tags)
    assert named == ("Ann Foo, person", "Bob, person")
    own = entities_of(Entities("tokens", "tags", {}), tokens, tags)
    assert own == ("Ann Foo, PER", "Bob, PER", "Rule, GAAP")


def test_tables_and_paragraphs_become_texts() -> None:
    table = [["", "2019", None], ["Net\n sales ", 3, 1.5]]
    assert list_as_text("table", table, "table") == " | 2019 | \nNet sales | 3 | 1.5"
    paragraphs = [{"uid": "a", "text": "One. "}, "Two.", None, {"uid": "b"}]
    assert list_as_text("paragraphs", paragraphs, "lines") == "One.\nTwo."
    assert list_as_text("paragraphs", paragraphs, "sentences") == "One. Two."
    assert list_as_text("paragraphs", None, "lines") == ""
    with pytest.raises(ValueError, match="field 'table': true is not a text"):
        list_as_text("table", [[True]], "table")


def test_marked_lines_are_the_summary() -> None:
    marked = Marked("text", "label")
    assert marked_lines(marked, "a \nb\nc", ["1", "0", "1"]) == "a c"
    with pytest.raises(ValueError, match="0 or 1 for each of the 2 lines of 'text'"):
        marked_lines(marked, "a\nb", ["1", "2"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), ("-.5", True), ("2.", True), ("1e-3", True), ("nan", False), ("1,000", False)],
)
def test_numbers_of_files_are_finite_decimals(text: str, expected: bool) -> None:
    assert is_float(text) is expected


def test_a_prompt_of_tat_qa_has_table_text_and_question() -> None:
    example = only_example("tatqa", ROWS["tatqa"][0])
    assert example.prompts[0] == (
        "Table:\n| 2019 | 2018\nRevenue | 112 | 105\nText:\nProfit rose.\nIt was kept.\n"
        "Question: What was the revenue in 2019?\nAnswer:"
    )
    assert example.choices == (" 112 million",)
    assert example.reference == Reference(("112",), "million", "span")


def test_a_prompt_of_conv_fin_qa_has_all_questions_so_far() -> None:
    example = only_example("convfinqa", ROWS["convfinqa"][0])
    assert "Questions:\nwhat was the revenue in 2019?\nand in 2018?\nAnswer:" in example.prompts[0]
    assert example.prompts[0].startswith("the following is taken from the report . it is in mill")
    assert example.choices == (" 105.0",)


def test_the_entities_of_a_sentence_are_one_answer() -> None:
    example = only_example("fin_ner", ROWS["fin_ner"][0])
    assert example.choices == (" Silicon Valley Bank, organization; Ann, person",)
    assert example.text == " ".join(TOKENS)


def test_an_unknown_answer_is_scored_nowhere() -> None:
    for name, row in (("edtsum", {"text": "a", "answer": None}), ("tatqa", ROWS["tatqa"][0])):
        unknown = {**row, "answer": None}
        example = only_example(name, unknown)
        assert (example.gold, example.reference) == (None, None), name
    assert find_task("tatqa").is_generated
