import argparse
import re

import pytest

from fingpt_lightning.deploy.label_options import parse_options as label_options
from fingpt_lightning.shards.options import ANY_COUNT, Shard, shard, shard_command
from fingpt_lightning.terminal.command_line import WrongOptions

_LABEL = ("--model", "m", "--task", "fpb", "--input", "a.csv", "--output", "b.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/8", "I is outside [1, 8], for shards are counted from 1; a SLURM array is --array=1-8"),
        ("9/8", "'9/8': I is outside [1, 8], for shards are counted from 1"),
        ("1/0", "'1/0': N is below 1"),
        ("a/b", "'a/b' is not of the form I/N, such as 3/8"),
        ("3", "'3' is not of the form I/N"),
        ("3/8/2", "'3/8/2' is not of the form I/N"),
        ("-1/8", "'-1/8' is not of the form I/N"),
        ("1.5/8", "'1.5/8' is not of the form I/N"),
        ("/", "'/' is not of the form I/N"),
        ("", "'' is not of the form I/N"),
    ],
)
def test_a_wrong_shard_is_named_with_its_range(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        shard(text)
    with pytest.raises(WrongOptions, match=f"^argument --shard: .*{re.escape(message)}"):
        label_options([*_LABEL, f"--shard={text}"])


def test_a_shard_and_a_merge_exclude_each_other() -> None:
    with pytest.raises(WrongOptions, match="argument --merge: not allowed with argument --shard"):
        label_options([*_LABEL, "--shard", "1/8", "--merge"])
    with pytest.raises(WrongOptions, match="argument --merge: 0 is below 1"):
        label_options([*_LABEL, "--merge", "0"])
    assert label_options([*_LABEL, "--merge"]).merge == ANY_COUNT
    assert label_options([*_LABEL, "--merge", "8"]).merge == 8
    assert label_options([*_LABEL]).merge is None


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_unit_is_in_one_shard_and_sizes_differ_by_at_most_one(count: int) -> None:
    own = [
        [index for index in range(11) if Shard(number, count).has(index)]
        for number in range(1, count + 1)
    ]
    assert sorted(index for indices in own for index in indices) == list(range(11))
    assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize("merge", [("--merge",), ("--merge", "8"), ("--merge=8",)])
def test_the_command_of_a_shard_is_that_of_the_merge(merge: tuple[str, ...]) -> None:
    words = ["--input", "a b.csv", *merge, "--overwrite", "--task", "fpb"]
    expected = "fingpt label --input 'a b.csv' --task fpb --shard"
    assert shard_command("fingpt label", words) == expected
