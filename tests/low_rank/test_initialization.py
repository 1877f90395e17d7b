import pytest
import torch

from fingpt_lightning.low_rank import Initialization, LowRankLinear
from fingpt_lightning.low_rank.initialization import initial_factors

SIZES = [(60, 40, 16), (40, 120, 24)]


def _factors(
    kind: Initialization, sizes: tuple[int, int, int], std: float = 0.3
) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(5)
    factors = initial_factors(kind, *sizes, std, stream)
    return [factor.double() for factor in factors]


@pytest.mark.parametrize("sizes", SIZES)
def test_svd_is_the_decomposition_of_the_dense_draw(sizes: tuple[int, int, int]) -> None:
    up, down = _factors(Initialization.SVD, sizes)
    stream = torch.Generator().manual_seed(5)
    drawn = torch.empty(sizes[1], sizes[0]).normal_(std=0.3, generator=stream).double()
    u, s, vh = torch.linalg.svd(drawn, full_matrices=False)
    rank = sizes[2]
    truth = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    torch.testing.assert_close(up @ down, truth, rtol=0, atol=1e-5)
    torch.testing.assert_close(up.T @ up, down @ down.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_cola_draws_both_factors_with_the_papers_variance(sizes: tuple[int, int, int]) -> None:
    in_features, out_features, rank = sizes
    scale = rank**-0.25 * (in_features + out_features) ** -0.25
    factors = _factors(Initialization.COLA, sizes)
    assert [factor.shape for factor in factors] == [(out_features, rank), (rank, in_features)]
    for factor in factors:
        assert factor.std() == pytest.approx(scale, rel=0.08)
        assert abs(factor.mean()) < 0.1 * scale


@pytest.mark.parametrize("sizes", SIZES)
def test_orthogonal_factors_have_one_singular_value_and_the_dense_variance(
    sizes: tuple[int, int, int],
) -> None:
    up, down = _factors(Initialization.ORTHOGONAL, sizes)
    in_features, out_features, rank = sizes
    length = (0.3**2 * in_features * out_features / rank) ** 0.25
    for gram in (up.T @ up, down @ down.T):
        torch.testing.assert_close(gram, length**2 * torch.eye(rank).double(), rtol=0, atol=1e-5)
    assert (up @ down).square().mean().sqrt() == pytest.approx(0.3, rel=1e-5)


def test_a_layer_starts_as_asked_from_its_stream_alone() -> None:
    layers = []
    for seed in (1, 1, 2):
        layer = LowRankLinear(8, 24, rank=3)
        layer.reset_parameters(0.1, torch.Generator().manual_seed(seed), Initialization.ORTHOGONAL)
        layers.append(layer)
    assert torch.equal(layers[0].up, layers[1].up)
    assert not torch.equal(layers[0].up, layers[2].up)
    gram = layers[0].up.T @ layers[0].up
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(3))
