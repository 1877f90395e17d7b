"""Wrong options of the Trainer's commands, named before anything heavy is imported.

What the options are is read from a table that `fingpt_lightning.cli.option_table` makes with the
real parser. What the table does not decide is left to that parser: a command line that it takes is
never refused here, and a message is the one that it would give.
"""

import ast
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fingpt_lightning.cli.config_errors import broken_config, check_configs, where
from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.terminal.messages import nearest
from fingpt_lightning.terminal.yaml_text import parse_yaml

TABLE = Path(__file__).with_name("option_table.json")
SUBJECTS = ("model", "data")
"""The options whose value is a class with settings, and which have a default class."""
_ROOT = Path(__file__).resolve().parents[2]
_LEFT_TO_THE_PARSER = ("-h", "--help", "--print_config")
_WORD = re.compile(r"[A-Za-z][\w./-]*")
_DECIMAL = re.compile(r"[+-]?\d+\.\d+")
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "y", "n", "null", "none", "nan", "inf"}
_INIT_ARGS = "init_args"


class Option(NamedTuple):
    """What is known of an option or of a setting of a class.

    Attributes:
        allowed: What may be given, in the parser's words; None where its values are not checked.
        kinds: Names of the types that ``allowed`` lists: int, float, bool and null.
        words: Words that ``allowed`` lists beside them.
        refusal: Message of the class for a number out of range, with ``{value}`` in its place.
        share_refusal: That for a float, where integers have another range.
        choices: Words that the class allows where its type is any text.
    """

    allowed: str | None = None
    kinds: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    refusal: str | None = None
    share_refusal: str | None = None
    choices: tuple[str, ...] = ()

    def is_wrong(self, value: object) -> bool:
        """Whether the parser surely refuses a value, text of the command line or one of a config.

        >>> Option("int or null", ("int", "null")).is_wrong("many")
        True
        """
        if self.allowed is None:
            return False
        if isinstance(value, bool):
            return not self.words and "bool" not in self.kinds
        if isinstance(value, float) or (isinstance(value, str) and _DECIMAL.fullmatch(value)):
            return not self.words and not {"float", "bool"} & set(self.kinds)
        if not isinstance(value, str) or value in self.words:
            return False
        return _WORD.fullmatch(value) is not None and value.lower() not in _YAML_WORDS

    def message(self, key: str, value: object) -> str:
        """The parser's message about a wrong value."""
        if isinstance(value, str) and _DECIMAL.fullmatch(value):
            value = float(value)
        hint = nearest(str(value), self.words)
        return f"{key}: expected {self.allowed}, got {str(value)!r}{hint}"

    def refused(self, name: str, value: object) -> str | None:
        """The message of the class about a value of the right type; None where it takes it."""
        if self.choices and isinstance(value, str) and value not in self.choices:
            known = ", ".join(self.choices)
            return f"{name} {value!r} is none of {known}{nearest(value, self.choices)}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if "int" not in self.kinds:
            value = float(value)
        refusal = self.refusal
        if isinstance(value, float) and self.share_refusal is not None:
            refusal = self.share_refusal
        if refusal is None or _is_within(value, refusal):
            return None
        return refusal.format(value=value)


class OptionTable(NamedTuple):
    """The options of the Trainer's commands and the settings of our classes.

    Attributes:
        commands: Names of the options of each command, as the parser lists them.
        options: What is known of each option.
        classes: What is known of each setting of a class, by the class's path.
        modules: Classes of each module that a class path may name.
        defaults: Class paths of model and data where none is named.
    """

    commands: dict[str, list[str]]
    options: dict[str, Option]
    classes: dict[str, dict[str, Option]]
    modules: dict[str, list[str]]
    defaults: dict[str, str]


