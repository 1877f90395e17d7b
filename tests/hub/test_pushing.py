import itertools
import logging
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

from fingpt_lightning.hub.pushing import PushError, push_to_hub, refuse_no_access
from tests.support.hub_server import TOKEN, HubServer, files_of, reach

# The client itself uploads in a way that the library below it no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        reach(server, monkeypatch)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like that of a quantized model with its adapter."""
    made = tmp_path / "model"
    (made / "adapter").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# Größe\n", encoding="utf-8")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (made / "adapter" / "adapter_model.safetensors").write_bytes(b"factors")
    return made


def test_every_byte_of_a_folder_gets_there_and_back(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    pushed = push_to_hub(folder, "me/small", commit_message="The first one")
    assert pushed == (f"{hub.url}/me/small", True)
    repository = hub.repositories["me/small"]
    assert repository.files() == files_of(folder)
    assert not repository.is_private
    first, commit = repository.branches["main"]
    assert commit.message == "The first one"
    assert commit.lfs == {"model.safetensors", "adapter/adapter_model.safetensors"}
    again = Path(snapshot_download("me/small", cache_dir=tmp_path / "cache"))
    assert files_of(again) == files_of(folder) | {".gitattributes": first.files[".gitattributes"]}


def test_what_is_there_already_is_not_sent_again(hub: HubServer, folder: Path) -> None:
    push_to_hub(folder, "me/small")
    hub.requests.clear()
    assert not push_to_hub(folder, "me/small").is_new
    assert not any("commit" in request or "lfs" in request for request in hub.requests)
    (folder / "config.json").write_text("[]")
    assert push_to_hub(folder, "me/small").is_new
    assert hub.repositories["me/small"].files() == files_of(folder)
    assert not any(request.startswith("PUT") for request in hub.requests), "weights went twice"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])  # of the same size
    assert push_to_hub(folder, "me/small").is_new
    assert hub.repositories["me/small"].files() == files_of(folder)


def test_weights_of_an_earlier_upload_go_and_other_files_stay(hub: HubServer, folder: Path) -> None:
    (folder / "LICENSE").write_text("MIT")
    push_to_hub(folder, "me/small")
    for name in ("LICENSE", "adapter/adapter_model.safetensors"):
        (folder / name).unlink()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    push_to_hub(folder, "me/small")
    assert hub.repositories["me/small"].files() == files_of(folder) | {"LICENSE": b"MIT"}


def test_a_private_repository_is_made_and_a_public_one_is_not_taken_for_one(
    hub: HubServer, folder: Path
) -> None:
    push_to_hub(folder, "me/secret", private=True)
    assert hub.repositories["me/secret"].is_private
    assert not push_to_hub(folder, "me/secret", private=True).is_new
    push_to_hub(folder, "me/open")
    (folder / "config.json").write_text("[]")
    with pytest.raises(PushError, match="push me/open: the repository is public"):
        push_to_hub(folder, "me/open", private=True)
    assert hub.repositories["me/open"].files()["config.json"] == b"{}"


def test_a_revision_is_a_new_branch(hub: HubServer, folder: Path) -> None:
    pushed = push_to_hub(folder, "me/small", revision="v/1")
    assert pushed.url == f"{hub.url}/me/small/tree/v/1"
    repository = hub.repositories["me/small"]
    assert repository.files("v/1") == files_of(folder)
    assert repository.files("main") == {}
    assert not push_to_hub(folder, "me/small", revision="v/1").is_new
    (folder / "config.json").write_text("[]")
    with pytest.raises(PushError, match="revision v/1 is there already, with other files"):
        push_to_hub(folder, "me/small", revision="v/1")
    push_to_hub(folder, "me/small")
    repository.branches["v3"] = repository.branches["main"][:1]  # of an upload that was interrupted
    assert push_to_hub(folder, "me/small", revision="v3").is_new
    assert repository.files("v3") == files_of(folder)
    repository.tags["v2"] = repository.branches["main"][-1].oid
    with pytest.raises(PushError, match="revision v2 is a tag there"):
        push_to_hub(folder, "me/small", revision="v2")
    assert len(repository.branches["v/1"]) == 2


