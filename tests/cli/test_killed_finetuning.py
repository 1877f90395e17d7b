"""What a finetuning has learned when it is killed, in every command that reads a model."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fingpt_lightning.cli.run_folders import read_checkpoint_lazily
from fingpt_lightning.models.adapting import adapter_state
from fingpt_lightning.models.formats.peft_adapter import PARTS, read_adapter, read_adapter_config
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.sources import find_adapter
from tests.support.killed_runs import Killed, status_of, write_base_and_rows

_FIT = [
    "fit", "--model", "fingpt_lightning.modules.QuantizedFinetuning", "--model.rank", "3",
    "--model.dora", "true", "--model.learning_rate", "0.05", "--data",
    "fingpt_lightning.data.FinancialInstructions", "--data.num_synthetic_items", "40",
    "--data.batch_size", "4", "--data.max_length", "400", "--trainer.accelerator", "cpu",
    "--trainer.max_epochs", "-1", "--trainer.val_check_interval", "1", "--trainer.logger", "false",
    "--trainer.check_val_every_n_epoch", "null", "--trainer.limit_val_batches", "1",
    "--trainer.num_sanity_val_steps", "0", "--last_checkpoint.every_n_train_steps", "2",
]  # fmt: skip


def _fit(folder: Path, base: Path, *words: str, max_steps: int = 6) -> int:
    steps = ["--trainer.max_steps", str(max_steps), "--model.base", str(base)]
    return status_of([*_FIT, *steps, "--trainer.default_root_dir", str(folder), *words])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``base``, ``run`` of a killed finetuning, and files for the commands."""
    folder = tmp_path_factory.mktemp("killed")
    write_base_and_rows(folder, 40)
    killed = f"--trainer.callbacks={Killed.__module__}.Killed"
    # By the highest loss, the best is an early one.
    status = _fit(folder / "run", folder / "base", killed, "--best_checkpoint.mode", "max")
    assert status == 1
    assert not list((folder / "run").glob("adapter*"))
    (folder / "prompts.txt").write_text("Shares of Foo\nGold\n")
    return folder


