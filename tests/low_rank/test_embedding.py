import pytest
import torch
from torch import nn

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead
from fingpt_lightning.low_rank.embedding import head_factors


def test_lookup_and_logits_are_those_of_the_product_table() -> None:
    embedding = LowRankEmbedding(13, 7, rank=3).double()
    head = LowRankHead(embedding)
    table = embedding.table @ embedding.up.T
    ids, hidden = torch.tensor([[4, 0], [12, 4]]), torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(embedding(ids), table[ids], rtol=0, atol=1e-12)
    torch.testing.assert_close(head(hidden), hidden @ table.T, rtol=0, atol=1e-12)


def test_head_and_embedding_hold_the_same_parameters() -> None:
    network = nn.ModuleDict({"embedding": LowRankEmbedding(13, 7, rank=3)})
    embedding = network["embedding"]
    assert isinstance(embedding, LowRankEmbedding)
    network["head"] = LowRankHead(embedding)
    assert sum(p.numel() for p in network.parameters()) == 3 * (13 + 7)


def test_head_factors_multiply_to_the_logits() -> None:
    hidden = torch.randn(5, 7)
    for head in (LowRankHead(LowRankEmbedding(13, 7, rank=3)), nn.Linear(7, 13, bias=False)):
        features, weight = head_factors(head, hidden)
        torch.testing.assert_close(features @ weight.T, head(hidden))


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(TypeError, match="a head is a LowRankHead or a Linear without bias"):
        head_factors(nn.Linear(7, 13), torch.randn(5, 7))


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 8 is outside \[1, 7\]"):
        LowRankEmbedding(13, 7, rank=8)
