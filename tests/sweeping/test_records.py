from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import create_trial

from fingpt_lightning.sweeping.records import BEST_CONFIG, run_folder, write_best_config

OF_ONE_RUN = {"name": "trial", "save_dir": "there", "offline": True, "mode": "offline"}


@pytest.mark.parametrize(
    ("class_path", "settings"),
    [
        ("lightning.pytorch.loggers.WandbLogger", None),
        ("lightning.pytorch.loggers.wandb.WandbLogger", None),
        ("mine.WandbLogger", OF_ONE_RUN),
    ],
)
def test_the_best_config_takes_name_and_place_from_lightnings_own_logger(
    class_path: str, settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    trial = create_trial(value=1.0)
    logger = {"class_path": class_path, "init_args": OF_ONE_RUN}
    trainer = {"default_root_dir": "there", "callbacks": None, "logger": logger}
    places = {key: {"dirpath": "there"} for key in ("best_checkpoint", "last_checkpoint")}
    run = tmp_path / run_folder(trial)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer, **places}))
    write_best_config(tmp_path, trial)
    found = yaml.safe_load((tmp_path / BEST_CONFIG).read_text())
    assert found["trainer"]["default_root_dir"] is None
    assert found["best_checkpoint"]["dirpath"] is None
    new = {"name": None, "save_dir": None, "offline": True, "mode": None}
    assert found["trainer"]["logger"]["init_args"] == (settings or new)