class GivenSettings(NamedTuple):
    """What configs and command line set, as far as it matters before the run.

    Attributes:
        configs: Files of ``--config``, in order.
        values: Values of options outside of model and data, by dotted key.
        classes: Class path of model and data; the default where none is named.
        init_args: Settings of those classes that are given.
        known: What is known of each setting of those classes; nothing of a class that is not ours.
    """

    configs: list[str]
    values: dict[str, Any]
    classes: dict[str, str]
    init_args: dict[str, dict[str, Any]]
    known: dict[str, dict[str, Option]]


def signature_digest(source: str, class_name: str) -> str | None:
    """A digest of the parameters of a class's ``__init__``, read without importing it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                    return hashlib.sha256(ast.unparse(inner.args).encode()).hexdigest()[:16]
    return None


def read_table() -> OptionTable | None:
    """The table; None where it was made with other versions of the parser.

    A class whose parameters are others than those in the table is left out.
    """
    if not TABLE.exists():
        return None
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    if any(version(name) != made_with for name, made_with in content["versions"].items()):
        return None
    classes = {}
    for path, known in content["classes"].items():
        if _digest_of(known["file"], known["name"]) == known["signature"]:
            classes[path] = {name: _option(one) for name, one in known["settings"].items()}
    options = {name: _option(one) for name, one in content["options"].items()}
    return OptionTable(
        content["commands"], options, classes, content["modules"], content["defaults"]
    )


def check_options(
    command: str, words: Sequence[str], table: OptionTable, own_options: Sequence[str] = ()
) -> GivenSettings | None:
    """Refuses a command line that the parser would refuse.

    Args:
        command: Command of the Trainer.
        words: Words after the command; each ``--config`` names a file, or is YAML.
        table: Result of `read_table`.
        own_options: Options of a command that takes those of ``command`` beside them, among which
            the nearest is searched too.

    Returns:
        Settings that are given; None where the parser does something else, such as printing help.

    Raises:
        ConfigError: An option is unknown, or has a value of a wrong type, or a config is wrong.
    """
    if any(word.partition("=")[0] in _LEFT_TO_THE_PARSER or ".help" in word for word in words):
        return None
    try:
        check_configs(words)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _Reader(command, words, table, own_options).read()


class _Reader:
    """Reads one command line."""

    def __init__(
        self, command: str, words: Sequence[str], table: OptionTable, own_options: Sequence[str]
    ) -> None:
        self._words, self._table, self._own_options = words, table, own_options
        self._names = table.commands[command]
        keys = {name.lstrip("-").rstrip("+") for name in self._names}
        self._keys = {key for key in keys if not key.endswith(".help")}
        self._groups = {key.rpartition(".")[0] for key in self._keys if "." in key}
        self._unknown: list[str] = []
        self._chosen: dict[str, str] = {}
        self._given: dict[str, dict[str, Any]] = {subject: {} for subject in SUBJECTS}
        self._values: dict[str, Any] = {}
        self._configs: list[str] = []

    def read(self) -> GivenSettings:
        for key, value in self._pairs():
            if key in ("config", "c"):
                self._configs.append(value)
                self._read_config(value)
            else:
                self._take(key, _Text(value))
        classes = {subject: self._class_of(subject) for subject in SUBJECTS}
        known = {key: self._table.classes.get(path, {}) for key, path in classes.items()}
        for subject in SUBJECTS:
            if known[subject]:
                self._check_subject(subject, known[subject])
        if self._unknown:
            first = self._unknown[0]
            if first.startswith("--"):
                name = first.partition("=")[0]
                known_names = [*self._own_options, *self._names]
                raise ConfigError(f"no option {name}{nearest(name, known_names)}")
            raise ConfigError(f"unrecognized arguments: {' '.join(self._unknown)}")
        init_args = {
            subject: {name: _loaded(value) for name, value in given.items()}
            for subject, given in self._given.items()
        }
        values = {key: _loaded(value) for key, value in self._values.items()}
        return GivenSettings(self._configs, values, classes, init_args, known)

    def _class_of(self, subject: str) -> str:
        return self._chosen.get(subject, self._table.defaults[subject])

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Options with their values; what is none goes to the unknown words."""
        position = 0
        while position < len(self._words):
            word = self._words[position]
            position += 1
            name, equals, value = word.partition("=")
            key = name.lstrip("-").rstrip("+")
            if not name.startswith("--") and name != "-c":
                self._unknown.append(word)
                continue
            subject, _, setting = key.partition(".")
            known = name in self._names or (subject in SUBJECTS and setting != "")
            if not known and self._may_be_known(key):
                raise _LeftError
            if not equals:
                has_value = position < len(self._words) and _is_value(self._words[position])
                if not has_value and known and name in self._names:
                    shown = "-c/--config" if key in ("config", "c") else self._shown(name)
                    raise ConfigError(f"argument {shown}: expected one argument")
                if not has_value and known:
                    raise _LeftError
                if has_value:
                    value = self._words[position]
                    position += 1
            if known:
                yield key, value
            else:
                self._unknown += [word] if equals or not value else [word, value]

    def _shown(self, name: str) -> str:
        """An option as argparse names it: all its forms."""
        bare = name.rstrip("+")
        return f"{bare}/{bare}+" if f"{bare}+" in self._names else bare

    def _may_be_known(self, key: str) -> bool:
        """Whether a key is the beginning of an option, or lies inside of the value of one."""
        if any(known.startswith(key) for known in self._keys):
            return True
        inside = {known for known in self._keys if known not in self._groups}
        return any(key.startswith(f"{known}.") for known in inside)

    def _take(self, key: str, value: Any) -> None:
        subject, _, setting = key.partition(".")
        if subject in SUBJECTS:
            self._take_subject(subject, setting, value)
            return
        option = self._table.options.get(key)
        if option is not None and option.is_wrong(value):
            raise ConfigError(option.message(key, value))
        self._values[key] = value

    def _take_subject(self, subject: str, setting: str, value: Any) -> None:
        setting = setting.removeprefix(f"{_INIT_ARGS}.")
        if setting in ("", "class_path"):
            path = str(value)
            module, _, name = path.rpartition(".")
            known = self._table.modules.get(module)
            if known is not None and name not in known:
                raise ConfigError(f"{subject}: no class {path!r}{nearest(name, known)}")
            if path != self._class_of(subject) and self._given[subject]:
                raise _LeftError  # the settings before are those of another class
            self._chosen[subject] = path
            return
        self._given[subject][setting] = value

    def _check_subject(self, subject: str, known: Mapping[str, Option]) -> None:
        for setting, value in self._given[subject].items():
            name = setting.partition(".")[0]
            if name not in known:
                hint = nearest(name, known)
                place = where(name, self._words)
                raise ConfigError(f"{subject} has no setting {name!r}{hint}{place}")
            if setting == name and known[name].is_wrong(value):
                raise ConfigError(known[name].message(f"{subject}.{name}", value))

    def _read_config(self, given: str) -> None:
        content, folder = _content(given, self._words)
        for key, value in content.items():
            if isinstance(value, str) and value.endswith(".yaml") and (folder / value).is_file():
                value = _content(str(folder / value), self._words)[0]
            self._take_group(str(key).rstrip("+"), value)

    def _take_group(self, key: str, value: Any) -> None:
        if key in SUBJECTS:
            self._take_class(key, value)
        elif key in self._groups and isinstance(value, dict):
            for name, inner in value.items():
                self._take_group(f"{key}.{str(name).rstrip('+')}", inner)
        elif key in self._keys:
            self._take(key, value)
        elif self._lies_inside(key):
            raise _LeftError
        else:
            self._refuse_setting(key, value)

    def _lies_inside(self, key: str) -> bool:
        inside = self._keys - self._groups
        return any(key.startswith(f"{known}.") for known in inside)

    def _take_class(self, subject: str, value: Any) -> None:
        if isinstance(value, str):
            self._take_subject(subject, "", value)
        elif isinstance(value, dict):
            if "class_path" in value:
                self._take_subject(subject, "class_path", value["class_path"])
            inner = value.get(_INIT_ARGS)
            settings = {k: v for k, v in value.items() if k not in ("class_path", _INIT_ARGS)}
            for name, one in (settings | (inner if isinstance(inner, dict) else {})).items():
                self._take_subject(subject, str(name), one)

    def _refuse_setting(self, key: str, value: Any) -> None:
        while isinstance(value, dict) and value:
            inner, value = next(iter(value.items()))
            key = f"{key}.{inner}"
        first, last = key.partition(".")[0], key.rpartition(".")[2]
        known = [name.removeprefix("--") for name in self._names]
        parts = {name.partition(".")[0] for name in known}
        meant = nearest(key, known) or nearest(first, parts - {first})
        raise ConfigError(f"no setting {key!r}{meant}{where(last, self._words)}")


