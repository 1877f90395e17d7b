import pytest
import torch
from torch import Tensor

from fingpt_lightning.low_rank.decomposition import (
    Method,
    ShiftedMoments,
    damped,
    decompose,
    energies_of,
    factors_of,
    loss_scores,
    output_basis,
    output_roots,
    relative_errors,
    shifted_errors,
    shifted_weight,
)
from fingpt_lightning.low_rank.factorize import Factors

SHAPES = [(7, 11), (11, 7), (9, 9)]


def _weights(rows: int, columns: int, number: int = 3) -> Tensor:
    return torch.randn(number, rows, columns, dtype=torch.float64)


def _moments(columns: int, num_tokens: int = 40, number: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs of very unequal features, and their second moments."""
    scales = torch.logspace(-2, 1, columns, dtype=torch.float64)
    mixed = torch.randn(columns, columns, dtype=torch.float64) * scales
    x = torch.randn(number, num_tokens, columns, dtype=torch.float64) @ mixed.T
    return x, x.mT @ x / num_tokens


def _reference(weight: Tensor, moment: Tensor, rank: int) -> Tensor:
    """U_r S_r V_r' S^-1 of the singular value decomposition of W S, by Cholesky's S."""
    root = torch.linalg.cholesky(moment)
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ vh[:rank]
    truth: Tensor = torch.linalg.solve_triangular(root, kept, upper=False, left=False)
    return truth


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_without_moments_a_pair_is_the_truncated_singular_value_decomposition(
    rows: int, columns: int
) -> None:
    weights = _weights(rows, columns)
    for rank in (1, 4, min(rows, columns)):
        for weight, pair in zip(weights, decompose(weights, [rank] * 3), strict=True):
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            truth = (u[:, :rank] * s[:rank]) @ vh[:rank]
            torch.testing.assert_close(pair.up @ pair.down, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_with_moments_a_pair_is_that_of_the_whitened_weight(rows: int, columns: int) -> None:
    weights = _weights(rows, columns)
    x, moments = _moments(columns)
    energies = energies_of(weights, moments)
    for rank in (1, 3, min(rows, columns) - 1):
        pairs = decompose(weights, [rank] * 3, moments)
        for index, pair in enumerate(pairs):
            product = pair.up @ pair.down
            truth = _reference(weights[index], moments[index], rank)
            torch.testing.assert_close(product, truth, rtol=1e-7, atol=1e-7)
            # The error of the outputs themselves is what the spectrum leaves out.
            lost = (x[index] @ (weights[index] - product).T).square().sum() / len(x[index])
            torch.testing.assert_close(lost, energies[index, rank:].sum(), rtol=1e-8, atol=1e-9)


def test_whitening_loses_less_of_the_outputs_and_more_of_the_weights() -> None:
    weights = _weights(9, 13)
    _, moments = _moments(13)
    for weight, moment, plain, whitened in zip(
        weights, moments, decompose(weights, [4] * 3), decompose(weights, [4] * 3, moments),
        strict=True,
    ):  # fmt: skip
        of_plain = relative_errors(weight, plain, moment)
        of_whitened = relative_errors(weight, whitened, moment)
        assert of_plain.output is not None
        assert of_whitened.output is not None
        assert of_whitened.output < 0.7 * of_plain.output
        assert of_plain.weight < of_whitened.weight


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_moments_of_few_tokens_lose_nothing_at_the_rank_of_the_inputs(
    rows: int, columns: int
) -> None:
    """Two tokens: moments are singular, and outputs on them need two columns."""
    weights = _weights(rows, columns)
    x, moments = _moments(columns, num_tokens=2)
    for method in Method:
        for index, pair in enumerate(decompose(weights, [2] * 3, moments, method)):
            outputs = x[index] @ weights[index].T
            torch.testing.assert_close(
                x[index] @ (pair.up @ pair.down).T, outputs, rtol=1e-4, atol=1e-3
            )


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_damped_moments_weigh_both_errors(rows: int, columns: int) -> None:
    weights = _weights(rows, columns)
    x, moments = _moments(columns, num_tokens=2)
    shrunk = damped(moments, 0.3)
    assert shrunk is not None
    for index, moment in enumerate(moments):
        of_mean = 0.3 * float(x[index].square().sum()) / 2 / columns  # both tokens, all features
        torch.testing.assert_close(
            shrunk[index], moment + of_mean * torch.eye(columns, dtype=torch.float64)
        )
    # Between those of the outputs alone and those of the weights alone.
    errors = [
        relative_errors(weights[0], decompose(weights, [2] * 3, damped(moments, damping))[0],
                        moments[0])
        for damping in (0.0, 0.3, 1e9)
    ]  # fmt: skip
    outputs = [error.output for error in errors if error.output is not None]
    of_weights = [error.weight for error in errors]
    assert outputs == sorted(outputs)
    assert of_weights == sorted(of_weights, reverse=True)
    assert outputs[0] < outputs[-1]
    plain = decompose(weights, [2] * 3)[0]
    far = decompose(weights, [2] * 3, damped(moments, 1e9))[0]
    torch.testing.assert_close(far.up @ far.down, plain.up @ plain.down, rtol=0, atol=1e-6)
    assert damped(moments, 0.0) is moments
    assert damped(None, 0.3) is None


def test_factors_share_the_singular_values_evenly() -> None:
    _, moments = _moments(11)
    for pair in decompose(_weights(7, 11), [2, 3, 5], moments):
        torch.testing.assert_close(pair.up.T @ pair.up, pair.down @ pair.down.T)


@pytest.mark.parametrize("with_moments", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_weights_of_a_batch_get_what_each_would_alone(
    rows: int, columns: int, with_moments: bool
) -> None:
    weights = _weights(rows, columns)
    moments = _moments(columns)[1] if with_moments else None
    ranks = [2, 5, 3]
    for index, pair in enumerate(decompose(weights, ranks, moments)):
        own = None if moments is None else moments[index : index + 1]
        (alone,) = decompose(weights[index : index + 1], ranks[index : index + 1], own)
        assert pair.up.shape == (rows, ranks[index])
        torch.testing.assert_close(pair.up @ pair.down, alone.up @ alone.down)


@pytest.mark.parametrize("with_moments", [False, True])
def test_a_random_subspace_is_nearly_as_good(with_moments: bool) -> None:
    weights = _weights(60, 90, 2) @ torch.diag(0.97 ** torch.arange(90, dtype=torch.float64))
    moments = _moments(90, 300, 2)[1] if with_moments else None
    exact = decompose(weights, [9, 9], moments)
    streams = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    random = decompose(weights, [9, 9], moments, Method.RANDOMIZED, streams)
    for index, weight in enumerate(weights):
        moment = None if moments is None else moments[index]
        errors = [relative_errors(weight, pair[index], moment) for pair in (exact, random)]
        best, near = (e.weight if e.output is None else e.output for e in errors)
        assert best <= near * (1 + 1e-9)
        assert near < 1.01 * best


def test_energies_are_squared_singular_values() -> None:
    for rows, columns in SHAPES:
        weights = _weights(rows, columns)
        truth = torch.linalg.svdvals(weights).square()
        torch.testing.assert_close(energies_of(weights), truth)
        torch.testing.assert_close(output_basis(weights, 2).energies, truth)


def test_errors_are_those_of_the_stored_factors() -> None:
    weight = torch.eye(4)
    pair = Factors(torch.eye(4)[:, :3], torch.eye(4)[:3])
    moment = torch.diag(torch.tensor([1.0, 1.0, 1.0, 9.0]))
    errors = relative_errors(weight, pair, moment)
    assert errors.weight == pytest.approx(0.5)
    assert errors.output == pytest.approx((9 / 12) ** 0.5)


def test_a_rank_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 columns are outside \[1, 7\]"):
        output_basis(_weights(7, 11), 8)


def _shifted(columns: int, num_tokens: int) -> tuple[Tensor, Tensor, ShiftedMoments]:
    """Inputs before and after something has changed, a row a token, and their moments."""
    x = _moments(columns, num_tokens, 1)[0][0]
    y = x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns)).double()
    products = (x.T @ x, x.T @ y, y.T @ y)
    return x, y, ShiftedMoments(*(product / num_tokens for product in products))


def test_a_shifted_weight_is_the_least_squares_on_what_reaches_it() -> None:
    (weight,) = _weights(7, 11, 1)
    x, y, moments = _shifted(11, 40)
    least = torch.linalg.lstsq(y, x @ weight.T).solution.T
    torch.testing.assert_close(shifted_weight(weight, moments, 0.0), least)
    # Damped, of the rows of one more kind of input, on which it is to be what it was.
    level = (0.5 * moments.own.diagonal().mean() * 40).sqrt() * torch.eye(11, dtype=torch.float64)
    rows, wanted = torch.cat([y, level]), torch.cat([x, level]) @ weight.T
    least = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(shifted_weight(weight, moments, 0.5), least)


def test_few_tokens_leave_the_weight_as_it_was_elsewhere() -> None:
    (weight,) = _weights(7, 11, 1)
    _, y, moments = _shifted(11, 4)
    _, _, vh = torch.linalg.svd(y)
    unseen = vh[4:].T
    torch.testing.assert_close(shifted_weight(weight, moments, 1e-3) @ unseen, weight @ unseen)


def test_shifted_errors_are_of_the_outputs() -> None:
    (weight,) = _weights(7, 11, 1)
    x, y, moments = _shifted(11, 40)
    pair = Factors(torch.randn(7, 3), torch.randn(3, 11))
    product = (pair.up @ pair.down).double()
    errors = shifted_errors(weight, pair, moments)
    assert errors.weight == pytest.approx(
        float((weight - pair.up.double() @ pair.down.double()).norm() / weight.norm())
    )
    truth = (x @ weight.T - y @ product.T).norm() / (x @ weight.T).norm()
    assert errors.output == pytest.approx(float(truth), rel=1e-4)


def _gradients(rows: int, number: int = 3) -> Tensor:
    """Second moments of gradients of very unequal features."""
    return _moments(rows, number=number)[1]


def _both_sides(weights: Tensor, moments: Tensor, roots: Tensor, rank: int) -> list[Factors]:
    basis = output_basis(roots.mT @ weights, rank, moments)
    return [
        factors_of(weight, vectors, root)
        for weight, vectors, root in zip(weights, basis.vectors, roots, strict=True)
    ]


def _lost(error: Tensor, moment: Tensor, gradient: Tensor) -> Tensor:
    """tr(G E C E'), twice the predicted increase of the loss."""
    return (gradient @ error @ moment @ error.T).trace()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_scores_are_what_factors_of_each_rank_lose_of_the_loss(rows: int, columns: int) -> None:
    weights, gradients = _weights(rows, columns), _gradients(rows)
    _, moments = _moments(columns)
    scores = loss_scores(weights, moments, gradients)
    assert scores.shape == (3, min(rows, columns))
    for rank in (1, 3, min(rows, columns) - 1):
        for index, pair in enumerate(decompose(weights, [rank] * 3, moments)):
            error = weights[index] - pair.up @ pair.down
            lost = _lost(error, moments[index], gradients[index])
            torch.testing.assert_close(scores[index, rank:].sum(), lost, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_whitened_on_both_sides_a_pair_is_the_nearest_by_the_loss(rows: int, columns: int) -> None:
    weights, gradients = _weights(rows, columns), _gradients(rows)
    _, moments = _moments(columns)
    roots = output_roots(gradients, 0.01)
    shifted = damped(gradients, 0.01)
    assert shifted is not None
    torch.testing.assert_close(roots @ roots.mT, shifted)
    energies = energies_of(roots.mT @ weights, moments)
    for rank in (1, 3, min(rows, columns) - 1):
        for index, pair in enumerate(_both_sides(weights, moments, roots, rank)):
            # Symmetric roots, where the code has Cholesky's: any root gives the same product.
            values, vectors = torch.linalg.eigh(shifted[index])
            root = (vectors * values.sqrt()) @ vectors.T
            truth = torch.linalg.solve(
                root, _reference(root @ weights[index], moments[index], rank)
            )
            product = pair.up @ pair.down
            torch.testing.assert_close(product, truth, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(pair.up.T @ pair.up, pair.down @ pair.down.T)
            lost = _lost(weights[index] - product, moments[index], shifted[index])
            torch.testing.assert_close(lost, energies[index, rank:].sum(), rtol=1e-7, atol=1e-9)


def test_without_gradients_both_sides_are_the_input_side() -> None:
    weights, gradients = _weights(9, 13), torch.zeros(3, 9, 9)
    _, moments = _moments(13)
    both = _both_sides(weights, moments, output_roots(gradients, 0.01), 4)
    for one, other in zip(both, decompose(weights, [4] * 3, moments), strict=True):
        torch.testing.assert_close(one.up @ one.down, other.up @ other.down)
