import sys
from types import SimpleNamespace

import pytest

from fingpt_lightning.terminal.messages import (
    first_line,
    nearest,
    nearest_of,
    print_status,
    without_credentials,
)


def test_a_name_is_never_its_own_nearest_one() -> None:
    known = ["--data.cache_dir", "--data.data_dir"]
    assert nearest_of("--data.cache_dir", known) == "--data.data_dir"
    assert nearest("rank", ["rank"]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:secret@hub.local:8080/x (no)", "at https://hub.local:8080/x (no)"),
        ("https://secret@hub.local", "https://hub.local"),
        ("HTTP://me:secr@et@hub.local/a@b", "HTTP://hub.local/a@b"),
        ("[http://me:secret@a, http://you:secret@b]", "[http://a, http://b]"),
        ("postgresql+psycopg://me:secret@db/x", "postgresql+psycopg://me:***@db/x"),
        ("postgresql://me@db/sweeps", "postgresql://me@db/sweeps"),
        ("postgresql://me:a/b@db/sweeps", "postgresql://me:***@db/sweeps"),
        ("postgresql://me:a#b@c@db/sweeps", "postgresql://me:***@db/sweeps"),
        ("http://hub.local:8080/@x", "http://hub.local:8080/@x"),
        ("no file http:/me:secret@hub.local/a", "no file http:/hub.local/a"),
        ("hf://gpt2:train@main", "hf://gpt2:train@main"),
        ("hf://a/b@main:train, me:you@hub", "hf://a/b@main:train, me:you@hub"),
    ],
)
def test_an_address_is_shown_without_its_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert first_line(OSError(f"{text}\nsecond line")) == shown


@pytest.mark.parametrize(
    ("launched", "of_lightning", "printed"),
    [
        (None, None, True),
        ("0", None, True),
        ("1", None, False),
        (None, 1, False),  # each node starts its own process
        ("0", 1, False),
        (None, 0, True),
    ],
)
def test_the_first_process_alone_prints_a_status(
    launched: str | None,
    of_lightning: int | None,
    printed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    if launched is not None:
        monkeypatch.setenv("SLURM_PROCID", launched)
    only = SimpleNamespace() if of_lightning is None else SimpleNamespace(rank=of_lightning)
    module = SimpleNamespace(rank_zero_only=only)
    monkeypatch.setitem(sys.modules, "lightning.fabric.utilities.rank_zero", module)
    print_status("begun")
    assert capsys.readouterr().err == ("fingpt: begun\n" if printed else "")
