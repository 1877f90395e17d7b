import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fingpt_lightning.reporting import write_report
from fingpt_lightning.reporting.files import read_metrics
from fingpt_lightning.reporting.report import write_page
from tests.reporting.folders import (
    make_evaluation,
    make_run,
    make_sweep,
    write_metrics,
    write_trace,
)

VOID = ("meta", "br", "link", "img", "input")


class _Page(HTMLParser):
    """What a browser would find: headings, tags that were left open, addresses, names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data", "srcset"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _report(folder: Path, *paths: Path) -> str:
    output = folder / "report.html"
    write_report(paths, output)
    assert not list(folder.glob("*.partial"))
    return output.read_text()


def _sections(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_a_run_shows_all_that_it_left(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", tasks=["fpb"])
    write_trace(run)
    html = _report(tmp_path, run)
    assert _sections(html) == [
        *("Learning", "Accuracy before and after", "Compression", "Throughput"),
        *("Memory by phase", "Pipeline", "What ran"),
    ]
    for text in (
        "2.97x",
        "0.780 (0.68-0.88)",
        "0.310 before training",
        "764.0 MiB",
        "8,000",
        "1.48x",
    ):
        assert text in html
    assert "Loss by tokens" in html
    assert "Loss by time" in html
    assert "&lt;unchanged&gt; &amp; payable" in html
    assert "<unchanged>" not in html


def test_the_page_is_whole_and_loads_and_runs_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", tasks=["fpb"])
    write_trace(run)
    html = _report(tmp_path, run, make_sweep(tmp_path / "quick_rank"))
    page = _Page(html)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert 'name="viewport" content="width=device-width' in html


def test_the_first_column_of_every_table_stays_while_the_others_are_scrolled(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "mine", tasks=["fpb"])
    html = _report(tmp_path, run, make_sweep(tmp_path / "quick_rank"))
    places = re.findall(r'<div class="(\w+)" tabindex="0">\s*(?:<h3>[^<]*</h3>\s*)?<table>', html)
    assert len(places) == html.count("<table>") > 4
    assert set(places) == {"scroll", "matrix"}
    (rule,) = re.findall(
        r"\.scroll tr > :first-child, \.matrix tr > :first-child \{([^}]*)\}", html
    )
    assert {"position: sticky", "left: 0"} <= {part.strip() for part in rule.split(";")}
    # Opaque, dark or light, so that nothing shines through.
    assert "background: var(--surface);" in rule
    palettes = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    assert all(re.search(r"--surface: #[0-9a-f]{6};", palette) for palette in palettes)
    assert len(palettes) == 2


def test_charts_take_every_colour_from_the_page_which_has_it_for_dark_and_light(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "mine")
    write_trace(run)
    html = _report(tmp_path, run, make_sweep(tmp_path / "quick_rank"))
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) > 10
    for chart in charts:
        ElementTree.fromstring(chart)
        assert not re.search(r"#[0-9a-f]{6}", chart)
    light, dark = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    for palette in (light, dark):
        assert used <= set(re.findall(r"--([\w-]+):", palette))


def test_runs_stand_side_by_side_and_the_best_of_a_row_is_marked(tmp_path: Path) -> None:
    small = make_run(tmp_path / "small", rank=32, final_loss=4.2)
    large = make_run(tmp_path / "large", rank=64, final_loss=3.8)
    html = _report(tmp_path, small, large)
    assert "Side by side" in _sections(html)
    row = re.search(r"<td>parameters</td>(.*?)</tr>", html, flags=re.DOTALL)
    assert row is not None
    cells = re.findall(r'<td class="([\w ]+)">(.*?)</td>', row[1])
    assert cells == [("number best", "632.0 K"), ("number", "1.3 M")]
    assert "Settings that differ" in html
    assert "<td>model.init_args.rank</td>" in html
    assert "<td>model.init_args.preset</td>" not in html
    assert "<td>trainer.default_root_dir</td>" not in html


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "quickstart", 4) for place in ("a", "b")]
    html = _report(tmp_path, *runs)
    assert "<strong>a/quickstart</strong>" in html
    assert "<strong>b/quickstart</strong>" in html


def test_a_run_that_failed_before_its_first_step_says_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "early", 0, is_finished=False)
    (run / "metrics.csv").unlink()
    html = _report(tmp_path, run)
    assert "<svg" not in html
    assert _sections(html) == ["What ran", "Not shown"]
    assert "it stopped before the first step" in html
    missing = html[html.index('id="missing"') :]
    for subject in ("Learning curves", "Accuracy", "Compression", "Throughput", "Memory"):
        assert f"{subject}" in missing


def test_a_run_that_ended_before_its_first_validation_has_no_validation_loss(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "early", 7, is_finished=False)
    rows = [{"step": step, "train/loss": 5.0, "train/tokens": 9.0 * step} for step in range(5)]
    write_metrics(run / "metrics.csv", [*rows, {"step": 5, "train/loss": float("nan")}])
    html = _report(tmp_path, run)
    assert "it stopped after 6 logged steps" in html
    assert "early: it ended before its first validation" in html
    assert "the loss is not a number from step 5 on" in html
    assert "Loss by time" not in html


def test_figures_without_answers_have_no_confusion(tmp_path: Path) -> None:
    html = _report(tmp_path, make_run(tmp_path / "mine", tasks=["fpb"], has_answers=False))
    assert "0.780" in html
    assert 'class="matrix"' not in html
    assert "predictions.jsonl is not there" in html


def test_an_evaluation_stands_beside_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", tasks=["fpb"])
    html = _report(tmp_path, make_evaluation(tmp_path / "base"), run)
    assert len(re.findall('class="matrix"', html)) == 3
    assert re.search(r"<td>base</td>\s*<td class=\"number\">0\.383 \(0\.28-0\.48\)</td>", html)


def test_a_sweep_has_a_frontier_importances_and_its_best_trials_as_runs(tmp_path: Path) -> None:
    html = _report(tmp_path, make_sweep(tmp_path / "quick_rank", num_trials=9))
    assert "Sweep quick_rank" in _sections(html)
    for title in ("Value of each trial", "Frontier of compression and loss", "Importance"):
        assert title in html
    assert re.findall(r"<strong>(trial \d)</strong>", html)[0] == "trial 2"
    assert len(re.findall(r"<strong>trial \d</strong>", html)) == 5
    assert "rank 512 is outside [1, 128]" in html
    assert "8 of 9 trials have ended" in html


def test_a_sweep_whose_trials_all_failed_is_told_without_charts(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "bad", num_trials=2)
    html = _report(tmp_path, sweep)
    assert "<svg" not in html
    assert "rank 512 is outside" in html


def test_an_earlier_page_stays_when_a_folder_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(FileNotFoundError, match=r"quikstart does not exist; did you mean quick"):
        _report(tmp_path, make_run(tmp_path / "quickstart", 4), tmp_path / "quikstart")
    assert (tmp_path / "report.html").read_text() == "before"


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(
        ValueError, match=r"other is not a run, sweep or evaluation: it holds none of"
    ):
        _report(tmp_path, tmp_path / "other")
    run = make_run(tmp_path / "runs" / "first", 4)
    with pytest.raises(ValueError, match=rf"there are runs in it: name one, as {run}"):
        _report(tmp_path, tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv is a file, not a folder"):
        _report(tmp_path, run / "metrics.csv")


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", 4)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        write_report([run], tmp_path / "absent" / "report.html")
    with pytest.raises(ValueError, match="is a folder, not a file"):
        write_report([run], tmp_path)
    with pytest.raises(ValueError, match="no run, sweep or evaluation is given"):
        write_report([], tmp_path / "report.html")


@pytest.mark.parametrize("trial", [{"number": "x"}, {"number": 0, "value": "low"}])
def test_a_trial_whose_numbers_are_texts_is_named(trial: dict[str, Any], tmp_path: Path) -> None:
    record = {"name": "x", "method": "grid", "metric": {"name": "val/loss", "goal": "minimize"}}
    trial |= {"state": "finished", "parameters": {}}
    (tmp_path / "sweep.json").write_text(json.dumps(record | {"trials": [trial]}))
    with pytest.raises(ValueError, match=r"sweep\.json is not .*0.[a-z]+' holds a text, not a num"):
        write_report([tmp_path], tmp_path / "report.html")


@pytest.mark.parametrize(
    "tasks",
    [3, {"fpb": 3}, {"fpb": {"accuracy": "high"}}, {"fpb": {"accuracy_interval": [0.1]}}],
    ids=str,
)
def test_results_whose_figures_are_none_are_named(tasks: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"tasks": tasks}))
    with pytest.raises(ValueError, match=r"results\.json is not the results of an evaluation"):
        write_report([tmp_path], tmp_path / "report.html")


def test_a_sweep_record_without_its_keys_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "x", "trials": []}))
    with pytest.raises(
        ValueError, match=r"sweep\.json is not a record of a sweep: 'method' is missing"
    ):
        _report(tmp_path, tmp_path)


def _with_tokenizer(run: Path, text: str, bits: float | None) -> Path:
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text(text)
    summary = json.loads((run / "summary.json").read_text())
    summary |= {} if bits is None else {"val_bits_per_byte": bits}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def _row(html: str, title: str) -> list[str]:
    row = re.search(rf"<td>{title}</td>(.*?)</tr>", html, flags=re.DOTALL)
    assert row is not None, title
    return [kinds for kinds, _ in re.findall(r'<td class="([\w ]+)">(.*?)</td>', row[1])]


@pytest.mark.parametrize("same", [True, False])
def test_losses_of_two_tokenizers_are_not_ranked(same: bool, tmp_path: Path) -> None:
    one = _with_tokenizer(make_run(tmp_path / "one", final_loss=3.8), "a", 1.4)
    other = make_run(tmp_path / "other", final_loss=4.2)
    html = _report(tmp_path, one, _with_tokenizer(other, "a" if same else "b", 1.3))
    best = ["number best", "number"]
    for title in ("last validation loss", "best validation loss"):
        assert _row(html, title) == (best if same else ["number", "number"])
    assert _row(html, "bits per byte") == best[::-1]
    assert ("The runs have different tokenizers" in html) is not same
    assert ("lowest validation loss" in html) is same
    assert "fewest bits per byte" in html


def _with_bytes(run: Path, per_token: float, tokenizer: str | None = None) -> Path:
    """Rewrites a run's rows as where the data know their bytes."""
    rows = [dict(row) for row in read_metrics(run / "metrics.csv")]
    tokens = 0.0
    for row in rows:
        tokens = row.get("train/tokens", tokens)
        if "val/loss" in row:
            bits = row["val/loss"] / math.log(2) / per_token
            row |= {"val/bits_per_byte": bits, "train/bytes": tokens * per_token}
            row |= {"train/tokens": tokens}
    write_metrics(run / "metrics.csv", rows)
    return run if tokenizer is None else _with_tokenizer(run, tokenizer, None)


