import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import quality
from benchmarks.quality_plot import _runs_over_time
from benchmarks.quality_runs import Run, Variant, Workshop, read_grid
from fingpt_lightning.modules import LowRankPretraining
from tests.support.fed_text import write_fed_text

SMALL = {"rank": 2, "embedding_rank": 2}
GRID: dict[str, Any] = {
    "model": {
        "preset": "gpt2-nano", "num_layers": 2, "width": 16, "num_heads": 2, "num_positions": 16,
    },
    "data": {"vocab_size": 300, "block_length": 16, "batch_size": 2},
    "trainer": {"gradient_clip_val": 1.0},
    "num_tuning_steps": 2,
    "num_steps": 2,
    "seeds": [3],
    "num_finalists": 1,
    "variants": [
        {"name": "dense", "model": {"rank": None}, "rates": [0.001]},
        {"name": "naive", "model": SMALL, "rates": [1e30, 0.01, 1e-9]},
        {"name": "spectron", "model": {**SMALL, "optimizer": "spectron"}, "rates": [0.07],
         "tuned": "spectron_learning_rate"},
    ],
}  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    write_fed_text(tmp_path / "data")
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    return [
        "quality", "--grid", str(tmp_path / "grid.yaml"), "--json", str(tmp_path / "record.json"),
        "--data_dir", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache"),
        "--repeats", "1",
    ]  # fmt: skip


def test_a_toy_grid_is_run_stopped_and_gone_on_with(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[Any, ...]] = []
    train = Workshop.train

    def counted(workshop: Workshop, variant: Variant, run: Run) -> Run:
        trained.append(run.key())
        return train(workshop, variant, run)

    monkeypatch.setattr(Workshop, "train", counted)
    monkeypatch.setattr(sys, "argv", [*words, "--max_minutes", "0"])
    quality.main()
    assert trained == []
    monkeypatch.setattr(sys, "argv", [*words, "--only", "spectron"])
    quality.main()
    quality.main()
    stages = [(key[0], key[1], key[3]) for key in trained]
    assert stages[:3] == [("naive", "tuning", 3)] * 3
    assert sorted(stages[3:]) == sorted(
        (name, stage, 3)
        for name, stage in (
            ("dense", "equal tokens"), ("naive", "equal tokens"), ("naive", "equal time"),
            ("spectron", "equal tokens"), ("spectron", "equal time"),
        )
    )  # fmt: skip
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["rates"] == {"dense": 0.001, "naive": 0.01, "spectron": 0.07}
    diverged, fine, _ = [run["val_loss_nats"] for run in record["runs"] if run["stage"] == "tuning"]
    assert diverged is None
    assert fine > 0
    assert record["summary"]["best"] == "spectron"
    assert record["summary"]["total_compression_ratio"] >= 2.64
    assert {
        "loss_gap_nats_equal_tokens", "loss_gap_nats_equal_time",
        "naive_loss_gap_nats_equal_tokens", "naive_loss_gap_nats_equal_time",
    } <= set(record["summary"])  # fmt: skip
    assert (tmp_path / "record.svg").read_text().startswith("<?xml")
    assert "| spectron |" in (tmp_path / "record.md").read_text()
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID | {"num_steps": 3}))
    with pytest.raises(ValueError, match=r"record\.json is of another grid"):
        quality.main()


def _stop(seconds: float) -> None:
    raise InterruptedError(f"would wait {seconds} s")


def test_processes_take_turns_and_end_with_the_record_of_one(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    train, turn = Workshop.train, 0

    def counted(workshop: Workshop, variant: Variant, run: Run) -> Run:
        trained.append(turn)
        return train(workshop, variant, run)

    monkeypatch.setattr(Workshop, "train", counted)
    # Each in its turn as far as it comes without the other.
    monkeypatch.setattr("time.sleep", _stop)
    for turn, has_to_wait in ((1, True), (2, True), (1, False), (2, False)):
        monkeypatch.setattr(sys, "argv", [*words, "--turn", f"{turn}/2"])
        with pytest.raises(InterruptedError) if has_to_wait else nullcontext():
            quality.main()
    assert trained == [1, 1, 2, 1, 1, 2, 2, 2]
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["runs"]) == 3 + 5
    assert record["summary"]["best"] == "spectron"


