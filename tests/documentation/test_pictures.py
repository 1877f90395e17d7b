"""A picture shows a page as a phone or a dark system does."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from documentation import pictures

_PAGE = """<!doctype html><meta name="viewport" content="width=device-width"><style>
body { background: rgb(255, 0, 0); }
@media (max-width: 400px) { body { background: rgb(0, 255, 0); } }
@media (prefers-color-scheme: dark) { body { background: rgb(0, 0, 255); } }
</style>"""
_HAS_BROWSER = any(map(shutil.which, pictures.BROWSERS))


@pytest.mark.skipif(not _HAS_BROWSER, reason="needs a Chromium")
@pytest.mark.parametrize(
    ("view", "size", "color"),
    [
        (pictures.View(600, 50), (600, 50), (255, 0, 0)),
        (pictures.View(390, 40, scale=2), (780, 80), (0, 255, 0)),
        (pictures.View(600, 50, is_dark=True), (600, 50), (0, 0, 255)),
    ],
    ids=["desktop", "phone", "dark"],
)
def test_a_picture_is_what_the_reader_sees(
    view: pictures.View, size: tuple[int, int], color: tuple[int, int, int], tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(_PAGE)
    with pictures.serving_folder(tmp_path) as address:
        pictures.take(f"{address}page.html", tmp_path / "picture.png", view)
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.size == size
        assert picture.convert("RGB").getpixel((300, 20)) == color


def test_a_browser_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "BROWSERS", ("no-such-browser",))
    with pytest.raises(FileNotFoundError, match="none of no-such-browser is installed"):
        pictures.take("http://127.0.0.1/", tmp_path / "picture.png", pictures.View(600, 50))


def test_every_picture_is_small_and_shown_in_a_guide() -> None:
    found = list(pictures.PICTURES.glob("*.png"))
    assert len(found) >= 7
    guides = "".join(path.read_text() for path in pictures.PICTURES.parent.glob("*.md"))
    guides += (pictures.PICTURES.parents[1] / "README.md").read_text()
    for picture in found:
        assert picture.stat().st_size <= pictures.MAX_BYTES, picture
        assert f"pictures/{picture.name}" in guides, picture
