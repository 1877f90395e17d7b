from pathlib import Path

import pytest

from fingpt_lightning.models.formats.tokenizer import tokenizer_of_model
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
    for name in ("run/checkpoints/best.ckpt", "gguf/model.gguf", "bare/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = tokenizer_of_model(str(tmp_path / model))
    assert found == (None if place is None else str(tmp_path / place))


def test_a_hub_name_is_that_of_its_tokenizer() -> None:
    assert tokenizer_of_model("owner/model") == "owner/model"
