import pytest

from fingpt_lightning.hub.names import check_branch, check_hub_name


@pytest.mark.parametrize("name", ["me/x", "a-b/c.d_e", "My_Team/Model-1.5B", "a/" + "b" * 94])
def test_names_as_the_hub_takes_them_are_taken(name: str) -> None:
    assert check_hub_name(name) == name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("my team/small model", "my-team/small-model"),
        ("https://huggingface.co/me/small", "me/small"),
        ("hf://models/me/small", "me/small"),
        ("me/small/", "me/small"),
        ("me/small.git", "me/small"),
        ("me/small--one", "me/small-one"),
        ("me/small..one", "me/small.one"),
        ("me/-small-", "me/small"),
        ("me/small/tree/main", "me/small"),
        ("me/klein+größer", "me/klein-gr-er"),
        ("small", "OWNER/small"),
    ],
)
def test_the_nearest_right_form_of_a_wrong_name_is_named(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=r"is not of the form OWNER/NAME") as refused:
        check_hub_name(name)
    assert str(refused.value).endswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("name", ["", "/", "..", "a/" + "b" * 97])
def test_a_name_that_is_like_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not of the form OWNER/NAME"):
        check_hub_name(name)


def test_names_of_branches() -> None:
    assert [check_branch(name) for name in ("v1", "main", "runs/a-1.5")] == [
        "v1", "main", "runs/a-1.5"
    ]  # fmt: skip
    for wrong in ("", "a b", "-a", "a..b", "a//b", "refs/pr/1", "a.lock", "a/"):
        with pytest.raises(ValueError, match="is not the name of a branch"):
            check_branch(wrong)
