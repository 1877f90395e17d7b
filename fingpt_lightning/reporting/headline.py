"""The figures that a page opens with, and the table of runs beside each other."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fingpt_lightning.metric_keys import (
    COMPRESSION_FIGURES,
    EVAL_FIGURES,
    MEMORY_PEAK_ALLOCATED,
    MEMORY_PEAK_RSS,
    THROUGHPUT_TOKENS_PER_S,
    THROUGHPUT_TRAINING_TIME_S,
    TRAIN_TOKENS,
    VAL_BITS_PER_BYTE,
    VAL_LOSS,
    compression_key,
)
from fingpt_lightning.reporting.answers import StoredResult
from fingpt_lightning.reporting.page import Block, Card, Cell, Note, Section, Table, number
from fingpt_lightning.reporting.runs import Evaluation, Run, Sweep
from fingpt_lightning.units import MIB, format_bytes, format_count, format_duration

_MAX_PARAMETERS_IN_CARD = 3


class Figure(NamedTuple):
    """One row of the comparison: how to find it and how to write it.

    ``better`` is 1 where more is better, -1 where less is, 0 where neither is.
    """

    title: str
    value: Callable[[Run], float | None]
    write: Callable[[float], str]
    better: int = 0


def last_val_loss(run: Run) -> float | None:
    """The last validation's loss, of the summary or, where the run ended early, of the log."""
    return _last(run.values(VAL_LOSS)) or _number(run.summary.get("last_val_loss"))


def bits_per_byte(run: Run) -> float | None:
    """The last validation's bits per byte of text, of the log or of the summary."""
    return _last(run.values(VAL_BITS_PER_BYTE)) or _number(run.summary.get("val_bits_per_byte"))


def peak_bytes(run: Run) -> float | None:
    """The peak memory: allocated on CUDA, of the process elsewhere."""
    for figure, key in (
        ("peak_allocated_mib", MEMORY_PEAK_ALLOCATED),
        ("peak_rss_mib", MEMORY_PEAK_RSS),
    ):
        logged = run.values(key)
        found = _number(run.summary.get(figure)) or (max(logged) if logged else None)
        if found is not None:
            return found * MIB
    return None


def tokens_per_s(run: Run) -> float | None:
    """The mean of the run, or the last logged."""
    return _number(run.summary.get("tokens_per_s")) or _last(run.values(THROUGHPUT_TOKENS_PER_S))


def compression(run: Run, figure: str) -> float | None:
    """One of `COMPRESSION_FIGURES`, from the summary or the log."""
    found = _number(run.summary.get(figure))
    if found is None and figure in COMPRESSION_FIGURES:
        found = _last(run.values(compression_key(figure)))
    return found


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _best_val_loss(run: Run) -> float | None:
    return min(run.values(VAL_LOSS), default=None)


def _compression_ratio(run: Run) -> float | None:
    return compression(run, "total_parameter_ratio")


_FIGURES = (
    Figure("last validation loss", last_val_loss, "{:.4f}".format, -1),
    Figure("best validation loss", _best_val_loss, "{:.4f}".format, -1),
    Figure("bits per byte", bits_per_byte, "{:.3f}".format, -1),
    Figure("parameters", lambda run: compression(run, "parameters"), format_count, -1),
    Figure("dense over stored", _compression_ratio, "{:.2f}x".format, 1),
    Figure("tokens/s", tokens_per_s, "{:,.0f}".format, 1),
    Figure("peak memory", peak_bytes, format_bytes, -1),
    Figure("optimizer steps", lambda run: run.num_steps or None, "{:,.0f}".format),
    Figure("tokens seen", lambda run: _last(run.values(TRAIN_TOKENS)), format_count),
    Figure(
        "time training", lambda run: _last(run.values(THROUGHPUT_TRAINING_TIME_S)), format_duration
    ),
)


_PER_TOKEN = ("last validation loss", "best validation loss")
"""The figures that depend on the tokenizer."""


def has_one_tokenizer(runs: Sequence[Run]) -> bool:
    """Whether losses per token can be compared: no two runs have different tokenizers."""
    return len({run.tokenizer for run in runs if run.tokenizer is not None}) <= 1


def tokenizer_remark(runs: Sequence[Run]) -> str | None:
    """Why losses per token are not ranked; None where they can be."""
    if has_one_tokenizer(runs):
        return None
    without = [run.name for run in runs if bits_per_byte(run) is None]
    instead = "bits per byte are"
    if without:
        instead = f"bits per byte would be, which are not known of {', '.join(without)}"
    return (
        "The runs have different tokenizers, so that a token is not the same length of text: their"
        f" losses per token are not comparable, {instead}."
    )


