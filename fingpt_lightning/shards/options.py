"""``--shard I/N`` and ``--merge [N]``, read without importing anything heavy."""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from fingpt_lightning.terminal.command_line import WrongOptions
from fingpt_lightning.terminal.numbers import positive_int

ANY_COUNT = 0
"""What ``--merge`` without a number stands for: as many shards as there are."""
_SHARD = re.compile(r"(\d{1,9})/(\d{1,9})")


@dataclass(frozen=True)
class Shard:
    """One of ``count`` shares of the work on an output, as ``I/N``.

    Attributes:
        number: Number of the share, from 1.
        count: Number of all shares.
    """

    number: int
    count: int

    def has(self, index: int) -> bool:
        """Whether a unit of the work is in this share: they are dealt out in turn.

        >>> [index for index in range(7) if Shard(2, 3).has(index)]
        [1, 4]
        """
        return index % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def shard(text: str) -> Shard:
    """A shard as ``I/N``.

    Raises:
        argparse.ArgumentTypeError: It is not of that form, or I is outside [1, N].

    >>> shard("3/8")
    Shard(number=3, count=8)
    """
    found = _SHARD.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 3/8")
    number, count = map(int, found.groups())
    if not 1 <= number <= count:
        of_array = f"; a SLURM array is --array=1-{count}" if number == 0 and count else ""
        raise argparse.ArgumentTypeError(
            f"{text!r}: I is outside [1, {count}], for shards are counted from 1{of_array}"
            if count
            else f"{text!r}: N is below 1"
        )
    return Shard(number, count)


def add_shard_options(parser: argparse.ArgumentParser, unit: str) -> None:
    """The options that split the work on an output among jobs, and join what they wrote.

    Args:
        parser: Parser that gets them.
        unit: What the work is dealt out by, in the plural, for ``--help``.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help=f"do only the I-th of N shares of the {unit}, counted from 1, as a job of an array",
    )
    group.add_argument(
        "--merge",
        type=positive_int,
        nargs="?",
        const=ANY_COUNT,
        metavar="N",
        help="join the N shards that such jobs wrote; without N as many as there are",
    )


def check_merge_options(options: argparse.Namespace) -> None:
    """Refuses options of how a model is run beside ``--merge``, which loads none.

    Those that answers depend on are compared with the settings of the shards instead.

    Args:
        options: Options of `add_shard_options` and of
            `fingpt_lightning.terminal.command_line.add_model_options`.

    Raises:
        WrongOptions: There is such an option.
    """
    if options.merge is None:
        return
    for name, default in (("dequantize", "auto"), ("device", None)):
        if getattr(options, name) != default:
            raise WrongOptions(f"--{name} has no effect with --merge, which loads no model")


def shard_command(command: str, words: list[str]) -> str:
    """The command line of a shard, to which ``I/N`` is added, from that of the merge.

    >>> shard_command("fingpt label", ["--input", "a b.csv", "--merge", "8"])
    "fingpt label --input 'a b.csv' --shard"
    """
    return shlex.join([*command.split(), *_without_merge(words), "--shard"])


def _without_merge(words: list[str]) -> Iterator[str]:
    follows_merge = False
    for word in words:
        is_count = follows_merge and not word.startswith("-")
        follows_merge = word == "--merge"
        is_merge = follows_merge or word.startswith("--merge=")
        if not is_count and not is_merge and word != "--overwrite":
            yield word
