"""Turns the parser's messages into one line that a person can act on.

jsonargparse lists every type that it tried; what helps is the key, the value, what is allowed, the
nearest right name, and the line of the config that is wrong.
"""

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from fingpt_lightning.files import not_utf8
from fingpt_lightning.terminal.messages import nearest
from fingpt_lightning.terminal.shapes import kind_of
from fingpt_lightning.terminal.yaml_text import parse_yaml

_LONGEST_QUOTE = 200


def explain(
    message: str,
    options: Iterable[str] = (),
    default_classes: Mapping[str, str] | None = None,
    words: Sequence[str] = (),
) -> str:
    r"""One line for a message of jsonargparse; a message it does not know only loses its breaks.

    Args:
        message: Message of the parser.
        options: All options of the command, among which the nearest is searched.
        default_classes: Class path that a key has when a config names none.
        words: Command line, whose configs are searched for the wrong key.

    >>> explain('Parser key "trainer.max_steps": Expected a <class \'int\'>. Got value: x')
    "trainer.max_steps: expected int, got 'x'"
    >>> explain("unrecognized arguments: --trainer.max_stps 3", ["--trainer.max_steps"])
    'no option --trainer.max_stps; did you mean --trainer.max_steps?'
    """
    text = " ".join(message.split())
    key = ""
    for part in re.findall(r'Parser key "([\w.]+)":', text):  # that of a block repeats its group
        key = part if not key or part.startswith(f"{key}.") else f"{key}.{part}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", text):
        name = found[1]
        class_path = re.search(r"'class_path': '([\w.]+)'", text)
        class_name = class_path[1] if class_path else (default_classes or {}).get(key)
        known = _settings_of(class_name) if class_name else []
        return f"{key} has no setting {name!r}{nearest(name, known)}{where(name, words)}"
    if found := re.match(r"unrecognized arguments: (--[^\s=]+)", text):
        return f"no option {found[1]}{nearest(found[1], options)}"
    if found := re.search(r"does not accept option '([\w.]+)'", text):
        known = [option.removeprefix("--") for option in options]
        first, last = found[1].partition(".")[0], found[1].rpartition(".")[2]
        parts = {option.partition(".")[0] for option in known}
        meant = nearest(found[1], known) or nearest(first, parts - {first})
        return f"no setting {found[1]!r}{meant}{where(last, words)}"
    if found := re.search(r"Problem with given class_path '([\w.]+)'", text):
        module, _, name = found[1].rpartition(".")
        return f"{key}: no class {found[1]!r}{nearest(name, _classes_of(module))}"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        example = (default_classes or {}).get(key)
        such = f" such as {example}" if example else ""
        return f"{key}: {found[1]!r} is not a class path{such}"
    if "Unexpected config" in text and (reason := broken_config(words)):
        return reason
    if "Problems parsing config" in text:
        return _first_broken(words) or text
    innermost = text.rpartition('Parser key "')[2]
    if found := re.search(
        r"Expected an? (.+?)\. Got value: (.*?)(?= - Expected| - Not a valid subclass|$)", innermost
    ):
        return _expected(key, found[1], found[2])
    found = re.search(r"Subtypes: \[(.*?)\] Errors: (.*?) Given value type: .*?: (.*?)$", innermost)
    if found and "Namespace(" in found[3]:  # a class that refused its settings
        return re.sub(r"^- (.*?)( - Expected a <class 'NoneType'>)?$", r"\1", found[2])
    if found:
        value = re.sub(r" (- Expected a|Given value type) .*", "", found[3])
        return _expected(key, found[1], value)
    return re.sub(r'^Parser key "([\w.]+)": ?(- )?', r"\1: ", text)


def _settings_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    return [] if found is None else list(inspect.signature(found).parameters)


def _classes_of(module: str) -> list[str]:
    try:
        found = vars(importlib.import_module(module))
    except (ImportError, ValueError):
        return []
    return [name for name, value in found.items() if inspect.isclass(value)]


def where(name: str, words: Sequence[str]) -> str:
    """The line of a config, or of a block that it names, which holds the key ``name``.

    Args:
        name: Last part of a setting.
        words: Command line, which names the configs.
    """
    for path in _configs(words):
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        ):
            if re.match(rf"\s*(- )?[{{]?\s*{re.escape(name)}\s*:", line):
                return f" ({path} line {number})"
    return ""


def check_configs(words: Sequence[str]) -> None:
    """Checks configs before they are parsed, for contents that parsing would never return from.

    Args:
        words: The command line, which names the configs.

    Raises:
        ValueError: A config is a pipe or a device, or its aliases expand to too many values.
    """
    for path in _given(words):
        if _is_special(path):
            raise ValueError(f"config {path} is neither a file nor a folder")
    for path in _configs(words):
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # the parser has its own message
            parse_yaml(path.read_text(encoding="utf-8"), path)


def _given(words: Sequence[str]) -> list[Path]:
    return [
        Path(word.partition("=")[2] or following)
        for word, following in zip(words, [*words[1:], ""], strict=False)
        if word.partition("=")[0] in ("--config", "-c")
    ]


def _configs(words: Sequence[str]) -> list[Path]:
    found = [path for path in _given(words) if _is_file(path)]
    for path in list(found):
        blocks = re.findall(
            r"^\w+:\s*(\S+\.yaml)\s*$", path.read_text(encoding="utf-8", errors="replace"), re.M
        )
        found += [path.parent / block for block in blocks if (path.parent / block).is_file()]
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a config may stand on the command line itself
        return False


def _is_special(path: Path) -> bool:
    try:
        return path.exists() and not (path.is_file() or path.is_dir())
    except (OSError, ValueError):
        return False


def _first_broken(words: Sequence[str]) -> str | None:
    """The place of the first config that is not YAML."""
    for path in _configs(words):
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            return f"{path} line {line} is not YAML: {error.problem}"
        except UnicodeDecodeError:
            return not_utf8(path)
        except yaml.YAMLError as error:
            return f"{path} is not YAML: {' '.join(str(error).split())[:_LONGEST_QUOTE]}"
    return None


def undecodable(words: Sequence[str]) -> str:
    """The message where a config is not text.

    Args:
        words: Command line, which names the configs.
    """
    return _first_broken(words) or "a config is not UTF-8 text"


def broken_config(words: Sequence[str]) -> str | None:
    """What is wrong with the first config that holds no settings; its contents are not echoed.

    Args:
        words: Command line, which names the configs.
    """
    if broken := _first_broken(words):
        return broken
    for path in _configs(words):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            return f"{path} is not a config: it holds {kind_of(found)}, not settings"
    return None


def _expected(key: str, types: str, value: str) -> str:
    words = re.findall(r"'(.*?)'", " ".join(re.findall(r"typing\.Literal\[(.*?)\]", types)))
    return f"{key}: expected {_allowed(types)}, got {value!r}{nearest(value, words)}"


def _allowed(types: str) -> str:
    """``int, float or null`` for ``<class 'int'>, <class 'float'>, <class 'NoneType'>``."""
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", ""), types)
    names = ["null" if name == "NoneType" else name for name in _split(types)]
    if {"int", "float"} <= set(names):
        # Python gives a union in the order in which the process first met its types.
        names.remove("int")
        names.insert(names.index("float"), "int")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _split(types: str) -> list[str]:
    """Splits at the commas outside of brackets."""
    names, depth = [""], 0
    for character in types:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names]
