"""A mapping of a YAML file whose keys and values are checked as they are read."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import yaml

from fingpt_lightning.files import not_utf8
from fingpt_lightning.terminal.messages import nearest
from fingpt_lightning.terminal.yaml_text import parse_yaml

T = TypeVar("T")
Word = TypeVar("Word", bound=str)


class YamlBlock:
    """Keys and values with their place, with which every message begins.

    Args:
        contents: Result of the YAML parser.
        place: File, and the keys that lead here.
        known: Keys that are allowed; None allows all.
        required: Keys that must exist.

    Raises:
        ValueError: ``contents`` is not a mapping, has an unknown key or lacks a required one.
    """

    def __init__(
        self,
        contents: object,
        place: str,
        known: Sequence[str] | None = None,
        required: Sequence[str] = (),
    ) -> None:
        if not isinstance(contents, dict):
            raise ValueError(f"{place}: keys and values are needed, not {contents!r}")
        self._contents = {str(key): value for key, value in contents.items()}
        self._place = place
        for key in self._contents:
            if known is not None and key not in known:
                advice = nearest(key, known) or f"; there are {', '.join(known)}"
                raise ValueError(f"{place}: no key {key!r}{advice}")
        for key in required:
            if key not in self._contents:
                raise ValueError(f"{place}: key {key!r} is missing")

    def __contains__(self, key: str) -> bool:
        return key in self._contents

    def is_list(self, key: str) -> bool:
        """Whether a key has a list of values."""
        return isinstance(self._contents[key], list)

    def error(self, key: str, reason: str) -> ValueError:
        """The error that ``key`` is wrong."""
        return ValueError(f"{self._place}: {key}: {reason}")

    def text(self, key: str, default: str | None = None) -> str:
        """Returns a text."""
        value = self._contents.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"a text is needed, not {value!r}")
        return value

    def value(self, key: str) -> str | None:
        """Returns a text, or a whole number or a truth value as text, or null."""
        value = self._contents[key]
        if value is not None and not isinstance(value, str | int):
            raise self.error(key, f"a text, a whole number or null is needed, not {value!r}")
        return None if value is None else str(value)

    def word(self, key: str, allowed: Sequence[Word]) -> Word:
        """Returns one of some words."""
        value = self.text(key)
        for word in allowed:
            if value == word:
                return word
        raise self.error(key, f"{value!r} is none of {', '.join(allowed)}{nearest(value, allowed)}")

    def texts(self, key: str) -> tuple[str, ...]:
        """Returns one text, or a list of them."""
        value = self._contents[key]
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items:
            raise self.error(key, f"a text or a list of texts is needed, not {value!r}")
        for item in items:
            if not isinstance(item, str):
                raise self.error(key, f"{item!r} is not text; write yes, no and numbers in quotes")
        return tuple(items)

    def integer(self, key: str, least: int) -> int:
        """Returns a whole number."""
        value = self._contents[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"a whole number, {least} or above, is needed, not {value!r}")
        return value

    def number(self, key: str) -> float:
        """Returns a number."""
        value = self._contents[key]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, f"a number is needed, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Returns true or false; false where the key is missing."""
        value = self._contents.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"true or false is needed, not {value!r}")
        return value

    def pattern(self, key: str) -> re.Pattern[str]:
        """Returns a regular expression whose dot matches line ends too."""
        return self._compiled(key, self.text(key))

    def replacements(self, key: str) -> dict[re.Pattern[str], str]:
        """Returns regular expressions and what replaces their matches."""
        texts = self.mapping(key, lambda block, name: block.text(name))
        return {self._compiled(key, pattern): text for pattern, text in texts.items()}

    def block(
        self, key: str, known: Sequence[str] | None = None, required: Sequence[str] = ()
    ) -> "YamlBlock":
        """Returns keys and values; none where ``key`` is missing and nothing is required."""
        return YamlBlock(self._contents.get(key, {}), f"{self._place}: {key}", known, required)

    def blocks(self, key: str, known: Sequence[str]) -> list["YamlBlock"]:
        """Returns a list of keys and values."""
        value = self._contents[key]
        if not isinstance(value, list) or not value:
            raise self.error(key, f"a list is needed, not {value!r}")
        return [
            YamlBlock(item, f"{self._place}: {key}, item {number}", known)
            for number, item in enumerate(value, start=1)
        ]

    def mapping(self, key: str, read: "Callable[[YamlBlock, str], T]") -> dict[str, T]:
        """Returns a mapping with any keys, its values read by one of the methods above."""
        inner = self.block(key)
        return {name: read(inner, name) for name in inner._contents}

    def _compiled(self, key: str, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise self.error(key, f"{pattern!r} is not a regular expression: {error}") from None


def read_yaml(path: Path, known: Sequence[str], required: Sequence[str]) -> YamlBlock:
    """Reads a file that is a mapping.

    Raises:
        ValueError: It is not YAML, or not such a mapping.
    """
    try:
        contents = parse_yaml(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError:
        raise ValueError(not_utf8(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}:{mark.line + 1 if mark else 1}: no YAML ({problem})") from None
    return YamlBlock(contents, str(path), known, required)
