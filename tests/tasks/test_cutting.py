import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.tasks.cutting import cut_own_text

TOKENS = st.lists(st.integers(0, 3), max_size=12)


@given(st.lists(st.integers(10, 12)), TOKENS, st.lists(st.integers(20, 22)), st.integers(1, 14))
def test_tokens_of_the_text_alone_go(
    before: list[int], text: list[int], after: list[int], num_excess: int
) -> None:
    cut = cut_own_text(before + text + after, text, num_excess)
    if num_excess > len(text):
        assert cut is None
        return
    kept = text[num_excess:] if not after else text[: len(text) - num_excess]
    assert cut == (*before, *kept, *after)


def test_the_text_s_ends_may_have_become_other_tokens() -> None:
    assert cut_own_text([1, 9, 5, 6, 7, 8, 2], [4, 5, 6, 7, 3], 2) == (1, 9, 5, 8, 2)


def test_a_text_that_the_instruction_has_too_is_cut_where_it_comes_last() -> None:
    assert cut_own_text([5, 6, 7, 1, 5, 6, 7, 2], [5, 6, 7], 2) == (5, 6, 7, 1, 5, 2)


def test_a_number_is_not_found_within_others() -> None:
    assert cut_own_text([1 << 32, 2, 7], [0, 1, 0], 1) is None


@pytest.mark.parametrize("tokens", [[1] * 200_000, list(range(200_000))])
def test_long_texts_are_cut_at_once(tokens: list[int]) -> None:
    start_s = time.perf_counter()
    cut = cut_own_text([7, *tokens, 8], tokens, 199_000)
    assert time.perf_counter() - start_s < 2
    assert cut == (7, *tokens[:1000], 8)
