"""How many prompts per second does `score` answer beside lm-evaluation-harness, with equal answers?

Both get the same model, prompts and choices, in float32, in turn. The harness is called as its
own tasks call it, one request per choice, at the fastest of some batch sizes.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.data.corpus import SyntheticCorpus
from fingpt_lightning.data.tokenizers import train_cached_tokenizer
from fingpt_lightning.evaluation.scoring import score
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.tasks import Example, find_task, read_rows

QUESTION = (
    "How many prompts a second does the scoring engine answer beside lm-evaluation-harness, and are"
    " the answers the same?"
)
OURS, THEIRS = "fingpt", "lm-evaluation-harness"
# Task of each ratio, by its key in the summary.
RATIOS = {
    "prompts_per_s_ratio_one_token_labels": "fpb",
    "prompts_per_s_ratio_nwgi7": "nwgi7",
}
_BATCH_SIZES = (1, 4, 16, 64)
_TUNING_ROWS = 16
Answers = list[int]


def main() -> None:
    """Measures both in turn on each task, several times, and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data_dir", type=Path, help="holds fpb/ and nwgi/; not with --toy")
    parser.add_argument("--limit", type=int, default=100, help="rows of each task")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a random model and a few made-up rows")
    options = parser.parse_args()
    if not options.toy and options.data_dir is None:
        parser.error("--data_dir is needed, but with --toy")
    with tempfile.TemporaryDirectory() as name:
        if options.toy:
            options.limit, options.repeats = 3, 1
            options.model, options.data_dir = str(toy_model(Path(name))), toy_data(Path(name))
        settings = {
            "model": "toy" if options.toy else options.model,
            "dtype": "float32",
            "limit": options.limit,
            "repeats": options.repeats,
        }
        record = new_record(QUESTION, settings)
        record["rows"] = _measure(options)
    record["summary"] = summary(record["rows"])
    write_record(options.json, record, table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = load_model(options.model)
    tokenizer = model.require_tokenizer()
    harness = Harness(model.network, tokenizer) if find_spec("lm_eval") else None
    if harness is None:
        print(f"{THEIRS} is not installed (pip install lm_eval): measuring {OURS} alone")
    rows = []
    for name in RATIOS.values():
        examples = read_rows(find_task(name), options.data_dir, "validation").examples
        examples = examples[: options.limit]

        def ours(examples: list[Example] = examples) -> Answers:
            found = score(model.network, tokenizer, examples, relative=True)
            return [prediction.choice or 0 for prediction in found]

        contenders: dict[str, Callable[[], Answers]] = {OURS: ours}
        if harness is not None:
            harness.choose_batch_size(examples[:_TUNING_ROWS])
            contenders = {THEIRS: lambda own=examples: harness.answer(own), **contenders}  # type: ignore[misc]
        rows += _measure_task(name, contenders, len(examples), options.repeats)
    return rows


def _measure_task(
    task: str, contenders: dict[str, Callable[[], Answers]], num_rows: int, repeats: int
) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {contender: [] for contender in contenders}
    answers: dict[str, Answers] = {}
    for repeat in range(repeats + 1):
        for contender, answer in contenders.items():
            started_s = time.perf_counter()
            answers[contender] = answer()
            if repeat > 0:  # the first warms up
                rates[contender].append(num_rows / (time.perf_counter() - started_s))
    baseline = next(iter(contenders))
    medians = {contender: spread(own)["median"] for contender, own in rates.items()}
    return [
        {
            "contender": contender,
            "task": task,
            "num_prompts": num_rows,
            "repeats": repeats,
            "prompts_per_s": spread(own),
            "ratio_to_harness": medians[contender] / medians[THEIRS] if THEIRS in medians else None,
            "share_identical_predictions": sum(
                map(int.__eq__, answers[contender], answers[baseline])
            )
            / num_rows,
        }
        for contender, own in rates.items()
    ]


class Harness:
    """lm-evaluation-harness's own backend for Hugging Face models.

    Args:
        network: Network that is shared with the other contender.
        tokenizer: Tokenizer of the network.
    """

    def __init__(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._backend = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=1)

    def choose_batch_size(self, examples: Sequence[Example]) -> int:
        """Sets the fastest of some batch sizes on a few rows, and returns it."""
        seconds = {}
        for size in _BATCH_SIZES:
            self._backend.batch_size_per_gpu = size
            started_s = time.perf_counter()
            self.answer(examples)
            seconds[size] = time.perf_counter() - started_s
        fastest = min(seconds, key=lambda size: seconds[size])
        self._backend.batch_size_per_gpu = fastest
        return fastest

    def answer(self, examples: Sequence[Example]) -> Answers:
        """The most likely choice of each row, by one request per choice as its tasks make them."""
        from lm_eval.api.instance import Instance

        requests = [
            Instance("loglikelihood", {}, (example.prefix + example.prompts[0], choice), index)
            for example in examples
            for index, choice in enumerate(example.choices)
        ]
        scores = iter(self._backend.loglikelihood(requests, disable_tqdm=True))
        found = []
        for example in examples:
            own = [next(scores)[0] for _ in example.choices]
            found.append(own.index(max(own)))
        return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The ratios that answer the question; None where the harness is not installed."""
    ours = {row["task"]: row for row in rows if row["contender"] == OURS}
    ratios = {key: ours[task]["ratio_to_harness"] for key, task in RATIOS.items()}
    if None in ratios.values():
        return {**ratios, "share_identical_predictions": None}
    shares = [row["share_identical_predictions"] for row in ours.values()]
    return {**ratios, "share_identical_predictions": min(shares)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = [
        [
            f"{row['task']}: {row['contender']}",
            f"{row['prompts_per_s']['median']:.2f}",
            f"{row['prompts_per_s']['p10']:.2f} - {row['prompts_per_s']['p90']:.2f}",
            "-" if row["ratio_to_harness"] is None else f"{row['ratio_to_harness']:.2f}",
            f"{row['share_identical_predictions']:.3f}",
        ]
        for row in rows
    ]
    header = ["", "prompts/s", "p10 - p90", "ratio to the harness", "identical answers"]
    return markdown_table(header, lines)


def toy_model(folder: Path) -> Path:
    """A folder with a random Llama of one block and its tokenizer."""
    corpus = SyntheticCorpus(20, 1)
    tokenizer = train_cached_tokenizer(corpus, 300, folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        hidden_size=24,
        intermediate_size=39,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def toy_data(folder: Path) -> Path:
    """A data folder with three rows of ``fpb`` and of ``nwgi``."""
    for task, label in (("fpb", "label"), ("nwgi", "label7")):
        (folder / task).mkdir()
        rows = [{"text": f"Share {number} rose", label: "neutral"} for number in range(3)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / task / "validation.jsonl").write_text("".join(lines))
    return folder


if __name__ == "__main__":
    main()
