"""Trains each recipe for a few steps on the emulated device and writes what a step did to it.

``python -m tests.support.cuda_emulation.recipes FILE``, started by `building.run_on_cuda`.
"""

import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

from tests.support.cuda_emulation.emulation import (
    Ledger,
    emulate_cuda,
    on_cuda,
    ones_on_disk,
)

# Before anything asks whether there is a device.
LEDGER = emulate_cuda()

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from typing_extensions import override  # noqa: E402

from callbacks.memory import MemoryMonitor  # noqa: E402
from callbacks.throughput import ThroughputMonitor  # noqa: E402
from fingpt_lightning.compression.command import compress  # noqa: E402
from fingpt_lightning.compression.stages import Compression  # noqa: E402
from fingpt_lightning.data.batch import TokenBatch  # noqa: E402
from fingpt_lightning.data.calibration_text import Calibration, shown_moments  # noqa: E402
from fingpt_lightning.data.instruction_batches import Batching, Collate  # noqa: E402
from fingpt_lightning.deploy import exporting  # noqa: E402
from fingpt_lightning.evaluation.answer_scores import answer_scores  # noqa: E402
from fingpt_lightning.evaluation.forward import SharedPrefix, run_trees  # noqa: E402
from fingpt_lightning.evaluation.token_tree import build_tree  # noqa: E402
from fingpt_lightning.models import attention  # noqa: E402
from fingpt_lightning.models.decoding import decode  # noqa: E402
from fingpt_lightning.models.families import head_of  # noqa: E402
from fingpt_lightning.models.formats.quantized_folder import quantize_layers  # noqa: E402
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning  # noqa: E402
from fingpt_lightning.modules import teacher as teachers  # noqa: E402
from fingpt_lightning.modules.base_model import RandomLlama, random_llama  # noqa: E402
from fingpt_lightning.planning import command  # noqa: E402
from fingpt_lightning.planning.blueprint import blueprint  # noqa: E402
from fingpt_lightning.tasks.encoding import Text  # noqa: E402
from tests.evaluation.tiny_language import (  # noqa: E402
    POSITIONS,
    tiny_network,
    tiny_tokenizer,
)

_NUM_STEPS = 2  # the first one makes the optimizer's state
_VOCABULARY = 211
_SIZES: dict[str, Any] = {"num_layers": 1, "width": 64, "num_heads": 4, "num_positions": 32}
_BF16: Literal["bf16-mixed"] = "bf16-mixed"


def _rows() -> list[dict[str, torch.Tensor]]:
    """Rows that begin alike, with labels at their ends."""
    rows = []
    for length in (9, 13, 13, 20):
        ids = torch.arange(length)
        labels = torch.full_like(ids, -100)
        labels[-2:] = 7
        rows.append({"input_ids": ids, "labels": labels, "task": torch.tensor(0)})
    return rows


def _block() -> TokenBatch:
    ids = torch.arange(66).view(2, 33)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


# Made before tensors are fake, as those of a loader's processes are.
_BLOCK = _block()
_INSTRUCTIONS = {batching: Collate(batching, 0)(_rows()) for batching in Batching}


class _Batches(LightningDataModule):
    """The same batch in every step."""

    def __init__(self, batch: TokenBatch) -> None:
        super().__init__()
        self.batch = batch
        self.vocabulary_size, self.eos_token_id = _VOCABULARY, 0
        self.block_length = batch["input_ids"].shape[1]

    def tokenizer_reference(self) -> dict[str, str | int]:
        """A reference that is always the same."""
        return {"name_or_path": "none", "sha256": "0", "vocabulary_size": _VOCABULARY}

    @override
    def on_before_batch_transfer(self, batch: TokenBatch, dataloader_idx: int) -> TokenBatch:
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        return module.prepared(batch)  # type: ignore[no-any-return]

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        batches: Any = [self.batch] * _NUM_STEPS
        return DataLoader(batches, batch_size=None)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


