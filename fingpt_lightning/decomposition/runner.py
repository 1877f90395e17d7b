"""One decomposition: layers taken apart in any number of processes, finished ones kept aside."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from fingpt_lightning.data.calibration_text import Calibration
from fingpt_lightning.decomposition.layer_files import (
    LayerResult,
    LayerWeight,
    Work,
    decompose_batch,
    gradients_file,
    measure_batch,
    moments_file,
    read_result,
    read_tensors,
    spectrum_file,
    write_tensors,
)
from fingpt_lightning.decomposition.layer_pool import LayerPool
from fingpt_lightning.decomposition.options import ALLOCATIONS, RECORD, WHITENINGS, check_output
from fingpt_lightning.decomposition.refinement import BlockErrors, last_factors, read_errors
from fingpt_lightning.decomposition.sequential import block_of, decompose_in_sequence
from fingpt_lightning.decomposition.source import Source, with_moments
from fingpt_lightning.files import (
    SETTINGS,
    WHOLE,
    clear_finished,
    clear_owned,
    files_sha256,
    is_unused,
    mark_finished,
    owned,
    parts_of,
    put_in_place,
    to_json,
    write_json,
)
from fingpt_lightning.low_rank import LowRankEmbedding
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.low_rank.decomposition import Method
from fingpt_lightning.low_rank.rank import resolve_rank
from fingpt_lightning.low_rank.rank_allocation import (
    LEAST_SHARE_BY_LOSS,
    allocate_ranks,
    num_parameters,
    parameters_left,
    ranks_at_ratio,
    ratio_for_parameters,
)
from fingpt_lightning.models.families import check_plain_embedding, family_of
from fingpt_lightning.models.finite import check_finite, check_network, to_finite
from fingpt_lightning.models.formats.hf_folder import (
    GENERATION_CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    write_config,
)
from fingpt_lightning.models.formats.tokenizer import write_tokenizer
from fingpt_lightning.models.input_moments import input_moments
from fingpt_lightning.models.layout import full_name, lay_out
from fingpt_lightning.models.loading import DTYPES, build_model
from fingpt_lightning.models.output_gradients import BackwardState, gradient_moments
from fingpt_lightning.terminal.messages import check_choice
from fingpt_lightning.terminal.progress import shown_progress
from fingpt_lightning.units import GIB

_GROUPS = "moments.json"
_BACKWARD = "backward.safetensors"
_SHARD_BYTES = 2 * GIB
_DAMPING = 0.01
"""Damping by default, where there has to be some."""


@dataclass(frozen=True)
class Request:
    """The request; exactly one of the first three is set.

    Args:
        rank_ratio: Share r / min(in, out) of each layer, in (0, 1].
        compression: Parameters of the dense network over those stored, above 1.
        energy: Share of the squared singular values that each layer keeps, in (0, 1].
        allocation: ``loss``, ``spectrum`` or ``uniform``, for ``compression``; ``loss`` with
            calibration alone.
        embedding_rank: Rank of an embedding tied to the head; None keeps it dense.
        method: Method, exact or randomized.
        seed: Seed of the randomized method and of the labels drawn for gradients, from 0 on.
        dtype: Type of the stored weights.
        damping: Weight of the weights' own error beside that of the outputs on the
            calibration text, as in `low_rank.decomposition.damped`; None without calibration, and
            for the default: 0.01 with ``sequential`` or whitening of both sides, else 0.
        sequential: Whether layers are taken apart one after the other, each for what reaches it
            through the low-rank layers before it; with calibration and without ``energy`` alone.
        refine: Number of Adam steps over the factors of each block on the difference of block
            outputs, from 0 on; with calibration alone.
        whitening: ``input``, or ``both`` for factors that are the nearest by the loss's curvature
            at the outputs too; with calibration alone.

    Raises:
        ValueError: A value is outside its range, or not exactly one of the first three is given.
    """

    rank_ratio: float | None = None
    compression: float | None = None
    energy: float | None = None
    allocation: str = "uniform"
    embedding_rank: int | float | None = None
    method: Method = Method.EXACT
    seed: int = 1
    dtype: str = "float32"
    damping: float | None = None
    sequential: bool = False
    refine: int = 0
    whitening: str = "input"

    def __post_init__(self) -> None:
        sizes = ("rank_ratio", "compression", "energy")
        given = [name for name in sizes if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of {', '.join(sizes)}; {named} is given")
        for name in ("rank_ratio", "energy"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} {share} is outside (0, 1]")
        if self.compression is not None and not 1 < self.compression < float("inf"):
            raise ValueError(
                f"compression {self.compression} is not a finite number above 1 (dense over stored"
                " parameters)"
            )
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_choice("whitening", self.whitening, WHITENINGS)
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} is below 0")
        if self.refine < 0:
            raise ValueError(f"refine {self.refine} is below 0")
        if self.damping is not None and not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping {self.damping} is not a number from 0 on")


class DecomposedLayer(NamedTuple):
    """A layer of the record: errors are |error| / |whole| of the weight and of the outputs."""

    name: str
    in_features: int
    out_features: int
    rank: int | None
    parameters: int
    dense_parameters: int
    weight_error: float
    output_error: float | None


@dataclass(frozen=True)
class Decomposition:
    """The record that lies beside the weights.

    Args:
        source: The model, for people.
        revision: The digest of its weights.
        settings: Settings of the request.
        calibration: Calibration text and tokens; None without calibration.
        parameters: Stored parameters.
        dense_parameters: Parameters of the model.
        layer_parameters: Stored parameters of only those layers that could become low-rank.
        dense_layer_parameters: Parameters of the same layers in the model.
        layers: Layers in the order of the network, with their errors before refinement.
        blocks: Errors of refined blocks, before and after.
    """

    source: str
    revision: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    parameters: int
    dense_parameters: int
    layer_parameters: int
    dense_layer_parameters: int
    layers: tuple[DecomposedLayer, ...]
    blocks: tuple[BlockErrors, ...] = ()

    @property
    def total_compression_ratio(self) -> float:
        """Dense over stored parameters of the whole network."""
        return self.dense_parameters / self.parameters

    @property
    def layer_compression_ratio(self) -> float:
        """Dense over stored parameters of the layers alone."""
        return self.dense_layer_parameters / self.layer_parameters

    def to_json(self) -> str:
        """The contents of ``decomposition.json``."""
        found = asdict(self) | {
            "layers": [layer._asdict() for layer in self.layers],
            "blocks": [block._asdict() for block in self.blocks],
            "total_compression_ratio": self.total_compression_ratio,
            "layer_compression_ratio": self.layer_compression_ratio,
        }
        return to_json(found, indent=1) + "\n"


def check_embedding_rank(source: Source, rank: int | float | None) -> None:
    """Raises unless the embedding of a model can have this rank.

    Args:
        source: Opened model.
        rank: Rank of the embedding; None keeps it as it is.

    Raises:
        ValueError: The embedding is scaled, factorized already or not tied to the head, or the rank
            is outside its range.
    """
    if rank is None:
        return
    check_plain_embedding(family_of(source.network))
    if isinstance(source.network.get_input_embeddings(), LowRankEmbedding):
        raise ValueError(f"embedding_rank {rank}: the embedding is factorized already")
    if source.embedding is None:
        raise ValueError("embedding_rank: the embedding is not tied to the head, and stays dense")
    _embedding_rank(source, rank)


@faster_products()
def decompose_model(
    source: Source,
    request: Request,
    output: Path,
    calibration: Calibration | None = None,
    *,
    workers: int = 1,
    devices: Sequence[str] = ("cpu",),
    overwrite: bool = False,
) -> Decomposition:
    """Writes a model whose linear layers are low-rank; the folder appears whole or not at all.

    Finished layers lie in ``OUTPUT.partial``, and a run that was killed goes on with them. In
    memory are the weights that are being taken apart, and at the end at most two GiB of the files
    being written. Calibrating takes the network once, in float32.

    Args:
        source: Opened model, whose weights are read once.
        request: Settings of the decomposition.
        output: Folder to make.
        calibration: Text to keep the outputs on; None keeps the weights.
        workers: Processes of one thread that share the layers, where the device is the CPU; with
            one there is none but this.
        devices: ``cpu``, or CUDA devices that share the layers.
        overwrite: Whether to replace a decomposition that is there, and begin anew.

    Raises:
        FileExistsError: The output is refused by `check_output`.
        InUseError: Another process makes this output.
        ValueError: The request cannot be met, or the folder of an unfinished run is of another.
    """
    check_output(output, overwrite)
    check_embedding_rank(source, request.embedding_rank)
    revision = files_sha256(source.weights.files)
    if request.refine and calibration is None:
        raise ValueError(f"refine {request.refine} needs a calibration")
    if request.sequential and (calibration is None or request.energy is not None):
        raise ValueError("sequential needs a calibration, and rank_ratio or compression")
    if _needs_gradients(request) and calibration is None:
        what = "whitening both" if request.whitening == "both" else "allocation loss"
        raise ValueError(f"{what} needs a calibration")
    if request.sequential or request.whitening == "both":
        damping = _DAMPING if request.damping is None else request.damping
        if damping <= 0:
            what = "sequential" if request.sequential else "whitening both"
            raise ValueError(f"damping {damping:g} of {what} is not above 0")
        request = replace(request, damping=damping)
    _parameters_left(source, request)  # refuses what cannot be before any work
    settings = asdict(request) | {"revision": revision, "calibration": _described(calibration)}
    with owned(parts_of(output)) as folder:
        try:
            _begin(folder, settings, overwrite)
            record = _decomposed(source, request, folder, calibration, revision, workers, devices)
            check_output(output, overwrite)  # another process may have been quicker
            mark_finished(folder)
            put_in_place(folder / WHOLE, output)
            clear_owned(folder)
        finally:
            if is_unused(folder, SETTINGS):
                clear_owned(folder)
    return record


def _decomposed(
    source: Source,
    request: Request,
    folder: Path,
    calibration: Calibration | None,
    revision: str,
    workers: int,
    devices: Sequence[str],
) -> Decomposition:
    """Makes the whole network in a folder of finished layers that is ours; gives the record."""
    in_blocks = source.layers
    if calibration is not None and _needs_gradients(request):
        _gather_gradients(source, calibration, folder, devices[0], request.seed)
        in_blocks = tuple(replace(layer, has_gradients=True) for layer in in_blocks)
    layers = [*in_blocks]
    if request.embedding_rank is not None and source.embedding is not None:
        layers.append(source.embedding)
    if calibration is not None and _needs_moments(request):
        groups = _calibrated(source, calibration, folder, devices[0])
        if source.embedding is not None:
            groups[source.embedding.name] = family_of(source.network).head
        layers = [with_moments(layer, groups) for layer in layers]
    work = Work(
        source.reader,
        folder,
        energy=request.energy,
        method=request.method,
        dtype=DTYPES[request.dtype],
        damping=request.damping or 0.0,
        both_sides=request.whitening == "both",
        seed=request.seed,
    )
    pool = LayerPool(workers, devices)
    ranks = _ranks(source, request, layers, work, pool)
    if request.energy is None:
        work = replace(work, ranks=ranks)
        pending = [(work, layer) for layer in layers]
    else:  # the embedding's rank alone is known
        known = replace(work, ranks=ranks, energy=None)
        pending = [(known if layer.name in ranks else work, layer) for layer in layers]
    if request.sequential:
        assert calibration is not None
        on_device = replace(work, device=devices[0])
        decompose_in_sequence(source, calibration, in_blocks, on_device, request.refine)
    pending = [pair for pair in pending if read_result(folder, pair[1].name) is None]
    pool.run(decompose_batch, pending, "taking layers apart")
    if request.refine and not request.sequential:
        assert calibration is not None
        refined = replace(work, device=devices[0])
        decompose_in_sequence(source, calibration, source.layers, refined, request.refine)
    made = _assembled(source, request, folder, layers)
    record = Decomposition(
        source.name,
        revision,
        {
            key: value
            for key, value in asdict(request).items()
            if value is not None
            and value is not False
            and (key, value) not in (("refine", 0), ("whitening", "input"))
        },
        _described(calibration),
        *made,
        blocks=_block_errors(folder, source.layers),
    )
    (folder / WHOLE / RECORD).write_text(record.to_json(), encoding="utf-8")
    return record


def _block_errors(folder: Path, layers: Sequence[LayerWeight]) -> tuple[BlockErrors, ...]:
    names = dict.fromkeys(block_of(layer.name) for layer in layers)
    found = (read_errors(folder, name) for name in names)
    return tuple(errors for errors in found if errors is not None)


def _needs_moments(request: Request) -> bool:
    """Whether those of the network as it is are."""
    has_spectra = request.compression is not None and request.allocation != "uniform"
    return not request.sequential or has_spectra or request.embedding_rank is not None


def _needs_gradients(request: Request) -> bool:
    """Whether the curvature of the loss is."""
    by_loss = request.compression is not None and request.allocation == "loss"
    return by_loss or request.whitening == "both"


def _described(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {"text": calibration.name, "tokens": calibration.ids.numel()}


def _begin(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    """Checks that what an earlier run finished may be used; where it finished nothing, begins."""
    clear_finished(folder)
    if overwrite or is_unused(folder, SETTINGS):
        clear_owned(folder)
    file = folder / SETTINGS
    now = json.loads(json.dumps(settings))
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{folder} is of an unfinished run with {name} {before.get(name)!r}, now"
                    f" {value!r}; remove it or --overwrite"
                )
        return
    write_json(file, now)


def _calibrated(
    source: Source, calibration: Calibration, folder: Path, device: str
) -> dict[str, str]:
    """Gathers second moments where that has not been done; gives their names by layer."""
    done = folder / _GROUPS
    if done.is_file():
        groups: dict[str, str] = json.loads(done.read_text(encoding="utf-8"))
        return groups
    network = build_model(source.model, device=device).network
    check_network(network)
    groups = {}
    num_blocks = network.config.num_hidden_layers
    ids = calibration.ids.to(device)
    what = f"calibrating on {ids.numel():,} tokens"
    with shown_progress(what, num_blocks, "blocks") as show:
        for number, found in enumerate(input_moments(network, ids)):
            groups |= found.groups
            for name, moments in found.moments.items():
                # Half the bytes of float64; sums were made in that.
                write_tensors(moments_file(folder, name), {"moments": moments.float().cpu()})
            show(min(number + 1, num_blocks))
    write_json(done, groups)
    return groups


def _gather_gradients(
    source: Source, calibration: Calibration, folder: Path, device: str, seed: int
) -> None:
    """Gathers second moments of gradients, where that has not been done, block by block."""
    file = folder / _BACKWARD
    start = None
    if file.is_file():
        read = read_tensors(file)
        start = BackwardState(int(read["block"]), read["gradients"])
        if start.block == 0:
            return
    network = build_model(source.model, device=device).network
    check_network(network)
    num_blocks = network.config.num_hidden_layers
    ids = calibration.ids.to(device)
    with shown_progress(f"gradients on {ids.numel():,} tokens", num_blocks, "blocks") as show:
        for moments, state in gradient_moments(network, ids, seed, start=start):
            for name, moment in moments.items():
                write_tensors(gradients_file(folder, name), {"gradients": moment.float().cpu()})
            # What the last blocks have left is of no use to anyone.
            left = state.gradients if state.block else torch.empty(0, 0, 0)
            write_tensors(file, {"gradients": left, "block": torch.tensor(state.block)})
            show(num_blocks - state.block)


def _embedding_rank(source: Source, rank: int | float | None) -> dict[str, int | None]:
    """The rank of the embedding by its name; nothing where it stays dense.

    Raises:
        ValueError: It is outside its range.
    """
    if rank is None or source.embedding is None:
        return {}
    try:
        return {source.embedding.name: resolve_rank(rank, *source.embedding.size)}
    except ValueError as error:
        raise ValueError(f"embedding_{error}") from None


def _parameters_left(source: Source, request: Request) -> int | None:
    """The parameters that ``compression`` leaves for the layers; None without it.

    Raises:
        ValueError: They are too few.
    """
    ranks = _embedding_rank(source, request.embedding_rank)
    if request.compression is None:
        return None
    sizes = {layer.name: layer.size for layer in source.layers}
    dense = sum(parameter.numel() for parameter in source.network.parameters())
    fixed = dense - sum(num_parameters(None, *size) for size in sizes.values())
    if source.embedding is not None and source.embedding.name in ranks:
        size = source.embedding.size
        fixed += num_parameters(ranks[source.embedding.name], *size) - num_parameters(None, *size)
    return parameters_left(
        sizes,
        request.compression,
        dense,
        fixed,
        f"compression {request.compression:g}",
        "--embedding_rank makes a tied embedding smaller",
    )


def _ranks(
    source: Source,
    request: Request,
    layers: Sequence[LayerWeight],
    work: Work,
    pool: LayerPool,
) -> dict[str, int | None]:
    """The ranks that are known before layers are taken apart."""
    sizes = {layer.name: layer.size for layer in source.layers}
    ranks = _embedding_rank(source, request.embedding_rank)
    if request.rank_ratio is not None:
        return ranks | ranks_at_ratio(sizes, request.rank_ratio)
    target = _parameters_left(source, request)
    if target is None:
        return ranks
    if request.allocation == "uniform":
        return ranks | ranks_at_ratio(sizes, ratio_for_parameters(sizes, target))
    linear = [layer for layer in layers if layer.name in sizes]
    pending = [x for x in linear if not spectrum_file(work.folder, x.name).is_file()]
    pool.run(measure_batch, [(work, layer) for layer in pending], "measuring spectra")
    energies = {
        layer.name: read_tensors(spectrum_file(work.folder, layer.name))["energies"].tolist()
        for layer in linear
    }
    if request.allocation == "loss":
        return ranks | allocate_ranks(energies, sizes, target, LEAST_SHARE_BY_LOSS, is_loss=True)
    return ranks | allocate_ranks(energies, sizes, target)


def _assembled(
    source: Source, request: Request, folder: Path, layers: Sequence[LayerWeight]
) -> tuple[int, int, int, int, tuple[DecomposedLayer, ...]]:
    """Writes the network's folder; gives the sizes and the layers of the record."""
    whole = folder / WHOLE
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    results: dict[str, LayerResult] = {}
    for layer in layers:
        found = read_result(folder, layer.name)
        assert found is not None, layer.name
        results[layer.name] = found
    embedding = None if source.embedding is None else source.embedding.name
    decomposed = {name for name, result in results.items() if result.rank is not None}
    dtype = DTYPES[request.dtype]
    stored = _written_shards(_whole_tensors(source, folder, decomposed, embedding, dtype), whole)
    shapes = {name: tuple(shape) for name, shape in stored.items()}
    network = lay_out(source.weights.config, shapes)
    missing = {name for name, _ in network.named_parameters()} - stored.keys()
    if missing:
        raise ValueError(f"{source.name}: {len(missing)} weights are missing: {min(missing)}, ...")
    if (source.model.folder / GENERATION_CONFIG).is_file():
        network.generation_config = GenerationConfig.from_pretrained(str(source.model.folder))
    write_config(network, whole, dtype)
    write_tokenizer(source.tokenizer, whole)
    rows = []
    for layer in layers:
        result = results[layer.name]
        size = layer.size
        own, dense = num_parameters(result.rank, *size), num_parameters(None, *size)
        rows.append(
            DecomposedLayer(
                layer.name, *size, result.rank, own, dense, result.weight_error, result.output_error
            )
        )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    dense_parameters = sum(parameter.numel() for parameter in source.network.parameters())
    own, dense = sum(row.parameters for row in rows), sum(row.dense_parameters for row in rows)
    return parameters, dense_parameters, own, dense, tuple(rows)