class _LeftError(Exception):
    """The command line is left to the parser."""


class _Text(str):
    """A value as the command line has it, which is YAML."""


def _loaded(value: Any) -> Any:
    if isinstance(value, _Text):
        with suppress(yaml.YAMLError):
            return yaml.safe_load(value)
        return str(value)
    return value


def given_settings(
    command: str, words: Sequence[str], own_options: Sequence[str] = ()
) -> GivenSettings | None:
    """As `check_options`, and None where the table does not decide."""
    table = read_table()
    if table is None:
        return None
    with suppress(_LeftError):
        return check_options(command, words, table, own_options)
    return None


def check_ranges(given: GivenSettings) -> None:
    """Refuses numbers out of range, and words that a class does not know.

    Raises:
        ConfigError: There is one.
    """
    for subject, known in given.known.items():
        for name, option in known.items():
            message = option.refused(name, given.init_args[subject].get(name))
            if message is not None:
                raise ConfigError(message)


def _content(given: str, words: Sequence[str]) -> tuple[dict[str, Any], Path]:
    path = Path(given)
    is_file = len(given) < 4096 and "\n" not in given and path.is_file()
    try:
        text = path.read_text(encoding="utf-8") if is_file else given
        content = parse_yaml(text, path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError):
        content = None
    if isinstance(content, dict):
        return content, path.parent
    if is_file and (reason := broken_config(words)) is not None:
        raise ConfigError(reason)
    raise _LeftError


