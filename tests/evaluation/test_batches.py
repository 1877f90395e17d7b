from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fingpt_lightning.evaluation.batches import plan_batches


@given(lengths=st.lists(st.integers(1, 40), max_size=30), batch_tokens=st.integers(1, 100))
def test_each_row_is_in_one_batch_and_no_padded_batch_is_over_budget(
    lengths: list[int], batch_tokens: int
) -> None:
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens
    for batch, following in pairwise(batches):
        longest = max(lengths[row] for row in batch)
        assert longest * (len(batch) + 1) > batch_tokens
        assert min(lengths[row] for row in batch) >= max(lengths[row] for row in following)


def test_a_budget_below_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_tokens 0 is below 1"):
        plan_batches([1], 0)
