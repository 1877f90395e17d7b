"""Data sets of the Hugging Face hub as documents, streamed through ``datasets``."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from fingpt_lightning.data.corpus import OnBadRow, Piece
from fingpt_lightning.data.documents import BadRowError, document_of_row, skipped_row
from fingpt_lightning.terminal import inputs
from fingpt_lightning.terminal.messages import first_line, no_field

HUB_PREFIX = inputs.HUB_PREFIX
"""Prefix that distinguishes the name of a data set from a path."""

_SPELLING = "hf://OWNER/NAME[/CONFIG][@REVISION][:SPLIT]"
_NAME = re.compile(
    r"hf://(?P<repository>(?!datasets/)[\w.-]+/[\w.-]+)(/(?P<config>[^/@:]+))?"
    r"(@(?P<revision>[^@:]+))?(:(?P<split>\w+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 10
# The hub was reached; all other errors are of the network, in the types of several libraries.
_ANSWERED = (HfHubHTTPError, FileNotFoundError, ValueError)


@dataclass(frozen=True)
class HubText:
    """One split of a data set of the hub; each row is a document.

    Streaming needs no disk, and keeps a few batches of rows in memory. Code that comes with a data
    set is never run.

    Attributes:
        config: Config of the data set, where it has several.
        revision: Branch, tag or commit; a full commit is read without resolving it at the hub.
        on_bad_row: Whether a row without text is an error or an empty piece that names its fault.
    """

    repository: str
    config: str | None
    revision: str | None
    split: str
    text_field: str = "text"
    on_bad_row: OnBadRow = "error"

    def pieces(self) -> Iterator[Piece]:
        """Streams all rows.

        Raises:
            ValueError: The hub has no such data set, or a row holds no text and ``on_bad_row`` is
                ``error``.
            RuntimeError: The stream broke.
        """
        number = 0
        rows = iter(self._open())
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                place = f"{self}, row {number + 1}"
                raise RuntimeError(f"{place}: the stream broke ({first_line(error)})") from error
            if row is None:
                return
            number += 1
            try:
                document = document_of_row(row, self.text_field, f"{self}, row {number}")
            except BadRowError as error:
                document = skipped_row(error, self.on_bad_row)
            yield document

    def num_bytes(self) -> None:
        """The size of a stream is unknown."""

    def fingerprint(self) -> str:
        """Follows the commit, which stands for the contents.

        Raises:
            ValueError: The hub does not report the commit of the revision.
        """
        place = f"{self.repository} {self.config} {self.split} at {self._commit()}"
        skipping = "with bad rows skipped, " if self.on_bad_row == "skip" else ""
        return f"{skipping}hub field {self.text_field!r} of {place}"

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB_PREFIX}{self.repository}{config}{revision}:{self.split}"

    def _commit(self) -> str:
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            return _commit_of(self.repository, self.revision)
        except Exception as error:
            raise ValueError(self._cannot(error)) from error

    def _open(self) -> Any:
        import datasets  # type: ignore[import-untyped]  # it takes a second that few runs need

        revision = self._commit()
        try:
            rows = datasets.load_dataset(
                self.repository, self.config, split=self.split, revision=revision, streaming=True
            )
        except Exception as error:
            raise ValueError(self._cannot(error)) from error
        if rows.column_names is None:
            return rows
        if self.text_field not in rows.column_names:
            raise ValueError(no_field(str(self), self.text_field, rows.column_names))
        return rows.select_columns([self.text_field])

    def _cannot(self, error: Exception) -> str:
        if "scripts are no longer supported" in str(error):
            parquet = f"{HUB_PREFIX}{self.repository}@refs/convert/parquet"
            way_out = f"; the hub's own conversion may be there as {parquet}"
        elif isinstance(error, _ANSWERED):
            way_out = ""
        else:
            download = f"hf download {self.repository} --repo-type dataset --local-dir FOLDER"
            way_out = f"; where there is a network: {download}; then give FOLDER in its place"
        return f"{self}: cannot be opened ({first_line(error)}){way_out}"


def parse_hub_name(
    name: str, text_field: str, default_split: str, key: str, on_bad_row: OnBadRow = "error"
) -> HubText:
    """Reads ``hf://OWNER/NAME[/CONFIG][@REVISION][:SPLIT]``.

    Args:
        name: Name in the form above.
        text_field: Name of the column that holds the text.
        default_split: Split that is taken where the name has none.
        key: Setting that the name comes from, for the message.
        on_bad_row: Whether a row without text is an error or is skipped.

    Raises:
        ValueError: The name has another form.

    >>> str(parse_hub_name("hf://a/b@main", "text", "train", "train_files"))
    'hf://a/b@main:train'
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{key}: {name!r} is not spelled {_SPELLING}")
    parts = match.groupdict()
    split = parts["split"] or default_split
    place = (parts["repository"], parts["config"], parts["revision"], split)
    return HubText(*place, text_field, on_bad_row)


@functools.cache
def _commit_of(repository: str, revision: str | None) -> str:
    info = HfApi().dataset_info(repository, revision=revision, timeout=_TIMEOUT_S)
    assert info.sha is not None
    return info.sha
