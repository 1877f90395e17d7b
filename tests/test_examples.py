"""The examples run as they stand, in seconds, in an empty folder."""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fingpt_lightning.deploy import label_options
from tests.support.documents import blocks
from tests.support.programs import ROOT, run_together

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
ARRAY_JOB = EXAMPLES / "array_job.sh"

# An array as SLURM has it: every job has its index and their number; its output goes elsewhere.
_SBATCH = r"""#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in
    --array=*) indices=${1#--array=} ;;
    --dependency=*) echo "after ${1#--dependency=afterok:}" >> "$CALLS" ;;
  esac
  shift
done
if [[ ${indices:-} == *-* ]]; then indices=$(seq -s , "${indices%-*}" "${indices#*-}"); fi
read -ra ids <<< "${indices//,/ }"
if [ ${#ids[@]} = 0 ]; then bash "$@" > /dev/null; fi
for id in "${ids[@]}"; do
  SLURM_ARRAY_TASK_ID=$id SLURM_ARRAY_TASK_COUNT=${#ids[@]} bash "$@" > /dev/null
done
echo 4242
"""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # What Lightning has to say of loggers and checkpoints that a short script leaves out.
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield
    left = {path.name for path in tmp_path.iterdir()} - {"log.txt", "runs", "scratch"}
    assert not left, "an example cleans up behind itself"


def _printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1].replace(",", ""))


def test_the_examples_are_those_that_are_tested_and_short() -> None:
    assert [path.stem for path in SCRIPTS] == [
        "callback_in_your_trainer", "finetune_and_evaluate", "only_the_layer", "only_the_loss",
        "pipeline_with_torchrun",
    ]  # fmt: skip
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (*SCRIPTS, NOTEBOOK, ARRAY_JOB):
        assert f"(examples/{path.name})" in readme, path.name
    for path in SCRIPTS:
        text = path.read_text()
        lines = [line for line in text.splitlines() if line.strip() and '"""' not in line]
        assert 10 <= len(lines) <= 40, (path.name, len(lines))
        assert f"examples/{path.name}\n" in text.partition('"""\n')[0], "how it is run"


def test_only_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed("only_the_layer.py", capsys)
    before = _number(r"([\d,]+) parameters became", printed)
    assert _number(r"became ([\d,]+)", printed) < before / 3
    assert _number(r"step 100: loss ([\d.]+)", printed) < _number(r"step 0: loss (.+)", printed) / 4


def test_only_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed("only_the_loss.py", capsys)
    ours, plain = re.findall(r"(\d+\.\d{6})", printed)
    assert abs(float(ours) - float(plain)) < 1e-5
    assert _number(r"gradients: (\S+)", printed) < 1e-6


def test_a_callback_in_your_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed("callback_in_your_trainer.py", capsys)
    assert _number(r"memory/peak_rss_mib: (\S+)", printed) > 0
    assert _number(r"throughput/tokens_per_s: (\S+)", printed) > 0


def test_finetune_and_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed("finetune_and_evaluate.py", capsys)
    before = _number(r"base: accuracy ([\d.]+)", printed)
    assert _number(r"with adapter: accuracy ([\d.]+)", printed) > max(0.6, before)


@pytest.mark.slow
def test_a_pipeline_with_torchrun(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    codes, printed = run_together(
        tmp_path, [[*torchrun, str(EXAMPLES / "pipeline_with_torchrun.py")]]
    )
    assert codes == [0], printed
    found = re.findall(r"rank (\d): ([\d,]+) parameters here, validation loss ([\d.]+)", printed)
    ranks, sizes, losses = zip(*sorted(found), strict=True)
    assert ranks == ("0", "1")
    assert sizes[0] != sizes[1], "each holds its own part"
    assert losses[0] == losses[1]


def test_a_job_array_runs_each_shard_and_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["bash", "-n", str(ARRAY_JOB)], check=True)
    programs, calls = tmp_path / "scratch" / "bin", tmp_path / "scratch" / "calls"
    programs.mkdir()
    for name, text in (("sbatch", _SBATCH), ("fingpt", '#!/bin/bash\necho "$*" >> "$CALLS"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SHARDS"):
        monkeypatch.delenv(name, raising=False)
    guide = blocks(ROOT / "docs" / "clusters.md")
    whole, again = (block.text for block in guide if "sbatch" in block.text)
    subprocess.run(["bash", "-euc", whole], check=True, cwd=ROOT)
    lines = calls.read_text().splitlines()
    label = lines[0].removesuffix(" --shard 1/8")
    assert label.startswith("label --model ")
    shards = [f"{label} --shard {number}/8" for number in range(1, 9)]
    assert lines == [*shards, "after 4242", f"{label} --merge"]
    for line in lines[:8] + lines[9:]:
        label_options.parse_options(line.split()[1:])
    calls.unlink()
    subprocess.run(["bash", "-euc", again], check=True, cwd=ROOT)
    assert calls.read_text().splitlines() == [shards[2], shards[4]]
    calls.unlink()
    subprocess.run(["bash", ARRAY_JOB, "evaluate"], check=True, env=os.environ | {"SHARDS": "8"})
    assert calls.read_text() == "evaluate --merge 8\n"


def test_the_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells, one after the other in one namespace, as Jupyter would."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "stripped"
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
    printed = capsys.readouterr().out
    low_rank = _number(r"low rank: ([\d,]+) parameters", printed)
    assert low_rank < _number(r"dense baseline: ([\d,]+) parameters", printed) / 1.5
    assert max(space["losses"].values()) < 6
