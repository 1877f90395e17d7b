"""Finetuning steps beside those of peft and transformers' Trainer at their defaults."""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.data.batch import IGNORED_LABEL, TokenBatch
from fingpt_lightning.data.instruction_batches import Batching, Collate
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models import vocabulary_loss
from fingpt_lightning.models.adapting import adapt, adapter_state
from fingpt_lightning.models.formats.peft_adapter import peft_state
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.packed_attention import run_packed, use_packed_attention
from fingpt_lightning.profiling import LiveTensorBytes, keep_freed_memory, module_memory

QUESTION = (
    "How many examples a second, and how much memory, does a step take beside peft and"
    " transformers.Trainer with the same model, rows, precision and adapters?"
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LEARNING_RATE, _MAX_NORM = 5e-5, 1.0  # the Trainer's defaults


class Outcome(NamedTuple):
    """The cost of the steps of both contenders, and their losses."""

    seconds: dict[str, list[float]]
    losses: dict[str, list[float]]
    peak_bytes: dict[str, int]


class OurStep:
    """Our adapters on packed rows after their shared instruction.

    Args:
        network: Network of the base.
        options: Settings of the adapters.
        num_steps: Number of steps of the run, over which the rate falls to zero, as the Trainer's.
    """

    def __init__(self, network: PreTrainedModel, options: AdapterOptions, num_steps: int) -> None:
        self.network = network.train()
        adapt(network, options, seed=1)
        use_packed_attention(network)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = AdamW(self.trained, lr=_LEARNING_RATE, weight_decay=0.0, fused=True)
        self.schedule = LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / num_steps))

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Forward, backward, clipping and update; returns the loss per token."""
        loss = self.backward(batch)
        clip_grad_norm_(self.trained, _MAX_NORM, foreach=True)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @faster_products()
    def backward(self, batch: TokenBatch) -> Tensor:
        """Forward and backward alone."""
        hidden = run_packed(
            self.network, batch["input_ids"], batch["position_ids"], batch["packing"]
        )
        kept = batch["labels"] != IGNORED_LABEL
        sums = vocabulary_loss(self.network.lm_head, hidden[kept], batch["labels"][kept])
        loss = sums.loss_sum / sums.num_tokens
        loss.backward()
        return loss


def compare(
    model: str, precision: str, batches: Sequence[Sequence[dict[str, Tensor]]], rank: int
) -> Outcome:
    """Runs the same steps with both contenders in turn; the first is warm-up.

    Args:
        model: Folder of the base.
        precision: Either ``fp32``, or ``bf16`` for a base in bfloat16 and the Trainer's ``bf16``.
        batches: Rows of each step.
        rank: Rank of the adapters; their alpha is twice that.
    """
    import transformers
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    dtype, eos = _DTYPES[precision], 0
    ours = OurStep(load_model(model, dtype=dtype).network, AdapterOptions(rank), len(batches))
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    theirs: Any = get_peft_model(base, config)
    set_peft_model_state_dict(theirs, peft_state(adapter_state(ours.network)))
    ours_collate, padded = Collate(Batching.SHARED_PREFIX, eos), Collate(Batching.PADDED, eos)
    seconds: dict[str, list[float]] = {"trainer": [], "ours": []}
    losses: dict[str, list[float]] = {"trainer": [], "ours": []}

    class InTurn(transformers.TrainerCallback):
        """Times each step of the Trainer, then takes the same step with ours."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start_s = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:
            seconds["trainer"].append(time.perf_counter() - self.start_s)
            batch = ours_collate(batches[state.global_step - 1])
            start_s = time.perf_counter()
            loss = ours(batch)
            seconds["ours"].append(time.perf_counter() - start_s)
            losses["ours"].append(float(loss))

    class InOrder(transformers.Trainer):
        """The Trainer, reading the rows in their order and keeping its losses."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            losses["trainer"].append(float(loss))
            return loss

    rows: list[dict[str, Tensor]] = [row for batch in batches for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=theirs,
            args=transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=len(batches[0]),
                num_train_epochs=1,
                learning_rate=_LEARNING_RATE,
                bf16=precision == "bf16",
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=rows,
            data_collator=lambda batch: _for_trainer(padded(batch), eos),
            callbacks=[InTurn()],
        )
        trainer.train()
    peak_bytes = {
        "trainer": _peak(
            theirs,
            trainer.optimizer,
            lambda: trainer.accelerator.unwrap_model(theirs)(
                **trainer._prepare_inputs(_for_trainer(padded(batches[0]), eos))
            ).loss.backward(),
            autocast=precision == "bf16",
        ),
        "ours": _peak(
            ours.network, ours.optimizer, lambda: ours.backward(ours_collate(batches[0]))
        ),
    }
    return Outcome({name: times[1:] for name, times in seconds.items()}, losses, peak_bytes)


def _for_trainer(batch: TokenBatch, eos_token_id: int) -> dict[str, Tensor]:
    """Labels as transformers expects them: it shifts them itself."""
    ids, labels = batch["input_ids"], batch["labels"]
    num_rows = len(ids)
    # The last target is not an input: it is appended, so that both predict the same tokens.
    whole = torch.cat([ids, ids.new_full((num_rows, 1), eos_token_id)], 1)
    shifted = torch.cat([labels.new_full((num_rows, 1), IGNORED_LABEL), labels], 1)
    whole = torch.where(shifted == IGNORED_LABEL, whole, shifted)
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": shifted}


def _peak(network: Any, optimizer: Any, backward: Any, autocast: bool = False) -> int:
    """Weights, optimizer and the most that tensors held beside them in a step."""
    network.zero_grad()
    held = module_memory(network, getattr(optimizer, "optimizer", optimizer))
    with LiveTensorBytes() as count, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        backward()
    return int(held.weights + held.optimizer + count.peak_bytes)


def _read_batches(options: argparse.Namespace, model: str) -> list[list[dict[str, Tensor]]]:
    num_rows = options.batch_size * (options.repeats + 1)
    data = FinancialInstructions(
        None if options.toy else [options.task],
        options.data_dir,
        model,
        batch_size=options.batch_size,
        chat_template="none",
        num_synthetic_items=2 * num_rows,
        seed=options.seed,
    )
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    found = [loader.dataset[i] for i in list(loader.sampler)[:num_rows]]
    if len(found) < num_rows:
        raise ValueError(f"{options.task} has {len(found)} rows, the steps take {num_rows}")
    size = options.batch_size
    return [found[first : first + size] for first in range(0, num_rows, size)]


def _toy_model(folder: Path) -> str:
    data = FinancialInstructions(num_synthetic_items=20, vocab_size=300)
    data.prepare_data()
    data.setup()
    data.tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=data.vocabulary_size,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and writes its record."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--task", default="fpb")
    parser.add_argument("--data_dir")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8, help="timed steps")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", default=list(_DTYPES), choices=list(_DTYPES))
    parser.add_argument("--toy", action="store_true", help="a tiny random model, synthetic rows")
    options = parser.parse_args(arguments)
    record = new_record(QUESTION, {**vars(options), "json": str(options.json)})
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _toy_model(Path(folder)) if options.toy else options.model
        batches = _read_batches(options, model)
        for precision in options.precisions:
            outcome = compare(model, precision, batches, options.rank)
            rows += _rows(precision, outcome, options.batch_size)
            ours = rows[-1]
            summary[f"examples_per_s_ratio_{precision}"] = ours["examples_per_s_ratio"]
            summary[f"step_memory_ratio_{precision}"] = ours["peak_memory_ratio"]
            losses = zip(outcome.losses["ours"], outcome.losses["trainer"], strict=True)
            difference = max(abs(a - b) / b for a, b in losses)
            summary[f"max_relative_loss_difference_{precision}"] = difference
    # The largest of the memory ratios, and the difference where rounding does not hide it.
    memory = [value for key, value in summary.items() if key.startswith("step_memory_ratio_")]
    summary["step_memory_ratio"] = max(memory)
    if "fp32" in options.precisions:
        summary["max_relative_loss_difference"] = summary["max_relative_loss_difference_fp32"]
    table = markdown_table(
        ["contender", "examples/s", "ratio", "peak MiB", "ratio"],
        [
            [
                f"{row['contender']}, {row['precision']}",
                f"{row['examples_per_s']['median']:.2f}",
                f"{row['examples_per_s_ratio']:.2f}",
                f"{row['peak_memory_mib']:.0f}",
                f"{row['peak_memory_ratio']:.2f}",
            ]
            for row in rows
        ],
    )
    write_record(options.json, record | {"rows": rows, "summary": summary}, table)
    print(table)


def _rows(precision: str, outcome: Outcome, batch_size: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for contender, times in outcome.seconds.items():
        rates = spread([batch_size / seconds for seconds in times])
        first = rows[0] if rows else {}
        peak_mib = outcome.peak_bytes[contender] / 2**20
        rows.append(
            {
                "contender": contender,
                "precision": precision,
                "repeats": len(times),
                "examples_per_s": rates,
                "examples_per_s_ratio": rates["median"]
                / first.get("examples_per_s", rates)["median"],
                "peak_memory_mib": peak_mib,
                "peak_memory_ratio": peak_mib / first.get("peak_memory_mib", peak_mib),
            }
        )
    return rows


if __name__ == "__main__":
    main()