@pytest.mark.parametrize("revision", [None, "v1"])
def test_an_upload_that_breaks_anywhere_is_repeated_and_never_half_there(
    hub: HubServer, folder: Path, revision: str | None
) -> None:
    refused, before = 0, files_of(folder)
    for number in itertools.count():
        seen = itertools.count()
        # Not a status that the client itself tries again, some seconds later.
        hub.answer_instead = lambda method, path, seen=seen, number=number: (  # type: ignore[misc]
            HTTPStatus.GONE if "harness" not in path and next(seen) == number else None
        )
        try:
            push_to_hub(folder, "me/small", revision=revision)
            break
        except PushError as error:
            message = str(error)
        assert "status 410" in message
        assert message.endswith(f"; {folder} is whole and can be pushed by the same command again")
        refused += 1
        if "me/small" in hub.repositories:
            repository = hub.repositories["me/small"]
            assert not any(repository.files(branch) for branch in repository.branches)
    assert refused > 5
    assert hub.repositories["me/small"].files(revision or "main") == before == files_of(folder)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            HTTPStatus.UNAUTHORIZED,
            "does not take the token (status 401); log in with hf auth login",
        ),
        (HTTPStatus.FORBIDDEN, "the token may not write there (status 403)"),
        (HTTPStatus.INSUFFICIENT_STORAGE, "answers with status 507 (no)"),
    ],
)
def test_a_refusal_says_what_to_do(
    hub: HubServer,
    folder: Path,
    status: HTTPStatus,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.answer_instead = lambda method, path: status
    with pytest.raises(PushError) as refused:
        push_to_hub(folder, "me/small")
    assert message in str(refused.value)
    assert TOKEN not in f"{refused.value}{capsys.readouterr()}"
    assert not hub.repositories


def test_a_page_of_a_portal_is_not_taken_for_the_hub(hub: HubServer, folder: Path) -> None:
    hub.answer_instead = lambda method, path: HTTPStatus.OK
    with pytest.raises(PushError, match="does not answer as the Hugging Face hub does"):
        push_to_hub(folder, "me/small")


def test_wrong_metadata_of_a_card_is_told_before_weights_are_sent(
    hub: HubServer, folder: Path
) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(PushError, match=r"Invalid metadata in README.md. - it is not YAML"):
        push_to_hub(folder, "me/small")
    assert not any(request.startswith("PUT") for request in hub.requests)


def test_a_commit_between_ours_is_not_overwritten(hub: HubServer, folder: Path) -> None:
    push_to_hub(folder, "me/small")
    (folder / "config.json").write_text("[]")

    def another(method: str, path: str) -> None:
        branch = hub.repositories["me/small"].branches["main"]
        if "/commit/" in path:
            branch.append(type(branch[-1])(branch[-1].files, "of a colleague"))

    hub.answer_instead = another
    with pytest.raises(PushError, match=r"the repository has changed meanwhile \(status 412\)"):
        push_to_hub(folder, "me/small")


def test_a_hub_that_cannot_be_reached_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HubServer()
    with server.running():
        reach(server, monkeypatch)
    with pytest.raises(PushError, match=rf"push me/small: {server.url} cannot be reached \("):
        push_to_hub(folder, "me/small")


def test_credentials_in_the_address_of_a_hub_are_not_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HubServer()
    with server.running():
        reach(server, monkeypatch)
    address = server.url.replace("://", "://me:secret@")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    with pytest.raises(PushError, match=rf"push me/small: {server.url} cannot be") as failed:
        push_to_hub(folder, "me/small")
    assert "secret" not in str(failed.value)


def test_without_a_token_nothing_is_asked(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach(hub, monkeypatch, token=None)
    with pytest.raises(PushError, match="there is no token; log in with hf auth login"):
        push_to_hub(folder, "me/small")
    assert not hub.requests


def test_offline_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    with pytest.raises(PushError, match="push: TRANSFORMERS_OFFLINE is set"):
        refuse_no_access()


def test_a_folder_without_files_is_refused(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="push me/small: no file in"):
        push_to_hub(tmp_path, "me/small")
    assert not hub.requests


def test_the_bars_of_the_client_stay_out_of_logs_and_come_back(
    hub: HubServer,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enable_progress_bars()
    log = logging.getLogger("huggingface_hub")
    seen = set()
    monkeypatch.setattr(log, "level", log.level)  # which is restored after the test
    log.setLevel(logging.INFO)
    hub.answer_instead = lambda method, path: seen.add(log.level)
    push_to_hub(folder, "me/small")
    assert capsys.readouterr() == ("", "")
    assert seen == {logging.ERROR}, "lines of its own, such as on each repeated request"
    assert log.level == logging.INFO
    assert not are_progress_bars_disabled()