def _kept(file: Path) -> dict[str, torch.Tensor]:
    state = torch.load(file, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


_NAMES = {
    "--model {run}": "best",
    "--model {run}/checkpoints/best.ckpt": "best",
    "--model {run}/checkpoints/last.ckpt": "last",
    "--model {base} --adapter {run}": "best",
    "--model {base} --adapter {run}/checkpoints/last.ckpt": "last",
}
_COMMANDS = {
    "evaluate": "evaluate --tasks fpb --data_dir {data} --output {out} --overwrite",
    "generate": "generate --prompts {prompts} --output {out}/made.jsonl --max_new_tokens 3",
    "label": "label --task fpb --input {data}/fpb/validation.jsonl --output {out}/made.csv",
    "export": "export --format merged --output {out}/made",
}


def _words(line: str, place: Path, out: Path) -> list[str]:
    places = {name: place / name for name in ("run", "base", "data")}
    return line.format(**places, prompts=place / "prompts.txt", out=out).split()


@pytest.mark.parametrize("names", _NAMES)
def test_each_name_of_a_checkpoint_gives_its_adapters(
    names: str, place: Path, tmp_path: Path
) -> None:
    words = _words(f"export --format peft --output {{out}}/made {names}", place, tmp_path)
    assert status_of(words) == 0
    found = load_model(tmp_path / "made").network
    kept = _kept(place / "run" / "checkpoints" / f"{_NAMES[names]}.ckpt")
    assert sum(map(len, adapter_state(found).values())) == len(kept)
    for name, tensor in kept.items():
        assert torch.equal(found.get_parameter(name), tensor), name


@pytest.mark.parametrize("command", _COMMANDS)
@pytest.mark.parametrize("names", [next(iter(_NAMES)), list(_NAMES)[-1]])
def test_every_command_reads_the_adapters_of_a_checkpoint(
    names: str, command: str, place: Path, tmp_path: Path
) -> None:
    words = _words(f"{_COMMANDS[command]} {names} --device cpu", place, tmp_path)
    assert status_of(words) == 0
    if command == "evaluate":
        found = json.loads((tmp_path / "results.json").read_text())["adapter"]
        assert found == str(place / "run" / "checkpoints" / f"{_NAMES[names]}.ckpt")
    else:
        assert list(tmp_path.glob("made*"))


def test_best_and_last_are_two(place: Path) -> None:
    best, last = (_kept(place / f"run/checkpoints/{kind}.ckpt") for kind in ("best", "last"))
    assert not any(torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("command", ["generate", "label"])
def test_many_adapters_on_one_base_may_be_checkpoints(
    command: str, place: Path, tmp_path: Path
) -> None:
    run = place / "run"
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": "Gold", "adapter": name}) + "\n" for name in ("a", "b"))
    )
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "Gold", "client": name}) + "\n" for name in ("a", "b"))
    )
    words = {
        "generate": f"generate --prompts {tmp_path}/prompts.jsonl --output {tmp_path}/made.jsonl",
        "label": f"label --task fpb --input {tmp_path}/rows.jsonl --adapter_column client"
        f" --output {tmp_path}/made.jsonl",
    }[command]
    words += f" --model {place}/base --device cpu --adapters a={run},b={run}/checkpoints/last.ckpt"
    assert status_of(words.split()) == 0
    assert len((tmp_path / "made.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["run", "run/checkpoints/last.ckpt"])
def test_another_fit_starts_where_a_killed_one_was(name: str, place: Path, tmp_path: Path) -> None:
    fit = _fit(tmp_path, place / name, "--model.learning_rate", "1e-30", max_steps=1)
    assert fit == 0
    kind = "last" if "last" in name else "best"
    kept, found = _kept(place / f"run/checkpoints/{kind}.ckpt"), load_model(tmp_path / "adapter")
    for part, tensor in kept.items():
        torch.testing.assert_close(found.network.get_parameter(part), tensor)
    assert read_adapter_config(tmp_path / "adapter").base.path == str(place / "base")


def test_a_plan_knows_the_sizes_of_a_killedstatus_of(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = [*_FIT, "--model.base", str(place / "run"), "--trainer.max_steps", "4"]
    assert status_of(["plan", *words[1:]]) == 0, capsys.readouterr().err
    assert "parameters" in capsys.readouterr().out


def test_a_decomposition_names_the_way_to_one_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run = place / "run"
    words = f"decompose --model {run} --rank_ratio 0.5 --output {tmp_path}/made --device cpu"
    assert status_of(words.split()) == 1
    assert f"{run} has an adapter; fingpt export --format merged" in capsys.readouterr().err


def test_a_resumed_run_ends_with_the_best_of_its_whole_history(place: Path, tmp_path: Path) -> None:
    last = place / "run" / "checkpoints" / "last.ckpt"
    # With the next steps lowering the loss, the best by the highest one is of the run before.
    words = ["--ckpt_path", str(last), "--best_checkpoint.mode", "max"]
    words += ["--trainer.callbacks=callbacks.RunSummary"]
    assert _fit(tmp_path, place / "base", *words) == 0
    kept = _kept(place / "run" / "checkpoints" / "best.ckpt")
    for found in (load_model(tmp_path), load_model(tmp_path / "adapter_best")):
        for name, tensor in kept.items():
            assert torch.equal(found.network.get_parameter(name), tensor), name


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            {"state_dict": {}},
            r"bad\.ckpt is not a checkpoint of adapters: it has no adapter_config",
        ),
        (b"PK\x03\x04", r"bad\.ckpt is not a checkpoint that can be read safely"),
        (
            {"state_dict": {}, "adapter_config": 3},
            r"bad\.ckpt: 'adapter_config' holds a number, not an object",
        ),
        (
            {"state_dict": {"network.a.lora_A": 3}, "adapter_config": {}},
            r"bad\.ckpt: 'network\.a\.lora_A' holds a number, not a tensor",
        ),
        (
            {"state_dict": {7: torch.zeros(2)}, "adapter_config": {}},
            r"bad\.ckpt: 7 is not a tensor's name",
        ),
        (
            {
                "state_dict": {f"network.lm_head.{p}": torch.tensor(1.0) for p in PARTS},
                "adapter_config": {"peft_type": "LORA", "base_model_name_or_path": "x"},
            },
            r"bad\.ckpt: lora_A of layer lm_head has 0 axes",
        ),
        (
            {"state_dict": {}, "adapter_config": {"peft_type": "LORA"}},
            r"bad\.ckpt has no base_model_name_or_path",
        ),
        (
            {"state_dict": {}, "adapter_config": {"peft_type": "VERA"}},
            r"bad\.ckpt: peft_type 'VERA' is not LORA",
        ),
    ],
)
def test_what_is_not_an_adapter_is_refused_in_a_line(
    contents: Any, message: str, place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.ckpt"
    if isinstance(contents, bytes):
        file.write_bytes(contents)
    else:
        torch.save(contents, file)
    with pytest.raises(ValueError, match=message):
        read_adapter(find_adapter(file))


def test_a_pickle_that_torch_itself_stumbles_over_is_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "adapter_config": {}}, tmp_path / "good.ckpt")
    bad = tmp_path / "bad.ckpt"
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(bad, "w") as made:
        for name in good.namelist():
            content = good.read(name)
            # Reads what was never kept, of which torch makes a KeyError.
            made.writestr(name, b"\x80\x02h\x07." if name.endswith("data.pkl") else content)
    for read in (load_model, find_adapter, read_checkpoint_lazily):
        with pytest.raises(
            ValueError, match=r"bad\.ckpt is not a checkpoint that can be read safely"
        ):
            read(bad)


def test_an_integer_where_a_weight_belongs_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    saved = torch.load(place / "run/checkpoints/last.ckpt", weights_only=True)
    name = next(name for name in saved["state_dict"] if name.endswith("lora_B"))
    saved["state_dict"][name] = saved["state_dict"][name].to(torch.int32)
    torch.save(saved, tmp_path / "int.ckpt")
    with pytest.raises(ValueError, match=rf"int\.ckpt: {name.removeprefix('network.')} .*int32"):
        load_model(tmp_path / "int.ckpt")