def _is_value(word: str) -> bool:
    """Whether argparse takes a word for the value of the option before it."""
    if not word.startswith("-") or word == "-" or " " in word:
        return True
    return re.fullmatch(r"-\d+|-\d*\.\d+", word) is not None


def _is_within(value: float | int, refusal: str) -> bool:
    """Whether a number is in the range of a message; of an infinite or no number, where it says."""
    refusal = re.sub(r" \([a-z ]+\)$", "", refusal)  # what a number in that range stands for
    is_number = math.isfinite(value)
    if found := re.search(r"is below ([\d.]+)$", refusal):
        return not is_number or value >= float(found[1])
    if found := re.search(r"is not above ([\d.]+)$", refusal):
        return not is_number or value > float(found[1])
    found = re.search(r"is outside ([\[(])([\d.]+), (\d+\*\*\d+|[\d.]+)([\])])$", refusal)
    assert found is not None, refusal
    base, _, power = found[3].partition("**")
    low, high = float(found[2]), float(base) ** float(power or 1)
    above = value >= low if found[1] == "[" else value > low
    return above and (value <= high if found[4] == "]" else value < high)


def _option(known: Mapping[str, Any]) -> Option:
    lists = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
    return Option(**{**known, **lists})


@functools.cache
def _digest_of(file: str, class_name: str) -> str | None:
    path = _ROOT / file
    return (
        signature_digest(path.read_text(encoding="utf-8"), class_name) if path.is_file() else None
    )
