"""Weights taken apart from file to file, a batch of one shape at a time, in any process.

A process that does this needs torch and safetensors alone, so that it starts in a second.
"""

import ctypes
import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fingpt_lightning.files import to_json, written_whole
from fingpt_lightning.low_rank.decomposition import (
    Errors,
    Method,
    ShiftedMoments,
    damped,
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
from fingpt_lightning.low_rank.rank import largest_rank
from fingpt_lightning.low_rank.rank_allocation import (
    Size,
    dense_if_not_smaller,
    energy_rank,
)
from fingpt_lightning.models.finite import check_finite

_PR_SET_PDEATHSIG = 1
MAX_BATCH_BYTES = 2**27
"""Bytes of the weights that are taken apart at a time, in float64; at least one is."""


@runtime_checkable
class TensorReader(Protocol):
    """Reads stored tensors by name; it can be sent to another process."""

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored."""


@dataclass(frozen=True)
class SafetensorsReader:
    """Tensors of safetensors files.

    Args:
        files: The file of each tensor.
    """

    files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        """One tensor; the file is opened for it alone, since a map counts as memory."""
        with safe_open(self.files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


@dataclass(frozen=True)
class LayerWeight:
    """A weight that may become factors.

    Args:
        name: Name of the layer in its network.
        stored: Name of the weight in the files.
        in_features: Input features of the layer.
        out_features: Output features of the layer.
        is_transposed: Whether it is stored with a row for each input.
        moments: The name of the second moments of its inputs; None where there are none.
        has_gradients: Whether there are second moments of the gradients at its outputs, by its
            name.
    """

    name: str
    stored: str
    in_features: int
    out_features: int
    is_transposed: bool = False
    moments: str | None = None
    has_gradients: bool = False

    @property
    def size(self) -> Size:
        """Input and output features."""
        return self.in_features, self.out_features

    def cost(self) -> float:
        """What taking it apart takes, about: the product and the eigenvectors of the Gram matrix.

        >>> LayerWeight("a", "a.weight", 768, 3072).cost() / LayerWeight("b", "", 768, 768).cost()
        1.25
        """
        smaller, larger = sorted(self.size)
        return smaller * smaller * (larger + 11.0 * smaller) / (12.0 * smaller**3)


@dataclass(frozen=True)
class Work:
    """How weights are taken apart, and from where to where.

    Args:
        reader: Reader of the weights.
        folder: Folder of the results; second moments lie in it too.
        ranks: Ranks of the layers; None, with ``energy``, where the spectrum decides. A layer whose
            rank is None stays dense.
        energy: The share of the squared singular values to keep.
        method: Method, exact or randomized.
        dtype: Dtype of the stored factors.
        damping: Damping of the moments, as in `damped`.
        both_sides: Whether the factors are the nearest by the loss's curvature at the outputs too,
            for layers that have gradients.
        seed: Seed of the randomized method; a layer's stream depends on it and its name alone.
        device: Device of the computation.
    """

    reader: TensorReader
    folder: Path
    ranks: Mapping[str, int | None] | None = None
    energy: float | None = None
    method: Method = Method.EXACT
    dtype: torch.dtype = torch.float32
    damping: float = 0.0
    both_sides: bool = False
    seed: int = 1
    device: str = "cpu"


class LayerResult(NamedTuple):
    """What became of a layer; ``rank`` is None where it stays dense, and errors are 0 there."""

    name: str
    rank: int | None
    weight_error: float
    output_error: float | None


@dataclass(frozen=True)
class Batch:
    """Weights of one shape that are taken apart together.

    Args:
        layers: Layers, at least one.
    """

    layers: tuple[LayerWeight, ...]

    @property
    def cost(self) -> float:
        """Cost of all layers."""
        return sum(layer.cost() for layer in self.layers)


def batches_of(
    layers: Sequence[LayerWeight], num_workers: int, max_bytes: int = MAX_BATCH_BYTES
) -> list[Batch]:
    """Layers of one shape together, the costliest batch first.

    No batch is so large that the workers could not share the work evenly: it costs at most a
    quarter of a worker's share, unless it is one layer.

    Args:
        layers: Layers in any order.
        num_workers: Number of workers that share the batches.
        max_bytes: Most bytes of a batch's weights in float64.
    """
    by_kind: dict[tuple[Size, bool], list[LayerWeight]] = {}
    for layer in layers:
        by_kind.setdefault((layer.size, layer.has_gradients), []).append(layer)
    share = sum(layer.cost() for layer in layers) / num_workers / 4
    found = []
    for ((in_features, out_features), _), alike in by_kind.items():
        most = max_bytes // (8 * in_features * out_features)
        if num_workers > 1:
            most = min(most, int(share / alike[0].cost()))
        most = max(1, most)
        # Of one length as far as can be: three and three, not five and one.
        number = -(-len(alike) // most)
        bounds = [index * len(alike) // number for index in range(number + 1)]
        found += [Batch(tuple(alike[a:b])) for a, b in itertools.pairwise(bounds)]
    return sorted(found, key=lambda batch: batch.cost, reverse=True)


def result_file(folder: Path, name: str) -> Path:
    """Where the factors of a layer are kept."""
    return folder / "layers" / f"{name}.safetensors"


def moments_file(folder: Path, name: str) -> Path:
    """Where second moments are kept."""
    return folder / "moments" / f"{name}.safetensors"


def gradients_file(folder: Path, name: str) -> Path:
    """Where the second moments of the gradients at a layer's outputs are kept."""
    return folder / "gradients" / f"{name}.safetensors"


def spectrum_file(folder: Path, name: str) -> Path:
    """Where the squared singular values of a layer, or its scores, are kept."""
    return folder / "spectra" / f"{name}.safetensors"


def write_tensors(file: Path, tensors: Mapping[str, Tensor], note: str = "") -> None:
    """Writes a file aside and then renames it: it is whole or not there.

    Args:
        file: File of safetensors.
        tensors: Tensors by name.
        note: Text that is kept with them.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as aside:
        save_file({name: x.contiguous() for name, x in tensors.items()}, aside, {"note": note})


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of `write_tensors`."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def read_result(folder: Path, name: str) -> LayerResult | None:
    """What became of a layer, as far as it is known."""
    file = result_file(folder, name)
    if not file.is_file():
        return None
    with safe_open(file, "pt") as opened:
        note = opened.metadata()["note"]
    return LayerResult(**json.loads(note))


def begin_worker(parent: int) -> None:
    """Prepares a process that takes layers apart: it shares the cores, and ends with its parent.

    Else it would go on writing into a folder that has another owner by then.

    Args:
        parent: Number of the process that starts it.
    """
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def decompose_batch(work: Work, batch: Batch) -> list[LayerResult]:
    """Takes a batch of weights apart and writes the factors of each, or a note that it is dense.

    Args:
        work: Settings of the decomposition.
        batch: Batch of layers whose results are not there yet.
    """
    weights = _weights(work, batch)
    moments = _moments(work, batch)
    roots = _roots(work, batch)
    size = batch.layers[0].size
    names = [layer.name for layer in batch.layers]
    if work.energy is None:
        assert work.ranks is not None
        ranks = [work.ranks[name] for name in names]
        columns = max((rank for rank in ranks if rank is not None), default=0)
    else:
        columns = largest_rank(*size)
    if not columns:
        return [keep_dense(work, layer) for layer in batch.layers]
    streams = [_generator(work, name) for name in names]
    seen = weights if roots is None else roots.mT @ weights.double()
    basis = output_basis(seen, columns, damped(moments, work.damping), work.method, streams)
    if work.energy is not None:
        found = [energy_rank(energies.tolist(), work.energy) for energies in basis.energies]
        ranks = [dense_if_not_smaller(rank, size) for rank in found]
    results = []
    for index, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        if rank is None:
            results.append(keep_dense(work, batch.layers[index]))
            continue
        root = None if roots is None else roots[index]
        pair = factors_of(weights[index].double(), basis.vectors[index, :, :rank], root)
        stored = Factors(pair.up.to(work.dtype), pair.down.to(work.dtype))
        moment = None if moments is None else moments[index]
        errors = relative_errors(weights[index], stored, moment)
        results.append(_written(work, name, stored, errors))
    return results


def decompose_reached(work: Work, layer: LayerWeight, moments: ShiftedMoments) -> LayerResult:
    """Takes one weight apart, for the inputs that low-rank layers give it, and writes its factors.

    Args:
        work: Settings of the decomposition, with a rank for the layer.
        layer: Layer whose result is not there yet.
        moments: Moments of its inputs before and now.
    """
    assert work.ranks is not None
    rank = work.ranks[layer.name]
    assert rank is not None, layer.name
    weight = _weights(work, Batch((layer,)))[0]
    target = shifted_weight(weight, moments, work.damping)
    own = damped(moments.own[None], work.damping)
    roots = _roots(work, Batch((layer,)))
    # |G^1/2 (W X - P Y)|^2 is least at the same target for every G: it enters in the last step.
    seen = target[None] if roots is None else roots.mT @ target
    basis = output_basis(seen, rank, own, work.method, [_generator(work, layer.name)])
    pair = factors_of(target, basis.vectors[0], None if roots is None else roots[0])
    stored = Factors(pair.up.to(work.dtype), pair.down.to(work.dtype))
    return _written(work, layer.name, stored, shifted_errors(weight, stored, moments))


def keep_dense(work: Work, layer: LayerWeight) -> LayerResult:
    """Writes that a layer stays dense."""
    result = LayerResult(layer.name, None, 0.0, None if layer.moments is None else 0.0)
    write_tensors(result_file(work.folder, layer.name), {}, to_json(result._asdict()))
    return result


def read_factors(folder: Path, name: str) -> Factors:
    """The factors that a layer has become."""
    tensors = read_tensors(result_file(folder, name))
    return Factors(tensors["up"], tensors["down"])


def measure_batch(work: Work, batch: Batch) -> list[str]:
    """Writes the squared singular values of a batch of weights; gives the layers' names.

    With gradients it is what each column that would be taken in turn is worth to the loss.
    """
    weights = _weights(work, batch)
    moments = damped(_moments(work, batch), work.damping)
    gradients, roots = _gradients(work, batch), _roots(work, batch)
    if roots is not None:
        energies = energies_of(roots.mT @ weights.double(), moments).cpu()
    elif gradients is not None:
        assert moments is not None
        energies = loss_scores(weights, moments, gradients).cpu()
    else:
        energies = energies_of(weights, moments).cpu()
    for layer, row in zip(batch.layers, energies, strict=True):
        write_tensors(spectrum_file(work.folder, layer.name), {"energies": row})
    return [layer.name for layer in batch.layers]


def _weights(work: Work, batch: Batch) -> Tensor:
    read = []
    for layer in batch.layers:
        weight = work.reader.read(layer.stored)
        check_finite(layer.stored, weight)
        read.append(weight.T if layer.is_transposed else weight)
    wide = torch.promote_types(read[0].dtype, torch.float32)
    return torch.stack([weight.to(work.device, wide) for weight in read])


def _moments(work: Work, batch: Batch) -> Tensor | None:
    names = [layer.moments for layer in batch.layers]
    known: dict[str, Tensor] = {}
    for name in names:
        if name is not None and name not in known:
            stored = read_tensors(moments_file(work.folder, name))["moments"]
            known[name] = stored.to(work.device, torch.float64)
    if not known:
        return None
    return torch.stack([known[name] for name in names if name is not None])


def _gradients(work: Work, batch: Batch) -> Tensor | None:
    if not batch.layers[0].has_gradients:
        return None
    files = [gradients_file(work.folder, layer.name) for layer in batch.layers]
    read = [read_tensors(file)["gradients"].to(work.device, torch.float64) for file in files]
    return torch.stack(read)


def _roots(work: Work, batch: Batch) -> Tensor | None:
    """L of `output_roots`, where factors are the nearest by both sides."""
    gradients = _gradients(work, batch) if work.both_sides else None
    return None if gradients is None else output_roots(gradients, work.damping)


def _generator(work: Work, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{work.seed}/{name}".encode()).digest()
    return torch.Generator(work.device).manual_seed(int.from_bytes(digest[:7], "big"))


def _written(work: Work, name: str, pair: Factors, errors: Errors) -> LayerResult:
    result = LayerResult(name, pair.up.shape[1], errors.weight, errors.output)
    tensors = {"up": pair.up.cpu(), "down": pair.down.cpu()}
    if not all(factor.isfinite().all() for factor in tensors.values()):
        kind = str(work.dtype).removeprefix("torch.")
        raise FloatingPointError(
            f"layer {name}: its factors are beyond {kind}; take bfloat16 or float32"
        )
    write_tensors(result_file(work.folder, name), tensors, to_json(result._asdict()))
    return result
