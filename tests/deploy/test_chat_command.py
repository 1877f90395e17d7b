import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy import chat_command
from fingpt_lightning.deploy.chat import Chat
from fingpt_lightning.models.formats.tokenizer import use_chat_template
from fingpt_lightning.tasks import find_task, read_rows
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.tasks.chat_templates import ENDED

Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template beside it."""
    folder = tmp_path_factory.mktemp("chat")
    tiny_network("llama").save_pretrained(folder / "model")
    tiny_tokenizer("<begin>").save_pretrained(folder / "model")
    (folder / "chat.jinja").write_text(ENDED)
    return folder


@pytest.fixture
def talk(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Runs ``fingpt chat`` with lines from a pipe; gives status, output and error."""

    def call(lines: str, *words: str, template: bool = True) -> tuple[int, str, str]:
        own = ["--model", str(model / "model"), "--device", "cpu", "--max_new_tokens", "5"]
        own += ["--chat_template", str(model / "chat.jinja")] if template else []
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()  # of the fixtures
        status = 0
        try:
            main(["chat", *own, *words])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def _answers(*messages: str, system: str | None = None) -> str:
    tokenizer = tiny_tokenizer("<begin>")
    use_chat_template(tokenizer, ENDED)
    chat = Chat(tiny_network("llama"), tokenizer, max_new_tokens=5)
    chat.system = system
    return "".join(chat.ask(message, lambda _: None) + "\n" for message in messages)


@pytest.mark.parametrize("line", ["Gold \udcff", "/system \udcff", "/save \udcff"])
def test_bytes_that_the_c_locale_lets_through_are_named(talk: Talk, line: str) -> None:
    status, _, error = talk(f"Gold\n{line}\n")
    assert status == 1
    assert error.splitlines()[-1] == "fingpt: error: line 2: not UTF-8"
    status, _, error = talk("Gold\n", "--system", line)
    assert (status, error) == (1, "fingpt: error: system: not UTF-8\n")


def test_each_line_of_a_pipe_is_answered(talk: Talk, model: Path) -> None:
    status, output, error = talk("Shares of Foo\n\nGold\n", "--system", "You help")
    assert status == 0, error
    assert output == _answers("Shares of Foo", "Gold", system="You help")
    first, second = error.splitlines()
    form = "a chat as the chat template renders it; /help lists the commands"
    assert first == f"{model}/model (llama): {form}"
    assert second == f"chat template: {model}/chat.jinja"


def test_without_a_template_the_first_line_says_that_the_text_goes_on(talk: Talk) -> None:
    status, output, error = talk("Shares of Foo", template=False)
    assert (status, output.count("\n") >= 1) == (0, True)
    first = error.splitlines()[0]
    assert "model (llama): plain text, for no chat template is in use: it goes on from" in first


def test_commands_change_the_conversation(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    lines = ["/help", "Gold", "/reset", "/system You help", "Foo", f"/save {file}", "/quit", "Foo"]
    status, output, error = talk("\n".join(lines))
    assert status == 0, error
    assert output == _answers("Gold") + _answers("Foo", system="You help")
    assert error.count("/system TEXT") == 1
    assert f"{file}: 1 exchanges" in error
    row = json.loads(file.read_text())
    roles = [turn["role"] for turn in row["messages"]]
    assert roles == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == "Foo"


def test_what_is_saved_can_be_trained_on(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "alpaca").mkdir()
    assert talk(f"Gold\nFoo\n/save {tmp_path}/alpaca/train.jsonl")[0] == 0
    (example,) = read_rows(find_task("alpaca"), tmp_path, "train").examples
    assert [turn.role for turn in example.turns] == ["user", "assistant"] * 2


def test_two_slashes_begin_a_message_with_one(talk: Talk) -> None:
    assert talk("//quit Foo\n")[1] == _answers("/quit Foo")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("Gold\n/rest\n", "line 2: /rest is none of /reset, /system, .*; did you mean /reset?"),
        ("/reset all\n", "line 1: /reset takes no text"),
        ("/save\n", "line 1: /save needs the name of a file"),
        ("/save x.jsonl\n", "line 1: there is nothing to save yet"),
        ("/save x.csv\n", "line 1: /save x.csv does not end in .jsonl"),
        ("Profit " * 300, r"line 1: the message has \d+ tokens with all around it; with max_new"),
    ],
)
def test_the_first_mistake_of_a_pipe_ends_the_command(talk: Talk, lines: str, message: str) -> None:
    status, _, error = talk(lines)
    assert status == 1
    assert re.search(f"fingpt: error: {message}", error), error