@pytest.mark.parametrize(
    ("optimum", "tried"),
    [
        (0.01, [0.01, 0.02, 0.005]),
        (0.003, [0.01, 0.02, 0.005, 0.0025]),
        (1.0, [0.01, 0.02, 0.04, 0.08]),
    ],
)
def test_rates_are_tried_beyond_the_end_that_is_best(
    tmp_path: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    optimum: float,
    tried: list[float],
) -> None:
    def train(workshop: Workshop, variant: Variant, run: Run) -> Run:
        run.val_loss_nats = abs(math.log(run.rate / optimum))
        return run

    monkeypatch.setattr(Workshop, "train", train)
    dense, naive, pairs = GRID["variants"]
    variants = [dense, naive | {"rates": [0.01, 0.02]}, pairs]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID | {"variants": variants}))
    monkeypatch.setattr(sys, "argv", words)
    quality.main()
    record = json.loads((tmp_path / "record.json").read_text())
    assert [run["rate"] for run in record["runs"] if run["stage"] == "tuning"] == tried
    assert record["rates"]["naive"] == min(tried, key=lambda rate: abs(math.log(rate / optimum)))


def test_seeds_beyond_the_first_are_for_what_is_judged(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = {"name": "larger", "model": {"rank": 2, "embedding_rank": None}, "rates": [0.001]}
    grid = GRID | {"seeds": [3, 4], "variants": [*GRID["variants"], larger]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    monkeypatch.setattr(sys, "argv", words)
    quality.main()
    runs = json.loads((tmp_path / "record.json").read_text())["runs"]
    of_seed_4 = [(run["variant"], run["stage"]) for run in runs if run["seed"] == 4]
    assert of_seed_4 == [
        *((name, "equal tokens") for name in ("dense", "naive", "spectron")),
        ("spectron", "equal time"),
    ]
    of_seed_3 = {(run["variant"], run["stage"]) for run in runs if run["seed"] == 3}
    assert {("naive", "equal time"), ("larger", "equal tokens")} <= of_seed_3


def _row(name: str, ratio: float, tokens: dict[str, float], time: dict[str, float]) -> Any:
    return {
        "contender": name, "total_compression_ratio": ratio, "rate": 0.1, "parameters": 1e6,
        "equal_tokens_loss_nats": tokens, "equal_time_loss_nats": time,
    }  # fmt: skip


def test_runs_are_drawn_over_time_where_none_of_equal_time_was_made() -> None:
    tokens, timed = (
        Run(name, stage, 0.1, 1, 9, curve_steps=[9], curve_loss_nats=[2.0])
        for name, stage in (("dense", "equal tokens"), ("small", "equal time"))
    )
    other = replace(timed, stage="equal tokens")
    rows = [{"contender": "dense"}, {"contender": "small"}]
    found = [
        _runs_over_time(runs, rows, {"dense", "small"} - untimed)
        for runs, untimed in (
            ([tokens, other, timed], set()),
            ([tokens, other], set()),
            ([tokens, other], {"small"}),
        )
    ]
    assert found == [[tokens, timed], [tokens, other], [tokens]]


def test_gaps_are_means_over_the_seeds_that_both_have() -> None:
    rows = [
        _row("dense", 1.0, {"1": 4.0, "2": 5.0}, {}),
        _row("naive", 2.7, {"1": 4.5}, {"1": 4.4}),
        _row("ours", 2.7, {"1": 4.1, "2": 5.05}, {"1": 3.9, "2": 4.8}),
        _row("larger", 2.0, {"1": 3.9}, {"1": 3.8}),
        _row("dense, other optimiser", 1.0, {"1": 3.7}, {}),
    ]
    found = quality.summary(rows)
    assert found["best"] == "ours"
    assert found["loss_gap_nats_equal_tokens"] == pytest.approx(0.075)
    assert found["loss_gap_nats_equal_time"] == pytest.approx(-0.15)
    assert found["naive_loss_gap_nats_equal_tokens"] == pytest.approx(0.5)
    assert found["best_of_same_size"] == "dense, other optimiser"
    assert found["same_size_loss_gap_nats_equal_tokens"] == pytest.approx(-0.3)
    assert "| naive | 0.1 | 1.00 | 2.70x | 4.500 | +0.500 |" in quality.table(rows)


def test_gaps_to_dense_networks_of_the_same_optimizer() -> None:
    rows = [
        _row("dense", 1.0, {"1": 4.0, "2": 5.0}, {}),
        _row("dense, same size", 2.6, {"1": 4.2, "2": 5.3}, {"1": 4.1}),
        _row("ours", 2.7, {"1": 4.1, "2": 5.05}, {"1": 3.9, "2": 4.8}),
        _row("other", 2.7, {"1": 4.3}, {}),
        _row("larger", 2.0, {"1": 3.9}, {"1": 3.8}),
    ]
    rows[2]["time_of_the_same_size_loss_nats"] = {"1": 4.25}
    assert quality.same_size_summary(rows, "dense, same size") == {
        "best": "ours",
        "total_compression_ratio": 2.7,
        "parameters_to_same_size_dense": 1.0,
        "gap_to_same_size_dense_equal_tokens_nats": pytest.approx(-0.175),
        "gap_to_same_size_dense_equal_time_nats": pytest.approx(0.05),
        "gap_to_dense_same_optimizer_equal_tokens_nats": pytest.approx(0.075),
        "gap_to_dense_same_optimizer_equal_time_nats": pytest.approx(-0.15),
    }
    assert quality.same_size_summary(rows[:1], "dense, same size") == {}
    assert quality.same_size_summary(rows[:2], "dense, same size") == {}


def _muon(**model: Any) -> dict[str, Any]:
    return {"optimizer": "spectron", "spectron_dense": True, "learning_rate": 0.01, **model}


SAME_SIZE_GRID = GRID | {
    "same_size": "narrow",
    "num_finalists": 2,
    "variants": [
        {"name": "dense", "model": _muon(rank=None), "rates": [0.07], "rest_rates": [0.02],
         "tuned": "spectron_learning_rate"},
        {"name": "narrow", "model": _muon(rank=None, width=4), "rates": [0.07],
         "tuned": "spectron_learning_rate"},
        {"name": "ours", "model": _muon(**SMALL), "rates": [0.05, 0.1], "rest_rates": [0.02],
         "tuned": "spectron_learning_rate"},
    ],
}  # fmt: skip


def test_low_rank_is_compared_with_the_dense_network_of_its_size(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Run] = []

    def train(workshop: Workshop, variant: Variant, run: Run) -> Run:
        # Best in the middle: at a rate of 0.1, and 0.02 for the rest.
        distance = abs(math.log(run.rate / 0.1)) + abs(math.log((run.rest_rate or 1.0) / 0.02))
        run.val_loss_nats = distance + run.seed
        trained.append(run)
        return run

    def step_times_s(
        workshop: Workshop, variants: list[Variant], *args: Any
    ) -> dict[str, list[float]]:
        times_s = {"dense": 4.0, "narrow": 1.0, "ours": 2.0, "later": 1.0}
        return {variant.name: [times_s[variant.name]] for variant in variants}

    monkeypatch.setattr(Workshop, "train", train)
    monkeypatch.setattr(Workshop, "step_times_s", step_times_s)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SAME_SIZE_GRID))
    # The one without the others: its gaps wait.
    monkeypatch.setattr(sys, "argv", [*words, "--only", "ours"])
    quality.main()
    assert [(run.stage, run.rate, run.rest_rate) for run in trained] == [
        ("tuning", 0.05, 0.01), ("tuning", 0.1, 0.01), ("tuning", 0.2, 0.01),
        ("tuning", 0.1, 0.02), ("tuning", 0.1, 0.04), ("equal tokens", 0.1, 0.02),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    quality.main()
    record = json.loads((tmp_path / "record.json").read_text())
    steps = {(run["variant"], run["stage"]): run["num_steps"] for run in record["runs"]}
    assert steps["ours", "equal time"] == 4
    assert steps["ours", "time of the same size"] == 1
    assert record["rest_rates"] == {"ours": 0.02, "dense": 0.02}
    assert record["summary"]["best"] == "ours"
    assert {key for key in record["summary"] if key.startswith("gap_to_")} == {
        f"gap_to_{other}_equal_{stage}_nats"
        for other in ("same_size_dense", "dense_same_optimizer")
        for stage in ("tokens", "time")
    }
    # A variant that is added does not repeat what was run; one that is changed is refused.
    num_runs = len(record["runs"])
    later = {"name": "later", "model": _muon(rank=1, embedding_rank=2), "rates": [0.07],
             "tuned": "spectron_learning_rate"}  # fmt: skip
    variants = [*SAME_SIZE_GRID["variants"], later]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SAME_SIZE_GRID | {"variants": variants}))
    quality.main()
    record = json.loads((tmp_path / "record.json").read_text())
    assert [run["variant"] for run in record["runs"][num_runs:]] == ["later"] * 3
    changed = [*variants[:3], later | {"rates": [0.08]}]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SAME_SIZE_GRID | {"variants": changed}))
    with pytest.raises(ValueError, match=r"record\.json is of another grid"):
        quality.main()


