"""Files that are whole or not there."""

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file aside and then renames it; text is UTF-8, its line ends are as given.

    Args:
        path: In a folder that is there; a file of that name is replaced.
        content: Of the file.
    """
    aside = path.with_name(f"{path.name}.partial")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(path)
