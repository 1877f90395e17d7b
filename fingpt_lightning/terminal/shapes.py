"""The shape of a file's contents: what a command reads, held against what is there."""

from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

_KINDS: Mapping[type, str] = {
    NoneType: "nothing",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    bytes: "bytes",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """What a value of a file is, in the words of messages.

    >>> [kind_of(value) for value in (None, True, 1.5, "", [], {})]
    ['nothing', 'true', 'a number', 'a text', 'a list', 'an object']
    """
    if isinstance(value, bool):
        return str(value).lower()
    return _KINDS.get(type(value)) or f"a {type(value).__name__}"


def check_shape(found: object, shape: Any, place: str, name: str = "") -> None:
    """Refuses contents of another shape than the one that is read.

    Args:
        found: Value of a JSON or YAML file.
        shape: A type or union of types (``float`` is any number); ``[shape]``, a list of any
            length; a tuple of shapes, a list of that length; or the shapes of an object by key,
            where ``key?`` may be missing and ``*`` stands for every key.
        place: File and line, with which the message begins.
        name: Keys that lead to the value.

    Raises:
        ValueError: A value is of another kind, or missing; the message names its key.

    >>> check_shape({"tasks": {"fpb": None}}, {"tasks": {"*": {"n": float}}}, "results.json")
    Traceback (most recent call last):
    ...
    ValueError: results.json: 'tasks.fpb' holds nothing, not an object
    """
    if not _is_of(found, shape):
        raise ValueError(
            f"{place}: {repr(name) if name else 'it'} holds {kind_of(found)}, not {_told(shape)}"
        )
    if isinstance(found, dict) and isinstance(shape, dict):
        for key, inner in shape.items():
            plain = key.removesuffix("?")
            if plain == key != "*" and key not in found:
                raise ValueError(f"{place}: {_at(name, key)!r} is missing")
            for one in found if key == "*" else found.keys() & {plain}:
                check_shape(found[one], inner, place, _at(name, one))
    elif isinstance(found, list) and isinstance(shape, list | tuple):
        if isinstance(shape, tuple) and len(found) != len(shape):
            raise ValueError(f"{place}: {name!r} has {len(found)} values, not {len(shape)}")
        inners = shape if isinstance(shape, tuple) else shape * len(found)
        for place_there, (one, inner) in enumerate(zip(found, inners, strict=True)):
            check_shape(one, inner, place, _at(name, place_there))


def _at(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _is_of(found: object, shape: Any) -> bool:
    if isinstance(shape, dict | list | tuple):
        return isinstance(found, dict if isinstance(shape, dict) else list)
    kinds = get_args(shape) or (shape,)
    if isinstance(found, bool):
        return bool in kinds
    return isinstance(found, kinds) or (float in kinds and isinstance(found, int))


def _told(shape: Any) -> str:
    if isinstance(shape, dict | list | tuple):
        return _KINDS[type(shape)]
    return " or ".join(_KINDS[kind] for kind in get_args(shape) or (shape,))
