"""How fast are labels and texts from a quantized base with an adapter, beside one merged network?

All contenders answer the same rows in turn, in one process, with the weights of one model: merged
and unquantized, in NF4 or int8 as they are stored, and dequantized once. A plain loop over
transformers runs the merged network. Times are CPU times of the process: on a machine that others
use, only they can be compared.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.evaluation import toy_data, toy_model
from benchmarks.record import markdown_table, new_record, spread, write_record
from fingpt_lightning.deploy.generation import Prompt, complete
from fingpt_lightning.evaluation.scoring import score
from fingpt_lightning.evaluation.token_tree import build_tree, num_common_tokens
from fingpt_lightning.low_rank.adapters import AdapterOptions
from fingpt_lightning.models.adapting import adapt, adapted_layers, linear_names
from fingpt_lightning.models.expansion import dequantize, merge_into_base
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.layout import features_of
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.profiling import measured_peak_flops_per_s
from fingpt_lightning.tasks import Example, find_task, read_rows
from fingpt_lightning.tasks.encoding import EncodedExample, encode_examples

QUESTION = (
    "How many rows per CPU second are labeled from a quantized base with an adapter beside one"
    " merged network, how many tokens are written, and are the answers the same?"
)
MERGED, LOOP = "merged, float32", "merged, plain transformers loop"
BFLOAT16 = "merged, bfloat16"
CONTENDERS: dict[str, tuple[str, bool, str]] = {
    MERGED: ("nf4", True, "merged"),
    BFLOAT16: ("nf4", True, "merged"),
    "nf4, at every product": ("nf4", False, "never"),
    "nf4, once": ("nf4", False, "always"),
    "nf4 with adapter, at every product": ("nf4", True, "never"),
    "nf4 with adapter, once": ("nf4", True, "always"),
    "int8 with adapter, at every product": ("int8", True, "never"),
    "int8 with adapter, once": ("int8", True, "always"),
}
"""Of each network the format, whether it has an adapter, and when it is dequantized."""
_LOOP_ROWS = 8
_PROMPT_WORDS = 12
Answers = list[Any]


def main() -> None:
    """Measures all contenders in turn, several times, and writes record and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="record to write; .md beside")
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--data_dir", type=Path, help="holds fpb/; not with --toy")
    parser.add_argument("--limit", type=int, default=64, help="rows")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--new_tokens", type=int, default=16, help="of each of 8 texts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a random model and a few made-up rows")
    options = parser.parse_args()
    if not options.toy and options.data_dir is None:
        parser.error("--data_dir is needed, but with --toy")
    with tempfile.TemporaryDirectory() as name:
        if options.toy:
            options.limit, options.repeats, options.new_tokens = 3, 1, 2
            options.model, options.data_dir = str(toy_model(Path(name))), toy_data(Path(name))
        names = ("limit", "rank", "new_tokens", "repeats")
        settings = {key: getattr(options, key) for key in names}
        record = new_record(
            QUESTION, {"model": "toy" if options.toy else options.model, **settings}
        )
        record["rows"] = _measure(options)
    record["summary"] = summary(record["rows"])
    write_record(options.json, record, table(record["rows"]))
    print(json.dumps(record["summary"], indent=1))


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    networks = {
        name: _network(options.model, options.rank, *how, bfloat16=name == BFLOAT16)
        for name, how in CONTENDERS.items()
    }
    tokenizer = load_model(options.model).require_tokenizer()
    examples = read_rows(find_task("fpb"), options.data_dir, "validation").examples
    examples = examples[: options.limit]
    found = encode_examples(tokenizer, examples, max_positions(networks[MERGED].config))
    encoded = [row for row in found if row is not None]
    prompts = [" ".join(e.prompts[0].split()[:_PROMPT_WORDS]) for e in examples[:_LOOP_ROWS]]
    labels: dict[str, Callable[[], Answers]] = {
        name: lambda own=network: _labels(own, tokenizer, examples)  # type: ignore[misc]
        for name, network in networks.items()
    }
    labels[LOOP] = lambda: loop_labels(networks[MERGED], encoded)
    texts: dict[str, Callable[[], Answers]] = {
        name: lambda own=network: _texts(own, tokenizer, prompts, options.new_tokens)  # type: ignore[misc]
        for name, network in networks.items()
    }
    peaks = {  # of one thread, as rates are by CPU second
        dtype: measured_peak_flops_per_s(torch.device("cpu"), dtype) / torch.get_num_threads()
        for dtype in (torch.float32, torch.bfloat16)
    }
    flops = _flops(networks[MERGED], encoded)
    rows = _measure_in_turn("label", labels, len(examples), options.repeats)
    for row in rows:
        peak = peaks[torch.bfloat16 if row["contender"] == BFLOAT16 else torch.float32]
        row["share_of_peak"] = flops * row["per_cpu_s"]["median"] / len(examples) / peak
    return rows + _measure_in_turn(
        "generate", texts, len(prompts) * options.new_tokens, options.repeats
    )


