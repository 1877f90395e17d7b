"""What does the program do with files and words that are damaged, mistaken or malicious?

Each input is a valid one with a mutation drawn from a seed: cut, flipped bits, other keys, other
types, huge numbers, NaN, deep nesting, pickles. It goes through ``fingpt`` in a fork of one parent
that has imported everything, in a folder of its own, with a limit of time and memory. Counted are
pickles and YAML tags that ran code (each would leave a file), tracebacks, deaths by a signal,
runs over the limit, and failures that do not end with the program's one line.
"""

import argparse
import copy
import faulthandler
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import fingpt_lightning.cli.trainer
import fingpt_lightning.decomposition.command
import fingpt_lightning.deploy.export_command
import fingpt_lightning.deploy.generate_command
import fingpt_lightning.deploy.label_command
import fingpt_lightning.evaluation.command  # noqa: F401  # all that a fork would import
from benchmarks.record import markdown_table, new_record, write_record
from fingpt_lightning.cli import sweep as _sweep_command  # noqa: F401
from fingpt_lightning.cli.main import main as run_program
from fingpt_lightning.data.synthetic_news import synthetic_news
from fingpt_lightning.data.tokenizers import train_tokenizer
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.metric_keys import VAL_LOSS
from fingpt_lightning.models.adapting import adapt, save_adapter

QUESTION = (
    "Of mutated configs, task files, sweep files, adapters, networks, tokenizers, texts and command"
    " lines: does any run code, end in a traceback, die, or take over 30 seconds?"
)
LIMIT_S = 30.0
_MAX_DATA_BYTES = 6 * 2**30
_POLL_S = 0.01
_SHOWN_LINES = 12
_CANARY = "canary"
_ROOT = Path(__file__).parents[1]
_VOCABULARY = 300
_LONG = 100_000

Words = list[str]


class Case(NamedTuple):
    """One mutated input.

    Attributes:
        kind: Kind of the input that was mutated.
        mutation: Description of the mutation.
        words: Command line, with paths in the case's folder.
    """

    kind: str
    mutation: str
    words: Words


class Outcome(NamedTuple):
    """The outcome of one input.

    Attributes:
        status: Exit status; negative for a signal.
        output: Whole output of the program.
        seconds: From fork to end.
        peak_mib: Largest resident memory.
        has_run_code: Whether the canary's file exists.
    """

    status: int
    output: str
    seconds: float
    peak_mib: float
    has_run_code: bool

    @property
    def has_traceback(self) -> bool:
        """Whether an exception was not caught."""
        return "Traceback (most recent call last)" in self.output

    @property
    def is_silent(self) -> bool:
        """Whether it failed without the program's line."""
        return self.status != 0 and "fingpt: error" not in self.output


class Payload:
    """Leaves a file where it is unpickled.

    Args:
        file: Path of the file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


def main() -> None:
    """Runs all inputs and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--per_kind", type=int, default=50, help="inputs of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at_once", type=int, default=2, help="forks")
    parser.add_argument("--show", action="store_true", help="print every input's last line")
    options = parser.parse_args()
    settings = {
        "per_kind": options.per_kind,
        "kinds": options.kinds,
        "seed": options.seed,
        "limit_s": LIMIT_S,
    }
    record = new_record(QUESTION, settings)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        make_materials(base)
        cases = [(kind, number) for kind in options.kinds for number in range(options.per_kind)]
        found: list[tuple[Case, Outcome]] = []
        for case, outcome in run_cases(cases, base, Path(folder), options.seed, options.at_once):
            found.append((case, outcome))
            if options.show or is_wrong(outcome):
                last = " | ".join(outcome.output.strip().splitlines()[-_SHOWN_LINES:])[-1500:]
                text = f"{case.kind} ({case.mutation}): {outcome.status} in {outcome.seconds:.1f} s"
                print(f"{text}, {outcome.peak_mib:.0f} MiB: {last}", file=sys.stderr)
    record["rows"] = [
        row_of(kind, [o for c, o in found if c.kind == kind]) for kind in options.kinds
    ]
    record["summary"] = summary([outcome for _, outcome in found])
    write_record(options.json, record, table(record["rows"]))


