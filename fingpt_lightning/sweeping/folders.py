"""The folder of a local sweep: what makes it one, and where one can be begun."""

from pathlib import Path

from fingpt_lightning.files import refuse_blocked, refuse_read_only

STUDY, SWEEP_FILE = "study.sqlite", "sweep.yaml"


def refuse_no_sweep(folder: Path) -> None:
    """Refuses to resume what is not a sweep.

    Raises:
        ValueError: The folder holds no sweep.
    """
    if not ((folder / STUDY).is_file() and (folder / SWEEP_FILE).is_file()):
        raise ValueError(f"{folder} is not a sweep: it has no {STUDY} and {SWEEP_FILE}")


def refuse_used_folder(folder: Path) -> None:
    """Refuses to begin a sweep where something lies.

    Raises:
        NotADirectoryError: A part of its path is a file.
        PermissionError: It cannot be written to.
        ValueError: The folder is not empty, or is a file.
    """
    refuse_blocked(folder, "output")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output {folder} is not empty; --resume goes on with a sweep")
    if folder.exists():
        refuse_read_only(folder, f"output {folder}")
