"""What is left of a pretrained model at a share of its parameters, by what is done to it?

Each row is one model: the original, and at each share one decomposed by plain singular values, by
whitening, in sequence, refined block by block, without some of its blocks, healed half on the
original's predictions and half on the text, on one of these alone, and rounded to NF4, after some
steps of training with rounded weights or without. One more row at each share is what ``fingpt
compress`` makes in a process of its own, from start to table. The record is written after every
row, and a row in it is not made again; what a row is made of is taken from ``--work_dir`` where
another made it; decomposition, refinement and healing go on where a killed call was. Tokens written
and rows answered per second are of one model after the other on the same machine.

One row at 0.5, with what it is made of:
``--shares 0.73,0.5 --only "0.5: half by blocks, healed"``.
"""

import argparse
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import markdown_table, new_record, started_record, write_record
from fingpt_lightning.compression.depth import write_shorter
from fingpt_lightning.compression.figures import measure
from fingpt_lightning.compression.healing import heal
from fingpt_lightning.data.calibration_text import (
    Calibration,
    CalibrationSource,
    calibration_sources,
    mixed_calibration,
    text_calibration,
)
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.decomposition.options import RECORD
from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import Source, open_source
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.files import write_whole
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.profiling.memory import peak_rss_bytes, reset_peak_rss

QUESTION = (
    "What is left of a pretrained model at a share of its parameters: by plain singular values, by"
    " whitening, in sequence, refined block by block, healed on the original's predictions, in NF4?"
)
TEXTS = {
    "wikitext2_test": "wikitext2/test.txt",
    "reuters_validation": "reuters21578/validation.jsonl",
    "fed_text_validation": "fed_text/validation.jsonl",
}
CALIBRATION = (
    "fed_text/train.jsonl=3", "reuters21578/train.jsonl=2", "wikitext2/validation.txt=2",
    "task:arc_easy=0.5", "task:arc_challenge=0.5", "task:piqa=0.5", "task:boolq=0.5",
    "task:openbookqa=0.5", "task:winogrande=0.5",
)  # fmt: skip
TASKS = ("arc_easy", "arc_challenge", "piqa", "boolq", "openbookqa", "winogrande")
ORIGINAL, REFINED, HEALED = "original", "refined", "healed"
NF4, NF4_TRAINED = "healed, NF4", "healed, healed rounded, NF4"
NF4_CALIBRATED = f"{NF4_TRAINED} calibrated"
"""The weights of `NF4_TRAINED`, rounded with the calibration as those of `NF4` are."""
COMMAND = "fingpt compress"
SPEEDS = ("decoded_tokens_per_s", "answered_rows_per_s")
DROPPED, HALF_DROPPED = "blocks dropped", "half by blocks, refined"
HEAL_QUANTIZED = 60
_OF_COMMAND = (
    "calibration_tokens", "refine", "batch_size", "block_length", "learning_rate", "precision",
    "teacher_dtype",
)  # fmt: skip
"""Options that the command and this benchmark have alike."""
_COLORS = ("#1d4ed8", "#c2410c", "#0f766e")


class Way(NamedTuple):
    """Settings of a decomposition.

    Attributes:
        is_calibrated: Whether outputs count.
        depth: Share of the parameters to save that dropped blocks save; 1 leaves all layers dense.
    """

    is_calibrated: bool = True
    sequential: bool = False
    refine: bool = False
    damping: float | None = None
    allocation: str = "uniform"
    whitening: str = "input"
    depth: float = 0.0


WAYS = {
    "plain SVD": Way(is_calibrated=False),
    "whitened": Way(),
    "whitened, by spectra": Way(allocation="spectrum"),
    "whitened, damping 0.02": Way(damping=0.02),
    "sequential": Way(sequential=True),
    "whitened, by loss": Way(allocation="loss"),
    "whitened on both sides": Way(whitening="both"),
    REFINED: Way(sequential=True, refine=True, allocation="loss"),
    DROPPED: Way(depth=1.0),
    HALF_DROPPED: Way(sequential=True, refine=True, allocation="loss", depth=0.5),
}


class Healing(NamedTuple):
    """Settings of a healing.

    Attributes:
        before: Contender that is healed.
        teacher_weight: Share of the original's predictions in the loss.
    """

    before: str
    teacher_weight: float = 0.5


HEALINGS = {
    HEALED: Healing(REFINED),
    "healed, predictions alone": Healing(REFINED, teacher_weight=1.0),
    "healed, text alone": Healing(REFINED, teacher_weight=0.0),
    "blocks dropped, healed": Healing(DROPPED),
    "half by blocks, healed": Healing(HALF_DROPPED),
}