def test_a_file_that_is_there_is_not_written_over(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text("mine")
    status, _, error = talk(f"Gold\n/save {tmp_path}/talk.jsonl")
    assert status == 1
    assert "it is there already; give another name" in error
    assert talk(f"Gold\n/save {tmp_path}/none/talk.jsonl")[2].count("there is no folder") == 1
    assert (tmp_path / "talk.jsonl").read_text() == "mine"


def test_what_is_left_out_is_told(talk: Talk) -> None:
    _, _, error = talk("Profit rose and the dividend\n" * 4, "--context", "60")
    told = r"the first \d of \d exchanges are left out: they do not fit the context of 60 tokens"
    assert re.search(told, error), error


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (("--top_k", "3"), "--top_k has no effect without --temperature", 2),
        (("--temperature", "0"), "--temperature: 0 is not above 0", 2),
        (("--context", "999"), "context 999 is beyond the model's 330 positions", 1),
        (("--contxt", "9"), "unrecognized arguments: --contxt 9; did you mean --context?", 2),
        (("--max_new_tokens", "0"), "0 is below 1", 2),
    ],
)
def test_wrong_settings_are_named(
    talk: Talk, words: tuple[str, ...], message: str, status: int
) -> None:
    code, _, error = talk("Gold", *words)
    assert (code, message in error) == (status, True), error


def test_an_adapter_answers(talk: Talk, model: Path, tmp_path: Path) -> None:
    (client,) = save_clients(model / "model", tmp_path, 1)
    plain = talk("Gold\n")
    adapted = talk("Gold\n", "--adapter", str(client))
    assert (plain[0], adapted[0]) == (0, 0), adapted[2]
    assert plain[1] != adapted[1]


def test_a_terminal_is_never_sent_what_controls_it() -> None:
    assert "a\x1b[2Jb\x9bc\n\td".translate(chat_command._HARMLESS) == "a\ufffd[2Jb\ufffdc\n\td"


# Slow enough to be interrupted, at a terminal that sends the signal of Ctrl-C.
# A program that was started in the background ignores Ctrl-C, and so do its children.
_SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
os.open(os.ttyname(0), os.O_RDWR)
from fingpt_lightning.cli.main import main
from fingpt_lightning.deploy.written_text import WrittenText
add = WrittenText.add
WrittenText.add = lambda text, token: time.sleep(0.1) or add(text, token)
main(sys.argv[1:])
"""


def test_at_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_program(model: Path) -> None:
    person, terminal = pty.openpty()
    words = ["chat", "--model", str(model / "model"), "--device", "cpu", "--max_new_tokens", "200"]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, *words],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        end_s = time.monotonic() + 60
        while (found := re.search(pattern, seen, re.DOTALL)) is None:
            left_s = max(0.0, end_s - time.monotonic())
            assert select.select([person], [], [], left_s)[0], f"no {pattern!r} in {seen!r}"
            seen += os.read(person, 4096).decode(errors="replace")
        seen = seen[found.end() :]

    try:
        wait_for("plain text.*> ")
        os.write(person, b"Shares of Foo\n")
        wait_for("Shares of Foo\r\n(?:\x1b[^\r]*\r)?.")  # readline's own sequences aside
        os.write(person, b"\x03")
        wait_for("interrupted.*> ")
        # CPython's readline loses a signal that comes between its prompt and its wait for keys.
        time.sleep(0.5)
        os.write(person, b"\x03")
        wait_for("Ctrl-D or /quit ends.*> ")
        os.write(person, b"/rest\n")
        wait_for("/rest is none of .*did you mean /reset.*> ")
        os.write(person, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(person)
