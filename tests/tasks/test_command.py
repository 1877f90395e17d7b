import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fingpt_lightning.cli.main import main
from fingpt_lightning.tasks import find_task, task_names
from fingpt_lightning.tasks.sources import splits_in
from tests.tasks.sample_rows import ROWS, SENTENCE


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["tasks", *words])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_every_shipped_task_is_listed_with_license_and_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = _run(capsys).splitlines()
    assert lines[0].split() == ["task", "kind", "license", "source"]
    for name in task_names():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        task = find_task(name)
        assert task.kind in line
        assert task.source.split()[0][:40] in line


def test_rows_are_counted_in_a_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "headline").mkdir()
    (tmp_path / "headline" / "train.jsonl").write_text(json.dumps(ROWS["headline"][0]))
    (tmp_path / "headline" / "dev.json").write_text(json.dumps(ROWS["headline"][:1] * 2))
    output = _run(capsys, "--data_dir", str(tmp_path))
    assert re.search(r"^headline +labels +dev 12, train 6 +", output, re.MULTILINE)
    assert re.search(r"^fpb +labels +- +", output, re.MULTILINE)


def test_a_task_is_shown_with_template_and_first_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = _run(capsys, "fpb")
    assert "Input: {text}\nAnswer: negative|neutral|positive" in output
    assert "columns  text, label; sentence, label; context, target; instruction, input, output" in (
        output
    )
    assert "license  CC BY-NC-SA 3.0" in output
    assert "first row" not in output
    for name, row in (("fpb", 0), ("alpaca", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(ROWS[name][row]))
    output = _run(capsys, "fpb", "--data_dir", str(tmp_path))
    assert "first row:\nInstruction: What is the sentiment of this news?" in output
    assert output.endswith(f"Input: {SENTENCE}\nAnswer: positive\n")
    output = _run(capsys, "alpaca", "--data_dir", str(tmp_path))
    assert output.endswith("first row:\nuser: Name a colour.\nassistant: Red.\n")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("fbp",), 1, "task 'fbp' is neither shipped nor a .yaml file; did you mean fpb?"),
        (("--data_dir", "nowhere"), 1, "data_dir: no folder nowhere"),
        (("--all",), 2, "unrecognized arguments: --all"),
    ],
)
def test_a_wrong_name_is_one_line(
    words: tuple[str, ...], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tasks", *words])
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_splits_are_those_that_can_be_read(tmp_path: Path) -> None:
    for name in ("fpb/Sentences_50Agree.txt", "fpb/dev.csv.gz", "fpb/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert splits_in(find_task("fpb"), tmp_path) == ["dev", "test", "train"]
    assert splits_in(find_task("tfns"), tmp_path) == []


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from fingpt_lightning.cli.main import main; main(['tasks']);"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
