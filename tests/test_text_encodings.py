"""No file is read or written in the encoding of the machine's locale."""

import ast
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("fingpt_lightning", "callbacks")


def _calls_without(source: str) -> Iterator[int]:
    """The lines of calls that open text and name no encoding."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        modes = [word.value for word in node.args[:1] if isinstance(word, ast.Constant)]
        is_text = node.func.attr in ("read_text", "write_text") or (
            node.func.attr == "open" and modes and modes[0] in ("r", "w", "a", "x")
        )
        if is_text and "encoding" not in {word.arg for word in node.keywords}:
            yield node.lineno


def test_every_text_file_is_opened_in_a_named_encoding() -> None:
    files = [file for name in _PACKAGES for file in (_ROOT / name).rglob("*.py")]
    assert len(files) > 200
    found = [
        f"{file.relative_to(_ROOT)}:{line}"
        for file in files
        for line in _calls_without(file.read_text(encoding="utf-8"))
    ]
    assert not found


def test_a_call_without_an_encoding_is_found() -> None:
    source = "a.read_text()\nb.open('w')\nc.open('rb')\nd.read_text(encoding='utf-8')\n"
    assert list(_calls_without(source)) == [1, 2]