class _OneStep(Callback):
    """Keeps the ledger of the last step, from the end of the one before."""

    def __init__(self) -> None:
        self.noted: dict[str, Any] = {}

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == _NUM_STEPS:
            self.noted = noted(LEDGER)
            tensors = [*pl_module.named_parameters(), *pl_module.named_buffers()]
            self.noted["not_on_device"] = [n for n, x in tensors if x.device.type != "cuda"]
        LEDGER.clear()


def noted(ledger: Ledger) -> dict[str, Any]:
    """The ledger as it stands, in plain types."""
    return json.loads(json.dumps(vars(ledger)))  # type: ignore[no-any-return]


def trained(
    module: LightningModule,
    batch: TokenBatch,
    precision: Any = _BF16,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """What a step of a real trainer did to the device, which validates after it too."""
    one_step = _OneStep()
    trainer = Trainer(
        accelerator="cuda", devices=1, precision=precision, max_steps=_NUM_STEPS,
        gradient_clip_val=1.0, limit_val_batches=1, num_sanity_val_steps=0, logger=False,
        callbacks=[*callbacks, one_step], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    # Numbers that are not there cannot be written.
    with patch.object(QuantizedFinetuning, "_save_adapter"):
        trainer.fit(module, datamodule=_Batches(batch))
    return one_step.noted


def pretraining(precision: Any = _BF16, **settings: Any) -> dict[str, Any]:
    """A step of `LowRankPretraining`."""
    module = LowRankPretraining(**(_SIZES | {"rank": 8} | settings))
    return trained(module, _BLOCK, precision)


def monitored() -> dict[str, Any]:
    """A step that the monitors of our configs watch and do not log."""
    module = LowRankPretraining(**_SIZES, rank=8)
    return trained(module, _BLOCK, callbacks=[MemoryMonitor(), ThroughputMonitor(warmup_steps=1)])


def llama(**settings: Any) -> dict[str, Any]:
    """A step of `LowRankPretraining` with a Llama."""
    module = LowRankPretraining(preset="llama-60m", num_layers=1, rank=32, **settings)
    return trained(module, _BLOCK)


def finetuning(
    batching: Batching = Batching.PADDED, width: int = 64, **settings: Any
) -> dict[str, Any]:
    """A step of `QuantizedFinetuning`."""
    base = RandomLlama(num_layers=1, width=width, num_positions=64)
    module = QuantizedFinetuning(random_base=base, rank=4, **settings)
    return trained(module, _INSTRUCTIONS[batching], "32-true")


def taught(
    step: Callable[..., dict[str, Any]], quantize: str | None = None, **settings: Any
) -> dict[str, Any]:
    """A step that learns the predictions of a frozen Llama.

    Args:
        step: Step of a module with the settings of a teacher.
        quantize: ``nf4``, ``int8`` or None, of the teacher's linear layers.
        settings: Settings of the module.
    """

    def loaded(path: str, **_: Any) -> Any:  # a folder of numbers that are not there
        return SimpleNamespace(network=_base(quantize), tokenizer=None, revision=path)

    with patch.object(teachers, "load_model", loaded):
        return step(teacher="teacher", **settings)


def causal_attention() -> dict[str, Any]:
    """The parts of our own attention, which an operator hides from fake tensors."""
    query, key = torch.randn(2, 6, 5, 8, device="cuda")
    weights = attention._attention_weights(query, key, 0.5)
    torch.bmm(weights, key)
    return noted(LEDGER)


def _base(quantize: str | None) -> PreTrainedModel:
    network = random_llama(
        RandomLlama(num_layers=2, num_positions=64), _VOCABULARY, 0, dtype=torch.bfloat16,
        device=torch.device("cuda"), quantize=quantize, seed=0,
    )  # fmt: skip
    network.eval()
    return network


def evaluated(quantize: str | None) -> dict[str, Any]:
    """Answers of one and of several tokens, scored behind a beginning that all rows share."""
    network, before = _base(quantize), 3
    texts = [Text((1, 2, 3, 4, row, *answer), 5) for row in (5, 6) for answer in ((7,), (8, 9))]
    trees = [build_tree(texts[first : first + 2], before) for first in (0, 2)]
    with torch.no_grad():
        hidden = run_trees(network, trees, SharedPrefix(network, (1, 2, 3)))
        scores = answer_scores(head_of(network), hidden, trees, relative=False)
    return noted(LEDGER) | {"answers": [len(row) for row in scores.scores]}


def generated(quantize: str | None) -> dict[str, Any]:
    """Prompts of two lengths that are gone on with."""
    texts = decode(_base(quantize), [[1, 2, 3], [4, 5]], 3, end_tokens=[0])
    return noted(LEDGER) | {"answers": [len(text) for text in texts]}


def rounded() -> dict[str, Any]:
    """A network whose layers and embedding become NF4, with calibration."""
    base = RandomLlama(num_layers=1, width=32, num_heads=2, num_positions=16)
    network = random_llama(
        base, _VOCABULARY, 0, dtype=torch.float32, device=torch.device("cuda"), quantize=None,
        seed=0,
    ).eval()  # fmt: skip
    calibration = Calibration(torch.arange(64).view(4, 16), "numbers")
    quantize_layers(network, "nf4", embeddings=True, moments=shown_moments(network, calibration))
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return noted(LEDGER) | {"not_on_device": [n for n, x in tensors if x.device.type != "cuda"]}


def compressed() -> dict[str, Any]:
    """All stages of ``fingpt compress`` but healing, from files to files."""
    small = dict.fromkeys(exporting.TOLERANCES, 1.0)  # as all numbers are, errors too
    with tempfile.TemporaryDirectory() as name, patch.dict(exporting.TOLERANCES, small):
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text("Foo Corp kept its dividend as profit rose. " * 200, encoding="utf-8")
        tiny_network("llama").save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        with on_cuda(LEDGER), ones_on_disk():
            made = compress(
                folder / "model", folder / "small", size=0.7, calibration=text, format="int8",
                calibration_tokens=5 * POSITIONS, allocation="loss", whitening="both",
                drop_blocks=1, refine=1, texts=[text], text_tokens=64,
            )  # fmt: skip
    assert isinstance(made, Compression)
    return noted(LEDGER) | {"measured_on": [made.original["device"], made.small["device"]]}


def planned(module: LightningModule, batch: TokenBatch, precision: str) -> dict[str, Any]:
    """The bytes of a step as ``fingpt plan`` counts them."""
    length = batch["input_ids"].shape[1]
    made = blueprint(module, _VOCABULARY, length, precision, torch.device("cuda"))
    step = command._count(module, made, batch, precision)
    return noted(LEDGER) | {"bytes": step._asdict()}


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "low-rank": lambda: pretraining(embedding_rank=8),
    "low-rank in float32": lambda: pretraining("32-true", embedding_rank=8),
    "low-rank in bfloat16 alone": lambda: pretraining("bf16-true"),
    "low-rank in float16": lambda: pretraining("16-mixed"),
    "dense": lambda: pretraining(rank=None),
    "llama": lambda: llama(),
    "spectron": lambda: pretraining(optimizer="spectron", embedding_rank=8),
    "spectron in float16": lambda: pretraining("16-mixed", optimizer="spectron"),
    "spectron of dense layers": lambda: pretraining(
        optimizer="spectron", spectron_dense=True, rank_overrides={"*.mlp.*": None}
    ),
    "spectron of the embedding's map": lambda: pretraining(
        optimizer="spectron", embedding_rank=8, embedding_optimizer="mixed"
    ),
    "own map of the head": lambda: pretraining(
        optimizer="spectron", embedding_rank=8, embedding_optimizer="mixed", head_map="own"
    ),
    "lora-muon": lambda: pretraining(
        optimizer="lora_muon", embedding_rank=8, embedding_optimizer="same"
    ),
    "lora-muon in float16": lambda: pretraining("16-mixed", optimizer="lora_muon"),
    "lora-muon of dense layers": lambda: pretraining(
        optimizer="lora_muon",
        lora_muon_dense=True,
        rank_overrides={"*.mlp.*": None},
        embedding_rank=8,
        embedding_optimizer="mixed",
    ),
    "product decay": lambda: pretraining(
        optimizer="spectron", factor_decay="product", initialization="orthogonal"
    ),
    "cola": lambda: pretraining(initialization="cola", factor_activation="silu"),
    "expansion": lambda: pretraining(factor_expansion=0.5),
    "self-guided": lambda: pretraining(self_guided=1.0, optimizer="spectron"),
    "recomputed low-rank": lambda: pretraining(recompute="low_rank"),
    "recomputed blocks": lambda: pretraining(recompute="block"),
    "residual stream in bfloat16": lambda: pretraining(residual_dtype="bfloat16"),
    "dropout": lambda: pretraining(dropout=0.1),
    "dropout recomputed": lambda: pretraining(dropout=0.1, recompute="low_rank"),
    "aware of nf4": lambda: pretraining(quantization_aware="nf4", quantization_start=0.0),
    "aware of int8": lambda: pretraining(quantization_aware="int8", quantization_start=0.0),
    "low-rank with monitors": monitored,
    "lora": lambda: finetuning(),
    "lora without quantization": lambda: finetuning(quantize=None),
    "lora in int8": lambda: finetuning(quantize="int8"),
    "lora in float64": lambda: finetuning(dtype="float64"),
    "lora of odd rows": lambda: finetuning(width=96),
    "dora": lambda: finetuning(dora=True),
    "lora packed": lambda: finetuning(Batching.PACKED),
    "lora behind a shared prefix": lambda: finetuning(Batching.SHARED_PREFIX),
    "lora with dropout, blocks recomputed": lambda: finetuning(dropout=0.1, recompute="block"),
    "lora with dropout, offloaded": lambda: finetuning(dropout=0.1, recompute="offload"),
    "lora with divergence": lambda: finetuning(kl_weight=0.1),
    "healing": lambda: taught(pretraining, embedding_rank=8),
    "healing softened, by nf4": lambda: taught(
        pretraining, "nf4", optimizer="spectron", teacher_weight=0.5, teacher_temperature=2.0
    ),
    "lora by a teacher": lambda: taught(finetuning, teacher_weight=0.5),
    "lora packed, by int8": lambda: taught(finetuning, "int8", batching=Batching.PACKED),
    "causal attention": causal_attention,
    "evaluation": lambda: evaluated(None),
    "evaluation in nf4": lambda: evaluated("nf4"),
    "evaluation in int8": lambda: evaluated("int8"),
    "generation": lambda: generated(None),
    "generation in nf4": lambda: generated("nf4"),
    "generation in int8": lambda: generated("int8"),
    "rounding to nf4": rounded,
}
"""Recipes by name; each gives what a step did."""

OUTSIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "plan of pretraining": lambda: planned(
        LowRankPretraining(**_SIZES, rank=8, recompute="block"), _BLOCK, _BF16
    ),
    "plan of finetuning": lambda: planned(
        QuantizedFinetuning(random_base=RandomLlama(num_layers=1, num_positions=64)),
        _INSTRUCTIONS[Batching.SHARED_PREFIX],
        "32-true",
    ),
    "compression": compressed,
}
"""The same for what makes tensors fake itself."""


@contextmanager
def _caught(result: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception:
        result["error"] = traceback.format_exc()


def main() -> None:
    """Runs all recipes, or those named after the file, and writes what each did."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "torch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in sys.argv[2:] or RECIPES | OUTSIDE:
        LEDGER.clear()
        result: dict[str, Any] = {}
        start_s = time.perf_counter()
        with _caught(result):
            if name in OUTSIDE:
                result |= OUTSIDE[name]()
            else:
                with on_cuda(LEDGER):
                    result |= RECIPES[name]()
        result["seconds"] = round(time.perf_counter() - start_s, 2)
        results[name] = result
    Path(sys.argv[1]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
