"""A network's files: safetensors, config, generation config, tokenizer."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.files import exchange, scratch_folder, sync_files, sync_folder, to_json
from fingpt_lightning.models.families import family_of, head_of
from fingpt_lightning.models.formats.quantized_folder import quantization_config, quantize_layers
from fingpt_lightning.models.formats.weights import SAFETENSORS
from fingpt_lightning.models.input_moments import InputMoments
from fingpt_lightning.models.quantization.frozen_matrix import FrozenMatrix
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedHead


def write_network(network: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Writes a network without adapters, dense or low-rank.

    Args:
        network: On any device.
        folder: There already.
        dtype: Of the stored weights.
    """
    # Each parameter once: what is tied is tied again when it is loaded.
    state = {name: p.detach().to("cpu", dtype) for name, p in network.named_parameters()}
    _write(network, state, folder, dtype, {})


def write_quantized(
    network: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    method: str,
    *,
    embeddings: bool = False,
    moments: Iterable[InputMoments] = (),
) -> None:
    """Writes a network whose layers are quantised, here where they are not yet, in place.

    Args:
        network: Without adapters, on the CPU; what is quantised in it is so by ``method``.
        folder: There already.
        dtype: Of what stays unquantised.
        method: ``nf4`` or ``int8``.
        embeddings: Also the token embedding, with the head tied to it.
        moments: As in `quantize_layers`.
    """
    quantize_layers(network, method, embeddings=embeddings, moments=moments)
    is_own = {name for name, _ in network.named_parameters()}
    tied = {name for name, _ in network.named_parameters(remove_duplicate=False)} - is_own
    family, head_is_codes = family_of(network), isinstance(head_of(network), QuantizedHead)
    state = {
        name: tensor.detach().to("cpu")
        for name, tensor in network.state_dict().items()
        if name not in tied and not (head_is_codes and family.is_head(name))
    }
    # What goes with the codes, scales among them, stays as it is.
    quantised = [name for name, m in network.named_modules() if isinstance(m, FrozenMatrix)]
    beside = {f"{name}.bias" for name in quantised}
    for name, tensor in state.items():
        is_part = any(name.startswith(f"{layer}.") for layer in quantised) and name not in beside
        if not is_part:
            state[name] = tensor.to(dtype)
    _write(network, state, folder, dtype, quantization_config(method, dtype))


def _write(
    network: PreTrainedModel,
    state: dict[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    quantization: dict[str, Any],
) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        folder / SAFETENSORS,
        {"format": "pt"},
    )
    write_config(network, folder, dtype, quantization)


def write_config(
    network: PreTrainedModel,
    folder: Path,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Writes the configs of network and generation.

    Args:
        network: It may be on the meta device.
        folder: There already.
        dtype: Of the stored weights.
        quantization: As transformers keeps it, where layers are quantised.
    """
    described = network.config.to_diff_dict()
    described.pop("quantization_config", None)
    head_is_codes = isinstance(head_of(network), QuantizedHead)
    described |= {
        "architectures": [type(network).__name__],
        "model_type": network.config.model_type,
        "tie_word_embeddings": head_is_codes or network.config.tie_word_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if quantization:
        described["quantization_config"] = quantization
    text = to_json(described, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if network.generation_config is not None:
        network.generation_config.save_pretrained(folder)


def check_replaceable(output: Path, overwrite: bool, is_ours: bool, what: str) -> None:
    """Raises where a finished folder could not be put in place.

    Args:
        output: Its name to be.
        overwrite: Whether one of its kind may be replaced.
        is_ours: Whether what is there is of its kind.
        what: Its kind.

    Raises:
        FileExistsError: ``output`` is there and not to be replaced.
    """
    if not output.exists():
        return
    if not is_ours:
        raise FileExistsError(f"output {output} is there, and no {what}; name another folder")
    if not overwrite:
        raise FileExistsError(f"output {output} is there already; --overwrite replaces it")


def put_in_place(finished: Path, output: Path) -> None:
    """Gives a folder of files its name; what had that name goes when the new one has it.

    The files are on the disk before. Where the system can, both change names in one step, so that
    the name is never without a folder.

    Args:
        finished: On the file system of ``output``; gone afterwards.
        output: The name.
    """
    for path in (finished, *finished.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # else some are their owner's alone
    sync_files(finished)
    if not output.exists():
        finished.rename(output)
    elif exchange(finished, output):
        shutil.rmtree(finished)
    else:
        with scratch_folder(output) as old:
            output.rename(old / output.name)
            finished.rename(output)
    sync_folder(output.parent)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast | None, folder: Path) -> None:
    """Writes the tokenizer, where there is one."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