def _choices(html: str) -> list[tuple[str, bool]]:
    """Names of the switch, and which one is on."""
    found = re.findall(r'<input type="radio"[^>]*?( checked)?><label[^>]*>(.*?)</label>', html)
    return [(name, bool(checked)) for checked, name in found]


def test_curves_stand_over_tokens_bytes_steps_and_time(tmp_path: Path) -> None:
    html = _report(tmp_path, make_run(tmp_path / "mine"), make_run(tmp_path / "other"))
    for title in ("Loss by tokens", "Loss by steps", "Loss by time"):
        assert f"<h3>{title}</h3>" in html
    assert _choices(html) == [("tokens", True), ("steps", False), ("time", False)]
    html = _report(tmp_path, _with_bytes(tmp_path / "mine", 4.0))
    assert [name for name, _ in _choices(html)] == ["tokens", "bytes", "steps", "time"]
    assert "<h3>Bits per byte by bytes</h3>" in html
    assert "<h3>Loss by tokens</h3>" in html
    assert "<script" not in html
    _Page(html)
    css = "".join(re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL))
    for place in range(1, 5):  # what is checked is shown
        chart = f"figure:nth-of-type({place})"
        assert f"input:nth-of-type({place}):checked ~ .charts > {chart}" in css


def test_curves_of_two_tokenizers_are_in_bits_per_byte(tmp_path: Path) -> None:
    one = _with_bytes(make_run(tmp_path / "one"), 4.0, "a")
    other = make_run(tmp_path / "other")
    html = _report(tmp_path, one, _with_bytes(other, 3.0, "b"))
    assert dict(_choices(html))["bytes"]
    for axis in ("tokens", "bytes", "steps", "time"):
        assert f"<h3>Bits per byte by {axis}</h3>" in html
    assert _row(html, "bits per byte") == ["number best", "number"]
    assert "not comparable, bits per byte are." in html


