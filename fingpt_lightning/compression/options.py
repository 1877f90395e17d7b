"""The options of ``fingpt compress``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.files import check_made_in_parts
from fingpt_lightning.terminal.command_line import (
    OptionParser,
    WrongOptions,
    device_name,
    names,
)
from fingpt_lightning.terminal.inputs import TASK_PREFIX
from fingpt_lightning.terminal.numbers import (
    number_above_0,
    number_from_0,
    part,
    positive_int,
    seed,
    share_from_0,
    whole_number,
)

RECORD = "compression.json"
"""The file by which the folder of a compression is known."""
FORMATS = ("low_rank", "int8", "nf4")
ALLOCATIONS = ("uniform", "spectrum", "loss")
WHITENINGS = ("input", "both")
AUTO = "auto"
PRECISIONS = ("bf16-mixed", "32-true")
TEACHER_DTYPES = ("bfloat16", "float32")
STORED_DTYPES = ("bfloat16", "float16", "float32")
REFINE_STEPS = 40
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 0.0005, 0.1, 0.0
TEACHER_WEIGHT = 0.5

_OF_HEALING = {
    "learning_rate": LEARNING_RATE, "warmup": WARMUP, "weight_decay": WEIGHT_DECAY,
    "teacher_weight": TEACHER_WEIGHT,
}  # fmt: skip
"""Settings that have no effect where nothing is healed."""


def build_parser() -> OptionParser:
    """The parser of ``fingpt compress``."""
    parser = OptionParser(
        "fingpt compress",
        "A dense model in, a small one out: decomposed, refined, healed, rounded, measured.",
    )
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or hub name, GGUF or run folder")
    add("--size", type=part, required=True, help="share of all parameters that is kept, in (0, 1)")
    add("--output", type=Path, required=True, help="folder that is made")
    add(
        "--format",
        choices=FORMATS,
        default="low_rank",
        help="of the weights: as they are, or rounded with calibration; default: %(default)s",
    )
    add(
        "--dtype",
        choices=(AUTO, *STORED_DTYPES),
        default=AUTO,
        help="of the weights of --format low_rank; default: %(default)s, that of the original's"
        " files",
    )
    add(
        "--calibration",
        nargs="+",
        required=True,
        metavar="FILE[=WEIGHT]",
        help="text files, and task:NAME, with weights: layers' outputs on them are kept, and"
        " healing trains on them",
    )
    add("--calibration_tokens", type=positive_int, help="that are read; default: 32768")
    add("--data_dir", type=Path, help="holds TASK/train.jsonl and TASK/validation.jsonl")
    add(
        "--allocation",
        choices=ALLOCATIONS,
        default="loss",
        help="one rank ratio, ranks by the layers' spectra, or by what they cost the loss to second"
        " order; default: %(default)s",
    )
    add(
        "--whitening",
        choices=WHITENINGS,
        default="input",
        help="the nearest factors by the layers' inputs, or by the curvature of the loss at their"
        " outputs too; like --allocation loss it takes a backward pass, which --plan counts;"
        " default: %(default)s",
    )
    add(
        "--drop_blocks",
        type=whole_number,
        default=0,
        metavar="N",
        help="blocks left out before the rest is decomposed: those that the calibration text misses"
        " least; default: %(default)s",
    )
    add("--embedding_rank", type=positive_int, help="of an embedding tied to the head")
    add(
        "--refine",
        type=whole_number,
        default=REFINE_STEPS,
        metavar="STEPS",
        help="Adam steps over the factors of each block; default: %(default)s",
    )
    add(
        "--heal",
        type=whole_number,
        default=0,
        metavar="STEPS",
        help="steps of training all weights on the original's predictions; default: %(default)s",
    )
    add(
        "--heal_quantized",
        type=whole_number,
        default=0,
        metavar="STEPS",
        help="steps after them in which the network computes with its weights as --format rounds"
        " them; default: %(default)s",
    )
    add("--batch_size", type=positive_int, default=4, help="rows of a step; default: %(default)s")
    add("--block_length", type=positive_int, default=512, help="tokens per row; default: 512")
    add(
        "--learning_rate",
        type=number_above_0,
        default=LEARNING_RATE,
        help="of healing, the highest; default: %(default)s",
    )
    add(
        "--warmup",
        type=share_from_0,
        default=WARMUP,
        help="share of the steps of healing in which the rate rises; default: %(default)s",
    )
    add(
        "--weight_decay",
        type=number_from_0,
        default=WEIGHT_DECAY,
        help="of matrices in healing; default: %(default)s",
    )
    add(
        "--teacher_weight",
        type=share_from_0,
        default=TEACHER_WEIGHT,
        metavar="SHARE",
        help="of the original's predictions in the loss of healing; the rest is the cross-entropy"
        " of the text's own tokens, and 0 heals without the original; default: %(default)s",
    )
    add(
        "--precision",
        choices=(AUTO, *PRECISIONS),
        default=AUTO,
        help="of healing; default: auto, bf16-mixed where the device is clearly faster in it, else"
        " 32-true; a killed run keeps the one that it had",
    )
    add(
        "--teacher_dtype",
        choices=(AUTO, *TEACHER_DTYPES),
        default=AUTO,
        help="of the original in healing; default: auto, that of the precision's products",
    )
    add(
        "--texts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text whose perplexity is measured before and after; best of no calibration file",
    )
    add("--text_tokens", type=positive_int, default=16384, help="of each; default: %(default)s")
    add("--tasks", type=names, default=[], help="whose validation is scored, with commas")
    add("--limit", type=positive_int, help="rows of each task; default: all")
    add(
        "--seed",
        type=seed,
        default=1,
        help="of refinement, healing and the labels drawn for gradients; default: %(default)s",
    )
    add(
        "--device",
        type=device_name,
        help="of all stages: cpu, cuda or cuda:1; with cuda the layers' spectra are taken on all of"
        " them; default: cuda where there is one",
    )
    add("--tokenizer", help="folder of the tokenizer, where the model has none beside it")
    add("--plan", action="store_true", help="print stages, time and memory, and make nothing")
    add("--overwrite", action="store_true", help="replace the folder, and begin anew")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt compress``.

    Args:
        words: Part of the command line after the command.

    Raises:
        WrongOptions: An option is unknown, missing, has an invalid value, or has no effect beside
            another.
        SystemExit: ``--help`` was given; the status is 0.
    """
    options = build_parser().read(words)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Refuses options that have no effect beside each other.

    Raises:
        WrongOptions: There is one.
    """
    has_tasks = bool(options.tasks) or any(
        str(name).startswith(TASK_PREFIX) for name in options.calibration
    )
    if options.data_dir is not None and not has_tasks:
        raise WrongOptions("--data_dir has an effect with --tasks or task:NAME of --calibration")
    if options.limit is not None and not options.tasks:
        raise WrongOptions("--limit has an effect with --tasks alone")
    for name, default in _OF_HEALING.items():
        if not (options.heal or options.heal_quantized) and getattr(options, name) != default:
            raise WrongOptions(f"--{name} has an effect with --heal alone")
    if options.heal_quantized and options.format == "low_rank":
        raise WrongOptions("--heal_quantized has an effect with --format int8 or nf4 alone")
    if options.dtype != AUTO and options.format != "low_rank":
        raise WrongOptions("--dtype has an effect with --format low_rank alone")
    if not options.teacher_weight and options.teacher_dtype != AUTO:
        raise WrongOptions("--teacher_dtype has no effect with --teacher_weight 0")


def check_output(output: Path, overwrite: bool) -> None:
    """Raises where a compression could not be written.

    The parts of one that a killed process had finished are removed.

    Raises:
        FileExistsError: ``output`` is there and not to be replaced, or is not a compression.
        NotADirectoryError: A part of its path is a file.
    """
    check_made_in_parts(output, overwrite, RECORD, "compression")
