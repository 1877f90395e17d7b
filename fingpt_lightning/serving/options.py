"""The options of ``fingpt serve``, read without importing anything heavy."""

import argparse
import ipaddress
import os
from pathlib import Path

from fingpt_lightning.terminal.command_line import (
    OptionParser,
    WrongOptions,
    add_chat_option,
    add_model_options,
    named_paths,
    names,
)
from fingpt_lightning.terminal.numbers import port, positive_int

API_KEY = "FINGPT_API_KEY"
"""The environment variable with the key that requests have to name."""


def build_parser() -> OptionParser:
    """The parser of ``fingpt serve``."""
    parser = OptionParser(
        "fingpt serve", "A server of a model and its adapters, with OpenAI's routes."
    )
    add_model_options(parser)
    add_chat_option(parser)
    add = parser.add_argument
    add("--adapters", type=named_paths, help="NAME=FOLDER,... each served as a model of its name")
    add("--name", help="name of the model itself; default: that of its folder")
    add("--host", default="127.0.0.1", help="address to listen at; default: %(default)s")
    add("--port", type=port, default=8000, help="0 takes a free one; default: %(default)s")
    add(
        "--tasks", type=names, help="tasks of /v1/label, by name or YAML file; default: all shipped"
    )
    add("--batch_size", type=positive_int, default=32, help="texts at once; default: %(default)s")
    add(
        "--max_queue",
        type=positive_int,
        default=256,
        help="requests that may wait; more are answered with status 503; default: %(default)s",
    )
    add(
        "--max_body_kib", type=positive_int, default=1024, help="of a request; default: %(default)s"
    )
    add("--timeout_s", type=positive_int, default=300, help="of a request; default: %(default)s")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt serve``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing or has an invalid value, an adapter has the
            name of the model, or others could reach the server without a key.
        SystemExit: With status 0, after ``--help`` has been answered.
    """
    options = build_parser().read(words)
    if options.adapter and options.adapters:
        raise WrongOptions("--adapter and --adapters: give one of them")
    if options.adapters and (name := served_name(options)) in options.adapters:
        raise WrongOptions(f"--adapters {name}: the model has this name; give it another by --name")
    if not is_loopback(options.host) and not os.environ.get(API_KEY):
        raise WrongOptions(
            f"--host {options.host} can be reached from other machines: set {API_KEY} to a key that"
            " requests have to name"
        )
    return options


def served_name(options: argparse.Namespace) -> str:
    """The name under which the model itself is served."""
    return options.name or Path(options.model.rstrip("/")).name


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
