import json
from pathlib import Path

import pytest
import torch

from fingpt_lightning.models.formats.peft_adapter import Base
from fingpt_lightning.models.sources import (
    ModelSource,
    adapter_at,
    resolve_source,
    tokenizer_of_model,
)
from tests.evaluation.tiny_language import tiny_tokenizer


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("run", "run/tokenizer"),
        ("run/checkpoints/best.ckpt", "run/tokenizer"),
        ("folder", "folder"),
        ("gguf", "gguf/model.gguf"),
        ("gguf/model.gguf", "gguf/model.gguf"),
        ("bare", None),
    ],
)
def test_the_tokenizer_of_a_model_is_where_its_form_has_it(
    tmp_path: Path, model: str, place: str | None
) -> None:
    for name in ("run/tokenizer", "folder"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    for name in (
        "run/checkpoints/best.ckpt",
        "gguf/model.gguf",
        "bare/config.json",
        "folder/config.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = tokenizer_of_model(str(tmp_path / model))
    assert found == (None if place is None else str(tmp_path / place))


def test_a_hub_name_is_that_of_its_tokenizer() -> None:
    assert tokenizer_of_model("owner/model") == "owner/model"


def _adapter(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("name", "weights", "adapter", "tokenizer", "base"),
    [
        ("base", "base", None, "base", "base"),
        ("bare", "bare", None, None, "bare"),
        ("gguf", "gguf/model.gguf", None, "gguf/model.gguf", "gguf"),
        ("gguf/model.gguf", "gguf/model.gguf", None, "gguf/model.gguf", "gguf/model.gguf"),
        ("run", "run/checkpoints/best.ckpt", None, "run/tokenizer", "run"),
        ("run/checkpoints/last.ckpt", "run/checkpoints/last.ckpt", None, "run/tokenizer",
         "run/checkpoints/last.ckpt"),
        ("client", "base", "client", "base", "client/../base"),
        ("own", "base", "own", "own", "own/../base"),
        ("tuned", "base", "tuned/adapter_best", "base", "tuned/adapter_best/../../base"),
        ("export", "export", "export/adapter", "export", "export"),
        ("on_run", "run/checkpoints/best.ckpt", "on_run", "run/tokenizer", "on_run/../run"),
    ],
)  # fmt: skip
def test_each_form_of_a_model_is_resolved_to_its_parts(
    name: str, weights: str, adapter: str | None, tokenizer: str | None, base: str, tmp_path: Path
) -> None:
    _files(tmp_path, "base/config.json", "base/tokenizer.json", "bare/config.json")
    _files(tmp_path, "gguf/model.gguf", "gguf/other.txt", "run/tokenizer/tokenizer.json")
    _files(tmp_path, "run/checkpoints/best.ckpt", "run/checkpoints/last.ckpt")
    _files(tmp_path, "export/config.json", "export/tokenizer.json")
    for folder, its_base in (
        ("client", "../base"), ("own", "../base"), ("tuned/adapter", "../../bare"),
        ("tuned/adapter_best", "../../base"), ("export/adapter", ".."), ("on_run", "../run"),
    ):  # fmt: skip
        _adapter(tmp_path / folder, its_base)
    _files(tmp_path, "own/tokenizer.json")
    found = resolve_source(tmp_path / name)
    assert found == ModelSource(
        name=str(tmp_path / name),
        weights=found.weights,
        adapter=None if adapter is None else tmp_path / adapter,
        tokenizer=found.tokenizer,
        commit=None,
        base=Base(str(tmp_path / base), None),
    )
    assert found.weights.resolve() == tmp_path / weights
    place = None if found.tokenizer is None else found.tokenizer.resolve()
    assert place == (None if tokenizer is None else tmp_path / tokenizer)
    where = tokenizer_of_model(str(tmp_path / name))
    assert (None if where is None else Path(where).resolve()) == place
    given = resolve_source(tmp_path / name, tokenizer=tmp_path / "bare")
    assert given.tokenizer == tmp_path / "bare"


def test_an_adapter_that_is_given_takes_the_place_of_one_beside(tmp_path: Path) -> None:
    _files(tmp_path, "base/config.json")
    _adapter(tmp_path / "base" / "adapter", "..")
    other = _adapter(tmp_path / "other", "no/where")
    found = resolve_source(tmp_path / "base", adapter=other)
    assert (found.adapter, found.base.path) == (other, str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"adapter .*base: .*other is an adapter itself"):
        resolve_source(other, adapter=tmp_path / "base")


def test_the_tokenizer_of_an_adapter_without_one_is_that_of_its_base(tmp_path: Path) -> None:
    assert tokenizer_of_model(str(_adapter(tmp_path / "client", "some/one"))) == "some/one"


def test_a_checkpoint_of_adapters_comes_before_the_folder_that_a_run_before_it_left(
    tmp_path: Path,
) -> None:
    _adapter(tmp_path / "adapter_best", "../base")
    _adapter(tmp_path / "adapter", "../base")
    assert adapter_at(tmp_path) == tmp_path / "adapter_best"
    (tmp_path / "checkpoints").mkdir()
    contents: dict[str, object] = {"state_dict": {}, "adapter_config": {}}
    torch.save(contents, tmp_path / "checkpoints" / "last.ckpt")
    assert adapter_at(tmp_path) == tmp_path / "adapter_best"
    torch.save(contents, tmp_path / "checkpoints" / "best.ckpt")
    assert adapter_at(tmp_path) == tmp_path / "checkpoints" / "best.ckpt"
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "best.ckpt")  # of a network
    assert adapter_at(tmp_path) == tmp_path / "adapter_best"
    _files(tmp_path, "config.json")
    assert adapter_at(tmp_path) == tmp_path / "adapter"
