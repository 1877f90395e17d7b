"""One export: written to a temporary folder, loaded again, compared, and only then renamed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fingpt_lightning.data.calibration_text import Calibration, shown_moments
from fingpt_lightning.deploy.comparing import TEXTS, differences, logits_of, probes
from fingpt_lightning.deploy.export_options import FORMATS
from fingpt_lightning.deploy.model_card import (
    Exported,
    Reading,
    known_of,
    model_card,
)
from fingpt_lightning.files import check_replaceable, put_in_place, scratch_folder
from fingpt_lightning.hub.card import CARD, EXPORT_MARK, has_mark
from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.adapting import adapted_layers, remove_adapters, save_adapter
from fingpt_lightning.models.expansion import expand, merge_into_base
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.formats.gguf import tokenizer_misfit, write_gguf
from fingpt_lightning.models.formats.hf_folder import (
    transformers_reads,
    write_network,
    write_quantized,
)
from fingpt_lightning.models.formats.peft_adapter import ADAPTER_FOLDER, trained_quantization
from fingpt_lightning.models.formats.quantized_folder import is_low_rank
from fingpt_lightning.models.formats.tokenizer import write_tokenizer
from fingpt_lightning.models.loading import AUTO, DTYPES, NONE, LoadedModel, load_model
from fingpt_lightning.models.quantization.frozen_matrix import FrozenMatrix, quantization_of
from fingpt_lightning.models.quantization.layers import QUANTIZATIONS
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedEmbedding

TOLERANCES = {
    "float64": 1e-10,
    "float32": 1e-4,
    "float16": 0.02,
    "bfloat16": 0.1,
    "int8": 0.3,
    "nf4": 0.7,
}
"""Largest relative error of the logits, by format where it quantizes, else by stored dtype."""
GGUF = "model.gguf"


def working_dtype(stored: str) -> torch.dtype:
    """Type in which source and export are compared: float32 unless float64 is stored."""
    return torch.float64 if stored == "float64" else torch.float32


def check_output(output: Path, overwrite: bool) -> None:
    """Raises where an export could not be written.

    Raises:
        FileExistsError: ``output`` exists and is not to be replaced, or is not an export.
    """
    check_replaceable(output, overwrite, has_mark(output, EXPORT_MARK), "export")


def export(
    source: LoadedModel,
    form: str,
    output: Path,
    dtype: str = "float32",
    *,
    texts: Sequence[str] = TEXTS,
    tolerance: float | None = None,
    overwrite: bool = False,
    embeddings: str | None = None,
    calibration: Calibration | None = None,
    request: str | None = None,
    results: Sequence[Path] = (),
) -> Exported:
    """Writes a model in another form; the folder appears whole and compared, or not at all.

    An adapter is merged in, except in the form ``peft``. A model that is quantized in the form that
    is made keeps its codes, and an adapter stays beside them, unless there is a calibration. In
    all other forms a quantized layer is what its codes stand for; a low-rank layer stays one in
    all forms but ``hf`` and ``gguf``.

    Args:
        source: Model in `working_dtype`; its network is changed, on its device.
        form: One of ``FORMATS`` of the options.
        output: Folder that is made.
        dtype: Type of the stored weights that are not quantized.
        texts: Real prompts to compare on.
        tolerance: Largest relative error of the logits; None is that of `TOLERANCES`.
        overwrite: Whether an existing export is replaced.
        embeddings: ``quantized`` or ``kept``, for the forms int8 and nf4; None quantizes those of
            low-rank networks, which plain transformers cannot read anyhow, and those that were
            quantized otherwise. A model that is quantized in the form already keeps what it has.
        calibration: Tokens on which rounding keeps the layers' outputs, for the forms int8 and nf4;
            None rounds each number to its nearest.
        request: Digest of what was requested, which the card keeps.
        results: Outputs of evaluations of the source, for the card.

    Raises:
        FileExistsError: As in `check_output`.
        ValueError: The form does not fit the model, or the export differs by more than allowed.
    """
    check_output(output, overwrite)
    if embeddings is not None and form not in QUANTIZATIONS:
        raise ValueError(f"embeddings {embeddings} has no effect on the format {form}")
    if calibration is not None and form not in QUANTIZATIONS:
        raise ValueError(f"calibration has no effect on the format {form}")
    network = source.network
    _check_form(source, form, dtype)
    if tolerance is None:
        tolerance = TOLERANCES[form if form in TOLERANCES else dtype]
    known = known_of(source, results)
    quantized = quantization_of(network)
    prompts = probes(network, source.tokenizer, texts)
    expected = logits_of(network, prompts)
    with scratch_folder(output) as made:
        num_parameters = _write(source, form, made, DTYPES[dtype], embeddings, calibration)
        again = _loaded_again(form, made, working_dtype(dtype), quantized, network.device)
        found = differences(prompts, expected, logits_of(again, prompts))
        worst = max(found, key=lambda difference: difference.relative_error)
        if worst.relative_error > tolerance:
            raise ValueError(
                f"the export's logits differ by {worst.relative_error:.2g} on {worst.kind} prompts,"
                f" more than the tolerance {tolerance:g}; nothing was written"
            )
        num_bytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        text = None if calibration is None else calibration.described()
        exported = Exported(form, dtype, num_bytes, num_parameters, tolerance, found, text)
        reading = Reading(
            needs_us=not transformers_reads(source.network),  # as it was written
            adapter_beside=(made / ADAPTER_FOLDER).is_dir(),
            trained_on=_trained_on(source),
            is_low_rank=is_low_rank(network),
            keeps_codes=quantized == form and calibration is None,
        )
        card = model_card(source, exported, output.name, reading, request, known)
        (made / CARD).write_text(card, encoding="utf-8")
        check_output(output, overwrite)  # another process may have been quicker
        put_in_place(made, output)
    return exported


def _check_form(source: LoadedModel, form: str, dtype: str) -> None:
    """Raises where a form does not fit a model, before anything is computed or written.

    Raises:
        ValueError: It does not; the message lists the forms that do.
    """
    if (reason := _misfit(source, form)) is not None:
        fitting = [name for name in FORMATS if _misfit(source, name) is None]
        raise ValueError(f"format {form}: {reason}; the formats {', '.join(fitting)} fit it")
    if form == "peft" and dtype != "float32":
        raise ValueError(f"dtype {dtype} has no effect: an adapter is kept as it is, in float32")


def _misfit(source: LoadedModel, form: str) -> str | None:
    """Why a model cannot be written in a form; None where it can."""
    network = source.network
    is_adapted = bool(adapted_layers(network))
    activations = {m.activation for m in network.modules() if isinstance(m, LowRankLinear)}
    if form in ("peft", "merged") and not is_adapted:
        return "it needs an adapter: give one, or its folder as the model"
    if form == "low_rank" and not is_low_rank(network):
        return "the model has no low-rank layer"
    if between := activations - {"none"}:
        held = f"its low-rank layers have {between.pop()} between their factors"
        if form == "low_rank" and is_adapted:
            return f"{held}, and no adapter can be merged into them"
        if form not in ("low_rank", "peft"):
            return f"{held}, which no dense or quantized layer computes"
    if form == "gguf":
        family = family_of(network)
        if family.gguf is None:
            return f"a {family.title} is not written"
        if source.tokenizer is None:
            return "it needs the tokenizer, which does not lie beside the model"
        return tokenizer_misfit(source.tokenizer)
    return None


def _write(
    source: LoadedModel,
    form: str,
    folder: Path,
    dtype: torch.dtype,
    embeddings: str | None,
    calibration: Calibration | None,
) -> int:
    """Writes the files; returns the number of the export's parameters."""
    network = source.network
    if form == "peft":
        base = source.source.base.absolute()
        save_adapter(network, folder, *base, trained_on=_trained_on(source))
        write_tokenizer(source.tokenizer, folder)
        layers = adapted_layers(network).values()
        return sum(p.numel() for x in layers for n, p in x.named_parameters() if "lora_" in n)
    if quantization_of(network) == form and calibration is None:
        num_parameters = _num_parameters(network)
        if adapted_layers(network):
            place = folder / ADAPTER_FOLDER
            save_adapter(network, place, "..", trained_on=_trained_on(source))
            remove_adapters(network)
        write_quantized(network, folder, dtype, form, embeddings=embeddings == "quantized")
        write_tokenizer(source.tokenizer, folder)
        return num_parameters
    has_codes = isinstance(network.get_input_embeddings(), QuantizedEmbedding)
    with_embeddings = embeddings == "quantized" or (
        embeddings is None and (has_codes or is_low_rank(network))
    )
    merge_into_base(network)
    if form in ("hf", "gguf"):
        expand(network)
    num_parameters = _num_parameters(network)
    if form == "gguf":
        write_gguf(network, source.require_tokenizer(), folder / GGUF, dtype)
        return num_parameters
    if form in QUANTIZATIONS:
        moments = () if calibration is None else shown_moments(network, calibration)
        write_quantized(network, folder, dtype, form, embeddings=with_embeddings, moments=moments)
    else:
        write_network(network, folder, dtype)
    write_tokenizer(source.tokenizer, folder)
    return num_parameters


def _num_parameters(network: PreTrainedModel) -> int:
    frozen = [module for module in network.modules() if isinstance(module, FrozenMatrix)]
    plain = [p.numel() for p in network.parameters() if p.is_floating_point()]
    return sum(plain) + sum(matrix.in_features * matrix.out_features for matrix in frozen)


def _trained_on(source: LoadedModel) -> str | None:
    """The quantization that the adapter was trained on, whatever its base is loaded as."""
    adapter = source.source.adapter
    return None if adapter is None else trained_quantization(adapter)


def _loaded_again(
    form: str, folder: Path, dtype: torch.dtype, quantized: str | None, device: torch.device
) -> PreTrainedModel:
    if form == "hf":  # as its reader will
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        assert isinstance(network, PreTrainedModel)
        network.eval().to(device)
        return network
    # An adapter is compared on its base as that was loaded, which --quantize may have determined.
    quantize = (quantized or NONE) if form == "peft" else AUTO
    place = folder / GGUF if form == "gguf" else folder
    return load_model(place, dtype=dtype, device=device, quantize=quantize).network
