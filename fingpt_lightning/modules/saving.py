"""A trained module as a folder for the hub, written by the module itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from fingpt_lightning.files import check_replaceable, put_in_place, scratch_folder
from fingpt_lightning.hub.card import (
    CARD,
    IMPORT_OURS,
    LOAD_BY_US,
    LOAD_NETWORK,
    PACKAGE,
    Origin,
    datasets_of,
    has_mark,
    metadata_block,
    origin_of,
)
from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.models.formats.tokenizer import write_tokenizer

_MARK = "<!-- made by: save_pretrained of fingpt-lightning -->"
_ADAPTER = f"""\
# pip install fingpt-lightning; PEFT reads it too where the base is a plain one
{LOAD_BY_US}"""


def check_savable(module: LightningModule) -> None:
    """Refuses a module that has no network, or a part of one.

    Raises:
        ValueError: It is such a module.
    """
    if "network" not in module._modules:
        raise ValueError("the module has no network yet: fit it, or call its configure_model")
    if module.device_mesh is not None or getattr(module, "partial_network", None) is not None:
        strategy = type(module.trainer.strategy).__name__
        raise ValueError(
            f"trainer.strategy {strategy} gives each process a part of the network; export a"
            " checkpoint: fingpt export --model CHECKPOINT --push OWNER/NAME"
        )


def save_module(
    module: LightningModule,
    folder: Path,
    write: Callable[[Path], None],
    *,
    start: str | None,
    needs_us: bool,
    is_adapter: bool,
) -> None:
    """Writes network or adapter, tokenizer and card; the folder appears whole or not at all.

    Args:
        module: Module that was trained, or that is attached to a trainer.
        folder: Folder that is made; one that was made so before is replaced.
        write: Function that writes the weights into a folder.
        start: Path or hub name of the model that the module began from, if any.
        needs_us: Whether this package alone reads the folder.
        is_adapter: Whether the weights are those of an adapter.

    Raises:
        FileExistsError: The folder is there, and something else.
    """
    check_replaceable(folder, True, has_mark(folder, _MARK), "model that a module has saved")
    data = None if module._trainer is None else getattr(module.trainer, "datamodule", None)
    origin = Origin() if start is None else origin_of(start)
    tags = ["lora"] if is_adapter else []
    library = "peft" if is_adapter else "transformers"
    metadata = metadata_block(
        folder.name,
        origin,
        library=PACKAGE if needs_us else library,
        tags=tags + (["low-rank"] if needs_us else []),
        relation="adapter" if is_adapter else None,
        datasets=datasets_of(dict(getattr(data, "hparams", {}))),
    )
    text = _ADAPTER if is_adapter else (IMPORT_OURS if needs_us else "") + LOAD_NETWORK
    lines = [
        metadata + f"# {folder.name}", "", _MARK, "", *_figures(module),
        "```python", text.format(name=folder.name), "```", "",
    ]  # fmt: skip
    with scratch_folder(folder) as made:
        write(made)
        write_tokenizer(getattr(data, "tokenizer", None), made)
        (made / CARD).write_text("\n".join(lines), encoding="utf-8")
        put_in_place(made, folder)


def _figures(module: LightningModule) -> list[str]:
    """What is known of the training, in sentences."""
    if module._trainer is None:
        return []
    steps: Any = module.trainer.global_step
    loss = module.trainer.callback_metrics.get(VAL_LOSS)
    after = "" if loss is None else f"; validation loss {float(loss):.4f} nats per token"
    return [f"Trained for {steps:,} steps{after}.", ""]
