import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import huggingface_hub
import pytest

from fingpt_lightning.tasks import Example, find_task, read_rows, sources
from fingpt_lightning.tasks.sources import open_split, splits_in

# The byte 0x85 ends a line in some readings of ISO-8859-1, and a sentence may hold the separator.
_SENTENCES = [
    *("Nokia \u00e4r upp .", "Sales \u0085fell .", "Write to ir@bank.fi .", "Flat ."),
    *("Up .", "Down .", "Same ."),
]
_LABELS = ["positive", "negative", "neutral", "neutral", "positive", "negative", "neutral"]


@pytest.fixture
def fpb(tmp_path: Path) -> Path:
    (tmp_path / "fpb").mkdir()
    return tmp_path / "fpb"


def _rows(folder: Path, split: str, task: str = "fpb") -> list[Mapping[str, object]]:
    return [row for _, row in open_split(find_task(task), folder, split).rows]


def _examples(fpb: Path, split: str) -> list[Example]:
    return read_rows(find_task("fpb"), fpb.parent, split).examples


def _write_lines(fpb: Path, encoding: str, name: str = "Sentences_50Agree.txt") -> None:
    lines = [f"{text}@{label}\r\n" for text, label in zip(_SENTENCES, _LABELS, strict=True)]
    (fpb / name).write_bytes("".join(lines).encode(encoding))


