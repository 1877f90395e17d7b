"""The folders of shards, beside the output that they are merged into.

``OUTPUT.shard-3-of-8`` belongs to one process at a time and holds files that are whole, the
settings that they are of, and, once there is nothing more to come, a record of them. So a job that
was killed resumes, one that is run twice does its work once, and a merge finds what is missing.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from fingpt_lightning.files import (
    OWNER,
    PARTIAL,
    SETTINGS,
    check_settings,
    clear_owned,
    is_unused,
    owned,
    read_json,
    write_json,
)
from fingpt_lightning.shards.options import ANY_COUNT, Shard

_RECORD = "shard.json"
_ONE_DTYPE = (
    " and the --dtype of the other; --dtype auto follows the machine: give all jobs of an array"
    " the same type"
)
_LISTED = 5
"""Missing shards whose commands are printed; a line has to end somewhere."""


class FinishedShard(NamedTuple):
    """A shard with nothing more to come.

    Attributes:
        shard: Number of the shard, and of all.
        folder: Folder of its files.
        facts: Facts that `finish_shard` was given.
    """

    shard: Shard
    folder: Path
    facts: dict[str, Any]


def shard_folder(output: Path, shard: Shard) -> Path:
    """The folder of a shard.

    >>> shard_folder(Path("out.jsonl"), Shard(3, 8)).name
    'out.jsonl.shard-3-of-8'
    """
    return _beside(output, f"shard-{shard.number}-of-{shard.count}")


@contextmanager
def begun_shard(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[bool]:
    """Makes the folder of a shard, or finds that of an earlier job, and owns it until the end.

    A folder without a whole file counts as empty: whatever its settings, nothing is lost with it.

    Args:
        folder: Folder of the shard.
        settings: Settings that determine the files, as JSON.
        overwrite: Whether what is there is deleted.

    Yields:
        Whether the shard is finished already.

    Raises:
        InUseError: Another process works on this shard.
        ValueError: What is there is of other settings.
    """
    with owned(folder):
        if overwrite or is_unused(folder, SETTINGS):
            clear_owned(folder)
        try:
            check_settings(folder, settings)
            yield (folder / _RECORD).is_file()
        finally:
            if is_unused(folder, SETTINGS):
                clear_owned(folder)


def finish_shard(folder: Path, facts: Mapping[str, Any]) -> None:
    """Notes that a shard is whole.

    Args:
        folder: Folder of `begun_shard`.
        facts: Facts for the merge that are not among the settings, as JSON.
    """
    files = {
        path.name: path.stat().st_size
        for path in sorted(folder.iterdir())
        if path.name not in (OWNER, SETTINGS, _RECORD) and path.suffix != PARTIAL
    }
    write_json(folder / _RECORD, {"files": files, "facts": dict(facts)})


def find_shards(output: Path, count: int, command: str) -> list[FinishedShard]:
    """All shards of an output, in order.

    Args:
        output: What they are to be merged into.
        count: Number of the shards, or `ANY_COUNT`.
        command: Command line of a shard, but for ``I/N`` at its end.

    Raises:
        FileNotFoundError: Shards are missing, unfinished or damaged; the message has the commands
            that make them.
        ValueError: It cannot be told how many shards there are to be.
    """
    counts = _counts_of(output)
    if not counts and output.exists():
        raise FileNotFoundError(
            f"there is no shard of {output}, which is there already: a merge removes its shards; to"
            f" make it anew, the first of {count or 'N'} jobs runs: {command} 1/{count or 'N'}"
        )
    if count == ANY_COUNT:
        if not counts:
            raise FileNotFoundError(
                f"there is no shard of {output}; the first of N jobs runs: {command} 1/N"
            )
        if len(counts) > 1:
            listed = " and ".join(f"of {number}" for number in counts)
            raise ValueError(
                f"there are shards {listed} of {output}; name the number, such as --merge"
                f" {counts[-1]}"
            )
        (count,) = counts
    found, faults = [], {}
    for shard in (Shard(number, count) for number in range(1, count + 1)):
        folder = shard_folder(output, shard)
        if (fault := _fault(folder)) is not None:
            faults[shard] = fault
        else:
            facts = read_json(folder / _RECORD)["facts"]
            found.append(FinishedShard(shard, folder, facts))
    if faults:
        raise FileNotFoundError(_what_to_run(output, count, command, faults))
    return found


@contextmanager
def merged_shards(
    output: Path, count: int, command: str, given: Mapping[str, Any]
) -> Iterator[list[FinishedShard]]:
    """All shards of an output, owned; they are removed at the end, unless it is an error.

    Args:
        output: What they are merged into.
        count: Number of the shards, or `ANY_COUNT`.
        command: Command line of a shard, but for ``I/N`` at its end.
        given: Settings that are known without a model; the shards must be of them.

    Raises:
        FileNotFoundError: As `find_shards`.
        InUseError: Another process works on one of the shards.
        ValueError: As `find_shards`, or the shards are of different settings.
    """
    with ExitStack() as stack:
        for found in find_shards(output, count, command):
            stack.enter_context(owned(found.folder))
        shards = find_shards(output, count, command)  # now that nobody changes them
        _check_equal(output, shards, given)
        yield shards
        for shard in shards:
            clear_owned(shard.folder)


def device_remark(shards: list[FinishedShard]) -> str | None:
    """A line where shards were computed on different devices; None where on one kind.

    Args:
        shards: Shards whose facts have a ``device``.
    """
    devices = sorted({str(shard.facts["device"]) for shard in shards})
    if len(devices) == 1:
        return None
    return (
        f"the shards were computed on {' and '.join(devices)}: the last digits may differ from"
        " those of one run"
    )


def _beside(output: Path, ending: str) -> Path:
    path = output if output.name not in ("", "..") else output.resolve()
    return path.with_name(f"{path.name}.{ending}")


def _counts_of(output: Path) -> list[int]:
    pattern = re.compile(re.escape(_beside(output, "shard-").name) + r"\d+-of-(\d+)")
    folder = _beside(output, "").parent
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted({int(match[1]) for name in names if (match := pattern.fullmatch(name))})


def _fault(folder: Path) -> str | None:
    """What is wrong with a shard; None where nothing is."""
    if not folder.is_dir():
        return "missing"
    if not (folder / _RECORD).is_file():
        return "unfinished"
    for name, num_bytes in read_json(folder / _RECORD)["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != num_bytes:
            return f"damaged: {name} is not of {num_bytes:,} bytes"
    return None


def _what_to_run(output: Path, count: int, command: str, faults: Mapping[Shard, str]) -> str:
    listed = list(faults.items())[:_LISTED]
    named = ", ".join(f"{shard.number} ({fault})" for shard, fault in listed)
    commands = "; ".join(
        f"{command} {shard}{' --overwrite' if fault.startswith('damaged') else ''}"
        for shard, fault in listed
    )
    more = f" and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return (
        f"{len(faults)} of the {count} shards of {output} are not whole: {named}{more}; run:"
        f" {commands}"
    )


def _check_equal(output: Path, shards: list[FinishedShard], given: Mapping[str, Any]) -> None:
    first, *others = ((one.shard, read_json(one.folder / SETTINGS)) for one in shards)
    for name, value in given.items():
        if first[1].get(name) != value:
            raise ValueError(
                f"the shards of {output} are of {name} {first[1].get(name)!r}, --merge of {value!r}"
            )
    for shard, settings in others:
        for name in dict.fromkeys((*first[1], *settings)):
            if settings.get(name) != first[1].get(name):
                same = _ONE_DTYPE if name == "dtype" else ""
                raise ValueError(
                    f"shard {shard} of {output} is of {name} {settings.get(name)!r}, shard"
                    f" {first[0]} of {first[1].get(name)!r}; run one of them again with"
                    f" --overwrite{same}"
                )
