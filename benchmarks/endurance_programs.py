"""The commands of the endurance benchmark, at the smallest size that exercises each completely."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.endurance_trials import Child, Program
from fingpt_lightning.cli import trainer as _cli_trainer  # noqa: F401  # a child has it at once
from fingpt_lightning.data import TextBlocks  # noqa: F401
from fingpt_lightning.data.corpus import SyntheticCorpus
from fingpt_lightning.data.tokenizers import train_tokenizer
from fingpt_lightning.decomposition import command as _decompose  # noqa: F401
from fingpt_lightning.deploy import export_command as _export  # noqa: F401
from fingpt_lightning.deploy import label_command, labelling
from fingpt_lightning.files import write_whole
from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.modules import LowRankPretraining  # noqa: F401
from fingpt_lightning.reporting import command as _report  # noqa: F401

PROGRAMS = ("fit", "cache", "export", "label", "decompose", "report", "sweep")
_STEPS, _STEPS_BEFORE = 5, 2
_RUN = "tiny"
_CHUNK_ROWS, _ROWS = 8, 40
_CONFIG = {
    "trainer": {
        "accelerator": "cpu", "max_steps": _STEPS, "max_epochs": -1, "logger": False,
        "val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1,
        "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_progress_bar": False,
    },
    "model": {
        "class_path": "fingpt_lightning.modules.LowRankPretraining",
        "init_args": {
            "preset": "gpt2-nano", "num_layers": 1, "width": 32, "num_heads": 2,
            "num_positions": 32, "rank": 8, "learning_rate": 0.002, "warmup": 1,
        },
    },
    "data": {
        "class_path": "fingpt_lightning.data.TextBlocks",
        "init_args": {
            "vocab_size": 300, "num_synthetic_items": 40, "val_share": 0.2, "block_length": 32,
            "batch_size": 2,
        },
    },
    "last_checkpoint": {"every_n_train_steps": 1},
}  # fmt: skip
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC")  # time at which a page was made
_TRIAL = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
folder = Path(words[words.index("--trainer.default_root_dir") + 1])
arguments = json.loads(Path(words[words.index("--config", 3) + 1]).read_text())
rate = arguments["model"]["init_args"]["learning_rate"]
(folder / "metrics.csv").write_text(f"step,VAL_LOSS\\n1,{rate + 1}\\n2,{rate}\\n")
(folder / "config.yaml").write_text(json.dumps({
    "model": arguments["model"], "trainer": {"logger": False, "callbacks": None},
    "best_checkpoint": {}, "last_checkpoint": {}, "data": {"init_args": {}}}))
""".replace("VAL_LOSS", VAL_LOSS)


def make_materials(folder: Path) -> dict[str, Program]:
    """Makes models, texts and runs that the commands read, and the commands.

    Args:
        folder: Folder that is made; it stays while the commands run.
    """
    folder.mkdir(parents=True)
    # Several parts of few rows: the child processes inherit it.
    for module in (labelling, label_command):
        setattr(module, "CHUNK_ROWS", _CHUNK_ROWS)  # noqa: B010  # a constant, to type checkers
    (folder / f"{_RUN}.yaml").write_text(yaml.safe_dump(_CONFIG))
    texts = [piece.text for piece in SyntheticCorpus(200, seed=1).pieces()]
    tokenizer = train_tokenizer(texts, 400)
    for name, seed in (("model", 1), ("other", 2)):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=400, n_positions=256, n_embd=32, n_layer=2, n_head=2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = (json.dumps({"text": text[:80]}) for text in texts[:_ROWS])
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
    _made(folder, "runs_before", _fit_words(folder, folder / "cache"), max_steps=_STEPS_BEFORE)
    _made(folder, "export_before", _export_words(folder, "other"))
    (folder / "trial_of_fingpt.py").write_text(_TRIAL)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(_sweep(folder)))
    return {
        "fit": _fit(folder),
        "cache": _cache(folder),
        "export": _export_program(folder),
        "label": _label(folder),
        "decompose": _decompose_program(folder),
        "report": _report_program(folder),
        "sweep": _sweep_program(folder),
    }


