import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import earlier_commit
from benchmarks.earlier_commit import EARLIER, FIT, LABELS, NOW, NOW_FLOAT32

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
            lines = ["step,throughput/step_time_s", "0,", *("1,9",) * 5, "6,0.5", "7,0.25"]
            place.write_text("\n".join(lines))
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
    assert [word for _, word in ran] == ["fit", *["label"] * 3, "fit", *["label"] * 6]
    works = [(row["work"], row["checkout"]) for row in record["rows"]]
    assert sorted(works) == sorted(
        [(work, name) for work in (FIT, *LABELS) for name in (EARLIER, NOW)]
        + [(work, NOW_FLOAT32) for work in LABELS]
    )
    assert len(record["config"]["earlier_commit"]) == 40
    assert record["summary"] == {
        "speed_ratio_fit": 1.0,
        "speed_ratio_label": 4.0,
        "speed_ratio_label_float32": 4.0,
        "speed_ratio_label_int8_with_adapter": 4.0,
        "speed_ratio_label_int8_with_adapter_float32": 4.0,
        "speed_ratio_label_nf4_with_adapter": 4.0,
        "speed_ratio_label_nf4_with_adapter_float32": 4.0,
        "least_same_labels": 1.0,
        "least_same_labels_float32": 1.0,
    }
    assert (
        "| label, nf4 with adapter | now | 0.50 | 6.0 | 1.000 |"
        in path.with_suffix(".md").read_text()
    )