def test_every_variant_of_the_shipped_grid_is_a_module_of_its_size() -> None:
    grid = read_grid(quality.GRID)
    assert len(grid.variants) > 4
    ratios = {}
    for variant in grid.variants:
        settings = {**grid.model, **variant.model, variant.tuned: variant.rates[0]}
        module = LowRankPretraining(**settings, vocab_size=8192)
        ratios[variant.name] = module.budget(256).total_compression_ratio
    assert ratios.pop("dense") == 1
    assert ratios["naive"] >= quality.WANTED_RATIO


@pytest.mark.parametrize("name", ["same_size_grid", "same_size_gpt2_small_grid"])
def test_the_variants_of_the_same_size_grids_have_the_sizes_that_they_claim(name: str) -> None:
    grid = read_grid(quality.GRID.with_name(f"{name}.yaml"))
    vocab_size, length = grid.data["vocab_size"], grid.data["block_length"]
    parameters = {}
    for variant in grid.variants:
        module = LowRankPretraining(**{**grid.model, **variant.settings()}, vocab_size=vocab_size)
        parameters[variant.name] = module.budget(length).total_parameters
    dense, narrow, *small = parameters.values()
    assert all(dense / size >= quality.WANTED_RATIO for size in small)
    assert all(abs(size / narrow - 1) <= 0.02 for size in small)


