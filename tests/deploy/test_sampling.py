import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.deploy.sampling import Sampler, Sampling

_LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def _shares(sampling: Sampling, num_draws: int = 4000) -> list[float]:
    tokens = Sampler(sampling, range(num_draws))(_LOGITS.expand(num_draws, -1))
    return (tokens.bincount(minlength=5) / num_draws).tolist()


def test_draws_follow_the_probabilities() -> None:
    for temperature in (1.0, 0.5):
        expected = (_LOGITS / temperature).softmax(0).tolist()
        for share, probability in zip(_shares(Sampling(temperature)), expected, strict=True):
            spread = math.sqrt(probability * (1 - probability) / 4000)
            assert abs(share - probability) < 4 * spread


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    assert [share > 0 for share in _shares(Sampling(top_k=2))] == [False, True, False, True, False]
    # 0.54, 0.20 and 0.12: the second reaches 0.6, the third is not needed.
    assert [share > 0 for share in _shares(Sampling(top_p=0.6))] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert _shares(Sampling(top_p=1e-9))[1] == 1
    assert _shares(Sampling(top_k=1))[1] == 1


def test_a_row_s_draws_are_its_own_whatever_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    together = Sampler(Sampling(seed=7), [4, 5, 6])
    first, second = together(logits), together(logits)
    alone = Sampler(Sampling(seed=7), [5])
    assert [int(alone(logits[1:2])), int(alone(logits[1:2]))] == [int(first[1]), int(second[1])]
    flat = torch.zeros(1, 10**6)
    drawn = {int(Sampler(Sampling(seed=seed), [row])(flat)) for seed in (7, 8) for row in range(3)}
    assert len(drawn) == 6


@given(
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | st.floats(0.01, 1.0),
    temperature=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31),
)
def test_a_drawn_token_is_always_one_that_can_be_drawn(
    top_k: int | None, top_p: float | None, temperature: float, seed: int
) -> None:
    token = int(Sampler(Sampling(temperature, top_k, top_p, seed), [0])(_LOGITS[None]))
    ranked = _LOGITS.argsort(descending=True).tolist()
    assert ranked.index(token) < (top_k or 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 is not above 0"),
        ({"top_k": 0}, "top_k 0 is below 1"),
        ({"top_p": 1.5}, r"top_p 1.5 is outside \(0, 1\]"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
