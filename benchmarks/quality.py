"""Which way of training a low-rank GPT-2 keeps the quality of its dense baseline?

Tunes the learning rate of every variant of a grid, the dense baseline's too, on a short budget,
beyond the given rates while the best is at their end; then trains the dense baseline, the
naive way and the best of the others on the same tokens, several seeds each, and the best of the
others once more for as long as the dense baseline took. What is only there for comparison,
variants that are not small enough and the naive way in equal time, has the first seed only. The
record is written after every run, and a run in it is not repeated; processes that take turns share
it.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality_plot import draw
from benchmarks.quality_runs import TUNING, Grid, Run, Variant, Workshop, read_grid
from benchmarks.record import (
    markdown_table,
    new_record,
    record_lock,
    spread,
    write_record,
)
from fingpt_lightning.profiling import keep_freed_memory

QUESTION = (
    "Which recipe keeps the quality of a dense GPT-2 in a network 2.64 times smaller, on the same"
    " tokens and in the same time?"
)
WANTED_RATIO = 2.64
SAME_SIZE_TIME = "time of the same size"
"""The stage in which a variant trains for as long as the dense network of its size took."""
STAGES = ("equal tokens", "equal time", SAME_SIZE_TIME)
"""The stages of runs that count."""
_PATIENCE_S = 2.0
_MAX_MORE_RATES = 2
GRID = Path(__file__).with_name("quality_grid.yaml")


def main() -> None:
    """Runs what the record lacks."""
    options = _options()
    deadline_s = time.monotonic() + 60 * options.max_minutes
    grid = read_grid(options.grid)
    keep_freed_memory()
    # One line per run is enough.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    text = options.data_dir / "fed_text"
    workshop = Workshop(
        grid,
        text / "train.jsonl",
        text / "validation.jsonl",
        options.cache_dir.expanduser(),
        options.tokenizer,
    )
    comparison = Comparison(
        grid, workshop, options.json, options.repeats, options.tokenizer, options.turn
    )
    if options.rates_from is not None:
        comparison.take_rates(options.rates_from)
    for step in comparison.steps(options.only):
        if time.monotonic() > deadline_s:
            print(f"max_minutes {options.max_minutes:g} are over: the same command goes on")
            break
        step()
    print(json.dumps(comparison.record["summary"], indent=1))


class Comparison:
    """The runs of a grid, those that are done and those that are to come.

    Args:
        grid: Grid that is compared.
        workshop: Workshop that trains.
        path: Path of the record.
        repeats: Number of turns of timed steps.
        tokenizer: Tokenizer in place of one that is trained on the text.
        turn: Number of this process among those that share the record, and how many these are.

    Raises:
        ValueError: ``path`` holds the record of another grid.
    """

    def __init__(
        self,
        grid: Grid,
        workshop: Workshop,
        path: Path,
        repeats: int,
        tokenizer: Path | None = None,
        turn: tuple[int, int] = (1, 1),
    ) -> None:
        self.grid, self.workshop, self.path, self.repeats = grid, workshop, path, repeats
        self._turn = turn
        self._numbers: dict[tuple[Any, ...], int] = {}
        config = _config(grid, tokenizer)
        self.record = new_record(QUESTION, config) | {
            "rows": [], "summary": {}, "rates": {}, "rest_rates": {}, "step_times_s": {},
            "sizes": {}, "runs": [],
        }  # fmt: skip
        self.runs: dict[tuple[Any, ...], Run] = {}
        if path.is_file():
            if not _continues(json.loads(path.read_text())["config"], config):
                raise ValueError(f"json {path} is of another grid: name another file")
            self._take_in()

    def _take_in(self) -> None:
        """The runs that the record on disk has, of this process and others."""
        if not self.path.is_file():
            return
        written = json.loads(self.path.read_text())
        for row in written["runs"]:
            run = Run(**row)
            self.runs[run.key()] = run
        ours, self.record = self.record, written
        self.record["config"] = ours["config"]
        for part in ("rates", "rest_rates", "step_times_s", "sizes"):
            self.record[part] = self.record.get(part, {}) | ours[part]

    def take_rates(self, path: Path) -> None:
        """Takes the learning rates that another record found best: nothing is tuned."""
        record = json.loads(path.read_text())
        for part in ("rates", "rest_rates"):
            self.record[part] |= record.get(part, {})

    def steps(self, only: Sequence[str] = ()) -> Iterable[Callable[[], None]]:
        """The remaining work, one item after the other; each depends on what came before.

        Args:
            only: Names of variants. The first two are always among them, except in a grid with
                `Grid.same_size`: what needs the others then waits for them.

        Raises:
            ValueError: There is no such variant.
        """
        known = [variant.name for variant in self.grid.variants]
        if unknown := set(only) - set(known):
            raise ValueError(f"only {sorted(unknown)} are none of {', '.join(known)}")
        always = known[:2] if self.grid.same_size is None else []
        chosen = [v for v in self.grid.variants if not only or v.name in {*always, *only}]
        for variant in (self.grid.variants[0], *chosen):
            if variant.name not in self.record["sizes"]:
                self.record["sizes"][variant.name] = self.workshop.sizes(variant)
        if self.grid.same_size is not None:
            # Variants may have widths of their own: all are compared with the first.
            dense = self.record["sizes"][known[0]]["parameters"]
            for sizes in self.record["sizes"].values():
                sizes["total_compression_ratio"] = dense / sizes["parameters"]
        yield from self._tuning(chosen, "rates")
        yield from self._tuning(chosen, "rest_rates")
        final = self._finalists(chosen)
        yield from self._timing(final)
        for seed in self.grid.seeds:
            for variant, run in self._counting_runs(final, seed):
                yield from self._training(variant, run)

    def _counting_runs(self, final: Sequence[Variant], seed: int) -> Iterable[tuple[Variant, Run]]:
        """The runs of one seed; variants for comparison only have the first seed."""
        references = [variant for variant in final if variant in self.grid.variants[:2]]
        best = [v for v in final if v not in references and self._is_small_enough(v)]
        is_first = seed == self.grid.seeds[0]
        for variant in final if is_first else [*references, *best]:
            yield variant, self._counting_run(variant, "equal tokens", seed, self.grid.num_steps)
        dense = self.grid.variants[0]
        smaller = best
        if is_first and self.grid.same_size is None:
            smaller = [v for v in final if v != dense and self._is_smaller(v)]
        for other, stage, variants in (
            (dense.name, "equal time", smaller),
            (self.grid.same_size, SAME_SIZE_TIME, best),
        ):
            if other is not None and other in self.record["step_times_s"]:
                for variant in variants:
                    num_steps = self._steps_in_time(variant, other, stage)
                    yield variant, self._counting_run(variant, stage, seed, num_steps)

    def _counting_run(self, variant: Variant, stage: str, seed: int, num_steps: int) -> Run:
        rate, rest_rate = self._rates(variant.name)
        return Run(variant.name, stage, rate, seed, num_steps, rest_rate)

    def _rates(self, name: str) -> tuple[float, float | None]:
        return self.record["rates"][name], self.record["rest_rates"].get(name)

    def _tuning(self, chosen: Sequence[Variant], part: str) -> Iterable[Callable[[], None]]:
        """Tries the rates of each, and beyond them while the best is the first or the last.

        Args:
            chosen: Variants to tune.
            part: Part of the record that takes the best: ``rates``, or ``rest_rates`` at those.
        """
        untuned = {variant.name for variant in chosen} - self.record[part].keys()
        rates = {v.name: self._given(v, part) for v in chosen if len(self._given(v, part)) > 1}
        goes_on = True
        while goes_on:
            tries = [self._try(v, rate, part) for v in chosen for rate in rates.get(v.name, [])]
            for run in tries:
                variant = next(v for v in chosen if v.name == run.variant)
                yield from self._training(variant, run, is_wanted=run.variant in untuned)
            wanted = {run.key() for run in tries if run.variant in untuned}
            yield from self._awaited(partial(self._are_done, wanted))
            goes_on = False
            for variant in chosen:
                tried = rates.get(variant.name, [])
                if (rate := self._rate_beyond(variant, tried, part)) is not None:
                    rates[variant.name].append(rate)
                    goes_on = True
        for variant in chosen:
            if variant.name in untuned and self._given(variant, part):
                self.record[part][variant.name] = self._best_rate(variant, part)

    def _given(self, variant: Variant, part: str) -> list[float]:
        return list(variant.rates) if part == "rates" else variant.all_rest_rates

    def _are_done(self, keys: set[tuple[Any, ...]]) -> bool:
        return self.runs.keys() >= keys

    def _try(self, variant: Variant, rate: float, part: str) -> Run:
        rest_rate = variant.all_rest_rates[0] if variant.rest_rates else None
        if part == "rest_rates":
            rate, rest_rate = self.record["rates"][variant.name], rate
        grid = self.grid
        return Run(variant.name, TUNING, rate, grid.seeds[0], grid.num_tuning_steps, rest_rate)

    def _rate_beyond(self, variant: Variant, tried: Sequence[float], part: str) -> float | None:
        """What else to try; None where the best lies between others, or enough was tried."""
        are_done = all(self._try(variant, rate, part).key() in self.runs for rate in tried)
        most = len(self._given(variant, part)) + _MAX_MORE_RATES
        if not tried or not are_done or len(tried) == most:
            return None
        best = self._best_rate(variant, part)
        return {min(tried): best / 2, max(tried): best * 2}.get(best)

    def _timing(self, final: Sequence[Variant]) -> Iterable[Callable[[], None]]:
        def are_timed() -> bool:
            return all(variant.name in self.record["step_times_s"] for variant in final)

        if self._turn[0] == 1 and not are_timed():
            # All of them, so that their ratios are from one time of day.
            yield lambda: self._time(final)
        yield from self._awaited(are_timed)

    def _training(
        self, variant: Variant, run: Run, is_wanted: bool = True
    ) -> Iterable[Callable[[], None]]:
        def train() -> None:
            done = self.workshop.train(variant, run)
            self.runs[done.key()] = done
            print(json.dumps({"run": done.key(), "val_loss_nats": done.val_loss_nats}), flush=True)
            self.write()

        # All processes number the same runs in the same order, finished ones included.
        planned = self._numbers.setdefault(run.key(), len(self._numbers) + 1)
        number, processes = self._turn
        is_ours = planned % processes == number % processes
        if is_wanted and is_ours and run.key() not in self.runs:
            yield train

    def _awaited(self, is_there: Callable[[], bool]) -> Iterable[Callable[[], None]]:
        """Looks at the record again and again until other processes have done their part."""

        def look_again() -> None:
            time.sleep(_PATIENCE_S)
            with record_lock(self.path):
                self._take_in()

        while not is_there():
            yield look_again

    def _is_smaller(self, variant: Variant) -> bool:
        return bool(self.record["sizes"][variant.name]["total_compression_ratio"] > 1)

    def _is_small_enough(self, variant: Variant) -> bool:
        ratio = self.record["sizes"][variant.name]["total_compression_ratio"]
        return bool(ratio >= WANTED_RATIO)

    def _best_rate(self, variant: Variant, part: str = "rates") -> float:
        tried = [r for r in self.runs.values() if r.variant == variant.name and r.stage == TUNING]
        if part == "rest_rates":
            tried = [run for run in tried if run.rate == self.record["rates"][variant.name]]
        elif variant.rest_rates:
            tried = [run for run in tried if run.rest_rate == variant.all_rest_rates[0]]
        finished = [run for run in tried if run.val_loss_nats is not None]
        best = min(finished, key=lambda run: run.val_loss_nats or 0.0, default=None)
        if best is None:
            return self._given(variant, part)[0]
        return best.rate if part == "rates" or best.rest_rate is None else best.rest_rate

    def _tuned_loss(self, variant: Variant) -> float:
        losses = [
            run.val_loss_nats
            for run in self.runs.values()
            if (run.variant, run.stage) == (variant.name, TUNING) and run.val_loss_nats is not None
        ]
        return min(losses, default=float("inf"))

    def _finalists(self, chosen: Sequence[Variant]) -> list[Variant]:
        first = [variant for variant in chosen if variant in self.grid.variants[:2]]
        others = [variant for variant in chosen if variant not in first]
        small = sorted(filter(self._is_small_enough, others), key=self._tuned_loss)
        # The frontier: larger variants are there to show what their size gains.
        larger = [v for v in others if v not in small]
        return first + small[: self.grid.num_finalists] + larger

    def _time(self, variants: Sequence[Variant]) -> None:
        rates = self.record["rates"]
        for name, taken_s in self.workshop.step_times_s(variants, rates, self.repeats).items():
            self.record["step_times_s"][name] = spread(taken_s)
        self.write()

    def _steps_in_time(self, variant: Variant, other: str, stage: str) -> int:
        """The steps of a variant in the time of the runs that count of ``other``.

        Runs that were made stand for themselves when steps are timed again beside new variants.
        """
        for run in self.runs.values():
            if (run.variant, run.stage) == (variant.name, stage):
                return run.num_steps
        times = self.record["step_times_s"]
        ratio: float = times[other]["median"] / times[variant.name]["median"]
        return max(1, round(self.grid.num_steps * ratio))

    def write(self) -> None:
        """Writes record, table and picture of what there is, other processes' part included."""
        with record_lock(self.path):
            self._take_in()
            self._write()

    def _write(self) -> None:
        self.record["runs"] = [run.as_row() for run in self.runs.values()]
        self.record["rows"] = rows = self._rows()
        self.record["summary"] = summary(rows)
        if self.grid.same_size is not None:
            self.record["summary"] = same_size_summary(rows, self.grid.same_size)
        write_record(self.path, self.record, table(rows))
        draw(
            list(self.runs.values()),
            rows,
            self.record["step_times_s"],
            self.grid.tokens_per_step,
            self.path.with_suffix(".svg"),
        )

    def _rows(self) -> list[dict[str, Any]]:
        found = []
        for variant in self.grid.variants:
            name = variant.name
            if name not in self.record["sizes"]:
                continue
            row: dict[str, Any] = {"contender": name, **self.record["sizes"][name]}
            row["tuned"], row["rate"] = variant.tuned, self.record["rates"].get(name)
            if (rest_rate := self.record["rest_rates"].get(name)) is not None:
                row["rest_rate"] = rest_rate
            tuning = self._tuning_loss(name)
            row |= {} if tuning is None else {"tuning_loss_nats": tuning}
            if name in self.record["step_times_s"]:
                row["step_time_s"] = self.record["step_times_s"][name]
            for stage in STAGES:
                if losses := self._losses(name, stage):
                    row[f"{stage.replace(' ', '_')}_loss_nats"] = losses
            found.append(row)
        dense = found[0] if found else {}
        for row in found:
            row["repeats"] = len(row.get("equal_tokens_loss_nats", {}))
            if {"step_time_s"} <= row.keys() & dense.keys():
                times = row["step_time_s"]["median"], dense["step_time_s"]["median"]
                row["ratio_to_dense"] = {"step_time_s": times[0] / times[1]}
        return found

    def _tuning_loss(self, name: str) -> float | None:
        """The loss at the best rates that were tried; None where none were."""
        losses = [
            run.val_loss_nats
            for run in self.runs.values()
            if (run.variant, run.stage, run.rate) == (name, TUNING, self.record["rates"].get(name))
            and run.rest_rate in (None, self.record["rest_rates"].get(name, run.rest_rate))
        ]
        return min((loss for loss in losses if loss is not None), default=None)

    def _losses(self, name: str, stage: str) -> dict[str, float]:
        """The runs by seed."""
        return {
            str(run.seed): run.val_loss_nats
            for run in self.runs.values()
            if (run.variant, run.stage) == (name, stage) and run.val_loss_nats is not None
        }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best variant that is small enough beside the dense baseline, and the naive way too.

    Of the dense baseline's size there may be another, such as one with Spectron: the best of
    these is reported too, as not all of the gain comes from the low-rank layers.

    A gap is the mean, over the seeds that both have, of a variant's loss minus the dense baseline's
    after `equal tokens`: at equal tokens, or after as much time as that took.

    Args:
        rows: Rows of the record; the first is the dense baseline, the second the naive way.
    """
    if len(rows) < 2 or "equal_tokens_loss_nats" not in rows[0]:
        return {}
    dense, naive, *others = rows
    small = [
        row
        for row in others
        if row["total_compression_ratio"] >= WANTED_RATIO and "equal_tokens_loss_nats" in row
    ]
    found: dict[str, Any] = {}
    if small:
        best = min(small, key=lambda row: _gap(row, dense, "equal_tokens") or 0.0)
        found = {
            "best": best["contender"],
            "total_compression_ratio": best["total_compression_ratio"],
            **_gaps(best, dense, ""),
        }
    same_size = [
        row
        for row in others
        if row["total_compression_ratio"] <= 1 and "equal_tokens_loss_nats" in row
    ]
    if same_size:
        best = min(same_size, key=lambda row: _gap(row, dense, "equal_tokens") or 0.0)
        found |= {"best_of_same_size": best["contender"], **_gaps(best, dense, "same_size_")}
    return found | _gaps(naive, dense, "naive_")


def same_size_summary(rows: Sequence[dict[str, Any]], same_size: str) -> dict[str, Any]:
    """The best variant that is small enough beside dense networks of the same optimizer.

    Args:
        rows: Rows of the record; the first is the dense network of the same width.
        same_size: Name of the dense network of as many parameters.
    """
    wide, rows = rows[0], rows[1:]
    narrow = next((row for row in rows if row["contender"] == same_size), {})
    if "equal_tokens_loss_nats" not in narrow:
        return {}
    small = [
        row
        for row in rows
        if row["total_compression_ratio"] >= WANTED_RATIO
        and row is not narrow
        and "equal_tokens_loss_nats" in row
    ]
    if not small:
        return {}
    best = min(small, key=lambda row: _gap(row, narrow, "equal_tokens") or 0.0)
    gaps = {
        "gap_to_same_size_dense_equal_tokens_nats": _gap(best, narrow, "equal_tokens"),
        "gap_to_same_size_dense_equal_time_nats": _gap(best, narrow, "time_of_the_same_size"),
    }
    if "equal_tokens_loss_nats" in wide:
        gaps["gap_to_dense_same_optimizer_equal_tokens_nats"] = _gap(best, wide, "equal_tokens")
        gaps["gap_to_dense_same_optimizer_equal_time_nats"] = _gap(best, wide, "equal_time")
    return {
        "best": best["contender"],
        "total_compression_ratio": best["total_compression_ratio"],
        "parameters_to_same_size_dense": best["parameters"] / narrow["parameters"],
        **{key: round(gap, 5) for key, gap in gaps.items() if gap is not None},
    }


def _gaps(row: dict[str, Any], dense: dict[str, Any], prefix: str) -> dict[str, float]:
    gaps = {
        f"{prefix}loss_gap_nats_{stage}": _gap(row, dense, stage)
        for stage in ("equal_tokens", "equal_time")
    }
    return {key: round(gap, 5) for key, gap in gaps.items() if gap is not None}


def _gap(row: dict[str, Any], dense: dict[str, Any], stage: str) -> float | None:
    ours, theirs = row.get(f"{stage}_loss_nats", {}), dense["equal_tokens_loss_nats"]
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return statistics.mean(differences) if differences else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table of all variants, without columns that no run has filled yet."""
    dense = rows[0] if rows and "equal_tokens_loss_nats" in rows[0] else None
    lines = []
    for row in rows:
        line = {
            "": row["contender"],
            "learning rate": _cell("{:g}", row["rate"]),
            "of the rest": _cell("{:g}", row.get("rest_rate")),
            "parameters (M)": _cell("{:.2f}", row["parameters"] / 1e6),
            "smaller in total": _cell("{:.2f}x", row["total_compression_ratio"]),
            "training MFLOP per token": _cell("{:.1f}", row.get("training_mflop_per_token")),
            "float32 MiB": _cell("{:.1f}", row.get("float32_mib")),
            "loss of tuning": _cell("{:.3f}", row.get("tuning_loss_nats")),
        }
        for stage in STAGES:
            key = stage.replace(" ", "_")
            is_beside_dense = dense is not None and row is not dense and stage != SAME_SIZE_TIME
            line[f"loss, {stage}"] = _mean_and_range(list(row.get(f"{key}_loss_nats", {}).values()))
            gap = _gap(row, dense, key) if dense is not None and is_beside_dense else None
            line[f"gap, {stage}"] = _cell("{:+.3f}", gap)
            if stage == "equal tokens":
                times = row.get("step_time_s")
                line["s per step (p10-p90)"] = (
                    f"{times['median']:.2f} ({times['p10']:.2f}-{times['p90']:.2f})"
                    if times
                    else ""
                )
        lines.append(line)
    columns = [name for name in (lines[0] if lines else ()) if any(line[name] for line in lines)]
    columns = ["", *(name for name in columns if name)]
    return markdown_table(columns, [[line[name] for name in columns] for line in lines])


