import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import earlier_commit
from benchmarks.earlier_commit import EARLIER, FIT, LABELS, NOW

_LIMIT = 3


def test_both_checkouts_run_every_work_at_toy_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Path, str]] = []
    told: set[Path] = set()

    def run(checkout: Path, words: list[str]) -> float:
        ran.append((checkout, words[0]))
        if "--chat_template" in words:
            told.add(checkout)
        if words[0] == "fit":
            place = Path(words[words.index("--trainer.logger.save_dir") + 1]) / "metrics.csv"
            place.parent.mkdir(parents=True)
            place.write_text("step,throughput/step_time_s\n0,\n1,9\n2,0.5\n3,0.25\n")
        else:
            rows = [{"fpb_label": "neutral"}] * _LIMIT
            place = Path(words[words.index("--output") + 1])
            place.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return 2.0 if checkout == tmp_path else 0.5

    monkeypatch.setattr(earlier_commit, "_run", run)
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "An earlier one"]):
        as_someone = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *as_someone, *words], check=True)
    path = tmp_path / "record.json"
    words = ["--toy", "--limit", str(_LIMIT), "--repeats", "1", "--earlier", str(tmp_path)]
    earlier_commit.main([*words, "--now", "--chat_template none", "--json", str(path)])
    record = json.loads(path.read_text())
    assert {checkout for checkout, _ in ran} == {tmp_path, Path.cwd()}
    assert told == {Path.cwd()}
    assert [word for _, word in ran] == ["fit", "label", "label", "label"] * 2
    works = [(row["work"], row["checkout"]) for row in record["rows"]]
    assert sorted(works) == sorted(
        (work, name) for work in (FIT, *LABELS) for name in (EARLIER, NOW)
    )
    assert len(record["config"]["earlier_commit"]) == 40
    assert record["summary"] == {
        "speed_ratio_fit": 1.0,
        "speed_ratio_label": 4.0,
        "speed_ratio_label_int8_with_adapter": 4.0,
        "speed_ratio_label_nf4_with_adapter": 4.0,
        "least_same_labels": 1.0,
    }
    assert (
        "| label, nf4 with adapter | now | 0.50 | 6.0 | 1.000 |"
        in path.with_suffix(".md").read_text()
    )
