"""The checkpoints that ``--ckpt_path`` may refer to, found without reading one."""

import re
from collections.abc import Sequence
from pathlib import Path

from fingpt_lightning.terminal.messages import nearest, nearest_name

NAMED = ("last", "best")
"""The values of ``--ckpt_path`` that stand for a checkpoint of the newest run of a config."""


def checkpoints_named(ckpt_path: str, run_name: str, runs_dir: Path) -> list[Path]:
    """The file that is named, or all those of that name, the newest first.

    Args:
        ckpt_path: Path of a file, or one of `NAMED`.
        run_name: Beginning of the run folders' names.
        runs_dir: Parent of all run folders.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The path is neither a file nor a folder, or is a folder of checkpoints.
    """
    if ckpt_path not in NAMED:
        path = Path(ckpt_path)
        if not path.exists():
            near = nearest(ckpt_path, NAMED) or nearest_name(path)
            raise FileNotFoundError(f"ckpt_path {ckpt_path}: no such file{near}")
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"ckpt_path {ckpt_path} is neither a file nor a folder")
        inner = [*path.glob("checkpoints/*.ckpt"), *path.glob("*.ckpt")]
        if inner:  # of a sharded checkpoint, which is a folder too, there are none
            raise ValueError(
                f"ckpt_path {ckpt_path} is a folder; name a checkpoint in it, as {min(inner)}"
            )
        return [path]
    found = newest_first(run_name, runs_dir, [ckpt_path])
    if not found:
        raise FileNotFoundError(
            f"ckpt_path {ckpt_path}: no {runs_dir}/{run_name}-*/checkpoints/{ckpt_path}.ckpt"
        )
    return found


def newest_first(run_name: str, runs_dir: Path, kinds: Sequence[str]) -> list[Path]:
    """Checkpoints of these kinds of all runs of a name; of equal age, the first kind first."""
    folders = runs_dir.iterdir() if runs_dir.is_dir() else ()
    stamped = [folder for folder in folders if _is_stamped(folder.name, run_name)]
    paths = [folder / "checkpoints" / f"{kind}.ckpt" for kind in kinds for folder in stamped]
    dated = [(path.stat().st_mtime_ns, path) for path in paths if path.is_file()]
    return [path for _, path in sorted(dated, key=lambda pair: pair[0], reverse=True)]


def _is_stamped(folder: str, run_name: str) -> bool:
    return re.fullmatch(re.escape(run_name) + r"-\d{8}-\d{6}(-\d+)?", folder) is not None
