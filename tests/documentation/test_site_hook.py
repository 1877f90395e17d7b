"""The site builds without a warning, and has what the repository's links lead to."""

import doctest
import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs pip install 'fingpt-lightning[docs]'")
pytest.importorskip("material", reason="the site needs pip install 'fingpt-lightning[docs]'")
pytest.importorskip("mkdocstrings", reason="the site needs pip install 'fingpt-lightning[docs]'")

from mkdocs.commands.build import build
from mkdocs.config import load_config

import fingpt_lightning
from documentation import site_hook
from fingpt_lightning import low_rank

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site; a warning, such as of a dead link, ends the build."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config("mkdocs.yml", strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    logging.getLogger("mkdocs").handlers.clear()
    return folder


def test_every_guide_and_every_record_has_a_page(site: Path) -> None:
    guides = [path for path in (ROOT / "docs").glob("**/*.md") if path.name != "README.md"]
    assert len(guides) > 40
    for guide in guides:
        page = site / guide.relative_to(ROOT / "docs").with_suffix(".html")
        assert "<h1" in page.read_text(), page
    records = (site / "benchmarks" / "index.html").read_text()
    for record in (ROOT / "docs" / "benchmarks").glob("*.json"):
        assert f'href="{record.name}"' in records, record
        assert (site / "benchmarks" / record.name).exists()


def test_the_readme_is_the_home_and_its_links_lead_to_pages(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert "Pretrain and finetune financial language models" in home
    targets = re.findall(r'href="(source/[^"]+|contributing.html|pipeline.html)"', home)
    assert "source/examples/quickstart.ipynb" in targets
    assert "source/examples/only_the_layer.py.html" in targets
    for target in targets:
        assert (site / target).exists(), target


def test_every_public_name_is_described(site: Path) -> None:
    page = (site / "api" / "package.html").read_text()
    named = set(re.findall(r'id="fingpt_lightning\.(\w+)"', page))
    assert set(fingpt_lightning.__all__) - {"__version__", "callbacks"} == named
    layers = (site / "api" / "low_rank.html").read_text()
    named = set(re.findall(r'<h[23] id="fingpt_lightning\.low_rank\.(?:\w+\.)?(\w+)"', layers))
    assert named == set(low_rank.__all__)


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=[\"']?([^\"' >]+)", text)
        assert loaded
        assert not [target for target in loaded if "//" in target], page


def test_the_examples_of_the_hook_hold() -> None:
    failed, tried = doctest.testmod(site_hook)
    assert tried >= 2
    assert not failed


def test_links_in_code_stay_as_they_are() -> None:
    text = "[a](../README.md)\n```\n[a](../README.md)\n```\n[a](https://example.org/README.md)"
    led = site_hook.in_site(text, "tasks.md")
    assert led == text.replace("../README.md", "index.md", 1)