def main() -> None:
    """Makes the rows that the record does not hold yet."""
    options = _parser().parse_args()
    keep_freed_memory()
    asides = ("json", "work_dir", "data_dir", "max_rows", "only", "command_heal")
    settings = {key: value for key, value in vars(options).items() if key not in asides}
    if options.heal_quantized == HEAL_QUANTIZED:
        del settings["heal_quantized"]  # as in records from before it was an option
    record = started_record(options.json, QUESTION, settings, rows=[])
    made = 0
    for share, contender in contenders(options.shares):
        if any((row["contender"], row["share"]) == (contender, share) for row in record["rows"]):
            continue
        if not _is_requested(share, contender, options.only):
            continue
        if made >= options.max_rows:
            break
        row = measured(share, contender, options)
        record["rows"].append(row | {"commit": new_record("", {})["commit"]})
        order = [*contenders(options.shares)]
        record["rows"].sort(key=lambda row: order.index((row["share"], row["contender"])))
        record["summary"] = summary(record["rows"])
        write_record(options.json, record, table(record["rows"]))
        draw(record["rows"], options.json.with_suffix(".svg"))
        made += 1
    print(table(record["rows"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, required=True, help="record to write; .md and .svg beside")
    add("--model", default="models/smollm2-135m")
    add("--data_dir", type=Path, required=True, help="with the texts and tasks")
    add("--work_dir", type=Path, required=True, help="for models and checkpoints")
    add("--shares", default="0.73,0.5", help="parameters kept, of all, with commas")
    add("--calibration", default=",".join(CALIBRATION), help="with commas, under --data_dir")
    add("--calibration_tokens", type=int, default=32768)
    add("--refine", type=int, default=40, help="steps per block")
    add("--heal", type=int, default=200, help="steps")
    add("--heal_quantized", type=int, default=HEAL_QUANTIZED, help="steps with rounded weights")
    add("--command_heal", type=int, default=250, help="steps of the row of the command")
    add("--batch_size", type=int, default=8)
    add("--block_length", type=int, default=512)
    add("--learning_rate", type=float, default=0.0005)
    add("--precision", default="bf16-mixed", help="of healing")
    add("--teacher_dtype", default="bfloat16", help="of the original in healing")
    add("--tokens", type=int, default=16384, help="of each text whose perplexity is measured")
    add("--tasks", default=",".join(TASKS))
    add("--limit", type=int, default=None, help="rows of each task")
    add("--only", default="", help="contenders of this call, with semicolons; SHARE: before a name")
    add("--max_rows", type=int, default=10**9, help="rows that this call makes at most")
    return parser


def contenders(shares: str) -> Iterator[tuple[float, str]]:
    """Share of the parameters and treatment of each row, in the order of the record."""
    yield 1.0, ORIGINAL
    for text in shares.split(","):
        for name in (*WAYS, *HEALINGS, NF4, NF4_TRAINED, NF4_CALIBRATED, COMMAND):
            yield float(text), name


def _is_requested(share: float, contender: str, only: str) -> bool:
    words = [word.strip() for word in only.split(";") if word.strip()]
    return (
        not words
        or contender == ORIGINAL
        or not {contender, f"{share:g}: {contender}"}.isdisjoint(words)
    )


def measured(share: float, contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: the model is made, unless it exists, and measured."""
    reset_peak_rss()
    source = open_source(options.model)
    parameters = sum(parameter.numel() for parameter in source.network.parameters())
    row: dict[str, Any] = {"contender": contender, "share": share}
    model = Path(options.model)
    if contender != ORIGINAL:
        model = _model(share, contender, source, options)
        row["making_time_s"] = float(_seconds_file(model).read_text(encoding="utf-8"))
        way = contender
        while way not in (*WAYS, COMMAND):
            way = _before(way)
        parameters = _num_parameters(_folder(share, way, options))
    if contender == COMMAND:
        row["heal"] = options.command_heal
    config = source.network.config
    texts = {
        name: text_calibration(
            TextFiles(find_text_files(str(options.data_dir / file))), source.tokenizer, config,
            options.tokens, options.block_length,
        ).ids
        for name, file in TEXTS.items()
    }  # fmt: skip
    tasks = [name for name in options.tasks.split(",") if name]
    figures = measure(model, texts, tasks, data_dir=options.data_dir, limit=options.limit)
    row |= {"parameters": parameters, "file_bytes": figures["file_bytes"]}
    row |= {f"{name}_perplexity": value for name, value in figures["perplexity"].items()}
    row |= {f"{name}_accuracy": value for name, value in figures["tasks"].items()}
    if figures["tasks"]:
        row["mean_accuracy"] = statistics.fmean(figures["tasks"].values())
    row |= {key: figures[key] for key in SPEEDS if key in figures}
    row["peak_memory_gib"] = peak_rss_bytes() / 2**30
    if contender == COMMAND:
        row["peak_memory_gib"] = float(_peak_file(model).read_text(encoding="utf-8"))
        # The original beside it on the same machine, which need not be that of the other rows.
        beside = measure(options.model, {}, tasks, data_dir=options.data_dir, limit=options.limit)
        row |= {f"original_{key}": beside[key] for key in SPEEDS if key in beside}
    return row


def _model(share: float, contender: str, source: Source, options: argparse.Namespace) -> Path:
    """The folder of a contender, made where it does not exist.

    Beside it lie the seconds that it took, with those of what it was made of; after a killed call
    only those since then count.
    """
    folder = _folder(share, contender, options)
    if _seconds_file(folder).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    if contender not in (*WAYS, COMMAND):
        base = _model(share, _before(contender), source, options)
        seconds += float(_seconds_file(base).read_text(encoding="utf-8"))
    started = time.perf_counter()
    if not folder.exists():
        _make(folder, share, contender, source, options)
        gc.collect()  # networks refer to themselves
    write_whole(_seconds_file(folder), str(seconds + time.perf_counter() - started))
    return folder


def _before(contender: str) -> str:
    """What a contender that is no plain decomposition is made of."""
    if contender in HEALINGS:
        return HEALINGS[contender].before
    return NF4_TRAINED if contender == NF4_CALIBRATED else HEALED


def _seconds_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.seconds")


def _peak_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.peak")


def _make(
    folder: Path, share: float, contender: str, source: Source, options: argparse.Namespace
) -> None:
    sources = _sources(options)
    if contender == COMMAND:
        _run_command(folder, share, options)
        return
    if contender in WAYS:
        way = WAYS[contender]
        calibration = _calibration(sources, source, options) if way.is_calibrated else None
        kept = share * source.network.num_parameters()
        if way.depth:
            assert calibration is not None
            shorter = folder if way.depth == 1 else folder.with_name(f"{folder.name}-shorter")
            if not shorter.exists():
                number = _num_blocks(source, way.depth * (1 - share))
                write_shorter(options.model, None, number, calibration, shorter)
            if way.depth == 1:
                return
            source = open_source(shorter)
        request = Request(
            compression=source.network.num_parameters() / kept,
            allocation=way.allocation,
            whitening=way.whitening,
            damping=way.damping,
            sequential=way.sequential,
            refine=options.refine if way.refine else 0,
        )
        decompose_model(source, request, folder, calibration)
        return
    before = _folder(share, _before(contender), options)
    if contender in (NF4, NF4_CALIBRATED):
        calibration = _calibration(sources, source, options)
        model = before if contender == NF4 else before.with_suffix(".run") / "end.ckpt"
        export(load_model(model, tokenizer=before), "nf4", folder, calibration=calibration)
        return
    is_rounded = contender == NF4_TRAINED
    assert source.tokenizer is not None
    checkpoint = heal(
        folder.with_suffix(".run"), before, options.model, sources, source.tokenizer,
        steps=options.heal_quantized if is_rounded else options.heal,
        batch_size=options.batch_size, block_length=options.block_length,
        learning_rate=options.learning_rate, precision=options.precision,
        teacher_weight=HEALINGS[HEALED if is_rounded else contender].teacher_weight,
        teacher_dtype=options.teacher_dtype, data_dir=options.data_dir, seed=1,
        quantize="nf4" if is_rounded else None,
    )  # fmt: skip
    form = "nf4" if is_rounded else "hf" if _before(contender) == DROPPED else "low_rank"
    export(load_model(checkpoint, tokenizer=before), form, folder)


def _run_command(folder: Path, share: float, options: argparse.Namespace) -> None:
    """The whole command, with the texts and tasks that it measures both models on itself."""
    calibration = [
        word if word.startswith("task:") else str(options.data_dir / word)
        for word in options.calibration.split(",")
    ]
    words = ["--model", options.model, "--size", f"{share:g}", "--output", str(folder)]
    words += ["--calibration", *calibration, "--data_dir", str(options.data_dir)]
    words += ["--texts", *(str(options.data_dir / file) for file in TEXTS.values())]
    words += ["--tasks", options.tasks, "--heal", str(options.command_heal)]
    if options.limit is not None:
        words += ["--limit", str(options.limit)]
    words += ["--text_tokens", str(options.tokens)]
    for name in _OF_COMMAND:
        words += [f"--{name}", str(getattr(options, name))]
    command = [sys.executable, "-m", "fingpt_lightning", "compress", *words]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    # Linux gives kibibytes; there was no other child.
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    write_whole(_peak_file(folder), str(peak_gib))


def _num_blocks(source: Source, saved: float) -> int:
    """The number of blocks that hold about a share of all parameters."""
    of_block = sum(layer.in_features * layer.out_features for layer in source.layers)
    of_block //= int(source.network.config.num_hidden_layers)
    return round(saved * source.network.num_parameters() / of_block)


def _num_parameters(folder: Path) -> int:
    if (folder / RECORD).is_file():
        return int(json.loads((folder / RECORD).read_text(encoding="utf-8"))["parameters"])
    return int(open_source(folder).network.num_parameters())


def _folder(share: float, contender: str, options: argparse.Namespace) -> Path:
    name = f"{contender.replace(', ', '_').replace(' ', '_').replace('.', '_')}-{share:g}"
    found: Path = options.work_dir / name.replace(".", "_")
    return found


def _sources(options: argparse.Namespace) -> tuple[CalibrationSource, ...]:
    words = options.calibration.split(",")
    return calibration_sources(
        [word if word.startswith("task:") else str(options.data_dir / word) for word in words]
    )


def _calibration(
    sources: Sequence[CalibrationSource], source: Source, options: argparse.Namespace
) -> Calibration:
    return mixed_calibration(
        sources, options.data_dir, source.tokenizer, source.network.config,
        options.calibration_tokens, options.block_length,
    )  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ratios to the original by share and contender."""
    original = rows[0]
    found = {}
    for row in rows[1:]:
        name = f"{row['share']:g}_{row['contender'].replace(', ', '_').replace(' ', '_')}"
        for key in (
            *(f"{text}_perplexity" for text in TEXTS), "mean_accuracy", *SPEEDS, "file_bytes",
        ):  # fmt: skip
            if (ratio := _ratio(key, row, original)) is not None:
                found[f"{key}_ratio_{name}"] = ratio
        healed = next(
            (x for x in rows if (x["contender"], x["share"]) == (HEALED, row["share"])), None
        )
        forms = {NF4: "nf4", NF4_TRAINED: "nf4_trained", NF4_CALIBRATED: "nf4_calibrated"}
        if (form := forms.get(row["contender"])) is not None and healed is not None:
            ratios = [row[f"{t}_perplexity"] / healed[f"{t}_perplexity"] for t in TEXTS]
            found[f"perplexity_ratio_{form}_over_healed_{row['share']:g}"] = max(ratios)
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _ratio(key: str, row: Mapping[str, Any], original: Mapping[str, Any]) -> float | None:
    beside = row.get(f"original_{key}", original.get(key))
    return float(row[key] / beside) if key in row and beside else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table."""
    original = rows[0]
    lines = []
    for row in rows:
        cells = [
            row["contender"], f"{row['parameters'] / 1e6:.1f}",
            f"{row['parameters'] / original['parameters']:.3f}", f"{row['file_bytes'] / 1e6:.0f}",
        ]  # fmt: skip
        cells += [f"{row[f'{text}_perplexity']:,.2f}" for text in TEXTS]
        cells.append(f"{row['mean_accuracy']:.3f}" if "mean_accuracy" in row else "-")
        ratios = (_ratio(key, row, original) for key in SPEEDS)
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        cells.append(f"{row['making_time_s'] / 60:.1f}" if "making_time_s" in row else "-")
        cells.append(f"{row['peak_memory_gib']:.1f}")
        lines.append(cells)
    return markdown_table(
        ["", "parameters (M)", "of all", "file (MB)", *(f"perplexity, {text}" for text in TEXTS),
         "mean accuracy", "decoding, ratio", "answering, ratio", "minutes", "peak GiB"],
        lines,
    )  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Perplexity by contender, a panel per share; lines are the original's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shares = sorted({row["share"] for row in rows if row["contender"] != ORIGINAL}, reverse=True)
    if not shares:
        return
    figure, axes = plt.subplots(
        1, len(shares), figsize=(1.5 + 5.5 * len(shares), 3.6), squeeze=False, layout="constrained"
    )
    for axis, share in zip(axes[0], shares, strict=True):
        ours = [row for row in rows if row["share"] == share and row["contender"] != ORIGINAL]
        places = range(len(ours), 0, -1)
        for text, color, marker in zip(TEXTS, _COLORS, "os^", strict=True):
            key = f"{text}_perplexity"
            axis.plot([row[key] for row in ours], places, marker, color=color, label=text)
            axis.axvline(rows[0][key], color=color, lw=1, ls="--", alpha=0.6)
        axis.set_yticks(places, [row["contender"] for row in ours])
        axis.set_xscale("log")
        axis.set_xlabel("perplexity; dashed: the original's")
        axis.set_title(f"{share:g} of the parameters", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
