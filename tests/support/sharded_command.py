"""A command that many jobs share by ``--shard`` and ``--merge``, run in this process."""

from collections.abc import Iterable, Mapping, Sequence

import pytest

from fingpt_lightning.cli.main import main


class ShardedCommand:
    """Runs a command that computes with a model; gives status, output and error.

    Args:
        command: Name of the command.
        given: Options with their values where a call names no other; with ``--output``.
        capsys: Fixture that captures what is printed.
    """

    def __init__(
        self, command: str, given: Mapping[str, str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._command, self._given, self._capsys = command, given, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        given = dict(self._given)
        if "--merge" not in words:
            given["--device"] = "cpu"
        defaults = [x for name, value in given.items() if name not in words for x in (name, value)]
        status = 0
        self._capsys.readouterr()
        try:
            main([self._command, *defaults, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = self._capsys.readouterr()
        return status, captured.out, captured.err

    def run_shards(self, count: int, *words: str) -> None:
        """Runs all shards of an output, which succeed."""
        for number in range(1, count + 1):
            status, _, error = self("--shard", f"{number}/{count}", *words)
            assert status == 0, error

    def assert_merge_refuses(
        self, own: Sequence[str], others: Iterable[tuple[Sequence[str], str]]
    ) -> None:
        """Beside ``--merge`` no option differs from the shards', and none is of how a model runs.

        Args:
            own: Words with which the shards were run.
            others: Other words, each with the part of the message that names the difference.
        """
        for words, message in others:
            status, _, error = self("--merge", *words)
            assert status == 1
            assert f"the shards of {self._given['--output']} are {message}" in error
        for name, value in (("--device", "cpu"), ("--dequantize", "never")):
            status, _, error = self("--merge", *own, name, value)
            assert status == 2
            assert f"{name} has no effect with --merge, which loads no model" in error
