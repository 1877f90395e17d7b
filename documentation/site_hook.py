"""Builds the site of ``mkdocs.yml`` from the Markdown files that are read in the repository too.

A file keeps the links that work where it lies. Here those that leave ``docs/`` are led to pages of
the site: the README is its home, and a linked source file becomes a page that shows it. Pages about
records and about the Python interface are generated, so that none of them goes stale.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Places in the repository, and those of their pages in the site.
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/README.md": "guides.md",
    "docs/benchmarks": "benchmarks/index.md",
}
INTERFACE = {
    "package": ("The package", ("fingpt_lightning",)),
    "modules": ("Modules", ("fingpt_lightning.modules",)),
    "strategies": ("Strategies", ("fingpt_lightning.strategies",)),
    "callbacks": ("Callbacks", ("callbacks",)),
    "low_rank": (
        "Low-rank layers",
        # The function has the name of its file, which hides it from a reader of source.
        ("fingpt_lightning.low_rank", "fingpt_lightning.low_rank.factorize.factorize"),
    ),
    "evaluation": (
        "Evaluation",
        tuple(
            f"fingpt_lightning.evaluation.{name}"
            for name in ("scoring", "calibration", "metrics", "paired", "results")
        ),
    ),
}
SHOWN_AS = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml", ".txt": "text"}
INTRODUCTION = """Each record holds the question, the command, the commit, the machine, the versions
and every figure with its spread; the page beside it is made from it."""
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in ``docs/`` as they are shown."""
    root = Path(config.config_file_path).parent
    guides = files.get_file_from_path("README.md")
    assert guides is not None
    files.remove(guides)
    generated = {"benchmarks/index.md": records_page(root / "docs" / "benchmarks")}
    for place, page in MOVED.items():
        if (root / place).is_file():
            generated[page] = (root / place).read_text(encoding="utf-8")
    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for place in sorted(_linked_sources(pages | generated)):
        page = site_path(place)
        if page.endswith(".md"):
            text = (root / place).read_text(encoding="utf-8")
            shown = f"````{SHOWN_AS[posixpath.splitext(place)[1]]}\n{text}````"
            generated[page] = f"# {posixpath.basename(place)}\n\n`{place}`\n\n{shown}\n"
        else:
            files.append(File.generated(config, page, abs_src_path=str(root / place)))
    for name, (title, modules) in INTERFACE.items():
        shown = "\n\n".join(f"::: {module}" for module in modules)
        generated[f"api/{name}.md"] = f"# {title}\n\n{shown}\n"
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads the links of a page, which are right in the repository, to the site's pages."""
    name = page.file.src_uri
    if name.startswith(("api/", "source/")):
        return markdown
    if name.startswith("benchmarks/") and not markdown.startswith("# "):
        title = page.file.name.replace("_", " ")
        markdown = f"# {title[0].upper()}{title[1:]}\n\n{markdown}"
    return in_site(markdown, name)


def in_site(markdown: str, page: str) -> str:
    """The text of a page, its links led from places in the repository to pages of the site.

    >>> in_site("[tests](../tests/test_docs.py), [home](../README.md#go)", "faq.md")
    '[tests](source/tests/test_docs.py.md), [home](index.md#go)'

    Args:
        markdown: Text as it lies in the repository.
        page: Path of the page in the site, as ``File.src_uri``.
    """
    place = repository_place(page)
    folder = posixpath.dirname(page) or "."

    def led(match: re.Match[str]) -> str:
        return posixpath.relpath(site_path(_resolved(place, match[1])), folder)

    parts = _FENCED.split(markdown)  # the odd ones are code
    parts[::2] = [_LINK.sub(led, part) for part in parts[::2]]
    return "".join(parts)


def site_path(place: str) -> str:
    """Where the site has a file of the repository.

    >>> [site_path(place) for place in ("docs/tasks.md", "CHANGELOG.md", "configs/a.yaml")]
    ['tasks.md', 'changelog.md', 'source/configs/a.yaml.md']

    Args:
        place: Path from the root of the repository.
    """
    if place in MOVED:
        return MOVED[place]
    if place.startswith("docs/"):
        return place.removeprefix("docs/")
    return f"source/{place}.md" if posixpath.splitext(place)[1] in SHOWN_AS else f"source/{place}"


def repository_place(page: str) -> str:
    """Where the repository has the text of a page: the opposite of ``site_path``."""
    places = {moved: place for place, moved in MOVED.items() if place.endswith(".md")}
    return places.get(page, f"docs/{page}")


def records_page(folder: Path) -> str:
    """A table of all records.

    Args:
        folder: Folder of the records, ``docs/benchmarks``.
    """
    lines = ["# Benchmark records", "", INTRODUCTION, "", "| record | question | made on |"]
    lines.append("| --- | --- | --- |")
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        page = path.with_suffix(".md")
        name = path.stem.replace("_", " ")
        shown = f"[{name}]({page.name}), [JSON]({path.name})" if page.exists() else ""
        shown = shown or f"[{name}]({path.name})"
        lines.append(f"| {shown} | {record['question']} | {record['started_at'][:10]} |")
    return "\n".join(lines)


def _linked_sources(pages: dict[str, str]) -> set[str]:
    """Files outside ``docs/`` that pages link to."""
    found = set()
    for page, text in pages.items():
        for part in _FENCED.split(text)[::2]:
            places = {_resolved(repository_place(page), link) for link in _LINK.findall(part)}
            found |= {place for place in places if site_path(place).startswith("source/")}
    return found


def _resolved(place: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
