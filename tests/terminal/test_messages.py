import pytest

from fingpt_lightning.terminal.messages import first_line, nearest, nearest_of, without_credentials


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
