import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets  # type: ignore[import-untyped]
import httpx
import huggingface_hub
import pytest

from fingpt_lightning.data import documents, hub_text
from fingpt_lightning.data.hub_text import HubText, parse_hub_name

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub:
    """One data set whose rows lie in a local file."""

    def __init__(self, path: Path, texts: list[Any], field: str = "text") -> None:
        self.path = path
        self.calls: list[dict[str, Any]] = []
        datasets.Dataset.from_dict({field: texts, "id": list(range(len(texts)))}).to_parquet(path)

    def load_dataset(self, repository: str, config: str | None, **settings: Any) -> Any:
        self.calls.append({"repository": repository, "config": config, **settings})
        return load_dataset(
            "parquet",
            data_files={"train": str(self.path)},
            split="train",
            streaming=settings["streaming"],
            cache_dir=str(self.path.parent),
        )


load_dataset = datasets.load_dataset


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Hub]:
    made = _Hub(tmp_path / "a.parquet", ["one", " ", "two"])
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    yield made
    hub_text._commit_of.cache_clear()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://a/b", ("a/b", None, None, "validation")),
        ("hf://a-1/b.c_2:train", ("a-1/b.c_2", None, None, "train")),
        ("hf://a/b/en+fr:test", ("a/b", "en+fr", None, "test")),
        ("hf://a/b@refs/convert/parquet", ("a/b", None, "refs/convert/parquet", "validation")),
        (f"hf://a/b/c@{_COMMIT}:test", ("a/b", "c", _COMMIT, "test")),
    ],
)
def test_a_name_is_read_in_its_parts(
    name: str, parts: tuple[str, str | None, str | None, str]
) -> None:
    corpus = parse_hub_name(name, "body", "validation", "val_files")
    assert corpus == HubText(*parts, "body")
    assert str(corpus) == (name if name.endswith(parts[3]) else f"{name}:{parts[3]}")


@pytest.mark.parametrize(
    "name",
    ["hf://b", "hf://a/b/c/d", "hf://datasets/a/b", "hf://a/b:", "hf://a/b@", "hf://a/b:train[:9]"],
)
def test_another_spelling_is_refused(name: str) -> None:
    message = (
        r"train_files: 'hf://.*' is not spelled hf://OWNER/NAME\[/CONFIG\]\[@REVISION\]\[:SPLIT"
    )
    with pytest.raises(ValueError, match=message):
        parse_hub_name(name, "text", "train", "train_files")


def test_rows_are_streamed_from_the_pinned_commit(hub: _Hub) -> None:
    corpus = HubText("a/b", "c", _COMMIT, "train")
    assert [piece.text for piece in corpus.pieces()] == ["one", "", "two"]
    assert hub.calls == [
        {
            "repository": "a/b",
            "config": "c",
            "split": "train",
            "revision": _COMMIT,
            "streaming": True,
        }
    ]


def test_the_fingerprint_follows_the_commit(hub: _Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def dataset_info(_: object, repository: str, revision: str | None, timeout: int) -> Any:
        asked.append((repository, revision))
        return SimpleNamespace(sha=_COMMIT)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    pinned = HubText("a/b", None, _COMMIT, "train").fingerprint()
    assert asked == []
    assert HubText("a/b", None, None, "train").fingerprint() == pinned
    assert HubText("a/b", None, "main", "train").fingerprint() == pinned
    list(HubText("a/b", None, "main", "train").pieces())
    assert asked == [("a/b", None), ("a/b", "main")]
    assert hub.calls[0]["revision"] == _COMMIT
    others = [
        HubText("a/c", None, _COMMIT, "train"),
        HubText("a/b", "c", _COMMIT, "train"),
        HubText("a/b", None, _COMMIT[::-1], "train"),
        HubText("a/b", None, _COMMIT, "test"),
        HubText("a/b", None, _COMMIT, "train", "body"),
    ]
    assert len({pinned, *(other.fingerprint() for other in others)}) == 6


def test_without_a_network_one_line_says_what_to_do() -> None:
    way_out = (
        "where there is a network: hf download no/where --repo-type dataset --local-dir FOLDER; "
        "then give FOLDER in its place"
    )
    with pytest.raises(ValueError, match=way_out) as raised:
        HubText("no/where", None, None, "train").fingerprint()
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("hf://no/where:train: cannot be opened (Cannot reach ")
    with pytest.raises(ValueError, match=way_out):
        list(HubText("no/where", None, _COMMIT, "train").pieces())


@pytest.mark.parametrize(
    ("error", "has_way_out"),
    [
        (httpx.ConnectError("Name or service not known"), True),
        (TimeoutError("timed out"), True),
        (ValueError("BuilderConfig 'c' not found. Available: ['d']"), False),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), False),
    ],
)
def test_the_way_out_is_told_where_the_hub_did_not_answer(
    error: Exception, has_way_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=re.escape(str(error))) as raised:
        list(HubText("a/b", "c", _COMMIT, "train").pieces())
    assert ("hf download a/b" in str(raised.value)) == has_way_out


def test_a_data_set_with_a_script_names_its_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = r"but found b.py\); the hub's own .* as hf://a/b@refs/convert/parquet"
    with pytest.raises(ValueError, match=message):
        list(HubText("a/b", None, _COMMIT, "train").pieces())


def test_a_missing_column_names_the_nearest(hub: _Hub) -> None:
    message = r"hf://a/b@0.*:train: no field 'texts'; did you mean 'text'\? The fields are \['id'"
    with pytest.raises(ValueError, match=message):
        list(HubText("a/b", None, _COMMIT, "train", "texts").pieces())


def test_a_row_without_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _Hub(tmp_path / "a.parquet", ["one", None])
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    with pytest.raises(ValueError, match=r":train, row 2: field 'text' holds nothing"):
        list(HubText("a/b", None, _COMMIT, "train").pieces())


def test_a_stream_that_breaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "x"}
        raise OSError("connection reset")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    with pytest.raises(RuntimeError, match=r"row 2: the stream broke \(connection reset\)"):
        list(HubText("a/b", None, _COMMIT, "train").pieces())


def test_datasets_and_pyarrow_are_imported_when_they_are_needed() -> None:
    assert "datasets" not in vars(hub_text)
    assert not {"pa", "parquet"} & vars(documents).keys()
