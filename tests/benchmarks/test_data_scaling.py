import json
import sys
from pathlib import Path

import pytest

from benchmarks import data_scaling


@pytest.mark.slow
def test_all_contenders_run_at_toy_size_and_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["data_scaling", "--toy", "--json", str(path)])
    data_scaling.main()
    record = json.loads(path.read_text())
    assert [row["contender"] for row in record["rows"]] == list(data_scaling.CONTENDERS)
    tokens = [row["num_tokens"] for row in record["rows"]]
    assert tokens[2] == pytest.approx(10 * tokens[0], rel=0.05)
    assert tokens[3] == tokens[0]
    assert set(record["summary"]) == {
        "tokenise_tokens_per_s_ratio_10x_to_1x", "loader_tokens_per_s_ratio_10x_to_1x",
        "peak_rss_ratio_10x_to_1x", "tokenise_workers_speedup_ratio",
    }  # fmt: skip
    assert "| 10x |" in path.with_suffix(".md").read_text()


def _run(tokens_per_s: float, rss_mib: float) -> dict[str, float]:
    return {
        "num_tokens": 1000.0,
        "tokenise_tokens_per_s": tokens_per_s,
        "tokenise_peak_rss_mib": rss_mib,
        "loader_tokens_per_s": 8 * tokens_per_s,
        "loader_peak_private_mib": 100.0,
    }


def test_the_summary_takes_medians_and_the_larger_growth_of_memory() -> None:
    runs = {
        "1x": [_run(100.0, 200.0), _run(90.0, 200.0), _run(500.0, 200.0)],
        "3x": [_run(100.0, 200.0)],
        "10x": [_run(95.0, 230.0)],
        "1x, one thread": [_run(50.0, 200.0)],
    }
    assert data_scaling.summary(data_scaling.rows(runs)) == {
        "tokenise_tokens_per_s_ratio_10x_to_1x": pytest.approx(0.95),
        "loader_tokens_per_s_ratio_10x_to_1x": pytest.approx(0.95),
        "peak_rss_ratio_10x_to_1x": pytest.approx(1.15),
        "tokenise_workers_speedup_ratio": pytest.approx(2.0),
    }


def test_smaller_corpora_begin_the_larger(tmp_path: Path) -> None:
    paths = {size: tmp_path / f"{size}.jsonl" for size in (1, 3)}
    data_scaling.write_news(paths, 5000.0)
    small, large = (path.read_text() for path in paths.values())
    assert large.startswith(small)
    assert 5000 <= len(small) < 6000
    assert 15_000 <= len(large) < 16_000