def test_the_grid_of_gpt2_s_vocabulary_has_variants_of_the_shipped_one() -> None:
    path = quality.GRID.with_name("quality_grid_gpt2_vocabulary.yaml")
    grid, shipped = read_grid(path), {v.name: v for v in read_grid(quality.GRID).variants}
    for variant in grid.variants:
        embedding = {"embedding_rank": variant.model.get("embedding_rank")}
        assert {**variant.model, **embedding} == {**shipped[variant.name].model, **embedding}
        settings = {**grid.model, **variant.model, variant.tuned: variant.rates[0]}
        module = LowRankPretraining(**settings, vocab_size=50257)
        wanted = 1 if variant.name == "dense" else quality.WANTED_RATIO
        assert module.budget(256).total_compression_ratio >= wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": GRID["variants"][:1]}, "a grid of 1 variants compares nothing"),
        ({"num_stepps": 3}, "num_stepps"),
        ({"seeds": []}, "seeds is empty"),
        ({"num_steps": 0}, "num_steps 0 is below 1"),
        ({"same_size": "narow"}, "same_size 'narow' is none of dense, naive, spectron"),
        (
            {"variants": [{"name": "a", "model": {}, "rates": [1], "rest_rates": [2]}] * 2},
            "variant 'a': rest_rates need a learning_rate beside learning_rate",
        ),
        ({"variants": [{"name": "a", "model": {}, "rates": []}]}, "variant 'a' has no rates"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | change))
    with pytest.raises(ValueError, match=message):
        read_grid(path)