def test_two_tokenizers_without_bytes_are_not_ranked_and_it_says_why(tmp_path: Path) -> None:
    one = _with_bytes(make_run(tmp_path / "one"), 4.0, "a")
    other = _with_tokenizer(make_run(tmp_path / "other", final_loss=4.5), "b", None)
    html = _report(tmp_path, one, other)
    for title in ("last validation loss", "best validation loss", "bits per byte"):
        assert _row(html, title) == ["number", "number"]
    assert "bits per byte would be, which are not known of other." in html
    assert "<h3>Loss by tokens</h3>" in html


def test_a_finetuning_has_its_adapter_in_place_of_a_dense_baseline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tuned", tasks=["fpb"])
    figures = {"base": "models/base in nf4", "adapter": "LoRA of rank 16", "steps": 40}
    counts = {"parameters": 135e6, "trained_parameters": 4.9e6, "trained_share": 0.035}
    (run / "summary.json").write_text(json.dumps(figures | counts))
    write_metrics(run / "metrics.csv", [{"step": 3, "train/loss": 0.5, "train/tokens": 9.0}])
    html = _report(tmp_path, run)
    assert "LoRA of rank 16 on models/base in nf4" in html
    assert "3.50%" in html
    assert "smaller than dense" not in html
    assert "Compression" not in html


def test_a_page_is_read_again_while_a_run_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", 8, is_finished=False)
    page = tmp_path / "watched.html"
    refresh = '<meta http-equiv="refresh" content="7">'
    assert write_page([run], page, 7)
    assert refresh in page.read_text()
    (run / "summary.json").write_text('{"steps": 8}')
    assert not write_page([run], page, 7)
    assert refresh not in page.read_text()
    assert "refresh" not in _report(tmp_path, make_run(tmp_path / "other", 8, is_finished=False))
