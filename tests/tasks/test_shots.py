import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.tasks.examples import Example, Shot
from fingpt_lightning.tasks.shots import with_examples_before


def _example(text: str, gold: int | None = 1) -> Example:
    return Example("Say. ", (f"{text}?",), (" no", " yes"), gold, 1, text)


_POOL = [_example(text) for text in "abcdefgh"]


@given(number=st.integers(1, 7), seed=st.integers(0, 99))
def test_examples_are_other_rows_with_their_answers_and_the_draw_is_its_seeds(
    number: int, seed: int
) -> None:
    made = with_examples_before(_POOL, _POOL, number, seed)
    assert made == with_examples_before(_POOL, _POOL, number, seed)
    for example in made:
        shots = [shot.prompt for shot in example.shots]
        assert len(set(shots)) == number
        assert f"Say. {example.text}?" not in shots
        assert set(example.shots) <= {Shot(f"Say. {e.text}?", " yes") for e in _POOL}
    # All questions but those that are drawn have the same ones.
    assert len({example.shots for example in made}) <= number + 1


def test_another_seed_draws_others() -> None:
    question = [_example("q")]
    drawn = {with_examples_before(question, _POOL, 2, seed)[0].shots for seed in range(9)}
    assert len(drawn) > 3


def test_the_right_context_of_several_is_shown() -> None:
    other = Example("", ("It. Al", "It. Bo"), (" won.", " won."), 1, 2, "o")
    (made,) = with_examples_before([_example("q")], [other], 1, 0)
    assert made.shots == (Shot("It. Bo", " won."),)


def test_too_few_rows_are_named() -> None:
    pool = [*_POOL[:2], _example("z", gold=None)]
    message = "num_fewshot 2 is above the 1 other rows of train with an answer"
    with pytest.raises(ValueError, match=message):
        with_examples_before(_POOL, pool, 2, 1)
