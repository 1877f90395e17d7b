import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest

from fingpt_lightning.cli.main import main
from fingpt_lightning.tasks import find_task
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.support.warm_python import ROOT, WarmProcess

_BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
_CHROMIUM = next((found for found in _BROWSERS if found is not None), None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "base"
    tiny_network("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _wait_for(log: Path, pattern: str, process: WarmProcess) -> re.Match[str]:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        if found := re.search(pattern, log.read_text()):
            return found
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def test_a_server_answers_and_ends_without_losing_what_it_accepted(
    base: Path, tmp_path: Path
) -> None:
    (client,) = save_clients(base, tmp_path, 1)
    log = tmp_path / "log.txt"
    words = ["-m", "fingpt_lightning", "serve", "--model", str(base), "--port", "0"]
    words += ["--adapters", f"ann={client}", "--tasks", "fpb"]
    with log.open("w") as output:
        process = WarmProcess(
            words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=output,
            stderr=output,
        )  # fmt: skip
    try:
        url = _wait_for(log, r"base, ann at (http://127\.0\.0\.1:\d+)/v1", process)[1]
        names = [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]
        assert names == ["base", "ann"]
        if _CHROMIUM is not None:
            _try_page(url, tmp_path)
        answers: list[httpx.Response] = []
        body = {"model": "ann", "prompt": "Foo", "max_tokens": 300, "n": 2, "temperature": 0}

        def ask() -> None:
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120))

        before = _num_accepted(url)
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while _num_accepted(url) < before + 8:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        assert [answer.status_code for answer in answers] == [200] * 4
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        assert process.wait(60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill_session()
            process.wait(60)
    assert re.search(r"stopped: \d+ requests answered, 0 failed, [\d,]+ tokens", log.read_text())


def _num_accepted(url: str) -> int:
    """Texts that wait, are being written or are done."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return sum(
        map(int, re.findall(r"^fingpt_(?:waiting|running|finished_total) (\d+)$", text, re.M))
    )


def _try_page(url: str, folder: Path) -> None:
    """A browser opens the page by a link that asks for a text and a label."""
    assert _CHROMIUM is not None
    words = [
        _CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=20000", "--dump-dom",
        f"{url}/?prompt=Foo&text=Profit+rose&task=fpb&model=ann",
    ]  # fmt: skip
    made = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    body = made[made.index("<body>") : made.index("<script>")]
    # The dump does not wait for the end of a stream, only for its beginning.
    assert re.search(r'<output id="written" class=""', body), body
    assert "fingpt_new_tokens_total 0" not in httpx.get(f"{url}/metrics").text
    assert body.count('class="bar"') == len(find_task("fpb").labels), body


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--host", "0.0.0.0"], 2, "set FINGPT_API_KEY to a key that requests have to name"),
        (["--port", "70000"], 2, "'70000' is not a port from 0 to 65535"),
        (["--port", "TAKEN"], 1, "Address already in use"),
        (["--tasks", "fbp"], 1, "did you mean fpb"),
        (["--tasks", "piqa"], 1, "piqa is of kind choices: it has no labels"),
        (["--adapters", "base=nowhere"], 2, "the model has this name; give it another by --name"),
        (["--adapters", "ann=nowhere", "--port", "0"], 1, "nowhere"),
    ],
)
def test_what_is_wrong_with_the_command_is_said_before_the_model_is_loaded(
    base: Path,
    words: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FINGPT_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [word.replace("TAKEN", port) for word in words]
        with pytest.raises(SystemExit) as caught:
            main(["serve", "--model", str(base), *given])
    assert caught.value.code == status
    assert message in capsys.readouterr().err