def _made(folder: Path, name: str, words: list[str], max_steps: int | None = None) -> None:
    (folder / name).mkdir()
    if max_steps is not None:
        words = [*words, "--trainer.max_steps", str(max_steps)]
    child = Child(words, folder / name, folder)
    if status := child.wait():
        raise RuntimeError(f"{words} ended with {status}: {child.log.read_text()}")


def _fit_words(folder: Path, cache: Path) -> list[str]:
    return ["fit", "--config", str(folder / f"{_RUN}.yaml"), "--data.cache_dir", str(cache)]


def _fit(materials: Path) -> Program:
    """Resumes the newest run of the config, one of which exists before."""

    def words(folder: Path) -> list[str]:
        return [*_fit_words(materials, materials / "cache"), "--ckpt_path", "last"]

    def prepare(folder: Path) -> None:
        shutil.copytree(materials / "runs_before" / "runs", folder / "runs")

    return Program(
        prepare, words, lambda folder, _: _lost_checkpoint(materials, folder), _last_state
    )


def _lost_checkpoint(materials: Path, folder: Path) -> str | None:
    for before in (materials / "runs_before").rglob("*.ckpt"):
        there = folder / before.relative_to(materials / "runs_before")
        if not there.is_file() or there.read_bytes() != before.read_bytes():
            return f"{there.relative_to(folder)} is not what it was"
    for path in folder.rglob("*.ckpt"):
        try:
            torch.load(path, weights_only=True)["state_dict"]
        except Exception as error:
            return f"{path.relative_to(folder)}: {type(error).__name__}"
    return None


