import re
from pathlib import Path
from typing import Any

import pytest

from fingpt_lightning.data.corpus import Corpus, CorpusShare, JoinedCorpus, SyntheticCorpus
from fingpt_lightning.data.hub_text import HubText
from fingpt_lightning.data.text_files import TextFiles
from fingpt_lightning.data.text_sources import MixturePart, TextSources


def _sources(mixture: list[MixturePart] | None = None, **files: str | list[str]) -> TextSources:
    given: Any = {"train": None, "val": None, "test": None, **files}
    return TextSources(given, mixture, 0.2, "text", 30, 1)


def _texts(corpora: tuple[Corpus, ...]) -> list[list[str]]:
    return [[piece.text for piece in corpus.pieces()] for corpus in corpora]


def _part(name: str, weight: float = 1.0, files: str | None = None) -> MixturePart:
    return {"name": name, "files": files, "weight": weight}


def test_hub_names_and_paths_may_follow_each_other(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]
    for path in paths:
        Path(path).write_text("x")
    sources = _sources(train=[paths[0], paths[1], "hf://a/b", paths[2]], val="hf://a/b", test=paths)
    (joined,) = sources.corpora("train")
    assert joined == JoinedCorpus(
        (
            TextFiles((Path(paths[0]), Path(paths[1]))),
            HubText("a/b", None, None, "train"),
            TextFiles((Path(paths[2]),)),
        )
    )
    assert sources.corpora("val") == (HubText("a/b", None, None, "validation"),)
    assert sources.corpora("test") == (TextFiles(tuple(map(Path, paths))),)


def test_each_part_of_a_mixture_holds_out_its_share() -> None:
    sources = _sources([_part("a", 3), _part("b", 1)])
    assert sources.weights == {"a": 3.0, "b": 1.0}
    news = SyntheticCorpus(30, seed=1), SyntheticCorpus(30, seed=2)
    assert sources.corpora("train") == tuple(CorpusShare(part, 0.2, "kept") for part in news)
    held_out = sources.corpora("val")
    assert held_out == sources.corpora("test")
    kept = _texts(sources.corpora("train"))
    (val,) = _texts(held_out)
    assert len(val) + len(kept[0]) + len(kept[1]) == 60
    assert not set(val) & {*kept[0], *kept[1]}


def test_a_part_has_its_own_text_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n')
    part = MixturePart(name="a", files=str(path), weight=1.0, text_field="body")
    sources = _sources([part, _part("b")], val=str(path))
    assert _texts(sources.corpora("train"))[0] == ["x"]


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([], "mixture has no parts"),
        ([_part("a", 0.0)], "mixture part 'a': weight 0.0 is not a number above 0"),
        ([_part("a", -1.0)], "mixture part 'a': weight -1.0 is not a number above 0"),
        ([_part("a", float("nan"))], "mixture part 'a': weight nan is not a number above 0"),
        ([_part("a", float("inf"))], "mixture part 'a': weight inf is not a number above 0"),
        ([_part("a"), _part("a")], "mixture has 2 parts named 'a'"),
        ([{"name": "a"}], "mixture part 0 has ['name']; it needs ['files', 'name', 'weight']"),
        ([{**_part("a"), "wieght": 1}], "mixture part 0 has ['files', 'name', 'weight', 'wieght']"),
    ],
)
def test_a_wrong_mixture_is_refused(mixture: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _sources(mixture)


def test_train_files_beside_a_mixture_are_refused() -> None:
    with pytest.raises(ValueError, match="train_files and mixture both name the training text"):
        _sources([_part("a")], train="a.txt")


def test_the_same_text_in_two_parts_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x")
    parts = [_part(name, 1.0, str(tmp_path / f"{name}.txt")) for name in "ab"]
    message = "mixture part 'a' and mixture part 'b' hold the same text: give it once"
    with pytest.raises(ValueError, match=message):
        _sources(parts).corpora("train")


def test_a_missing_file_is_named_with_its_part(tmp_path: Path) -> None:
    parts = [_part("news", 1.0, str(tmp_path / "no.txt"))]
    with pytest.raises(FileNotFoundError, match=r"mixture part 'news': .*no.txt does not exist"):
        _sources(parts).corpora("train")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="val_files: no path is given"):
        _sources(val=[]).corpora("val")


def test_an_unknown_rule_for_bad_rows_is_refused() -> None:
    sources = TextSources({"train": None, "val": None, "test": None}, None, 0.2, "text", 30, 1)
    object.__setattr__(sources, "on_bad_row", "skp")  # past the check of types in tests
    with pytest.raises(ValueError, match="on_bad_row 'skp' is none of error, skip; did you mean"):
        sources.__post_init__()


def test_all_files_of_all_splits_follow_the_rule_for_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    files = [str(tmp_path / "a.jsonl"), "hf://a/b"]
    given: Any = {"train": files, "val": files, "test": files}
    sources = TextSources(given, None, 0.2, "text", 30, 1, "skip")
    for split in given:
        (corpus,) = sources.corpora(split)
        assert isinstance(corpus, JoinedCorpus)
        for part in corpus.corpora:
            assert isinstance(part, TextFiles | HubText)
            assert part.on_bad_row == "skip"