def glance_section(runs: Sequence[Run]) -> Section | None:
    """Several runs in a table, a column per run; the best of a row is marked."""
    if len(runs) < 2:
        return None
    rows, is_fair = [], has_one_tokenizer(runs)
    for figure in _FIGURES:
        values = [figure.value(run) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        better = figure.better if is_fair or figure.title not in _PER_TOKEN else 0
        best = {1: max, -1: min}[better](known) if better else None
        differs = len(set(known)) > 1
        cells = [
            number("-") if x is None else number(figure.write(x), is_best=differs and x == best)
            for x in values
        ]
        rows.append([Cell(figure.title), *cells])
    if not rows:
        return None
    head = [Cell(""), *(Cell(run.name, is_number=True, run=i) for i, run in enumerate(runs))]
    lead = "The same figures of all runs; the best of each row is bold."
    blocks: list[Block] = [Table(head, rows)]
    if (remark := tokenizer_remark(runs)) is not None:
        blocks.append(Note(remark))
    return Section("glance", "Side by side", lead, blocks)


def cards(
    runs: Sequence[Run], sweeps: Sequence[Sweep], evaluations: Sequence[Evaluation]
) -> list[Card]:
    """The most important figures."""
    found = [card for sweep in sweeps for card in _sweep_cards(sweep)]
    if len(runs) == 1 and not sweeps:
        found += _run_cards(runs[0])
    elif runs and not sweeps:
        found += _best_cards(runs)
    for evaluation in evaluations[:2]:
        found += [
            _task_card(result, None, evaluation.name) for result in evaluation.task_results[:3]
        ]
    return found


def _sweep_cards(sweep: Sweep) -> list[Card]:
    ranked = sweep.ranked()
    states = [trial.state for trial in sweep.trials]
    counts = [f"{states.count(s)} {s}" for s in ("finished", "pruned", "failed", "running")]
    counted = ", ".join(text for text in counts if not text.startswith("0"))
    found = [Card("trials", f"{len(states)}", counted)]
    if ranked:
        best = ranked[0]
        assert best.value is not None
        way = "highest" if sweep.goal == "maximize" else "lowest"
        found.insert(0, Card(f"{way} {sweep.metric}", f"{best.value:.4f}", f"trial {best.number}"))
        for name, value in list(best.parameters.items())[:_MAX_PARAMETERS_IN_CARD]:
            found.append(Card(name.rpartition(".")[2], f"{value}", "in the best trial"))
    return found


def _run_cards(run: Run) -> list[Card]:
    found = []
    losses = run.values(VAL_LOSS)
    if (loss := last_val_loss(run)) is not None:
        note = f"from {losses[0]:.3f} at the first validation" if len(losses) > 1 else ""
        if (bits := bits_per_byte(run)) is not None:
            note = ", ".join(filter(None, (f"{bits:.3f} bits per byte", note)))
        found.append(Card("validation loss", f"{loss:.3f}", note))
    for task in dict.fromkeys(result.task for result in run.task_results):
        task_results = [result for result in run.task_results if result.task == task]
        found.append(
            _task_card(task_results[-1], task_results[0] if len(task_results) > 1 else None, "")
        )
    if (adapter := run.summary.get("adapter")) is not None:
        trained, share = compression(run, "trained_parameters"), run.summary.get("trained_share")
        note = f"{adapter} on {run.summary.get('base')}"
        if trained is not None and isinstance(share, float):
            found.append(Card("trained parameters", format_count(trained), f"{share:.2%}, {note}"))
    elif (ratio := compression(run, "total_parameter_ratio")) is not None:
        ours, dense = compression(run, "parameters"), compression(run, "dense_parameters")
        note = f"{format_count(ours)} of {format_count(dense)} parameters" if ours and dense else ""
        found.append(Card("smaller than dense", f"{ratio:.2f}x", note))
    if (rate := tokens_per_s(run)) is not None:
        ratio = _number(run.summary.get("speed_ratio"))
        note = f"{ratio:.2f}x the dense baseline, timed in turn" if ratio else "training, mean"
        found.append(Card("tokens per second", f"{rate:,.0f}", note))
    if (peak := peak_bytes(run)) is not None:
        found.append(Card("peak memory", format_bytes(peak), "highest of the run"))
    tokens, time_s = _last(run.values(TRAIN_TOKENS)), _last(run.values(THROUGHPUT_TRAINING_TIME_S))
    if run.num_steps:
        parts = [f"{format_count(tokens)} tokens"] if tokens else []
        parts += [format_duration(time_s)] if time_s else []
        found.append(Card("optimizer steps", f"{run.num_steps:,}", ", ".join(parts)))
    return found


def _best_cards(runs: Sequence[Run]) -> list[Card]:
    found = []
    named = {
        "last validation loss": "lowest validation loss",
        "bits per byte": "fewest bits per byte",
        "dense over stored": "smallest beside dense",
        "tokens/s": "most tokens per second",
        "peak memory": "least peak memory",
    }
    for figure in _FIGURES:
        known = [(figure.value(run), place) for place, run in enumerate(runs)]
        values = [(value, place) for value, place in known if value is not None]
        if figure.title in _PER_TOKEN and not has_one_tokenizer(runs):
            continue
        if figure.title not in named or len({value for value, _ in values}) < 2:
            continue
        value, place = max(values, key=lambda found: figure.better * found[0])
        note = runs[place].name
        found.append(Card(named[figure.title], figure.write(value), note, run=place))
    return found


def _task_card(result: StoredResult, before: StoredResult | None, name: str) -> Card:
    key = next((key for key in EVAL_FIGURES if key in result.figures), None)
    if key is None:
        return Card(result.task, "-", name)
    note = name
    if before is not None and key in before.figures:
        note = f"{before.figures[key]:.3f} {before.moment}"
    return Card(f"{EVAL_FIGURES[key]}, {result.task}", f"{result.figures[key]:.3f}", note)