def _whole_tensors(
    source: Source, folder: Path, decomposed: set[str], embedding: str | None, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """All weights of the new network, one layer after the other."""
    own = {name for name, _ in source.network.named_parameters()}  # tied parameters once
    for stored, tensor in source.weights.tensors:
        name = full_name(source.network, stored)
        layer, _, part = name.rpartition(".")
        if layer in decomposed and part == "weight":
            block = None if layer == embedding else block_of(layer)
            factors = last_factors(folder, layer, block)
            if layer == embedding:
                yield f"{layer}.table", factors.up
                yield f"{layer}.up", factors.down.T
            else:
                yield f"{layer}.down", factors.down
                yield f"{layer}.up", factors.up
        elif name in own:
            check_finite(stored, tensor)
            yield name, to_finite(stored, tensor, dtype)


def _written_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int = _SHARD_BYTES
) -> dict[str, torch.Size]:
    """Writes weights as they come, in files of limited size; gives the shapes by name."""
    shapes: dict[str, torch.Size] = {}
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []

    def write() -> None:
        save_file(held, folder / f"{len(files)}.part", {"format": "pt"})
        files.append(list(held))
        held.clear()

    num_bytes = 0
    for name, tensor in tensors:
        if held and num_bytes + tensor.nbytes > max_bytes:
            write()
            num_bytes = 0
        held[name] = tensor.contiguous().clone()
        shapes[name] = tensor.shape
        num_bytes += tensor.nbytes
    write()
    if len(files) == 1:
        (folder / "0.part").rename(folder / SAFETENSORS)
        return shapes
    place: dict[str, str] = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        place |= dict.fromkeys(names, file)
    listed = {"metadata": {}, "weight_map": place}
    write_json(folder / SAFETENSORS_INDEX, listed)
    return shapes
