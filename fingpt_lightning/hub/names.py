"""Names of repositories and branches on the hub, by a rule, without asking the hub."""

import argparse
import re
from collections.abc import Callable

_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
_LONGEST = 96
_BRANCH = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._/-]*[A-Za-z0-9_])?")
_ADDRESS = re.compile(r"^(https?://[^/]*/|hf://)?(models/)?")
MAIN = "main"


def check_hub_name(name: str) -> str:
    """A name of the form OWNER/NAME as the hub takes it.

    Raises:
        ValueError: It is not one; the nearest one is named.

    >>> check_hub_name("my team/small model")
    Traceback (most recent call last):
    ...
    ValueError: 'my team/small model' is not of the form OWNER/NAME, of letters, digits, - _ and .;\
 did you mean my-team/small-model?
    """
    if is_hub_name(name):
        return name
    hint = _nearest_hub_name(name)
    raise ValueError(
        f"{name!r} is not of the form OWNER/NAME, of letters, digits, - _ and ."
        + ("" if hint is None else f"; did you mean {hint}?")
    )


def check_branch(name: str) -> str:
    """The name of a branch.

    Raises:
        ValueError: It is not one.
    """
    is_one = _BRANCH.fullmatch(name) and ".." not in name and "//" not in name
    if not is_one or name.endswith(".lock") or name.startswith("refs/"):
        raise ValueError(
            f"revision {name!r} is not the name of a branch: letters, digits, - _ . and /"
        )
    return name


def as_option(check: Callable[[str], str]) -> Callable[[str], str]:
    """A check of a name as the ``type`` of an option, whose message argparse shows."""

    def checked(text: str) -> str:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form OWNER/NAME as the hub takes it."""
    parts = name.split("/")
    return (
        len(parts) == 2
        and len(name) <= _LONGEST
        and all(_PART.fullmatch(part) for part in parts)
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def _nearest_hub_name(name: str) -> str | None:
    plain = _ADDRESS.sub("", name.strip()).strip("/").removesuffix(".git")
    parts = [part for part in plain.split("/") if part][:2]
    cleaned = [
        re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", part)))
        for part in parts
    ]
    cleaned = [part.strip("-.") for part in cleaned]
    found = "/".join(cleaned if len(cleaned) == 2 else ["OWNER", *cleaned])[:_LONGEST].strip("-./")
    return found if is_hub_name(found) else None
