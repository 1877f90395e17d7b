import re
import sys
import time

import pytest

from fingpt_lightning.terminal import progress
from fingpt_lightning.terminal.progress import SoFar, announced, shown_progress, shown_tokenizing


def _show(what: str, num_bytes: int | None = None) -> None:
    with shown_tokenizing(what, num_bytes) as show:
        show(SoFar(7, 11_000, 500_000))
        show(SoFar(13, 22_000, 1_000_000))


def _be_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize("on_terminal", [False, True])
def test_short_work_is_quiet(
    on_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if on_terminal:
        _be_a_terminal(monkeypatch)
    _show("short")
    assert capsys.readouterr().err == ""


def test_a_terminal_sees_a_line_that_moves_and_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _be_a_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    _show("a[1].jsonl", 2_000_000)
    shown = capsys.readouterr().err
    assert "a[1].jsonl" in shown
    assert "\u2501" in shown, "a bar"
    assert "-:--:--" in shown or "0:00:" in shown, "the time that is left"
    assert "tokenized a[1].jsonl: 13 documents, 1 MB, 0.0 M tokens, " in shown


def test_without_a_size_there_is_a_rate_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _be_a_terminal(monkeypatch)
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    _show("stream")
    shown = capsys.readouterr().err
    assert "k tokens/s" in shown
    assert "\u2501" not in shown
    assert ":--" not in shown


def test_a_log_sees_one_line_at_the_start_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    _show("piped", 1_000_000)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "tokenizing piped"
    assert last.startswith("tokenized piped: 13 documents, 1 MB, 0.0 M tokens, ")


@pytest.mark.parametrize(
    ("total", "told"),
    [(250, r"healing: 120 of 250 steps, about [\d.]+ \w+ left"), (None, "healing: 120 steps")],
)
def test_a_log_sees_how_far_long_work_has_come(
    total: int | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    with shown_progress("healing", total, "steps") as show:
        show(100)
        monkeypatch.setattr(progress, "_LINE_S", 0.0)
        show(120)
        monkeypatch.setattr(progress, "_LINE_S", 60.0)
        show(130)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["healing"] * 3
    assert re.fullmatch(told, lines[1])
    with shown_progress("in silence", total, "steps", in_log=False) as show:
        monkeypatch.setattr(progress, "_LINE_S", 0.0)
        show(120)
    assert capsys.readouterr().err == ""


def test_work_that_fails_is_not_said_to_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", 0.0)
    work = shown_tokenizing("failing", None)
    work.__enter__()(SoFar())
    assert not work.__exit__(KeyError, KeyError(), None)
    assert capsys.readouterr().err.splitlines() == ["tokenizing failing"]


def test_long_work_without_parts_has_a_line_at_its_start_and_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_QUIET_S", 0.01)
    with announced("loading [base]"):
        time.sleep(0.1)
        begun = capsys.readouterr().err
    assert begun == "loading [base] ...\n"
    assert re.fullmatch(r"loading \[base\]: [\d.]+ ms\n", capsys.readouterr().err)


def test_short_work_other_ranks_and_failures_have_no_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with announced("short"):
        pass
    monkeypatch.setattr(progress, "_QUIET_S", 0.01)
    with pytest.raises(KeyError), announced("failing"):
        raise KeyError
    monkeypatch.setattr(progress, "process_rank", lambda: "1")
    with announced("on another rank"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
