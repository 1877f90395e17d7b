"""Do the forms in which a finetuned model is exported give the same answers as the model?

The model, a base with its adapter, answers a validation set; so does each export of it, loaded
again. Then many adapters on one base answer in mixed batches, and each of them alone.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.llama_cpp import next_token_logprobs
from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.data.calibration_text import CALIBRATION_TOKENS, task_calibration
from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.exporting import GGUF, export
from fingpt_lightning.evaluation.runner import TaskRun, metrics_of, predict, read_tasks
from fingpt_lightning.evaluation.scoring import Prediction
from fingpt_lightning.models.adapting import adapted_layers, save_adapter
from fingpt_lightning.models.loading import AUTO, NONE, build_model, load_model
from fingpt_lightning.models.sources import resolve_source

QUESTION = (
    "Which share of a finetuned model's answers do its exports give too, how large are they, and do"
    " many adapters in mixed batches answer as each does alone?"
)
_CALIBRATED = "_calibrated"
FORMS = ("merged", "int8", "nf4", "int8_calibrated", "nf4_calibrated", "gguf")
_SOURCE = "base and adapter"
_LLAMA_CPP_PROMPTS = 100
_SPLIT = "validation"


def main() -> None:
    """Exports in all forms, evaluates all of them, and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--adapter", type=Path, required=True, help="folder in PEFT's format")
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--task", default="fpb")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--calibration_tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--limit", type=int, help="rows of the task")
    parser.add_argument("--num_adapters", type=int, default=50, help="in mixed batches")
    parser.add_argument("--batch_size", type=int, default=10, help="of mixed batches")
    parser.add_argument("--seed", type=int, default=1, help="of the made-up adapters")
    options = parser.parse_args()
    (run,) = read_tasks([options.task], options.data_dir, _SPLIT, limit=options.limit)
    names = (
        "task", "forms", "calibration_tokens", "limit", "num_adapters", "batch_size", "seed"
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    settings |= {"split": _SPLIT, "split_sha256": run.sha256}
    record = new_record(QUESTION, settings)
    with tempfile.TemporaryDirectory() as folder:
        record["rows"] = compare_forms(
            options.adapter,
            options.forms,
            run,
            Path(folder),
            options.data_dir,
            options.calibration_tokens,
        )
        record["adapters"] = compare_adapters(
            options.adapter,
            run,
            options.num_adapters,
            options.batch_size,
            options.seed,
            Path(folder),
        )
    record["summary"] = summary(record["rows"], record["adapters"])
    write_record(options.json, record, table(record["rows"], record["adapters"]))
    print(json.dumps(record["summary"], indent=1))


def compare_forms(
    adapter: Path,
    forms: Sequence[str],
    run: TaskRun,
    folder: Path,
    data_dir: Path,
    calibration_tokens: int,
) -> list[dict[str, Any]]:
    """The answers of each export beside those of its source, in float32, as it was trained.

    Args:
        adapter: Adapter of the finetuned model.
        forms: Forms, of `FORMS`.
        run: Run with the questions.
        folder: Folder for the exports, which stay there.
        data_dir: Folder with the task's ``train`` split, on which calibrated forms keep outputs.
        calibration_tokens: Number of its tokens that are read.
    """
    source = load_model(adapter, quantize=AUTO)
    network, tokenizer = source.network, source.require_tokenizer()
    expected = predict(network, tokenizer, run.task, run.examples)
    base_bytes = sum(p.nbytes for n, p in network.named_parameters() if "lora_" not in n)
    rows = [_row(_SOURCE, run, expected, expected, base_bytes)]
    for form in forms:
        calibration = None
        if form.endswith(_CALIBRATED):
            calibration = task_calibration(
                run.task.name, data_dir, tokenizer, network.config, calibration_tokens
            )
        # An export changes the network that it is given.
        kind = form.removesuffix(_CALIBRATED)
        trained = load_model(adapter, quantize=AUTO)
        exported = export(trained, kind, folder / form, calibration=calibration)
        again = load_model(folder / form / GGUF if form == "gguf" else folder / form)
        answers = predict(again.network, tokenizer, run.task, run.examples)
        row = _row(form, run, answers, expected, exported.num_bytes)
        errors = [difference.relative_error for difference in exported.differences]
        row |= {"max_relative_logit_error": max(errors)}
        if form == "gguf" and find_spec("xllamacpp"):
            row |= _by_llama_cpp(folder / form / GGUF, network, tokenizer, run)
        rows.append(row)
    return rows


def _row(
    form: str,
    run: TaskRun,
    answers: Sequence[Prediction],
    expected: Sequence[Prediction],
    num_bytes: int,
) -> dict[str, Any]:
    equal = sum(a.choice == b.choice for a, b in zip(answers, expected, strict=True))
    return {
        "contender": form,
        "share_equal_predictions": equal / len(expected),
        "accuracy": metrics_of(run, answers)["accuracy"],
        "num_prompts": len(expected),
        "file_mb": num_bytes / 1e6,
    }


@torch.no_grad()
def _by_llama_cpp(
    file: Path, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, run: TaskRun
) -> dict[str, float | int]:
    """The token after each of the first prompts, by llama.cpp and by the source."""
    prompts = [one.prefix + one.prompts[0] for one in run.examples[:_LLAMA_CPP_PROMPTS]]
    theirs = next_token_logprobs(file, prompts, network.config.vocab_size)
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    ours = torch.stack([
        _next_token_logits(network, tokenizer, [row])[0].log_softmax(-1) for row in rows
    ])  # fmt: skip
    centred = ours - ours.mean(1, keepdim=True)
    return {
        "llama_cpp_prompts": len(prompts),
        "llama_cpp_share_equal_next_tokens": float(
            (theirs.argmax(1) == ours.argmax(1)).float().mean()
        ),
        "llama_cpp_relative_logit_error": float((theirs - ours).norm() / centred.norm()),
    }


@torch.no_grad()
def compare_adapters(
    adapter: Path, run: TaskRun, num_adapters: int, batch_size: int, seed: int, folder: Path
) -> dict[str, Any]:
    """Mixed batches, each row its own client's adapter, beside one row at a time.

    Args:
        adapter: Adapter that the clients' adapters vary, each with noise of its own.
        run: Run whose first rows are answered.
        num_adapters: Number of clients, each with one row.
        batch_size: Rows of a mixed batch.
        seed: Seed of the noise.
        folder: Folder for the clients' adapters.
    """
    source = resolve_source(adapter)
    whole = build_model(source, quantize=NONE)
    tokenizer, adapted = whole.require_tokenizer(), whole.network
    network = build_model(source.without_adapter()).network
    bank = AdapterBank(network)
    generator = torch.Generator().manual_seed(seed)
    plain = {n: p.clone() for n, p in adapted.named_parameters() if "lora_" in n}
    clients = [f"client {number}" for number in range(num_adapters)]
    for client in clients:
        for layer_name, layer in adapted_layers(adapted).items():
            for part in ("lora_A", "lora_B"):
                own = plain[f"{layer_name}.{part}"]
                noise = torch.randn(own.shape, generator=generator) * own.std()
                getattr(layer, part).copy_(own + noise / 2)
        save_adapter(adapted, folder / client, str(adapter))
        bank.load(client, folder / client)
    prompts = [run.examples[i % len(run.examples)] for i in range(num_adapters)]
    rows = [tokenizer(one.prefix + one.prompts[0])["input_ids"] for one in prompts]
    mixed: list[Tensor] = []
    alone: list[Tensor] = []
    for first in range(0, num_adapters, batch_size):
        names = clients[first : first + batch_size]
        with bank.rows(names):
            mixed += _next_token_logits(network, tokenizer, rows[first : first + batch_size])
    for client, row in zip(clients, rows, strict=True):
        with bank.rows(client):
            alone += _next_token_logits(network, tokenizer, [row])
    with bank.rows(None):
        base_logits = _next_token_logits(network, tokenizer, rows[:1])[0]
    answers = list(zip(mixed, alone, strict=True))
    return {
        "num_adapters": num_adapters,
        "batch_size": batch_size,
        "share_equal_answers": (
            sum(int(a.argmax() == b.argmax()) for a, b in answers) / len(answers)
        ),
        "max_logit_difference": max(float((a - b).abs().max()) for a, b in answers),
        "logit_change_by_an_adapter": float((alone[0] - base_logits).abs().max()),
        "memory_per_adapter_mib": bank.num_bytes(clients[0]) / 2**20,
        "base_mib": sum(p.nbytes for p in network.parameters()) / 2**20,
    }


def _next_token_logits(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[list[int]]
) -> list[Tensor]:
    longest = max(map(len, rows))
    # With padding on the right no row sees it.
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
    return list(network.get_submodule("lm_head")(last))


def summary(rows: Sequence[dict[str, Any]], adapters: dict[str, Any]) -> dict[str, float]:
    """The shares that answer the question."""
    found = {
        f"share_equal_predictions_{row['contender']}": row["share_equal_predictions"]
        for row in rows
        if row["contender"] != _SOURCE
    }
    for row in rows:
        found |= {key: row[key] for key in row if key.startswith("llama_cpp_")}
    found["share_equal_answers_mixed_batches"] = adapters["share_equal_answers"]
    found["max_logit_difference_mixed_batches"] = adapters["max_logit_difference"]
    return found


def table(rows: Sequence[dict[str, Any]], adapters: dict[str, Any]) -> str:
    """The Markdown table, and a sentence on the adapters."""
    lines = [
        [
            row["contender"],
            f"{row['share_equal_predictions']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['file_mb']:.1f}",
            f"{row['max_relative_logit_error']:.2g}" if "max_relative_logit_error" in row else "-",
        ]
        for row in rows
    ]
    llama_cpp = [row for row in rows if "llama_cpp_prompts" in row]
    heard = [
        " The token after each of {llama_cpp_prompts} prompts, by llama.cpp from the GGUF file:"
        " share of equal ones {llama_cpp_share_equal_next_tokens:.3f}, relative error of the logits"
        " {llama_cpp_relative_logit_error:.2g}.".format(**row)
        for row in llama_cpp
    ]
    header = ["", "equal predictions", "accuracy", "MB", "relative error of logits"]
    sentence = (
        "{num_adapters} adapters in mixed batches of {batch_size}: share of equal answers"
        " {share_equal_answers:.3f}, largest difference of a logit {max_logit_difference:.1g} (an"
        " adapter changes them by up to {logit_change_by_an_adapter:.2g}); an adapter takes"
        " {memory_per_adapter_mib:.1f} MiB beside the {base_mib:.0f} MiB of the base."
    ).format(**adapters)
    return f"{markdown_table(header, lines)}\n\n{sentence}{''.join(heard)}"


if __name__ == "__main__":
    main()