def _cell(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _mean_and_range(losses: Sequence[float]) -> str:
    if len(losses) < 2:
        return f"{losses[0]:.3f}" if losses else ""
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})"


def _config(grid: Grid, tokenizer: Path | None) -> dict[str, Any]:
    """The grid as the record keeps it, without what it does not set."""
    config: dict[str, Any] = json.loads(json.dumps(asdict(grid)))
    config["variants"] = [
        {key: value for key, value in variant.items() if key != "rest_rates" or value}
        for variant in config["variants"]
    ]
    # So that records made before these fields existed can be continued.
    if grid.same_size is None:
        del config["same_size"]
    if grid.num_curve_batches == Grid.num_curve_batches:
        del config["num_curve_batches"]
    return config | {"tokenizer": None if tokenizer is None else tokenizer.name}


def _continues(written: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a record's grid is this one, but for variants that one of them lacks."""
    before, now = (
        {variant["name"]: variant for variant in each["variants"]} for each in (written, config)
    )
    free = {"variants": None, "num_finalists": None}
    return written | free == config | free and all(
        before[name] == now[name] for name in before.keys() & now.keys()
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=Path, default=GRID, help="YAML; the shipped one by default")
    parser.add_argument(
        "--json", type=Path, required=True, help="record to write or go on with; .md, .svg beside"
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="with fed_text/{train,validation}.jsonl"
    )
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/fingpt_lightning"))
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="of these variants")
    parser.add_argument("--max_minutes", type=float, default=float("inf"))
    parser.add_argument(
        "--turn", type=_turn, default=(1, 1), metavar="I/N", help="the Ith of N that share a record"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of timed steps")
    parser.add_argument("--tokenizer", type=Path, help="folder, in place of a BPE of the text")
    parser.add_argument(
        "--rates_from", type=Path, metavar="RECORD", help="whose best learning rates to take"
    )
    return parser.parse_args()


def _turn(text: str) -> tuple[int, int]:
    number, _, processes = text.partition("/")
    if not 1 <= int(number) <= int(processes):
        raise ValueError(text)
    return int(number), int(processes)


if __name__ == "__main__":
    main()