def is_wrong(outcome: Outcome) -> bool:
    """Whether any of the counted events happened."""
    return (
        outcome.has_run_code
        or outcome.has_traceback
        or outcome.is_silent
        or outcome.status < 0
        or outcome.seconds > LIMIT_S
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """The counts that answer the question."""
    return {
        "inputs": len(outcomes),
        "code_run": sum(outcome.has_run_code for outcome in outcomes),
        "tracebacks": sum(outcome.has_traceback for outcome in outcomes),
        "over_30_s": sum(outcome.seconds > LIMIT_S for outcome in outcomes),
        "died_by_signal": sum(outcome.status < 0 for outcome in outcomes),
        "failed_without_a_line": sum(outcome.is_silent for outcome in outcomes),
    }


def row_of(kind: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The counts of one kind, its exit statuses, and its slowest and largest input."""
    statuses = Counter(str(outcome.status) for outcome in outcomes)
    return {
        "kind": kind,
        **summary(outcomes),
        "statuses": dict(sorted(statuses.items())),
        "longest_s": round(max(outcome.seconds for outcome in outcomes), 1),
        "peak_mib": round(max(outcome.peak_mib for outcome in outcomes)),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    keys = ("inputs", "code_run", "tracebacks", "over_30_s", "died_by_signal")
    header = ["kind", *keys, "failed_without_a_line", "statuses", "longest_s", "peak_mib"]
    cells = []
    for row in rows:
        statuses = ", ".join(f"{status}: {number}" for status, number in row["statuses"].items())
        cells.append([str(row[key]) if key != "statuses" else statuses for key in header])
    return markdown_table(header, cells)


def run_cases(
    cases: Sequence[tuple[str, int]], base: Path, parent: Path, seed: int, at_once: int = 1
) -> Iterator[tuple[Case, Outcome]]:
    """Makes inputs and runs them.

    Args:
        cases: Kind and number of each.
        base: Materials of `make_materials`.
        parent: Folder for the folders of the cases.
        seed: Seed of all mutations.
        at_once: Largest number of forks at a time.
    """
    waiting = list(cases)
    running: list[_Fork] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            kind, number = waiting.pop(0)
            folder = parent / f"{kind}-{number}"
            folder.mkdir()
            draw = random.Random(f"{seed} {kind} {number}")
            mutation, words = KINDS[kind](draw, base, folder)
            running.append(_Fork(Case(kind, mutation, words), folder))
        time.sleep(_POLL_S)
        for fork in list(running):
            if (outcome := fork.poll()) is not None:
                running.remove(fork)
                yield fork.case, outcome


class _Fork:
    """A case that runs in a fork of this process."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self._folder = case, folder
        self._log = folder.with_suffix(".log")
        self._started_s = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run_child(case.words, folder, self._log)

    def poll(self) -> Outcome | None:
        """The outcome, once there is one."""
        pid, status, usage = os.wait4(self._pid, os.WNOHANG)
        seconds = time.monotonic() - self._started_s
        if pid == 0 and seconds > LIMIT_S:
            os.killpg(self._pid, signal.SIGKILL)
            _, status, usage = os.wait4(self._pid, 0)
        elif pid == 0:
            return None
        output = self._log.read_text(errors="replace")
        has_run_code = any(self._folder.rglob(_CANARY)) or (self._folder / _CANARY).exists()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._log.unlink()
        peak_mib = usage.ru_maxrss / 1024
        return Outcome(os.waitstatus_to_exitcode(status), output, seconds, peak_mib, has_run_code)


def _run_child(words: Words, folder: Path, log: Path) -> None:
    """Runs the program and ends the process, whatever happens."""
    status = 99
    try:
        os.setsid()
        os.chdir(folder)
        with log.open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 0)
        resource.setrlimit(resource.RLIMIT_DATA, (_MAX_DATA_BYTES, _MAX_DATA_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.dump_traceback_later(LIMIT_S - 2, file=2)
        try:
            run_program(words)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 98
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


# --- what is mutated -----------------------------------------------------------------------------


def make_materials(base: Path) -> None:
    """Makes a valid input of each kind; needs some seconds.

    Args:
        base: New folder for them.

    Raises:
        RuntimeError: The program refused a valid input.
    """
    model = base / "model"
    model.mkdir(parents=True)
    texts = [item.text for item in synthetic_news(40, 1)]
    tokenizer = train_tokenizer(texts, _VOCABULARY)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    network = LlamaForCausalLM(config)
    network.save_pretrained(model)
    tokenizer.save_pretrained(model)
    adapt(network, AdapterOptions(rank=2), seed=1)
    save_adapter(network, base / "adapter", base=str(model))
    rows = [{"text": text, "label": "positive"} for text in texts[:3]]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (base / "rows.jsonl").write_text(lines)
    blocks = _ROOT / "configs"
    settings = yaml.safe_load((blocks / "debug_quickstart.yaml").read_text())
    for key in ("trainer", "model", "data"):
        settings[key] = yaml.safe_load((blocks / settings[key]).read_text())
    settings["trainer"] |= {"max_steps": 2, "logger": False, "enable_progress_bar": False}
    (base / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    sweep = {
        "method": "random",
        "metric": {"name": VAL_LOSS, "goal": "minimize", "target": 0.1},
        "run_cap": 2,
        "early_terminate": {"type": "hyperband", "min_iter": 1},
        "parameters": {
            "model": {
                "parameters": {
                    "init_args": {
                        "parameters": {
                            "rank": {"values": [4, 8]},
                            "learning_rate": {"min": 0.001, "max": 0.01},
                        }
                    }
                }
            }
        },
        "command": [
            "${env}", "${interpreter}", "-m", "fingpt_lightning", "fit", "--config",
            str(base / "config.yaml"), "--config", "${args_json_file}",
        ],
    }  # fmt: skip
    (base / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    shutil.copyfile(_ROOT / "fingpt_lightning" / "tasks" / "fpb.yaml", base / "task.yaml")
    run = str(base / "run")
    fit = ["fit", "--config", str(base / "config.yaml"), "--trainer.default_root_dir", run]
    export = ["export", "--model", str(model), "--format", "gguf", "--device", "cpu"]
    for words in (fit, [*export, "--output", str(base / "gguf")]):
        fork = _Fork(Case("valid", "none", words), _made(base / "work"))
        while (outcome := fork.poll()) is None:
            time.sleep(_POLL_S)
        if outcome.status:
            raise RuntimeError(f"{words[0]}: {outcome.output}")
    (base / "model.gguf").write_bytes(next((base / "gguf").glob("*.gguf")).read_bytes())
    checkpoint = base / "run" / "checkpoints" / "last.ckpt"
    (base / "last.ckpt").write_bytes(checkpoint.read_bytes())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _generate(model: Path, *more: str) -> Words:
    few = ("--max_new_tokens", "2", "--device", "cpu")
    return ["generate", "--model", str(model), "--prompt", "Profit rose", *few, *more]


def _fit(config: Path) -> Words:
    return ["fit", "--config", str(config)]


def _of_config(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    mutation = _mutate_yaml(draw, base / "config.yaml", folder / "config.yaml")
    verb = draw.choice(("fit", "fit", "plan"))
    words = [verb, "--config", str(folder / "config.yaml")]
    if verb == "fit":  # a valid config trains, and would run for as long as it requests
        words += ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"]
        words += ["--model.preset", "gpt2-nano"]  # a cut config may have left the sizes out
    return f"{verb}, {mutation}", words


def _of_task(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    mutation = _mutate_yaml(draw, base / "task.yaml", folder / "task.yaml")
    words = ["label", "--model", str(base / "model"), "--task", str(folder / "task.yaml")]
    out = str(folder / "out.jsonl")
    return mutation, [*words, "--input", str(base / "rows.jsonl"), "--output", out]


def _of_sweep(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    mutation = _mutate_yaml(draw, base / "sweep.yaml", folder / "sweep.yaml")
    # An input that passes all checks is refused by the folder, and runs no trial.
    used = _made(folder / "used")
    (used / "file").touch()
    return mutation, ["sweep", str(folder / "sweep.yaml"), "--local", "--output", str(used)]


def _of_adapter(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    adapter = folder / "adapter"
    shutil.copytree(base / "adapter", adapter)
    if draw.random() < 0.7:
        mutation = _mutate_json(draw, adapter / "adapter_config.json")
    else:
        mutation = _mutate_safetensors(draw, adapter / "adapter_model.safetensors", folder)
    return mutation, _generate(base / "model", "--adapter", str(adapter))


def _of_safetensors(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    model = folder / "model"
    shutil.copytree(base / "model", model)
    mutation = _mutate_safetensors(draw, model / "model.safetensors", folder)
    if draw.random() < 0.5:
        return mutation, _generate(model)
    rest = ["--rank_ratio", "0.5", "--output", str(folder / "out"), "--device", "cpu"]
    return f"decompose, {mutation}", ["decompose", "--model", str(model), *rest]


def _of_network_config(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    model = folder / "model"
    shutil.copytree(base / "model", model)
    return _mutate_json(draw, model / "config.json"), _generate(model)


def _of_tokenizer(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    model = folder / "model"
    shutil.copytree(base / "model", model)
    name = draw.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    return f"{name}, {_mutate_json(draw, model / name)}", _generate(model)


def _of_gguf(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    file = folder / "model.gguf"
    content = (base / "model.gguf").read_bytes()
    mutation, mutated = _mutate_bytes(draw, content, folder, draw.choice((200, 4000, len(content))))
    file.write_bytes(mutated)
    return mutation, _generate(file)


def _of_checkpoint(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    file = folder / "last.ckpt"
    shutil.copytree(base / "run" / "tokenizer", folder / "tokenizer")
    if draw.random() < 0.5:
        content = (base / "last.ckpt").read_bytes()
        mutation, mutated = _mutate_bytes(draw, content, folder)
        file.write_bytes(mutated)
    else:
        contents = torch.load(base / "last.ckpt", weights_only=True)
        contents.pop("loops", None)
        mutation = _mutate_tree(draw, contents, [_Hostile(Payload(folder / _CANARY))])
        torch.save(contents, file)
    if draw.random() < 0.5:
        return mutation, _generate(file)
    more = ["--ckpt_path", str(file), "--trainer.logger", "false"]
    return f"validate, {mutation}", ["validate", *more]


def _of_text(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    content = (base / "rows.jsonl").read_bytes()
    if draw.random() < 0.5:
        rows = [json.loads(line) for line in content.splitlines()]
        mutation = _mutate_tree(draw, rows, [])
        lines = [_json_text(row) for row in rows] if isinstance(rows, list) else [str(rows)]
        content = "\n".join(lines).encode(errors="surrogatepass")
    else:
        mutation, content = _mutate_bytes(draw, content, folder)
    ending = draw.choice((".jsonl", ".jsonl", ".jsonl.gz", ".parquet", ".csv", ".json"))
    file = folder / f"rows{ending}"
    file.write_bytes(content)
    words = ["label", "--model", str(base / "model"), "--task", "fpb", "--input", str(file)]
    return f"{ending}, {mutation}", [*words, "--output", str(folder / "out.jsonl")]


def _of_command_line(draw: random.Random, base: Path, folder: Path) -> tuple[str, Words]:
    out = str(folder / "out")
    model = str(base / "model")
    valid = draw.choice(
        [
            _generate(base / "model", "--temperature", "0.7", "--top_k", "5", "--seed", "3"),
            [*_fit(base / "config.yaml"), "--trainer.max_steps", "1", "--model.rank", "4"],
            ["plan", "--config", str(base / "config.yaml"), "--model.rank", "4"],
            ["decompose", "--model", model, "--output", out, "--rank_ratio", "0.5"],
            ["export", "--model", model, "--output", out, "--format", "int8"],
            ["validate", "--ckpt_path", str(base / "last.ckpt"), "--trainer.logger", "false"],
            ["report", str(base / "run"), "--output", str(folder / "report.html")],
            ["label", "--model", model, "--task", "fpb", "--input", str(base / "rows.jsonl"),
             "--output", f"{out}.jsonl", "--batch_tokens", "100"],
            ["evaluate", "--model", model, "--tasks", "fpb", "--data_dir", str(base),
             "--output", out, "--limit", "2"],
        ]
    )  # fmt: skip
    words = list(valid)
    done = []
    for _ in range(draw.randint(1, 2)):
        index = draw.randrange(len(words))
        how = draw.choice(("drop", "double", "rename", "value", "insert"))
        done.append(how)
        if how == "drop" and len(words) > 1:
            del words[index]
        elif how == "double":
            words.insert(index, words[index])
        elif how == "rename":
            words[index] = _misspelled(draw, words[index])
        else:
            words[index : index + (how == "value")] = [draw.choice(_WORDS)]
    return f"{valid[0]}, {' and '.join(done)}", words


KINDS: dict[str, Callable[[random.Random, Path, Path], tuple[str, Words]]] = {
    "config": _of_config,
    "task": _of_task,
    "sweep": _of_sweep,
    "adapter": _of_adapter,
    "command_line": _of_command_line,
    "safetensors": _of_safetensors,
    "network_config": _of_network_config,
    "tokenizer": _of_tokenizer,
    "gguf": _of_gguf,
    "checkpoint": _of_checkpoint,
    "text": _of_text,
}

# --- mutations -----------------------------------------------------------------------------------

_WORDS = (
    "", "-", "--", "---", "-1", "0", "nan", "inf", "1e400", "9" * 40, "null", "[", "{}", "{a: [",
    "\N{PILE OF POO}", "a" * 5000, "/dev/zero", "/dev/null", "/", ".", "..", "~", "*", "%s%n", "[]",
    "--config", "--help", "--model", "!!python/object/apply:os.system [id]", "\x1b[31m", "a\nb",
)  # fmt: skip


class _Hostile(NamedTuple):
    """A value that is inserted as it is: trees hold it where it can be written."""

    value: object


def _values(draw: random.Random) -> object:
    """A value of another type or size."""
    return draw.choice(
        [
            None, True, -1, 0, 1, 2, 10**7, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"),
            float("inf"), "", "x", "nan", "a" * _LONG, "\0", "\N{PILE OF POO}", [], {}, [[]],
            list(range(1000)), {"a": {"b": 1}}, {str(key): key for key in range(1000)},
            _nested(100), _nested(2000), "../../etc/passwd", "/dev/zero", "os.system",
            "builtins.eval", "${env}", "{text}{text.__class__}", "(a+)+$",
        ]
    )  # fmt: skip


def _nested(depth: int) -> object:
    found: object = 1
    for _ in range(depth):
        found = [found]
    return found


def _places(tree: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*at, key)
            yield from _places(value, (*at, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:20]):
            yield (*at, index)
            yield from _places(value, (*at, index))


def _mutate_tree(draw: random.Random, tree: Any, hostile: Sequence[_Hostile]) -> str:
    """Changes one place of nested mappings and lists, in place; returns a description."""
    place = draw.choice(list(_places(tree)))
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    last = place[-1]
    how = draw.choice(["value"] * 6 + ["rename", "delete", "copy"] + ["hostile"] * bool(hostile))
    if how == "rename" and isinstance(inner, dict):
        inner[_misspelled(draw, str(last))] = inner.pop(last)
    elif how == "delete":
        del inner[last]
    elif how == "copy" and isinstance(inner, dict):
        inner[_misspelled(draw, str(last))] = copy.deepcopy(inner[last])
    elif how == "hostile":
        inner[last] = draw.choice(hostile).value
    else:
        how, inner[last] = "value", _values(draw)
    return f"{how} at {'.'.join(map(str, place))[:60]}"


def _misspelled(draw: random.Random, word: str) -> str:
    if len(word) < 2:
        return word + "x"
    index = draw.randrange(len(word) - 1)
    return word[:index] + word[index + 1] + word[index] + word[index + 2 :]


def _mutate_bytes(
    draw: random.Random, content: bytes, folder: Path, within: int | None = None
) -> tuple[str, bytes]:
    """Changes bytes; returns a description.

    Args:
        draw: Generator of all random choices.
        content: Bytes to change.
        folder: Folder where a pickle that is run leaves its file.
        within: Number of the first bytes, to which changes are limited.
    """
    within = min(within or len(content), len(content))
    how = draw.choice(
        ("cut", "flip", "flip", "flip", "zeros", "noise", "double", "empty", "pickle")
    )
    mutated = bytearray(content)
    index = draw.randrange(within)
    if how == "cut":
        del mutated[index:]
    elif how == "flip":
        for _ in range(draw.randint(1, 8)):
            mutated[draw.randrange(within)] ^= 1 << draw.randrange(8)
    elif how == "zeros":
        mutated[index : index + 64] = bytes(64)
    elif how == "noise":
        mutated[index:index] = draw.randbytes(64)
    elif how == "double":
        mutated[index:index] = mutated[: draw.randrange(1, within + 1)]
    elif how == "empty":
        mutated.clear()
    else:
        mutated[:] = _pickled(draw, folder)
    return f"bytes {how}", bytes(mutated)


def _pickled(draw: random.Random, folder: Path) -> bytes:
    payload = Payload(folder / _CANARY)
    if draw.random() < 0.5:
        return pickle.dumps(payload)
    buffer = io.BytesIO()
    torch.save({"state_dict": {}, "network_config": payload}, buffer)
    return buffer.getvalue()


def _mutate_json(draw: random.Random, file: Path) -> str:
    content = file.read_bytes()
    if draw.random() < 0.2:
        mutation, content = _mutate_bytes(draw, content, file.parent)
    else:
        tree = json.loads(content)
        mutation = _mutate_tree(draw, tree, [])
        content = _json_text(tree).encode(errors="surrogatepass")
    file.write_bytes(content)
    return mutation


def _json_text(tree: object) -> str:
    """Deeper than ``json`` can write, and with NaN."""
    if isinstance(tree, dict):
        members = ",".join(f"{json.dumps(str(k))}:{_json_text(v)}" for k, v in tree.items())
        return f"{{{members}}}"
    depth = 0
    while isinstance(tree, list) and len(tree) == 1:
        tree, depth = tree[0], depth + 1
    if isinstance(tree, list):
        inner = f"[{','.join(map(_json_text, tree))}]"
    else:
        inner = _json_text(tree) if isinstance(tree, dict) else json.dumps(tree)
    return "[" * depth + inner + "]" * depth


def _mutate_yaml(draw: random.Random, source: Path, file: Path) -> str:
    text = source.read_text()
    how = draw.random()
    if how < 0.2:
        mutation, content = _mutate_bytes(draw, text.encode(), file.parent)
        file.write_bytes(content)
        return mutation
    if how < 0.3:
        mutation, line = draw.choice(
            [
                ("tag", f"!!python/object/apply:os.system ['touch {file.parent / _CANARY}']"),
                ("aliases", _alias_bomb()),
                ("deep", "[" * 3000 + "]" * 3000),
                ("merge", "{<<: [1, 2]}"),
            ]
        )
        lines = [line for line in text.splitlines() if line.partition(":")[0].isidentifier()]
        key = draw.choice(lines).partition(":")[0]
        tree = yaml.safe_load(text)
        tree.pop(key, None)
        file.write_text(yaml.safe_dump(tree) + f"{key}: {line}\n")
        return mutation
    tree = yaml.safe_load(text)
    mutation = _mutate_tree(draw, tree, [])
    # JSON is YAML, and is written at any depth.
    file.write_text(_json_text(tree).replace("NaN", ".nan").replace("Infinity", ".inf"))
    return mutation


def _alias_bomb() -> str:
    levels = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 12):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        levels.append(f"&a{level} [{inner}]")
    return f"[{', '.join(levels)}]"


def _mutate_safetensors(draw: random.Random, file: Path, folder: Path) -> str:
    content = file.read_bytes()
    if draw.random() < 0.4:
        within = None if draw.random() < 0.3 else 3000
        mutation, content = _mutate_bytes(draw, content, folder, within)
    else:
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        mutation = _mutate_tree(draw, header, [])
        text = _json_text(header).encode(errors="surrogatepass")
        length = draw.choice([len(text)] * 8 + [2**40, 0])
        content = struct.pack("<Q", length) + text + content[8 + size :]
    file.write_bytes(content)
    return mutation


if __name__ == "__main__":
    # One thread: a fork has none of its parent's.
    torch.set_num_threads(1)
    os.environ.update(
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
        WANDB_MODE="offline", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    main()
