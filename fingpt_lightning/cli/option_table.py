"""Makes the table of options that `fingpt_lightning.cli.early_options` reads.

``python -m fingpt_lightning.cli.option_table`` writes it anew; a test compares it with the parser.
"""

import contextlib
import importlib
import inspect
import json
import re
import types
from argparse import Action, ArgumentError, ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser as TypedParser
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from typing_extensions import override

from fingpt_lightning.cli.config_errors import explain
from fingpt_lightning.cli.early_options import TABLE, signature_digest
from fingpt_lightning.cli.trainer import DEFAULT_CLASSES, FinGPTCLI, forget_unions, options_of
from fingpt_lightning.data import FinancialInstructions, TextBlocks
from fingpt_lightning.files import write_whole
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning

COMMANDS = ("fit", "validate", "test", "predict")
_PACKAGES = ("jsonargparse", "lightning")
_MODULES = ("fingpt_lightning.modules", "fingpt_lightning.data")
_CLASSES: Mapping[str, tuple[type, Mapping[str, Any]]] = {
    "fingpt_lightning.modules.LowRankPretraining": (LowRankPretraining, {"preset": "gpt2-nano"}),
    "fingpt_lightning.modules.QuantizedFinetuning": (QuantizedFinetuning, {"base": "base"}),
    "fingpt_lightning.data.TextBlocks": (TextBlocks, {}),
    "fingpt_lightning.data.FinancialInstructions": (FinancialInstructions, {"tasks": ["fpb"]}),
}
_NO_WORD = "no-such-word"
_LIMIT = (
    r"( is (?:below [\d.]+|not above [\d.]+|outside [\[(][\d.]+, [\d.*]+[\])])(?: \([a-z ]+\))?)"
)
_NAMES = {int: "int", float: "float", bool: "bool", type(None): "null"}


def make_table() -> dict[str, Any]:
    """The table, as JSON holds it."""
    forget_unions()
    commands: dict[str, list[str]] = {}
    options: dict[str, dict[str, Any]] = {}
    for command in COMMANDS:
        parser = _parser_of(command)
        commands[command] = sorted(set(options_of(parser)))
        for action in _actions(parser):
            if (known := _described(action, action.dest)) and action.dest not in options:
                options[action.dest] = known
    return {
        "versions": {name: version(name) for name in _PACKAGES},
        "defaults": DEFAULT_CLASSES,
        "modules": {
            module: [
                n for n, v in vars(importlib.import_module(module)).items() if inspect.isclass(v)
            ]
            for module in _MODULES
        },
        "commands": commands,
        "options": options,
        "classes": {path: _class(*of) for path, of in _CLASSES.items()},
    }


def as_text(table: Mapping[str, Any]) -> str:
    """The table with one line per option."""
    text = json.dumps(table, indent=1)
    # A list of words, or what is known of one option, stays on a line.
    return (
        re.sub(r"(?<=: )[\[{]\n[^\[{}\]]*[\]}]", lambda found: _on_one_line(found[0]), text) + "\n"
    )


def _on_one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text)


class _Parsed(Exception):
    pass


def _parser_of(command: str) -> LightningArgumentParser:
    found: list[LightningArgumentParser] = []

    class Interrupted(FinGPTCLI):
        """Ends when the parser stands."""

        @override
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            found.append(parser)
            raise _Parsed

    with contextlib.suppress(_Parsed):
        Interrupted([command])
    return found[0]


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    for action in parser._actions:
        if isinstance(action.choices, Mapping):  # the parsers of the commands
            for below in action.choices.values():
                yield from _actions(below)
        else:
            yield action


def _described(action: Action, key: str) -> dict[str, Any]:
    """What the parser says about a wrong value of an option, and which values are not wrong."""
    kinds, words = _kinds(getattr(action, "_typehint", None))
    if kinds is None or "config" in key.split("."):
        return {}
    alone = TypedParser(exit_on_error=False)
    alone.add_argument(f"--{key}", type=action._typehint)  # type: ignore[attr-defined]
    try:
        alone.parse_args([f"--{key}", _NO_WORD])
    except ArgumentError as error:
        message = explain(str(error.message))
        found = re.fullmatch(rf"{re.escape(key)}: expected (.*), got '{_NO_WORD}'", message)
        assert found is not None, message
        return {"allowed": found[1], "kinds": sorted(kinds), **({"words": words} if words else {})}
    raise AssertionError(f"{key} takes {_NO_WORD!r}")


def _kinds(hint: Any) -> tuple[list[str] | None, list[str]]:
    """Names of the types in a union and the words of its literals; None where another is in it."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_kinds(part) for part in get_args(hint)]
        words = [word for _, inner in parts for word in inner]
        if any(kinds is None for kinds, _ in parts):
            return None, []
        return [name for kinds, _ in parts for name in kinds or ()], words
    if get_origin(hint) is Literal:
        return [], [str(word) for word in get_args(hint)]
    return ([_NAMES[hint]], []) if hint in _NAMES else (None, [])


def _class(kind: type, valid: Mapping[str, Any]) -> dict[str, Any]:
    source = Path(inspect.getfile(kind))
    parser = TypedParser(exit_on_error=False)
    parser.add_class_arguments(kind, "at")
    actions = {action.dest: action for action in parser._actions}
    settings = {}
    for name in inspect.signature(kind).parameters:
        settings[name] = _described(actions[f"at.{name}"], f"at.{name}")
        if (kinds := settings[name].get("kinds")) != []:
            settings[name] |= _refusal(kind, valid, name, kinds or ())
    return {
        "file": source.relative_to(Path(__file__).resolve().parents[2]).as_posix(),
        "name": kind.__name__,
        "signature": signature_digest(source.read_text(encoding="utf-8"), kind.__name__),
        "settings": settings,
    }


def _refusal(
    kind: type, valid: Mapping[str, Any], name: str, kinds: Sequence[str]
) -> dict[str, Any]:
    """What the class itself says of a number out of range, or of a word."""
    found: dict[str, Any] = {}
    is_either = {"int", "float"} <= set(kinds)
    for type_name, probe in {"int": -1, "float": -1.0}.items():
        message = _raised(kind, dict(valid) | {name: probe}) if type_name in kinds else ""
        if parts := re.fullmatch(rf"({name}[ =]){re.escape(str(probe))}{_LIMIT}", message):
            key = "share_refusal" if is_either and type_name == "float" else "refusal"
            found[key] = f"{parts[1]}{{value}}{parts[2]}"
    if not kinds:
        message = _raised(kind, dict(valid) | {name: _NO_WORD})
        if parts := re.fullmatch(rf"{name} '{_NO_WORD}' is none of ([\w, .-]+)", message):
            found["choices"] = parts[1].split(", ")
    return found


def _raised(kind: type, settings: Mapping[str, Any]) -> str:
    try:
        kind(**settings)
    except ValueError as error:
        return str(error)
    except Exception:  # of a type that the class does not expect: the parser refuses it before
        return ""
    return ""


if __name__ == "__main__":
    write_whole(TABLE, as_text(make_table()))
