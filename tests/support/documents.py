"""Reads the guides: their commands, examples, links and the names that they mention."""

import re
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
_SHELL = ("", "bash")
PLACEHOLDER = "..."
"""Placeholder in a guide for words that appeared before."""


class Block(NamedTuple):
    """A fenced block of a guide.

    Attributes:
        language: Language as written after the fence; empty for none.
        text: Lines of the block.
        line: Number of its first line in the file.
    """

    language: str
    text: str
    line: int


class ShellCommand(NamedTuple):
    """A command of a guide.

    Attributes:
        text: Command on one line, without its comment.
        document: Name of the file.
        line: Number of the line where its block begins.
    """

    text: str
    document: str
    line: int

    @property
    def words(self) -> list[str]:
        """The words as a shell splits them; placeholders are left out."""
        return [word for word in shlex.split(self.text) if word != PLACEHOLDER]


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a file, in order."""
    text = document.read_text()
    found = _FENCED.finditer(text)
    return [Block(m["language"], m["text"], text.count("\n", 0, m.start()) + 2) for m in found]


def shell_commands(document: Path) -> list[ShellCommand]:
    """The commands of a file in their order; a script, which begins with ``#!``, is one."""
    found = []
    for block in blocks(document):
        if block.language not in _SHELL:
            continue
        joined = re.sub(r"\s*\\\n\s*", " ", block.text)
        is_script = joined.startswith("#!")
        for line in [joined] if is_script else joined.splitlines():
            text = line if is_script else re.sub(r"(^|\s+)# .*$", "", line).strip()
            if text:
                found.append(ShellCommand(text, document.name, block.line))
    return found


def inline_code(document: Path) -> list[str]:
    """The texts between single backquotes, tables included."""
    without_blocks = _FENCED.sub("", document.read_text())
    return [text.replace("\\|", "|") for text in _INLINE.findall(without_blocks)]


def links(document: Path) -> list[str]:
    """The targets of links and pictures."""
    return _LINK.findall(_FENCED.sub("", document.read_text()))


def anchors(document: Path) -> set[str]:
    """The anchors of a file's headings, that may follow ``#`` in a link, as GitHub makes them."""
    return {_anchor(heading) for heading in _HEADING.findall(_FENCED.sub("", document.read_text()))}


def options_in(words: list[str]) -> Iterator[str]:
    """The options among words, without their values."""
    for word in words:
        if re.match(r"--[a-z]", word):
            yield word.partition("=")[0]


def _anchor(heading: str) -> str:
    kept = [
        character
        for character in heading.strip().lower()
        if character in " -_" or unicodedata.category(character)[0] in "LN"
    ]
    return "".join(kept).replace(" ", "-")