@pytest.mark.parametrize("encoding", ["iso-8859-1", "utf-8-sig", "utf-8"])
def test_the_four_forms_of_phrasebank_give_equal_examples(fpb: Path, encoding: str) -> None:
    _write_lines(fpb, encoding)
    parts = [*_examples(fpb, "train"), *_examples(fpb, "test")]
    from_lines = sorted(parts, key=lambda example: example.row)
    assert [example.text for example in from_lines] == _SENTENCES

    pairs = list(zip(_SENTENCES, _LABELS, strict=True))
    ids = [["negative", "neutral", "positive"].index(label) for label in _LABELS]
    hub = datasets.Dataset.from_dict({"sentence": _SENTENCES, "label": ids})
    hub.to_parquet(fpb / "hub.parquet")
    start = "Instruction: What is the sentiment of this news?\nInput: "
    rows = [{"context": f"{start}{text}\nAnswer: ", "target": label} for text, label in pairs]
    (fpb / "instruct.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    rows = [{"text": text, "label": label} for text, label in pairs]
    (fpb / "local.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for split in ("hub", "instruct", "local"):
        assert _examples(fpb, split) == from_lines


def test_the_cut_is_that_of_datasets(fpb: Path) -> None:
    _write_lines(fpb, "utf-8")
    whole = datasets.Dataset.from_dict({"sentence": _SENTENCES})
    parts = whole.train_test_split(test_size=0.25, seed=42)
    for split in ("train", "test"):
        assert [example.text for example in _examples(fpb, split)] == list(parts[split]["sentence"])
    assert len(_examples(fpb, "test")) == 2


def test_of_several_sentence_files_half_agreement_counts(fpb: Path) -> None:
    _write_lines(fpb, "utf-8")
    (fpb / "Sentences_AllAgree.txt").write_text("x@neutral\n" * 8)
    assert open_split(find_task("fpb"), fpb.parent, "test").path.name == "Sentences_50Agree.txt"


def test_a_split_file_goes_before_the_sentence_file(fpb: Path) -> None:
    _write_lines(fpb, "utf-8")
    (fpb / "train.jsonl").write_text('{"text": "x", "label": "neutral"}')
    assert _rows(fpb.parent, "train") == [{"text": "x", "label": "neutral"}]


def test_a_row_of_csv_is_numbered_by_its_first_line(fpb: Path) -> None:
    (fpb / "train.csv").write_text('text,label\n\n"a\nb",neutral\nc,neutral\nd\n')
    rows = list(open_split(find_task("fpb"), fpb.parent, "train").rows)
    assert rows == [
        (3, {"text": "a\nb", "label": "neutral"}),
        (5, {"text": "c", "label": "neutral"}),
        (6, {"text": "d"}),
    ]


def test_blank_lines_are_no_rows_but_count(fpb: Path) -> None:
    (fpb / "train.jsonl").write_text('\ufeff{"a": 1}\n\n \n{"a": 2}\n', encoding="utf-8")
    rows = list(open_split(find_task("fpb"), fpb.parent, "train").rows)
    assert rows == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("name", ["train.json", "train.JSON"])
def test_an_array_of_objects_is_read_as_its_lines_are(name: str, fpb: Path) -> None:
    rows = [{"text": "Profit rose", "label": "positive"}, {"text": "It fell", "label": 0.5}]
    (fpb / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (fpb / name).write_text("\ufeff" + json.dumps(rows, indent=1))
    assert _rows(fpb.parent, "train") == _rows(fpb.parent, "lines")


@pytest.mark.parametrize("name", ["train.JSONL", "train.Jsonl.GZ", "train.CSV"])
def test_endings_may_be_in_capitals(name: str, fpb: Path) -> None:
    data = b"a\n1\n" if name.endswith("CSV") else b'{"a": "1"}\n'
    (fpb / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert _rows(fpb.parent, "train") == [{"a": "1"}]


def test_a_split_in_a_form_that_is_not_read_is_named(fpb: Path) -> None:
    (fpb / "train.xls").touch()
    with pytest.raises(FileNotFoundError, match=r"no split 'train' .*; train\.xls ends in none of"):
        _rows(fpb.parent, "train")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_labels_of_a_table_are_whole_numbers_though_one_is_missing(
    ending: str, tmp_path: Path
) -> None:
    (tmp_path / "tfns").mkdir()
    pandas = pytest.importorskip("pandas")
    texts = ["The mill made a profit.", "The yard made a loss.", "The board meets.", "No label."]
    frame = pandas.DataFrame({"text": texts, "label": [1, 0, 2, None]})
    file = tmp_path / "tfns" / f"train{ending}"
    frame.to_csv(file, index=False) if ending == ".csv" else frame.to_parquet(file)
    task = find_task("tfns")
    found = read_rows(task, tmp_path, "train").examples
    labels = [None if example.gold is None else task.labels[example.gold] for example in found]
    assert labels == ["positive", "negative", "neutral", None]


def test_what_is_no_text_is_told_with_file_row_and_field(tmp_path: Path) -> None:
    (tmp_path / "alpaca").mkdir()
    row = {"instruction": "Name the wares.", "input": "", "output": "Ware a."}
    lines = [row, {**row, "output": ["Ware a.", "Ware b."]}]
    (tmp_path / "alpaca" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        ValueError, match=r"train\.jsonl:2: field 'output' holds a list, not a text"
    ):
        read_rows(find_task("alpaca"), tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train.jsonl", b'{"a": 1}\n{"a": }', "train.jsonl:2: no JSON (Expecting value"),
        ("train.jsonl", b'{"a": 1}\n{"a": 1, "b": [], "a": 2}', "jsonl:2: key 'a' is there twice"),
        ("train.jsonl", b'[{"a": 1},\n{"a": 1, "a": 2}]', "train.jsonl:2: key 'a' is there twice"),
        ("train.json", b'[\n\n{"a": {"b": 1, "b": 1}}]', "train.json:3: key 'b' is there twice"),
        ("train.jsonl", b"[1]", "train.jsonl:1: it holds a number, not an object"),
        ("train.jsonl", b'\n{"a": "\xe4"}', "train.jsonl:2: no UTF-8 at byte 7 of the line"),
        ("train.jsonl", b"[" * 100_000, "train.jsonl: no JSON (maximum recursion"),
        ("train.jsonl.gz", b"plain", "train.jsonl.gz is not a whole gzip file (Not a gzipped file"),
        (
            "train.jsonl.gz",
            gzip.compress(b'{"a": 1}', mtime=0)[:-4],
            "is not a whole gzip file (Compressed",
        ),
        ("train.json", b'[{"a": 1}, 2]', "train.json:2: it holds a number, not an object"),
        ("train.json", b'"a"', "train.json:1: it holds a text, not an object"),
        ("train.json", b'[{"a": 1},\n{"a" 2}]', "train.json: no JSON (Expecting ':' delimiter in"),
        ("train.json", b'[{"a": 1}\n{"a": 2}]', "train.json: no JSON (Expecting ',' in line 2)"),
        ("train.json", b'[{"a": 1}', "train.json: no JSON (Expecting ',' in line 1)"),
        ("train.json", b'[{"a": 1}] 2', "train.json: no JSON (Extra data in line 1)"),
        (
            "train.json",
            b'{"a": {}, "b": 2}',
            "train.json: row 'b': it holds a number, not an object",
        ),
        ("train.json", b"[" * 100_000, "train.json: no JSON (maximum recursion"),
        ("train.json", b'["\xe4"]', "train.json: no UTF-8 at byte 2"),
        (
            "train.csv",
            b"a,b\n1,2,3\n",
            "csv:2: 3 values, more than the header's 2 names; the separator is taken to be ','",
        ),
        ("train.csv", b'a,b\n"1" 2,3\n', "train.csv:2: no CSV ("),
        (
            "train.parquet",
            b"x" * 20,
            "train.parquet is not a whole Parquet file (Parquet magic bytes",
        ),
        ("Sentences_50Agree.txt", b"a@neutral\n\nb\n", "Agree.txt:3: not of the form sentence@lab"),
        ("Sentences_50Agree.txt", b"a@neutral\n", "Agree.txt: 1 rows are too few for train and t"),
    ],
)
def test_a_broken_file_is_told_in_one_line(name: str, data: bytes, message: str, fpb: Path) -> None:
    (fpb / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        _rows(fpb.parent, "train")
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_told_with_its_neighbour(fpb: Path) -> None:
    fpb.rename(fpb.with_name("fpb2"))
    with pytest.raises(FileNotFoundError, match=r"task fpb: no folder .*fpb; did you mean fpb2\?"):
        _rows(fpb.parent, "train")


def test_a_missing_split_is_told_with_those_there(fpb: Path) -> None:
    (fpb / "dev.jsonl.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"has no split 'train' .*; the splits there: dev$"):
        _rows(fpb.parent, "train")
    _write_lines(fpb, "utf-8")
    with pytest.raises(FileNotFoundError, match=r"the splits there: dev, test, train$"):
        _rows(fpb.parent, "validation")


def test_a_split_in_two_forms_is_refused(fpb: Path) -> None:
    for name in ("train.jsonl", "train.CSV"):
        (fpb / name).touch()
    with pytest.raises(ValueError, match=r"has train\.CSV and train\.jsonl; keep one of them"):
        _rows(fpb.parent, "train")


def test_the_hub_is_asked_for_the_named_set_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*names: str | None, **options: str | None) -> list[dict[str, object]]:
        asked.append((names, options))
        return [{"sentence": text, "label": 1} for text in _SENTENCES]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(find_task("fpb"), None, "test")
    assert rows.path == Path("takala/financial_phrasebank/sentences_50agree/test")
    assert sorted(example.row for example in rows.examples) == sorted(
        _SENTENCES.index(example.text) + 1 for example in rows.examples
    )
    assert len(rows.examples) == 2
    assert _rows_of_hub("fiqa_sa", "validation")
    assert asked == [
        (
            ("takala/financial_phrasebank", None),
            {
                "data_dir": "sentences_50agree",
                "revision": "refs/convert/parquet",
                "split": "train",
            },
        ),
        (
            ("pauri32/fiqa-2018", None),
            {"data_dir": None, "revision": None, "split": "validation"},
        ),
    ]


def _rows_of_hub(task: str, split: str) -> list[Mapping[str, object]]:
    return [row for _, row in open_split(find_task(task), None, split).rows]


def test_a_hub_out_of_reach_is_asked_once_and_then_only_its_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def dataset_info(api: object, name: str, **settings: object) -> None:
        asked.append((name, settings["timeout"]))
        raise ConnectionError("no route to host")

    def load_dataset(name: str, *_: object, **__: object) -> list[dict[str, object]]:
        assert datasets.config.HF_HUB_OFFLINE, "each failed request would be repeated"
        if name != "allenai/ai2_arc":
            return [{"sentence": "Shares rose.", "label": 2}] * 4
        raise FileNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_reason_of_hub", sources._reason_of_hub.__wrapped__)
    with pytest.raises(RuntimeError, match=r"Hugging Face hub \(no route to host\); give data_dir"):
        _rows_of_hub("arc_easy", "test")
    assert asked == [("allenai/ai2_arc", 10)]
    assert len(_rows_of_hub("fpb", "train")) > 0
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_hub_out_of_reach_is_told_in_one_line() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"allenai/ai2_arc cannot be had from the Hugging Face hub \(.*give data_dir to read",
    ) as caught:
        _rows_of_hub("arc_easy", "test")
    assert "\n" not in str(caught.value)


def test_what_the_hub_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="task headline names no data set on the hub; give data_d"):
        _rows_of_hub("headline", "test")
    with pytest.raises(ValueError, match="has no split 'dev', only train, validation, test"):
        _rows_of_hub("arc_easy", "dev")
    with pytest.raises(ValueError, match="has no split 'validation', only train, test"):
        _rows_of_hub("fpb", "validation")


def test_the_published_files_of_fiqa_are_one_split(tmp_path: Path) -> None:
    (tmp_path / "fiqa_sa").mkdir()
    task = find_task("fiqa_sa")
    for name, score in (("headline", "-0.5"), ("post", "0.5")):
        row = {"sentence": f"a {name}", "info": [{"sentiment_score": score, "target": "Foo"}]}
        text = json.dumps({"14": row})
        (tmp_path / "fiqa_sa" / f"task1_{name}_ABSA_train.json").write_text(text)
    found = read_rows(task, tmp_path, "train")
    assert found.path == tmp_path / "fiqa_sa"
    assert [(example.text, example.gold) for example in found.examples] == [
        ("a headline", 0),
        ("a post", 2),
    ]
    assert [example.prompts[0].split("?")[0] for example in found.examples] == [" news", " tweet"]
    with pytest.raises(FileNotFoundError, match=r"the splits there: train$"):
        read_rows(task, tmp_path, "test")


def _write_fiqa(folder: Path) -> list[str]:
    """As many rows as the hub's three splits of FiQA have, on one topic each."""
    number = 0
    for split, num_rows in (("train", 961), ("validation", 102), ("test", 150)):
        rows = [
            {"sentence": f"Foo {number + place}", "format": "post", "sentiment_score": 0.0}
            for place in range(num_rows)
        ]
        number += num_rows
        path = folder / "fiqa_sa" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [f"Foo {place}" for place in range(number)]


def test_fingpts_split_of_fiqa_is_cut_out_of_all_three(tmp_path: Path) -> None:
    texts = _write_fiqa(tmp_path)
    task = find_task("fiqa_sa_fingpt")
    test, train = (read_rows(task, tmp_path, split) for split in ("test", "train"))
    assert (len(test.examples), len(train.examples)) == (275, 938)
    assert sorted(one.text for one in (*test.examples, *train.examples)) == sorted(texts)
    # What FinGPT's benchmarks/fiqa.py does with the hub's data set.
    whole = datasets.Dataset.from_dict({"text": texts})
    expected = whole.train_test_split(0.226, seed=42)["test"]["text"]
    assert [example.text for example in test.examples] == expected
    assert [example.row for example in test.examples] == [texts.index(x) + 1 for x in expected]
    assert test.split_rule == (
        "train_test_split(test_size=0.226, seed=42) of splits train + validation + test"
    )


def test_a_cut_of_splits_needs_all_of_them(tmp_path: Path) -> None:
    _write_fiqa(tmp_path)
    task = find_task("fiqa_sa_fingpt")
    assert splits_in(task, tmp_path) == ["test", "train"]
    with pytest.raises(FileNotFoundError, match="no split 'validation', only train and test: its"):
        open_split(task, tmp_path, "validation")
    (tmp_path / "fiqa_sa" / "test.jsonl").unlink()
    assert splits_in(task, tmp_path) == []
    with pytest.raises(FileNotFoundError, match="has no split 'test'"):
        open_split(task, tmp_path, "train")


def test_a_source_says_by_which_rule_its_rows_are_the_split(
    fpb: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_lines(fpb, "utf-8")
    rule = "train_test_split(test_size=0.25, seed=42) of "
    assert open_split(find_task("fpb"), fpb.parent, "test").split_rule == (
        f"{rule}Sentences_50Agree.txt"
    )
    (fpb / "dev.jsonl").write_text("{}")
    assert open_split(find_task("fpb"), fpb.parent, "dev").split_rule == "all rows of dev.jsonl"
    rows = [{"sentence": f"Foo {n}", "label": 0, "sentiment_score": 0.1} for n in range(9)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: rows)
    assert open_split(find_task("fpb"), None, "test").split_rule == (
        f"{rule}split train of takala/financial_phrasebank sentences_50agree at"
        " refs/convert/parquet"
    )
    assert open_split(find_task("tfns"), None, "train").split_rule == (
        "split train of zeroshot/twitter-financial-news-sentiment"
    )
    whole = open_split(find_task("fiqa_sa_fingpt"), None, "test")
    assert whole.split_rule == (
        "train_test_split(test_size=0.226, seed=42) of splits train + validation + test of"
        " pauri32/fiqa-2018"
    )
    assert len(list(whole.rows)) == 7


def test_the_first_folder_that_is_there_counts(tmp_path: Path) -> None:
    task = find_task("fomc")
    row = json.dumps({"text": "Rates rise.", "label": "hawkish"})
    for name, number in (("fomc_stance", 2), ("fomc", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(f"{row}\n" * number)
        assert len(read_rows(task, tmp_path, "train").examples) == number
    assert splits_in(task, tmp_path) == ["train"]
