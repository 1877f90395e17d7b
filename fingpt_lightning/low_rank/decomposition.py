"""Factors A and B nearest to dense weights, many weights of one shape at a time.

Axes: B weights of one shape, O out_features, I in_features, R rank, K columns of a subspace,
M = min(O, I).

Distance is measured on the weights or, with moments, on the outputs of the layers: with
E the error of a weight and C = X X' / n the second moments of a layer's n inputs X, that is
|E|^2 or tr(E C E') = |E X|^2 / n. Where the layers before have changed what reaches a layer to Y,
it is |W X - P Y|^2 / n of the product P = U D. With G the second moments of the gradients of a loss
at the layer's outputs it is tr(G E C E'), twice the increase of the loss to second order.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fingpt_lightning.low_rank.factorize import Factors

OVERSAMPLING = 16
"""Columns of a randomized subspace beyond the rank."""
POWER_ITERATIONS = 2


class Method(StrEnum):
    """How the leading subspace is found."""

    EXACT = "exact"
    """From all eigenvectors of the smaller Gram matrix, in float64."""
    RANDOMIZED = "randomized"
    """Subspace iteration from a random start, in float32: faster at small ranks."""


class Basis(NamedTuple):
    """Where the outputs of some layers are largest.

    Args:
        vectors: Orthonormal columns, the direction of the largest outputs first.
        energies: Squares of all M singular values of W S, downwards, with S S' = C; of the
            randomized method those of the subspace alone.
    """

    vectors: Float[Tensor, "B O K"]
    energies: Float[Tensor, "B E"]


class Errors(NamedTuple):
    """Distance of the factors from their weight: |W - U D| / |W|, and the same for the outputs."""

    weight: float
    output: float | None


class ShiftedMoments(NamedTuple):
    """Moments of a layer's n inputs X, and of the inputs Y after layers before it have changed.

    Args:
        whole: C = X X' / n.
        cross: K = X Y' / n.
        own: D = Y Y' / n.
    """

    whole: Float[Tensor, "I I"]
    cross: Float[Tensor, "I I"]
    own: Float[Tensor, "I I"]


def output_basis(
    weights: Float[Tensor, "B O I"],
    num_columns: int,
    moments: Float[Tensor, "B I I"] | None = None,
    method: Method = Method.EXACT,
    generators: Sequence[torch.Generator] | None = None,
) -> Basis:
    """The leading left singular vectors of W S, where S S' = C, or of W without moments.

    The nearest weight of rank R is U U' W with the first R of these columns U: no inverse of S
    is taken, so that moments may be singular. Exact, W C W' (if O <= I) or S' W' W S is taken
    apart, which resolves singular values down to 1e-8 of the largest. Randomized, a random
    subspace is multiplied by W C W' and made orthonormal, over and over.

    Args:
        weights: Weights on any device, all of one shape.
        num_columns: K, in [1, M].
        moments: C of each layer; None measures on the weights.
        method: Method, exact or randomized.
        generators: Generators of the randomized start, one per weight, on its device; None draws
            from torch's.

    Raises:
        ValueError: ``num_columns`` is out of range.

    Source: https://arxiv.org/abs/2403.07378, section 3.2 (SVD-LLM: W S = U Sigma V', factors
    U sqrt(Sigma) and sqrt(Sigma) V' S^-1, whose product is U U' W);
    https://arxiv.org/abs/0909.4061, algorithm 4.4 (subspace iteration).
    """
    smaller = min(weights.shape[1:])
    if not 1 <= num_columns <= smaller:
        raise ValueError(f"{num_columns} columns are outside [1, {smaller}]")
    if method is Method.RANDOMIZED:
        return _randomized_basis(weights.float(), num_columns, moments, generators)
    gram_BMM, tall_BOI = _smaller_gram(weights, moments)
    energies_BM, vectors_BMM = _downwards(gram_BMM)
    leading_BMK = vectors_BMM[:, :, :num_columns]
    if tall_BOI is None:
        return Basis(leading_BMK, energies_BM)
    # Orthonormal where singular values are as good as zero, too.
    vectors_BOK, _ = torch.linalg.qr(tall_BOI @ leading_BMK)
    return Basis(vectors_BOK, energies_BM)


def energies_of(
    weights: Float[Tensor, "B O I"], moments: Float[Tensor, "B I I"] | None = None
) -> Float[Tensor, "B M"]:
    """Squares of all singular values of W S, downwards, without the vectors: half the time."""
    gram, _ = _smaller_gram(weights, moments)
    values: Tensor = torch.linalg.eigvalsh((gram + gram.mT) / 2)
    return values.flip(-1).clamp_min(0)


def loss_scores(
    weights: Float[Tensor, "B O I"],
    moments: Float[Tensor, "B I I"],
    gradients: Float[Tensor, "B O O"],
) -> Float[Tensor, "B M"]:
    """What each column of a basis of `output_basis` is worth to the loss, twice, in its order.

    With u and s the left singular vectors and the singular values of W S, the factors of rank R
    leave out the sum of s^2 u' G u over all later columns: tr(G E C E') of their error E. Such
    scores need not fall, since the order is that of the outputs.

    Args:
        weights: Weights as in `output_basis`.
        moments: C of each layer.
        gradients: G of each layer.
    """
    basis = output_basis(weights, min(weights.shape[1:]), moments)
    seen_BOM = gradients.double() @ basis.vectors
    return basis.energies * (basis.vectors * seen_BOM).sum(1).clamp_min(0)


def output_roots(gradients: Float[Tensor, "B O O"], damping: float) -> Float[Tensor, "B O O"]:
    """L with L L' = G, damped so that it has an inverse; 1 where G is 0, in float64.

    The factors nearest in tr(G E C E') come from L' W: its basis U by `output_basis`, and from that
    the product L'^-1 U U' L' W, which `pair_of` makes.

    Args:
        gradients: G of each layer.
        damping: Damping as in `damped`, above 0.

    Source: https://arxiv.org/abs/2505.17974 (GFWSVD) and https://arxiv.org/abs/2605.15626 (IO-SVD),
    whose G are those of observed labels and of the top-k predictions.
    """
    shifted = damped(gradients.double(), damping)
    assert shifted is not None
    is_zero_B11 = (shifted.diagonal(dim1=-2, dim2=-1).sum(-1) <= 0)[:, None, None]
    identity = torch.eye(shifted.shape[-1], dtype=torch.float64, device=shifted.device)
    roots: Tensor = torch.linalg.cholesky(torch.where(is_zero_B11, identity, shifted))
    return roots


def damped(moments: Float[Tensor, "B I I"] | None, damping: float) -> Float[Tensor, "B I I"] | None:
    """C + damping mean(diag C) 1: moments that leave no direction of the inputs out.

    Moments of few tokens, or of one kind of text, show of most directions only that they did not
    occur there; this much of the error of the weight itself counts beside that of the outputs.

    Args:
        moments: C of each layer; None stays None.
        damping: Damping, at least 0; 0 changes nothing, and a large one leaves the weight's error
            alone.
    """
    if moments is None or not damping:
        return moments
    means_B11 = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    return moments + damping * means_B11 * identity


def shifted_weight(
    weight: Float[Tensor, "O I"], moments: ShiftedMoments, damping: float
) -> Float[Tensor, "O I"]:
    """The V nearest to putting out on Y what W puts out on X: W K D^-1, in float64.

    With l = damping mean(diag D) it is W (K + l 1) (D + l 1)^-1, the least of
    |W X - V Y|^2 / n + l |W - V|^2: where Y carries little information, V is W.

    Args:
        weight: W.
        moments: Moments of X and Y.
        damping: Damping, above 0, since D of few tokens is singular or nearly so.

    Source: with P = U D of full rank the least squares of
    https://arxiv.org/abs/2403.07378, section 3.3, whose X is that of the changed network.
    """
    shift = damping * moments.own.diagonal().mean()
    identity = torch.eye(len(moments.own), dtype=torch.float64, device=moments.own.device)
    seen = weight.double() @ (moments.cross.double() + shift * identity)
    found: Tensor = torch.linalg.solve(moments.own.double() + shift * identity, seen.T).T
    return found


def square_roots(moments: Float[Tensor, "B I I"]) -> Float[Tensor, "B I I"]:
    """S with S S' = C, in float64: Cholesky's, or that of the eigenvectors where C is singular."""
    moments = moments.double()
    roots, failed = torch.linalg.cholesky_ex(moments)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(moments)
        by_eigen = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        roots = torch.where((failed > 0)[:, None, None], by_eigen, roots)
    found: Tensor = roots
    return found


def pair_of(
    weight: Float[Tensor, "O I"],
    vectors: Float[Tensor, "O R"],
    root: Float[Tensor, "O O"] | None = None,
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """U U' W as two factors that share its singular values evenly: up' up = down down'.

    Args:
        weight: W.
        vectors: U, orthonormal columns.
        root: L of `output_roots`, where U is the basis of L' W; the product is L'^-1 U U' L' W.
    """
    vectors, weight = vectors.double(), weight.double()
    if root is not None:
        columns_OR = torch.linalg.solve_triangular(root.T, vectors, upper=True)
        return _evenly(columns_OR, vectors.T @ (root.T @ weight))
    projection_RI = vectors.T @ weight
    _, turned = _downwards((projection_RI @ projection_RI.T)[None])
    rows_RI = turned[0].T @ projection_RI
    singular_values = torch.linalg.vector_norm(rows_RI, dim=1, keepdim=True)
    # A zero singular value has a zero row: any scale keeps it.
    scale = torch.where(singular_values > 0, singular_values, 1.0).sqrt()
    return (vectors @ turned[0]) * scale.T, rows_RI / scale


def decompose(
    weights: Float[Tensor, "B O I"],
    ranks: Sequence[int],
    moments: Float[Tensor, "B I I"] | None = None,
    method: Method = Method.EXACT,
    generators: Sequence[torch.Generator] | None = None,
) -> list[Factors]:
    """The nearest factors of each weight, in the dtype of the weights.

    Args:
        weights: Weights as in `output_basis`.
        ranks: One rank per weight.
        moments: Moments as in `output_basis`.
        method: Method as in `output_basis`.
        generators: Generators as in `output_basis`.
    """
    basis = output_basis(weights, max(ranks), moments, method, generators)
    return [
        factors_of(weight, vectors[:, :rank])
        for weight, vectors, rank in zip(weights, basis.vectors, ranks, strict=True)
    ]


def factors_of(
    weight: Float[Tensor, "O I"],
    vectors: Float[Tensor, "O R"],
    root: Float[Tensor, "O O"] | None = None,
) -> Factors:
    """`pair_of` in the dtype of the weight."""
    up, down = pair_of(weight, vectors, root)
    return Factors(up.to(weight.dtype).contiguous(), down.to(weight.dtype).contiguous())


def relative_errors(
    weight: Float[Tensor, "O I"], factors: Factors, moment: Float[Tensor, "I I"] | None = None
) -> Errors:
    """Distance of the stored factors from their weight.

    Args:
        weight: W.
        factors: Factors of any dtype.
        moment: C of the layer's inputs, for the error of its outputs.
    """
    weight = weight.double()
    error = weight - factors.up.double() @ factors.down.double()
    of_weight = float(error.norm() / weight.norm().clamp_min(1e-300))
    if moment is None:
        return Errors(of_weight, None)
    moment = moment.double()
    lost, whole = (float(((x @ moment) * x).sum().clamp_min(0)) for x in (error, weight))
    return Errors(of_weight, (lost / max(whole, 1e-300)) ** 0.5)


def shifted_errors(
    weight: Float[Tensor, "O I"], factors: Factors, moments: ShiftedMoments
) -> Errors:
    """`relative_errors` of |W X - U D Y|, with the factors as stored.

    Args:
        weight: W.
        factors: Factors of any dtype.
        moments: Moments of X and Y.
    """
    weight = weight.double()
    product = factors.up.double() @ factors.down.double()
    of_weight = float((weight - product).norm() / weight.norm().clamp_min(1e-300))
    whole = ((weight @ moments.whole) * weight).sum()
    cross, own = ((x * product).sum() for x in (weight @ moments.cross, product @ moments.own))
    lost = float((whole - 2 * cross + own).clamp_min(0))
    return Errors(of_weight, (lost / max(float(whole), 1e-300)) ** 0.5)


def _evenly(
    up: Float[Tensor, "O R"], down: Float[Tensor, "R I"]
) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """The same product as two factors with up' up = down down'."""
    left_OR, left_RR = torch.linalg.qr(up)
    right_IR, right_RR = torch.linalg.qr(down.T)
    u, singular_values, vh = torch.linalg.svd(left_RR @ right_RR.T)
    scale = singular_values.sqrt()
    return (left_OR @ u) * scale, scale[:, None] * (vh @ right_IR.T)


def _smaller_gram(
    weights: Float[Tensor, "B O I"], moments: Float[Tensor, "B I I"] | None
) -> tuple[Float[Tensor, "B M M"], Float[Tensor, "B O I"] | None]:
    """W C W', or S' W' W S and beside it W S, where that is smaller; in float64."""
    weights = weights.double()
    if weights.shape[1] <= weights.shape[2]:
        weighed = weights if moments is None else weights @ moments.double()
        return weighed @ weights.mT, None
    scaled = weights if moments is None else weights @ square_roots(moments)
    return scaled.mT @ scaled, scaled


def _downwards(gram: Float[Tensor, "B N N"]) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N N"]]:
    """Eigenvalues, none below zero, and eigenvectors, the largest first."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def _randomized_basis(
    weights: Float[Tensor, "B O I"],
    num_columns: int,
    moments: Float[Tensor, "B I I"] | None,
    generators: Sequence[torch.Generator] | None,
) -> Basis:
    num_weights, out_features, in_features = weights.shape
    width = min(num_columns + OVERSAMPLING, out_features, in_features)
    streams = [None] * num_weights if generators is None else generators
    device, dtype = weights.device, weights.dtype
    drawn = [
        torch.randn(in_features, width, generator=stream, device=device, dtype=dtype)
        for stream in streams
    ]
    start = torch.stack(drawn)
    narrow = None if moments is None else moments.to(weights.dtype)

    def weighed(x: Tensor) -> Tensor:
        return x if narrow is None else narrow @ x

    subspace, _ = torch.linalg.qr(weights @ weighed(start))
    for _ in range(POWER_ITERATIONS):
        subspace, _ = torch.linalg.qr(weights @ weighed(weights.mT @ subspace))
    seen = (weights.mT @ subspace).double()
    energies, turned = _downwards(seen.mT @ (seen if moments is None else moments.double() @ seen))
    vectors = subspace.double() @ turned[:, :, :num_columns]
    return Basis(vectors, energies)
