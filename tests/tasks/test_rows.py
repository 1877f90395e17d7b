import csv
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet, table  # type: ignore[import-untyped]

from fingpt_lightning.tasks import find_task, read_rows
from tests.tasks.sample_rows import ROWS, TAGS, TOKENS

# What the data folder's README says, in questions where a row has several.
_NUM_EXAMPLES = {
    ("arc_challenge", "train"): 712,
    ("arc_challenge", "validation"): 231,
    ("arc_easy", "train"): 1390,
    ("arc_easy", "validation"): 511,
    ("boolq", "train"): 1953,
    ("boolq", "validation"): 678,
    ("fin_ner", "train"): 1034,
    ("fin_ner", "validation"): 112,
    ("fin_ner_types", "train"): 732,
    ("fin_ner_types", "validation"): 68,
    ("fiqa_sa", "train"): 821,
    ("fiqa_sa", "validation"): 89,
    ("fomc", "train"): 1600,
    ("fomc", "validation"): 268,
    ("fpb", "train"): 3245,
    ("fpb", "validation"): 358,
    ("headline", "train"): 6 * 7338,
    ("headline", "validation"): 6 * 1069,
    ("nwgi", "validation"): 958,
    ("nwgi7", "validation"): 958,
    ("openbookqa", "train"): 296,
    ("openbookqa", "validation"): 110,
    ("piqa", "train"): 1114,
    ("piqa", "validation"): 375,
    ("tatqa", "train"): 1248,
    ("tatqa", "validation"): 420,
    ("tfns", "train"): 8431,
    ("tfns", "validation"): 930,
    ("winogrande", "train"): 773,
    ("winogrande", "validation"): 253,
}


def _write(folder: Path, task: str, rows: list[dict[str, object]], split: str = "train") -> Path:
    (folder / task).mkdir(parents=True, exist_ok=True)
    path = folder / task / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("name", "split"), _NUM_EXAMPLES)
def test_real_splits_have_the_documented_rows(name: str, split: str, shared_data: Path) -> None:
    rows = read_rows(find_task(name), shared_data, split, strict=True)
    assert len(rows.examples) == _NUM_EXAMPLES[name, split]
    assert rows.num_skipped == 0
    assert all(example.gold is not None for example in rows.examples)
    assert len({example.prefix for example in rows.examples}) == 1


@pytest.mark.parametrize("name", ["fiqa_sa", "nwgi"])
def test_labels_that_are_derived_equal_those_in_the_file(name: str, shared_data: Path) -> None:
    task = find_task(name)
    rows = read_rows(task, shared_data, "validation")
    lines = rows.path.read_text(encoding="utf-8").splitlines()
    derived = [task.labels[example.gold or 0] for example in rows.examples]
    assert derived == [json.loads(line)["label"] for line in lines]
    assert set(derived) == set(task.labels)


def test_real_labels_are_distributed_as_in_the_file(shared_data: Path) -> None:
    task = find_task("tfns")
    rows = read_rows(task, shared_data, "train")
    counts = Counter(task.labels[example.gold or 0] for example in rows.examples)
    assert counts == {"neutral": 5464, "positive": 1698, "negative": 1269}


def test_a_repeated_question_is_asked_once(tmp_path: Path) -> None:
    row: dict[str, object] = {"tokens": TOKENS, "tags": TAGS}
    twice: dict[str, object] = {"tokens": ["Ann", "pays", "Ann"], "tags": ["I-PER", "O", "I-PER"]}
    _write(tmp_path, "fin_ner", [row, twice, row])
    rows = read_rows(find_task("fin_ner_types"), tmp_path, "train")
    assert [(example.row, example.gold) for example in rows.examples] == [(1, 1), (1, 0), (2, 0)]


def test_other_tasks_keep_repeated_rows(tmp_path: Path) -> None:
    _write(tmp_path, "fpb", [{"text": "x", "label": "neutral"}] * 2)
    assert len(read_rows(find_task("fpb"), tmp_path, "train").examples) == 2


def test_empty_texts_are_counted_or_refused(tmp_path: Path) -> None:
    texts = ["x", " ", "y", ""]
    path = _write(tmp_path, "fpb", [{"text": text, "label": "neutral"} for text in texts])
    task = find_task("fpb")
    rows = read_rows(task, tmp_path, "train")
    assert [(example.text, example.row) for example in rows.examples] == [("x", 1), ("y", 3)]
    assert rows.num_skipped == 2
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: the text is empty")):
        read_rows(task, tmp_path, "train", strict=True)


def test_a_wrong_row_is_told_with_file_and_line(tmp_path: Path) -> None:
    good: dict[str, object] = {"text": "x", "label": "neutral"}
    path = _write(tmp_path, "fpb", [good, good | {"label": "up"}])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: label 'up' is none of negative")):
        read_rows(find_task("fpb"), str(tmp_path), "train")


def test_the_digest_is_of_text_choices_and_gold(tmp_path: Path) -> None:
    _write(tmp_path, "piqa", [{"goal": "fry", "sol1": "a", "sol2": "b", "label": 1}])
    rows = read_rows(find_task("piqa"), tmp_path, "train")
    assert rows.sha256 == hashlib.sha256(b'["fry", [" a", " b"], 1]\n').hexdigest()


@pytest.mark.parametrize("change", [{"goal": "boil"}, {"sol1": "c"}, {"label": 0}])
def test_the_digest_follows_the_data(change: dict[str, object], tmp_path: Path) -> None:
    row: dict[str, object] = {"goal": "fry", "sol1": "a", "sol2": "b", "label": 1}
    digests = set()
    for contents in (row, row | change):
        _write(tmp_path, "piqa", [contents])
        digests.add(read_rows(find_task("piqa"), tmp_path, "train").sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("name", ["arc_easy", "boolq", "fiqa_sa", "fpb", "nwgi", "winogrande"])
def test_the_digest_is_that_of_the_data_in_any_shape(name: str, tmp_path: Path) -> None:
    digests = set()
    for row in ROWS[name]:
        _write(tmp_path, name, [dict(row)])
        digests.add(read_rows(find_task(name), tmp_path, "train").sha256)
    assert len(digests) == 1


def _write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "label"), *rows])


def _write_gzip(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in rows]
    path.write_bytes(gzip.compress("".join(lines).encode()))


def _write_jsonl(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


def _write_parquet(path: Path, rows: list[tuple[str, str]]) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    parquet.write_table(table({"text": columns[0], "label": columns[1]}), path)


_WRITERS: dict[str, Callable[[Path, list[tuple[str, str]]], None]] = {
    ".jsonl": _write_jsonl,
    ".jsonl.gz": _write_gzip,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"])),
            st.sampled_from(["negative", "neutral", "positive"]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_all_kinds_of_files_give_equal_examples(
    rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data")
    (folder / "fpb").mkdir()
    read = []
    for ending, write in _WRITERS.items():
        path = folder / "fpb" / f"{ending.replace('.', '')}{ending}"
        write(path, rows)
        read.append(read_rows(find_task("fpb"), folder, ending.replace(".", "")))
    assert [example.text for example in read[0].examples] == [
        text.strip() for text, _ in rows if text.strip()
    ]
    for other in read[1:]:
        assert (other.sha256, other.num_skipped) == (read[0].sha256, read[0].num_skipped)
        assert [e.text for e in other.examples] == [e.text for e in read[0].examples]
