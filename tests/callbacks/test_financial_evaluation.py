import csv
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor
from typing_extensions import override

from callbacks import financial_evaluation
from callbacks.financial_evaluation import FinancialEvaluation
from callbacks.summary import RunSummary
from fingpt_lightning.evaluation.results import write_results
from fingpt_lightning.evaluation.run_evaluations import read_run_evaluations
from fingpt_lightning.evaluation.runner import evaluate, metrics_of, predict, read_tasks
from fingpt_lightning.reporting import write_report
from fingpt_lightning.reporting.answers import task_results_of_run
from fingpt_lightning.reporting.files import read_objects
from tests.callbacks.tiny_run import PlainModule, tiny_trainer
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer, write_rows
from tests.support.lightning_ranks import RanksEnvironment
from tests.support.ranks import run_ranks
from tests.support.token_data import TokenData

TASKS = ["fpb", "piqa"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
]


class _Module(LightningModule):
    """Trains a tiny Llama; a dropout beside it tells whether modes are restored."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_network("llama").train()
        self.network.model.norm.eval()
        self.losses: list[float] = []

    @override
    def on_fit_start(self) -> None:
        # Not Python's: type checks in tests draw from it.
        for seed in (torch.manual_seed, numpy.random.seed):
            seed(5)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.network.training
        assert not self.network.model.norm.training
        noise = torch.rand(()) + numpy.random.random()  # noqa: NPY002
        output = self.network(input_ids=batch["input_ids"], labels=batch["input_ids"])
        self.losses.append(float(output.loss.detach() + noise))
        loss: Tensor = output.loss
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class _Data(TokenData):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__(batch_size)
        self.tokenizer = tiny_tokenizer()


def _data_dir(folder: Path) -> str:
    for task in TASKS:
        write_rows(folder, task)
    return str(folder)


def _rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _fit(folder: Path, module: _Module, callback: FinancialEvaluation | None) -> None:
    options = {"logger": CSVLogger(folder, name="", version="")}
    trainer = tiny_trainer(folder, [callback] if callback else [], **options)
    trainer.fit(module, datamodule=_Data())


def test_figures_before_during_and_after_are_those_of_the_network_then(tmp_path: Path) -> None:
    data_dir, module = _data_dir(tmp_path / "data"), _Module()
    run = read_tasks(["fpb"], data_dir, "validation")[0]

    def figures() -> dict[str, Any]:
        network = module.network
        was_training = [part for part in network.modules() if part.training]
        found = metrics_of(run, predict(network.eval(), tiny_tokenizer(), run.task, run.examples))
        for part in was_training:
            part.training = True
        return found

    before = figures()
    _fit(tmp_path, module, FinancialEvaluation(TASKS, data_dir, every_n_steps=2))
    after = figures()
    rows = [row for row in _rows(tmp_path) if any(key.startswith("eval/") for key in row)]
    # 4 steps: before, after 2 and after 4, where the last one is not repeated.
    assert [(row["step"], "eval/fpb/mcc" in row) for row in rows] == [
        (step, task) for step in (0, 1, 3) for task in (True, False)
    ]
    for row, expected in ((rows[0], before), (rows[4], after)):
        for key in ("accuracy", "macro_f1", "weighted_f1", "mcc", "missing"):
            assert row[f"eval/fpb/{key}"] == pytest.approx(expected[key])
    assert rows[1].keys() == {"step", "eval/piqa/accuracy", "eval/piqa/accuracy_norm"}


def test_without_names_the_tasks_and_the_folder_of_the_data_are_taken(tmp_path: Path) -> None:
    class OnTasks(_Data):
        data_dir = _data_dir(tmp_path / "data")
        task_names = ["piqa", "alpaca"]  # noqa: RUF012

    callback, summary = FinancialEvaluation(), RunSummary()
    trainer = tiny_trainer(tmp_path, [callback, summary], logger=CSVLogger(tmp_path))
    trainer.fit(_Module(), datamodule=OnTasks())
    (task,) = callback.history
    assert (task, len(callback.history[task])) == ("piqa", 2)
    found = json.loads((tmp_path / "summary.json").read_text())
    before, after = (row["accuracy"] for row in callback.history["piqa"])
    assert found["piqa/accuracy_before"] == before
    assert found["piqa/accuracy_after"] == after
    # What the untrained network answered is not what came of the training.
    trainer = tiny_trainer(tmp_path, [FinancialEvaluation(after=False), RunSummary()])
    trainer.fit(_Module(), datamodule=OnTasks())
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["piqa/accuracy_before"] == before
    assert "piqa/accuracy_after" not in found
    with pytest.raises(ValueError, match="the datamodule trains on none that has right answers"):
        tiny_trainer(tmp_path, [FinancialEvaluation()]).fit(_Module(), datamodule=_Data())


def test_training_is_as_without_it(tmp_path: Path) -> None:
    data_dir = _data_dir(tmp_path / "data")
    losses = []
    for callback in (None, FinancialEvaluation(TASKS, data_dir, every_n_steps=1, calibrate=True)):
        module = _Module()
        _fit(tmp_path, module, callback)
        losses.append(module.losses)
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"before": False}, [3]),
        ({"after": False}, [0]),
        ({"before": False, "every_n_steps": 3}, [2, 3]),
    ],
)
def test_each_time_can_be_left_out(
    tmp_path: Path, options: dict[str, Any], steps: list[int]
) -> None:
    callback = FinancialEvaluation(["fpb"], _data_dir(tmp_path / "data"), limit=2, **options)
    _fit(tmp_path, _Module(), callback)
    assert [row["step"] for row in _rows(tmp_path) if "eval/fpb/mcc" in row] == steps


class _Run:
    """The part of a W&B run that a logger uses."""

    name = id = "run"

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)


def test_wandb_gets_figures_answers_and_a_picture(tmp_path: Path) -> None:
    run = _Run()
    logger = WandbLogger(experiment=run, save_dir=tmp_path)  # type: ignore[arg-type]
    callback = FinancialEvaluation(TASKS, _data_dir(tmp_path / "data"), before=False)
    trainer = tiny_trainer(tmp_path, [callback], logger=logger)
    trainer.fit(_Module(), datamodule=_Data())
    logged = {key: value for row in run.logged for key, value in row.items() if "eval/" in key}
    assert {key for key in logged if "fpb" in key} == {
        f"eval/fpb/{name}"
        for name in (
            *("accuracy", "macro_f1", "weighted_f1", "mcc", "missing"),
            *("predictions", "confusion"),
        )
    }
    assert "eval/piqa/confusion" not in logged
    answers = logged["eval/fpb/predictions"]
    assert answers.columns == ["row", "text", "gold", "prediction", "scores"]
    assert [row[:3] for row in answers.data[:2]] == [
        [1, "Shares of Foo fell", "negative"], [2, "Profit rose", "positive"],
    ]  # fmt: skip
    (picture,) = logged["eval/fpb/confusion"]
    assert min(picture.image.size) > 200
    assert {row["trainer/global_step"] for row in run.logged if "eval/fpb/mcc" in row} == {3}


def _kept(folder: Path, name: str) -> list[int]:
    return sorted(int(path.parent.name) for path in (folder / "eval").glob(f"*/{name}"))


def test_each_step_leaves_what_fingpt_evaluate_writes(tmp_path: Path) -> None:
    data_dir, module = _data_dir(tmp_path / "data"), _Module()
    callback = FinancialEvaluation(TASKS, data_dir, every_n_steps=2, calibrate=True, limit=4)
    _fit(tmp_path, module, callback)
    assert _kept(tmp_path, "results.json") == [0, 2, 4]
    assert {0, 4} <= set(_kept(tmp_path, "predictions.jsonl"))
    logged = [row for row in _rows(tmp_path) if "eval/fpb/mcc" in row]
    for step, row in zip((0, 2, 4), logged, strict=True):
        found = json.loads((tmp_path / f"eval/{step}/results.json").read_text())
        assert (found["step"], list(found["tasks"])) == (step, TASKS)
        assert found["settings"] == {
            "scoring": "choices", "calibrate": True, "limit": 4, "batch_tokens": None
        }  # fmt: skip
        assert found["tasks"]["fpb"]["mcc"] == pytest.approx(row["eval/fpb/mcc"])
    # Byte for byte, but for the time it took, what the command's writer makes of the same network.
    runs = read_tasks(TASKS, data_dir, "validation", limit=4)
    module.network.eval()
    write_results(
        tmp_path / "plain",
        {},
        [evaluate(module.network, tiny_tokenizer(), run, calibrate=True) for run in runs],
    )
    ours, plain = tmp_path / "eval/4", tmp_path / "plain"
    assert (ours / "predictions.jsonl").read_bytes() == (plain / "predictions.jsonl").read_bytes()
    by_writer = [json.loads((one / "results.json").read_text())["tasks"] for one in (ours, plain)]
    for task in (task for tasks in by_writer for task in tasks.values()):
        assert task.pop("seconds") > 0
        assert task.pop("prompts_per_s") > 0
    assert by_writer[0] == by_writer[1]


def test_many_evaluations_keep_three_files_of_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.5, 0.4])

    def scored(*args: Any) -> dict[str, Any]:
        return metrics_of(*args) | {"weighted_f1": next(scores)}

    monkeypatch.setattr(financial_evaluation, "metrics_of", scored)
    callback = FinancialEvaluation(["fpb"], _data_dir(tmp_path / "data"), every_n_steps=1, limit=2)
    trainer = tiny_trainer(tmp_path, [callback], max_steps=5, max_epochs=-1)
    trainer.fit(_Module(), datamodule=_Data())
    assert _kept(tmp_path, "results.json") == [0, 1, 2, 3, 4, 5]
    assert _kept(tmp_path, "predictions.jsonl") == [0, 2, 5]
    assert not list(tmp_path.glob("eval/*/*.partial"))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    def fit(max_steps: int, module: _Module, ckpt_path: str | None = None) -> Trainer:
        callback = FinancialEvaluation(
            ["fpb"], _data_dir(tmp_path / "data"), before=ckpt_path is None, every_n_steps=2
        )
        logger = CSVLogger(tmp_path, name="", version=f"to_{max_steps}")
        trainer = tiny_trainer(
            tmp_path, [callback], max_steps=max_steps, max_epochs=-1, logger=logger
        )
        trainer.fit(module, datamodule=_Data(), ckpt_path=ckpt_path, weights_only=False)
        return trainer

    fit(2, _Module()).save_checkpoint(tmp_path / "two.ckpt")
    fit(6, _Module(), str(tmp_path / "two.ckpt"))
    assert _kept(tmp_path, "results.json") == [0, 2, 4, 6]
    assert {0, 6} <= set(_kept(tmp_path, "predictions.jsonl"))
    # It goes back to step 2 and takes another way: what was found later is no more of this run.
    fit(3, _Module(), str(tmp_path / "two.ckpt"))
    assert [one.step for one in read_run_evaluations(tmp_path)] == [0, 2, 3]
    assert set(_kept(tmp_path, "predictions.jsonl")) <= {0, 2, 3}


def test_the_report_shows_what_was_left_without_wandb(tmp_path: Path) -> None:
    callback = FinancialEvaluation(["fpb"], _data_dir(tmp_path / "data"))
    trainer = tiny_trainer(tmp_path / "run", [callback, RunSummary()], logger=False)
    trainer.fit(_Module(), datamodule=_Data())
    write_report([tmp_path / "run"], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "before training" in html
    assert "after step 4" in html
    assert html.count('class="matrix"') == 2
    (figures, _) = task_results_of_run(tmp_path / "run")
    assert figures.figures["mcc"] == callback.history["fpb"][0]["mcc"]


def test_a_score_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    module = _Module()
    with torch.no_grad():
        module.network.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = torch.nan
    message = r"task fpb, row \d: the scores are not finite: the tensor model.layers.1.mlp.up_proj"
    with pytest.raises(FloatingPointError, match=message):
        _fit(tmp_path, module, FinancialEvaluation(["fpb"], _data_dir(tmp_path / "data")))
    assert _kept(tmp_path, "*") == []
    assert module.losses == []


def test_wrong_data_end_the_run_before_training(tmp_path: Path) -> None:
    data_dir = _data_dir(tmp_path)
    (tmp_path / "fpb" / "validation.jsonl").write_text('{"text": "Foo", "label": "fine"}')
    module = _Module()
    with pytest.raises(ValueError, match=r"validation\.jsonl:1: label 'fine'"):
        _fit(tmp_path, module, FinancialEvaluation(["fpb"], data_dir))
    with pytest.raises(FileNotFoundError, match="tst"):
        _fit(tmp_path, module, FinancialEvaluation(["fpb"], data_dir, split="tst"))
    assert module.losses == []


def test_what_it_cannot_evaluate_is_said(tmp_path: Path) -> None:
    data_dir = _data_dir(tmp_path / "data")

    def trainer() -> Trainer:
        return tiny_trainer(tmp_path, [FinancialEvaluation(["fpb"], data_dir)])

    with pytest.raises(TypeError, match="a datamodule with a tokenizer, which TokenData has not"):
        trainer().fit(_Module(), datamodule=TokenData(2))
    with pytest.raises(TypeError, match="one of transformers, which PlainModule has not"):
        trainer().fit(PlainModule(), datamodule=_Data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "tasks is empty"),
        ({"batch_tokens": 0}, "batch_tokens 0 is below 1"),
        ({"every_n_steps": 0}, "every_n_steps=0 is below 1"),
        ({"before": False, "after": False}, "nothing to do"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinancialEvaluation(**({"tasks": ["fpb"], "data_dir": "."} | arguments))


def _fit_on_a_rank(process_rank: int, world_size: int, folder: str) -> list[int]:
    asked: list[int] = []
    callback = FinancialEvaluation(TASKS, f"{folder}/data", after=False)
    whole = callback._predict

    def counted(*args: Any) -> Any:
        before = num_run[0]
        answers = whole(*args)
        asked.append(num_run[0] - before)
        return answers

    callback._predict = counted  # type: ignore[method-assign, assignment]
    module = _Module()
    num_run = [0]
    module.network.model.register_forward_pre_hook(
        lambda _, __, kwargs: num_run.__setitem__(0, num_run[0] + len(kwargs["input_ids"])),
        with_kwargs=True,
    )
    logger = CSVLogger(folder, name="", version="ranks")
    trainer = tiny_trainer(
        Path(folder), [callback], devices=world_size, strategy="ddp", logger=logger,
        plugins=[RanksEnvironment()], max_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=_Data(1))
    return asked


@pytest.mark.slow
def test_ranks_share_the_rows_and_log_what_one_process_would(tmp_path: Path) -> None:
    data_dir = _data_dir(tmp_path / "data")
    asked = run_ranks(_fit_on_a_rank, 2, str(tmp_path), timeout_s=120)
    # Each with the row of the shared beginning.
    assert asked == [[4, 3], [3, 2]]
    _fit(tmp_path / "one", _Module(), FinancialEvaluation(TASKS, data_dir, after=False))
    found = [
        [row for row in _rows(folder) if any(key.startswith("eval/") for key in row)]
        for folder in (tmp_path / "ranks", tmp_path / "one")
    ]
    assert len(found[0]) == 2
    assert found[0] == found[1]
    # One process wrote, and all rows in order.
    assert _kept(tmp_path, "results.json") == [0]
    rows = [
        read_objects(folder / "eval/0/predictions.jsonl", {})
        for folder in (tmp_path, tmp_path / "one")
    ]
    assert len(rows[0]) > 5
    for ours, alone in zip(*rows, strict=True):
        scores = ours.pop("scores")
        assert scores == pytest.approx(alone.pop("scores"), abs=1e-4)
        assert ours == alone
