from contextlib import ExitStack
from pathlib import Path

import pytest

from fingpt_lightning.files import SETTINGS, check_settings, write_json
from fingpt_lightning.shards.folders import (
    begun_shard,
    find_shards,
    finish_shard,
    merged_shards,
    shard_folder,
)
from fingpt_lightning.shards.options import ANY_COUNT, Shard

COMMAND = "fingpt label --shard"


@pytest.mark.parametrize(("count", "named"), [(ANY_COUNT, "N"), (2, "2")])
def test_a_merge_that_is_run_twice_is_told_so(tmp_path: Path, count: int, named: str) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("merged")
    with pytest.raises(FileNotFoundError) as failed:
        find_shards(output, count, COMMAND)
    assert str(failed.value) == (
        f"there is no shard of {output}, which is there already: a merge removes its shards; to"
        f" make it anew, the first of {named} jobs runs: {COMMAND} 1/{named}"
    )


@pytest.mark.parametrize(
    ("name", "advice"), [("dtype", "--dtype bfloat16 goes on with it, else "), ("model", "")]
)
def test_a_dtype_that_auto_took_before_is_named(tmp_path: Path, name: str, advice: str) -> None:
    check_settings(tmp_path, {name: "bfloat16"})
    check_settings(tmp_path, {name: "bfloat16"})
    with pytest.raises(ValueError, match="now 'float32'") as failed:
        check_settings(tmp_path, {name: "float32"})
    assert str(failed.value).endswith(f"now 'float32'; {advice}remove it or --overwrite")


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        (
            "dtype",
            " and the --dtype of the other; --dtype auto follows the machine: give all jobs of an"
            " array the same type",
        ),
        ("model", ""),
    ],
)
def test_dtypes_that_auto_took_on_two_machines_are_made_equal_by_name(
    tmp_path: Path, name: str, ending: str
) -> None:
    output = tmp_path / "out.jsonl"
    for number, value in enumerate(("bfloat16", "float32"), start=1):
        folder = shard_folder(output, Shard(number, 2))
        with begun_shard(folder, {name: value}, False):
            write_json(folder / "part.json", {})
            finish_shard(folder, {})
        assert (folder / SETTINGS).is_file()
    with pytest.raises(ValueError, match="shard") as failed, ExitStack() as stack:
        stack.enter_context(merged_shards(output, 2, COMMAND, {}))
    assert str(failed.value) == (
        f"shard 2/2 of {output} is of {name} 'float32', shard 1/2 of 'bfloat16'; run one of them"
        f" again with --overwrite{ending}"
    )
