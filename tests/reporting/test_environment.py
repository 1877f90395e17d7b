import json
import shutil
import subprocess
from pathlib import Path

import pytest

from fingpt_lightning.reporting.environment import environment, git_state, write_environment


def test_the_environment_names_command_machine_and_versions(tmp_path: Path) -> None:
    write_environment(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]
    words = ["/usr/bin/fingpt", "fit", "--config", "my config.yaml"]
    assert environment(words)["command"] == "fingpt fit --config 'my config.yaml'"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_only_a_tracked_file_has_a_git_state(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    code = tmp_path / "code.py"
    code.write_text("1")
    assert git_state(code) is None
    git("init")
    assert git_state(code) is None
    git("add", "code.py")
    git("commit", "-m", "first")
    state = git_state(code)
    assert state is not None
    assert state["dirty"] is False
    assert len(str(state["commit"])) == 40
    code.write_text("2")
    state = git_state(code)
    assert state is not None
    assert state["dirty"] is True
