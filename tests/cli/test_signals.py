import os
import signal
from collections.abc import Iterator

import pytest

from fingpt_lightning.cli import main as program
from fingpt_lightning.cli.errors import TerminatedError
from fingpt_lightning.cli.main import main
from fingpt_lightning.cli.signals import raised_sigterm, sigterm_left_to


@pytest.fixture(autouse=True)
def _default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_a_command_with_status_143_after_cleaning_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def run(_: list[str]) -> None:
        try:
            try:
                _terminate()
            except Exception:  # what goes on after failures does not after this
                pytest.fail("SIGTERM was taken for a failure")
        finally:
            _terminate()  # a second one does not end the cleaning up
            cleaned.append(True)

    monkeypatch.setattr(program, "_run", run)
    with pytest.raises(SystemExit) as ended:
        main(["export"])
    assert ended.value.code == 143
    assert cleaned == [True]
    assert capsys.readouterr().err == "fingpt: error: ended by SIGTERM\n"


def test_sigterm_is_left_to_who_sees_to_it() -> None:
    is_handled = True
    with raised_sigterm(), sigterm_left_to(lambda: is_handled):
        _terminate()
        is_handled = False
        with pytest.raises(TerminatedError):
            _terminate()


def test_a_handler_that_is_there_stays() -> None:
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    with raised_sigterm():
        _terminate()
    assert seen == [True]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
