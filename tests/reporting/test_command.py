import time
from pathlib import Path

import pytest

from fingpt_lightning.cli.main import main
from tests.reporting.folders import make_run


def _run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    status = 0
    try:
        main([str(word) for word in words])
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_report_writes_the_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    run = make_run(tmp_path / "mine", 4)
    status, text = _run(capsys, "report", run, "--output", page)
    assert status == 0
    assert f"{page}: " in text
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_report_tells_each_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "mine", 4)
    cases = [
        (("report",), 2, "required: RUN_OR_SWEEP"),
        (("report", run, "--outptu", "x.html"), 2, "did you mean --output?"),
        (("report", tmp_path / "mone"), 1, "mone does not exist; did you mean mine?"),
        (("report", run, "--output", tmp_path / "no" / "x.html"), 1, "there is no folder"),
    ]
    for words, status, message in cases:
        found, text = _run(capsys, *words)
        assert found == status, text
        assert message in text
        assert len(text.strip().splitlines()) == 1
    (run / "metrics.csv").write_text("step,train/loss\n0,x\n")
    status, text = _run(capsys, "report", run, "--output", tmp_path / "x.html")
    assert status == 1
    assert f"{run / 'metrics.csv'}:2: train/loss is 'x', which is not a number" in text
    assert not (tmp_path / "x.html").exists()


def test_watch_writes_the_page_until_the_run_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, page = make_run(tmp_path / "mine", 4, is_finished=False), tmp_path / "page.html"
    slept: list[float | int] = []

    def sleep(seconds: float | int) -> None:
        assert "not finished" in page.read_text()
        slept.append(seconds)
        if len(slept) == 2:
            (run / "summary.json").write_text('{"steps": 4}')

    monkeypatch.setattr(time, "sleep", sleep)
    status, text = _run(capsys, "report", run, "--output", page, "--watch", "3")
    assert status == 0
    assert slept == [3, 3]
    assert f"{page}: written every 3 s until the run ends" in text
    assert "not finished" not in page.read_text()


def test_watch_of_a_finished_run_writes_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it sleeps"))
    run = make_run(tmp_path / "mine", 4)
    assert _run(capsys, "report", run, "--output", tmp_path / "x.html", "--watch")[0] == 0


def test_ctrl_c_ends_a_watch_with_a_page_that_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, page = make_run(tmp_path / "mine", 4, is_finished=False), tmp_path / "page.html"

    def interrupt(seconds: float | int) -> None:
        assert 'http-equiv="refresh" content="10"' in page.read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    status, text = _run(capsys, "report", run, "--output", page, "--watch")
    assert status == 0
    assert "interrupted" not in text
    assert f"{page}: " in text.splitlines()[-1]
    assert page.read_text().rstrip().endswith("</html>")
    assert "http-equiv" not in page.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]