def _network(
    model: str, rank: int, quantize: str, has_adapter: bool, how: str, *, bfloat16: bool
) -> PreTrainedModel:
    network = load_model(model, quantize=quantize).network
    if has_adapter:
        adapt(network, AdapterOptions(rank), seed=1)
        stream = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in adapted_layers(network).values():
                layer.lora_B.normal_(std=0.01, generator=stream)
    if how == "merged":
        merge_into_base(network)
    elif how == "always":
        dequantize(network)
    if bfloat16:
        nn.Module.to(network, torch.bfloat16)
    network.eval()
    return network


def _labels(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> Answers:
    return [one.choice for one in score(network, tokenizer, examples, relative=True)]


@torch.no_grad()
def loop_labels(network: PreTrainedModel, rows: Sequence[EncodedExample]) -> Answers:
    """The likeliest first token among the choices, by batches of padded prompts of like length.

    Args:
        network: Network in evaluation mode.
        rows: Rows with their choices.
    """
    answers: Answers = [None] * len(rows)
    prompts = [row.texts[0].tokens[: row.texts[0].first_scored] for row in rows]
    order = sorted(range(len(rows)), key=lambda place: len(prompts[place]))
    for first in range(0, len(order), _LOOP_ROWS):
        batch = order[first : first + _LOOP_ROWS]
        length = max(len(prompts[place]) for place in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(batch):
            ids[row, : len(prompts[place])] = torch.tensor(prompts[place])
            mask[row, : len(prompts[place])] = 1
        logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, place in enumerate(batch):
            last = logits[row, len(prompts[place]) - 1]
            choices = [text.tokens[text.first_scored] for text in rows[place].texts]
            answers[place] = int(last[choices].argmax())
    return answers


def _texts(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    new_tokens: int,
) -> Answers:
    written = complete(
        network, tokenizer, [Prompt(text) for text in prompts], new_tokens, batch_size=len(prompts)
    )
    return [completion.text for _, completion in sorted(written, key=lambda one: one[0])]


def _flops(network: PreTrainedModel, rows: Sequence[EncodedExample]) -> int:
    """Operations of the blocks' products over the tokens that differ, and once over the others."""
    num_shared = num_common_tokens([row.texts for row in rows])
    trees = [build_tree(row.texts, num_shared) for row in rows]
    num_tokens = num_shared + sum(len(tree.tokens) for tree in trees)
    layers = (features_of(network.get_submodule(name)) for name in linear_names(network))
    return 2 * num_tokens * sum(in_features * out_features for in_features, out_features in layers)


def _measure_in_turn(
    what: str, contenders: dict[str, Callable[[], Answers]], number: int, repeats: int
) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    answers: dict[str, Answers] = {}
    for repeat in range(repeats + 1):
        for name, answer in contenders.items():
            started_s = time.process_time()
            answers[name] = answer()
            if repeat > 0:  # the first warms up
                rates[name].append(number / (time.process_time() - started_s))
    medians = {name: spread(own)["median"] for name, own in rates.items()}
    return [
        {
            "contender": name,
            "what": what,
            "repeats": repeats,
            "per_cpu_s": spread(own),
            "ratio_to_merged": medians[name] / medians[MERGED],
            "share_of_equal_answers": _share_equal(answers, name),
        }
        for name, own in rates.items()
    ]


def _share_equal(answers: dict[str, Answers], name: str) -> float | None:
    """The share of answers as those of the network that dequantizes at every product.

    Of the plain loop as those of ours with the same network; None of the others.
    """
    other = MERGED if name == LOOP else name.replace(", once", ", at every product")
    if other == name:
        return None
    pairs = list(zip(answers[name], answers[other], strict=True))
    return [one == another for one, another in pairs].count(True) / len(pairs)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The ratios that answer the question."""
    return dict(_summarized(rows))


def _summarized(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    names = {
        "nf4_with_adapter": "nf4 with adapter, at every product",
        "nf4_with_adapter_once": "nf4 with adapter, once",
        "int8_with_adapter_once": "int8 with adapter, once",
        "transformers_loop": LOOP,
    }
    for what in ("label", "generate"):
        ratios = {row["contender"]: row["ratio_to_merged"] for row in rows if row["what"] == what}
        for key, name in names.items():
            if name in ratios:
                yield f"{what}_{key}_ratio_to_merged", ratios[name]
    by_name = {row["contender"]: row for row in rows if row["what"] == "label"}
    yield "label_share_of_peak", by_name[MERGED]["share_of_peak"]
    yield "label_bfloat16_share_of_peak", by_name[BFLOAT16]["share_of_peak"]
    shares = [row["share_of_equal_answers"] for row in rows if "once" in row["contender"]]
    yield "share_of_equal_answers", min(shares)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table."""
    lines = []
    for row in rows:
        share, peak = row["share_of_equal_answers"], row.get("share_of_peak")
        lines.append(
            [
                f"{row['what']}: {row['contender']}",
                f"{row['per_cpu_s']['median']:.1f}",
                f"{row['per_cpu_s']['p10']:.1f} - {row['per_cpu_s']['p90']:.1f}",
                f"{row['ratio_to_merged']:.2f}",
                "" if peak is None else f"{peak:.2f}",
                "" if share is None else f"{share:.3f}",
            ]
        )
    header = ["rows labeled or tokens written", "per CPU second", "p10 - p90", "this / merged"]
    return markdown_table([*header, "share of peak", "equal answers"], lines)


if __name__ == "__main__":
    main()