def _last_state(folder: Path) -> Any:
    paths = sorted(folder.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    state = torch.load(paths[-1], weights_only=True)
    digest = hashlib.sha256()
    for name, tensor in state["state_dict"].items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    for moments in state["optimizer_states"][0]["state"].values():
        digest.update(b"".join(value.numpy().tobytes() for value in moments.values()))
    return state["global_step"], digest.hexdigest()


def _cache(materials: Path) -> Program:
    """Trains a tokenizer and tokenizes, then takes one step."""

    def words(folder: Path) -> list[str]:
        options = ["--trainer.fast_dev_run", "1", "--data.num_synthetic_items", "600"]
        return [*_fit_words(materials, folder / "cache"), *options]

    def outcome(folder: Path) -> Any:
        return _digests(folder / "cache")

    return Program(lambda _: None, words, _lost_cache, outcome)


def _lost_cache(folder: Path, _: Any) -> str | None:
    for header in (folder / "cache").glob("tokens-*.json"):
        found = json.loads(header.read_text())
        size = header.with_suffix(".bin").stat().st_size
        if size != found["num_tokens"] * 2:
            return f"{header.name} tells of {found['num_tokens']} tokens, there are {size} bytes"
    return None


def _export_words(materials: Path, model: str) -> list[str]:
    given = ["--model", str(materials / model), "--format", "hf", "--output", "out"]
    return ["export", *given, "--overwrite"]


def _export_program(materials: Path) -> Program:
    """Replaces an export of another model."""
    before = _digests(materials / "export_before" / "out")

    def prepare(folder: Path) -> None:
        shutil.copytree(materials / "export_before" / "out", folder / "out")

    def lost(folder: Path, whole: Any) -> str | None:
        now = _digests(folder / "out")
        return None if now in (before, whole) else f"out is neither export: {sorted(now)}"

    return Program(
        prepare,
        lambda _: _export_words(materials, "model"),
        lost,
        lambda folder: _digests(folder / "out"),
    )


def _label(materials: Path) -> Program:
    def words(folder: Path) -> list[str] | None:
        if (folder / "out.jsonl").exists():
            return None
        given = ["--model", str(materials / "model"), "--input", str(materials / "rows.jsonl")]
        return ["label", *given, "--task", "fpb", "--output", "out.jsonl", "--device", "cpu"]

    def lost(folder: Path, _: Any) -> str | None:
        file = folder / "out.jsonl"
        if file.exists() and len(file.read_text().splitlines()) != _ROWS:
            return "out.jsonl is cut"
        return None

    def outcome(folder: Path) -> str:
        return (folder / "out.jsonl").read_text()

    return Program(lambda _: None, words, lost, outcome, keeps_parts=True)


def _decompose_program(materials: Path) -> Program:
    def words(folder: Path) -> list[str] | None:
        if (folder / "out").exists():
            return None
        given = ["--model", str(materials / "model"), "--rank_ratio", "0.5", "--output", "out"]
        return ["decompose", *given, "--device", "cpu"]

    def lost(folder: Path, _: Any) -> str | None:
        names = {"model.safetensors", "config.json", "decomposition.json", "tokenizer.json"}
        missing = names - _digests(folder / "out").keys()
        return f"out has no {min(missing)}" if (folder / "out").exists() and missing else None

    def outcome(folder: Path) -> Mapping[str, str]:
        return _digests(folder / "out")

    return Program(lambda _: None, words, lost, outcome, keeps_parts=True)


def _report_program(materials: Path) -> Program:
    """Replaces a page."""

    def words(_: Path) -> list[str]:
        run = next((materials / "runs_before" / "runs").iterdir())
        return ["report", str(run), "--output", "report.html"]

    def lost(folder: Path, _: Any) -> str | None:
        page = (folder / "report.html").read_text()
        return None if page.rstrip().endswith("</html>") else "report.html is cut"

    return Program(
        lambda folder: write_whole(folder / "report.html", "<html>before</html>"),
        words,
        lost,
        lambda folder: _TIME.sub("", (folder / "report.html").read_text()),
    )


def _sweep(materials: Path) -> dict[str, Any]:
    config = str(materials / f"{_RUN}.yaml")
    rates = {"learning_rate": {"values": [0.003, 0.001]}}
    return {
        "method": "grid",
        "metric": {"name": VAL_LOSS, "goal": "minimize"},
        "parameters": {"model": {"parameters": {"init_args": {"parameters": rates}}}},
        "command": [
            *("${interpreter}", "-S", "-E", str(materials / "trial_of_fingpt.py"), "fit"),
            *("--config", config, "--config", "${args_json_file}"),
        ],
    }


def _sweep_program(materials: Path) -> Program:
    """Two trials, each of a program that only writes what a run would."""

    def words(folder: Path) -> list[str]:
        if (folder / "out" / "study.sqlite").exists():
            return ["sweep", "--resume", "out"]
        return ["sweep", str(materials / "sweep.yaml"), "--local", "--output", "out"]

    def lost(folder: Path, _: Any) -> str | None:
        file = folder / "out" / "sweep.json"
        if not file.exists():
            return None
        for trial in json.loads(file.read_text())["trials"]:
            figures = folder / "out" / "trials" / f"{trial['number']:03d}" / "metrics.csv"
            if trial["state"] == "finished" and not figures.is_file():
                return f"trial {trial['number']} has no metrics"
            if trial["state"] == "failed":
                return f"trial {trial['number']} failed"
        return None

    def outcome(folder: Path) -> Any:
        record = json.loads((folder / "out" / "sweep.json").read_text())
        trials = [(trial["state"], trial["value"]) for trial in record["trials"]]
        return trials, (folder / "out" / "best.yaml").read_text().count("\n"), record["best"]

    return Program(lambda _: None, words, lost, outcome)


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if sys.platform != "linux":
    raise RuntimeError("the endurance benchmark needs Linux: it forks, mounts and counts on /proc")
