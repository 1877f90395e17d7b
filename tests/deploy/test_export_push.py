"""``fingpt export --push`` against a hub on the loopback interface."""

import os
import re
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from fingpt_lightning.cli.main import main
from fingpt_lightning.models.loading import load_model
from tests.deploy.tiny_clients import save_low_rank_model
from tests.support.hub_server import TOKEN, HubServer, files_of, reach

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
Export = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().running() as server:
        reach(server, monkeypatch)
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A low-rank GPT-2 of a few thousand parameters."""
    return save_low_rank_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def export(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    """Runs ``fingpt export --format low_rank``; gives status, output and error."""

    def call(*words: str) -> tuple[int, str, str]:
        fixed = ["--model", str(model), "--output", str(tmp_path / "out"), "--format", "low_rank"]
        status = 0
        capsys.readouterr()
        try:
            main(["export", *fixed, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        assert TOKEN not in captured.out + captured.err
        return status, captured.out, captured.err

    return call


def test_what_is_downloaded_is_the_export_and_loads_through_the_auto_classes(
    export: Export, hub: HubServer, tmp_path: Path
) -> None:
    words = ("--push", "me/small", "--private", "--revision", "v1", "--commit_message", "First")
    status, output, error = export(*words)
    assert (status, error) == (0, "")
    assert output.splitlines()[-1] == f"{hub.url}/me/small/tree/v1: pushed"
    repository = hub.repositories["me/small"]
    assert repository.is_private
    assert repository.branches["v1"][-1].message == "First"
    assert repository.files("v1") == files_of(tmp_path / "out")

    cache = tmp_path / "cache"
    again = Path(snapshot_download("me/small", revision="v1", cache_dir=cache))
    downloaded = files_of(again)
    del downloaded[".gitattributes"]
    assert downloaded == files_of(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained("me/small", revision="v1", cache_dir=cache)
    ids = torch.tensor([AutoTokenizer.from_pretrained(again)("Profit rose")["input_ids"]])
    ours = load_model(tmp_path / "out").network
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_an_upload_that_failed_is_repeated_without_the_export(
    export: Export, hub: HubServer, tmp_path: Path
) -> None:
    hub.answer_instead = lambda method, path: HTTPStatus.FORBIDDEN if "commit" in path else None
    status, output, error = export("--push", "me/small")
    assert status == 1
    (line,) = error.splitlines()
    assert line.startswith("fingpt: error: push me/small: the token may not write there (status")
    assert line.endswith(f"{tmp_path / 'out'} is whole and can be pushed by the same command again")
    made = files_of(tmp_path / "out")
    assert not output

    hub.answer_instead = lambda method, path: None
    status, output, error = export("--push", "me/small")
    assert (status, error) == (0, "")
    *figures, last = output.splitlines()
    assert last == f"{hub.url}/me/small: pushed"
    card = made["README.md"].decode()
    assert all(re.split(r"\s{2,}", line)[2] in card for line in figures[1:3]), "as they were found"
    assert hub.repositories["me/small"].files() == made == files_of(tmp_path / "out")
    assert export("--push", "me/small")[1].splitlines()[-1].endswith(": has these files already")


def test_a_folder_of_another_request_is_not_pushed(
    export: Export, hub: HubServer, model: Path, tmp_path: Path
) -> None:
    assert export()[0] == 0
    for words in (("--dtype", "bfloat16"), ("--tolerance", "0.5")):
        status, _, error = export("--push", "me/small", *words)
        assert status == 1
        assert "made by other options or of files that have changed since" in error
    weights = model / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert export("--push", "me/small")[0] == 1
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Profit rose")
    words = ("--prompts", str(prompts))
    assert export(*words, "--overwrite")[0] == 0
    prompts.write_text("Profit fell again")
    assert export("--push", "me/small", *words)[0] == 1
    assert not hub.requests
    assert export("--push", "me/small", "--overwrite")[0] == 0
    assert hub.repositories["me/small"].files() == files_of(tmp_path / "out")


def test_nothing_is_pushed_where_the_export_fails(export: Export, hub: HubServer) -> None:
    status, _, error = export("--push", "me/small", "--dtype", "bfloat16", "--tolerance", "1e-12")
    assert status == 1
    assert "more than the tolerance 1e-12; nothing was written" in error
    assert not hub.requests


@pytest.mark.parametrize("checks", ["early", "late"])
def test_offline_and_without_a_token_nothing_is_exported(
    checks: str, export: Export, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checks == "late":
        monkeypatch.setenv("FINGPT_NO_EARLY_CHECKS", "1")
    reach(hub, monkeypatch, token=None)
    status, _, error = export("--push", "me/small")
    assert (status, error) == (
        1,
        "fingpt: error: push: there is no token; log in with hf auth login, or set HF_TOKEN\n",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, error = export("--push", "me/small")
    assert (status, error) == (
        1,
        "fingpt: error: push: HF_HUB_OFFLINE is set, so that nothing is uploaded; unset it\n",
    )
    assert not (tmp_path / "out").exists()
    assert not hub.requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--push", "me/my model"), "did you mean me/my-model?"),
        (("--push", "me/x", "--revision", "a b"), "revision 'a b' is not the name of a branch"),
        (("--private",), "--private has an effect with --push alone"),
        (("--revision", "v1"), "--revision has an effect with --push alone"),
        (("--commit_message", "x"), "--commit_message has an effect with --push alone"),
    ],
)
def test_a_wrong_option_is_status_2(export: Export, words: tuple[str, ...], message: str) -> None:
    status, _, error = export(*words)
    assert status == 2
    assert message in error
