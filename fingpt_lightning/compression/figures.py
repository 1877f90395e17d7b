"""What a model is worth: size, perplexities, task scores, speed; for the original and the small."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.generation import Prompt, complete
from fingpt_lightning.evaluation.command import evaluate
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models.device import device_name
from fingpt_lightning.models.families import logits_of
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.profiling.memory import peak_rss_bytes, storage_bytes
from fingpt_lightning.terminal.progress import shown_progress

_ROWS, _CHUNK = 4, 512
_PROMPTS = ("The Federal Reserve", "Shares of the company", "The dividend", "In 2019, profit")
_NEW_TOKENS, _REPEATS = 32, 3


@faster_products()
def perplexity(network: PreTrainedModel, ids: Int[Tensor, "N T"]) -> float:
    """Exp of the mean loss of each token but the first of each row.

    Args:
        network: Network in evaluation mode, quantized or not.
        ids: Tokens in rows.
    """
    total = 0.0
    with torch.no_grad():
        for rows in ids.to(network.device).split(_ROWS):
            inputs, labels = rows[:, :-1], rows[:, 1:].reshape(-1)
            output = network.base_model(input_ids=inputs, use_cache=False)
            hidden = output.last_hidden_state.flatten(0, 1)
            for part, target in zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True):
                logits = logits_of(network, part).float()
                total += float(F.cross_entropy(logits, target, reduction="sum").double())
    return math.exp(total / (ids.numel() - len(ids)))


def tokens_per_s(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Tokens that are written per second, greedily, to four short prompts together."""
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        prompts = [Prompt(text) for text in _PROMPTS]
        done = complete(network, tokenizer, prompts, _NEW_TOKENS, batch_size=len(prompts))
        number = sum(completion.num_tokens for _, completion in done)
        found.append(number / (time.perf_counter() - started))
    return max(found)


def measure(
    model: str | Path,
    texts: Mapping[str, Int[Tensor, "N T"]],
    tasks: Sequence[str],
    *,
    data_dir: Path | None,
    limit: int | None,
    tokenizer: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The figures of a model.

    Args:
        model: Path of the model.
        texts: Tokens by the name of the text.
        tasks: Tasks whose ``validation`` is scored.
        data_dir: Folder of their rows; None reads from the hub.
        limit: Number of rows of each task; None takes all.
        tokenizer: Folder of the tokenizer, where the model has none beside it.
        device: Device of the network, which the figures name.
    """
    placed = torch.device(device)
    if placed.type == "cuda":
        torch.cuda.reset_peak_memory_stats(placed)
    loaded = load_model(model, tokenizer=tokenizer, device=placed)
    network = loaded.network
    folder = Path(loaded.source.weights)
    files = [folder] if folder.is_file() else list(folder.glob("*.safetensors"))
    figures: dict[str, Any] = {
        "device": device_name(placed),
        "file_bytes": sum(file.stat().st_size for file in files),
        "memory_bytes": storage_bytes([*network.parameters(), *network.buffers()]),
        "perplexity": {},
        "tasks": {},
    }
    with shown_progress(f"measuring {loaded.description}", len(texts) + 1, "texts") as show:
        for number, (name, ids) in enumerate(texts.items(), start=1):
            figures["perplexity"][name] = perplexity(network, ids)
            show(number)
        if loaded.tokenizer is not None:
            figures["decoded_tokens_per_s"] = tokens_per_s(network, loaded.tokenizer)
    del network, loaded
    if tasks:
        found = evaluate(
            model, tasks, data_dir=data_dir, limit=limit, tokenizer=tokenizer, device=device
        )
        figures["tasks"] = {
            name: result.metrics["accuracy"] for name, result in found.results.items()
        }
        seconds = sum(result.seconds for result in found.results.values())
        rows = sum(len(result.predictions) for result in found.results.values())
        figures["answered_rows_per_s"] = rows / seconds
    figures["peak_memory_bytes"] = peak_rss_bytes()
    if placed.type == "cuda":
        figures["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(placed)
    return figures
