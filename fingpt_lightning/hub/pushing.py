"""Uploads a finished folder to a repository of the hub, as one commit, by the hub's own client."""

import hashlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fingpt_lightning.hub.names import MAIN, check_branch, check_hub_name
from fingpt_lightning.terminal.messages import first_line, without_credentials
from fingpt_lightning.terminal.progress import announced

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_OF_A_MODEL = (".safetensors", ".safetensors.index.json", "adapter_config.json")
"""Ends of the files that a reader takes for a part of the model, if they are left behind."""
_UNAUTHORIZED, _FORBIDDEN, _CHANGED = 401, 403, 412


class PushError(OSError):
    """A folder that could not be uploaded; it stays where it is."""


class NoAccessError(PushError):
    """An upload that was not begun: the client is offline or has no token."""


class Pushed(NamedTuple):
    """Where a folder is on the hub, and whether it had to be uploaded."""

    url: str
    is_new: bool


def refuse_no_access() -> None:
    """Refuses an upload that the hub's client would, before anything has been computed.

    No request is made, unless the login of this machine has to be renewed.

    Raises:
        NoAccessError: The client is offline, or has no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import OIDCError

    if constants.is_offline_mode():
        name = next((name for name in _OFFLINE if os.environ.get(name)), _OFFLINE[0])
        raise NoAccessError(f"push: {name} is set, so that nothing is uploaded; unset it")
    try:
        token = get_token()
    except OIDCError as error:
        raise NoAccessError(f"push: no token ({first_line(error)})") from error
    if token is None:
        raise NoAccessError("push: there is no token; log in with hf auth login, or set HF_TOKEN")


def push_to_hub(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> Pushed:
    """Uploads a folder to a repository of models, which is made where it is not there.

    The files get into one commit, after all of them have been uploaded: a repository is never left
    with half a model. An upload that was interrupted is repeated by the same call, and what the hub
    has already is not sent again. Weights and adapters of an earlier upload that the folder does
    not have are removed in the same commit; other files of the repository stay.

    The token is that of the hub's client: ``HF_TOKEN``, or that of ``hf auth login``.

    Args:
        folder: Folder that is finished.
        name: OWNER/NAME of the repository.
        private: Whether only its owner sees the repository; one that others see is refused then.
        revision: Branch that is made; None commits to ``main``.
        commit_message: First line of the commit's message; None names this package.

    Returns:
        Address of the model. Where the branch holds the same files already, nothing is uploaded.

    Raises:
        FileNotFoundError: There is no such folder, or no file in it.
        PushError: The hub cannot be reached or refuses the upload.
        ValueError: The name of repository or branch cannot be one.
    """
    folder = Path(folder).expanduser()
    try:
        return upload(folder, name, private, revision, commit_message)
    except PushError as error:
        if isinstance(error, NoAccessError):
            raise
        raise PushError(
            f"{error}; {folder} is whole and can be pushed by the same command again"
        ) from error.__cause__


def upload(
    folder: Path, name: str, private: bool, revision: str | None, commit_message: str | None
) -> Pushed:
    """`push_to_hub` of a folder that does not stay."""
    check_hub_name(name)
    revision = MAIN if revision is None else check_branch(revision)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if not files:
        raise FileNotFoundError(f"push {name}: no file in {folder}")
    refuse_no_access()
    from huggingface_hub import HfApi

    version = importlib.metadata.version("fingpt-lightning")
    api = HfApi(library_name="fingpt-lightning", library_version=version)
    message = commit_message or f"Upload by fingpt-lightning {version}"
    try:
        with announced(f"uploading {folder} to {name}"), _client_that_shows_bars_alone():
            return _pushed(api, files, name, private, revision, message)
    except Exception as error:  # of the client and the libraries below it
        raise PushError(
            f"push {name}: {_reason(error, without_credentials(api.endpoint))}"
        ) from error


def _pushed(
    api: "HfApi",
    files: Mapping[str, Path],
    name: str,
    private: bool,
    revision: str,
    message: str,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(name, private=private or None, exist_ok=True)
    if private and not api.model_info(name).private:
        raise PushError("the repository is public; make it private in its settings")
    url = f"{without_credentials(api.endpoint)}/{name}" + (
        "" if revision == MAIN else f"/tree/{revision}"
    )
    refs = api.list_repo_refs(name)
    if any(tag.name == revision for tag in refs.tags):
        raise PushError(f"revision {revision} is a tag there; name another one")
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    head = heads.get(revision, heads[MAIN])
    there = _files_at(api, name, head)
    if revision in heads and _are_equal(files, there):
        return Pushed(url, is_new=False)
    # A branch without a commit of its own is that of an upload that was interrupted.
    if head != heads[MAIN] and head not in {c.commit_id for c in api.list_repo_commits(name)}:
        raise PushError(f"revision {revision} is there already, with other files; name another one")
    left_behind = [
        path
        for path in there
        if path not in files and (path.endswith(_OF_A_MODEL) or path.startswith("adapter/"))
    ]
    additions = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
    if revision not in heads:
        api.create_branch(name, branch=revision, revision=head)
    api.create_commit(
        name,
        [*additions, *(CommitOperationDelete(path) for path in left_behind)],
        commit_message=message,
        revision=revision,
        parent_commit=head,
    )
    return Pushed(url, is_new=True)


def _files_at(api: "HfApi", name: str, revision: str) -> "dict[str, RepoFile]":
    from huggingface_hub.hf_api import RepoFile

    found = api.list_repo_tree(name, recursive=True, revision=revision)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def _are_equal(files: Mapping[str, Path], there: "Mapping[str, RepoFile]") -> bool:
    """Whether a commit holds these files and no other one, but for what the hub adds itself."""
    if set(files) != set(there) - {".gitattributes"}:
        return False
    sizes_agree = all(file.stat().st_size == there[path].size for path, file in files.items())
    return sizes_agree and all(_is_equal(file, there[path]) for path, file in files.items())


def _is_equal(file: Path, there: "RepoFile") -> bool:
    if there.lfs is not None:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == there.lfs.sha256
    content = file.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return git.hexdigest() == there.blob_id


@contextmanager
def _client_that_shows_bars_alone() -> Iterator[None]:
    """The client's bars on a terminal, none in a log, and no lines of its own beside them."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    log = logging.getLogger("huggingface_hub")
    level, were_disabled = log.level, are_progress_bars_disabled()
    is_ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    log.setLevel(logging.ERROR)
    if is_ours:
        (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    try:
        yield
    finally:
        log.setLevel(level)
        if is_ours:
            (disable_progress_bars if were_disabled else enable_progress_bars)()


def _reason(error: BaseException, endpoint: str) -> str:
    """Why an upload ended, in the words of a person who has to do something about it."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    cause = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # of one file's upload
        cause = cause.__cause__
    if isinstance(cause, PushError):
        return str(cause)
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status == _UNAUTHORIZED:
            return (
                f"{endpoint} does not take the token (status 401); log in with hf auth login, or"
                " set HF_TOKEN"
            )
        if status == _FORBIDDEN:
            return "the token may not write there (status 403); it needs the right to, in settings"
        if status == _CHANGED:
            return "the repository has changed meanwhile (status 412)"
        said = without_credentials(cause.server_message or first_line(cause))
        return f"{endpoint} answers with status {status} ({said})"
    if isinstance(cause, HTTPError):
        return f"{endpoint} cannot be reached ({first_line(cause)})"
    if isinstance(error, KeyError | TypeError | JSONDecodeError):
        found = f"{type(error).__name__}: {first_line(error)}"
        return f"{endpoint} does not answer as the Hugging Face hub does ({found})"
    if isinstance(error, ValueError):  # of the card's metadata, with one line for each mistake
        return " ".join(str(error).split())
    because = "" if error.__cause__ is None else f" ({first_line(error.__cause__)})"
    return first_line(error) + because
