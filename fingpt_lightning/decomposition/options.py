"""The options of ``fingpt decompose``, read without importing anything heavy."""

import argparse
from pathlib import Path

from fingpt_lightning.files import check_made_in_parts
from fingpt_lightning.terminal.command_line import (
    OptionParser,
    WrongOptions,
    add_calibration_options,
    asks_for_calibration,
    check_calibration_options,
    device_name,
)
from fingpt_lightning.terminal.numbers import (
    compression,
    number_from_0,
    positive_int,
    rank,
    seed,
    share,
    whole_number,
)

METHODS = ("exact", "randomized")
ALLOCATIONS = ("loss", "spectrum", "uniform")
WHITENINGS = ("input", "both")

RECORD = "decomposition.json"
"""The file by which the folder of a decomposition is known."""


def build_parser() -> OptionParser:
    """The parser of ``fingpt decompose``."""
    parser = OptionParser(
        "fingpt decompose", "A dense model in, its layers as low-rank layers out; it trains on."
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="Hugging Face folder or hub name, GGUF, checkpoint or run folder",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--rank_ratio", type=share, help="r / min(in, out) of each layer, to 1")
    target.add_argument(
        "--compression", type=compression, help="parameters of the dense model over those stored"
    )
    target.add_argument(
        "--energy", type=share, help="share of the squared singular values that each layer keeps"
    )
    add("--output", type=Path, required=True, help="folder that is made")
    add(
        "--allocation",
        choices=ALLOCATIONS,
        help="of --compression: ranks by what they cost the loss of a calibration, to second order;"
        " by the layers' spectra; or one ratio; default: uniform",
    )
    add(
        "--embedding_rank",
        type=rank,
        help="rank, or share of the width, of an embedding tied to the head; default: dense",
    )
    add_calibration_options(parser)
    add(
        "--damping",
        type=number_from_0,
        help="of the calibration: how much of the weights' own error counts beside that of the"
        " outputs, from 0 on; default: 0, with --sequential or --whitening both 0.01",
    )
    add(
        "--sequential",
        action="store_true",
        help="of the calibration: layer after layer, each for what reaches it through the factors"
        " before it; slower, and nearer to the model",
    )
    add(
        "--refine",
        type=whole_number,
        default=0,
        metavar="STEPS",
        help="of the calibration: Adam steps over the factors of each block, so that it puts out"
        " what the dense block did; default: %(default)s",
    )
    add(
        "--whitening",
        choices=WHITENINGS,
        help="of the calibration: the nearest factors by the layers' inputs, or by the curvature of"
        " the loss at their outputs too; like --allocation loss it takes a backward pass (about"
        " three forward passes, and the hidden states before all blocks in memory);"
        " default: input",
    )
    add("--method", choices=METHODS, default="exact", help="default: %(default)s")
    add(
        "--seed",
        type=seed,
        help="of --method randomized, --allocation loss and --whitening both; default: 1",
    )
    add(
        "--workers",
        type=positive_int,
        default=1,
        help="processes of one thread that share the layers, on the CPU; default: %(default)s",
    )
    add(
        "--device",
        type=device_name,
        help="cpu, cuda for all of them, or cuda:1; default: cuda where there is one",
    )
    add(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="of the stored weights; default: %(default)s",
    )
    add("--tokenizer", help="folder of the tokenizer, where the model has none beside it")
    add("--overwrite", action="store_true", help="replace the folder, and begin anew")
    return parser


def parse_options(words: list[str]) -> argparse.Namespace:
    """The options that follow ``fingpt decompose``.

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
    """Refuses options that have no effect beside each other, or need another.

    Raises:
        WrongOptions: There is one.
    """
    if options.allocation is not None and options.compression is None:
        raise WrongOptions("--allocation has an effect with --compression alone")
    check_calibration_options(options)
    if options.allocation == "loss" and not asks_for_calibration(options):
        raise WrongOptions("--allocation loss needs --calibration or --calibration_task")
    if options.whitening is not None and not asks_for_calibration(options):
        raise WrongOptions("--whitening has an effect with a calibration alone")
    if options.whitening == "both" and options.damping == 0:
        raise WrongOptions("--whitening both needs a --damping above 0; default: 0.01")
    if options.damping is not None and not asks_for_calibration(options):
        raise WrongOptions("--damping has an effect with a calibration alone")
    if options.sequential and not asks_for_calibration(options):
        raise WrongOptions("--sequential needs --calibration or --calibration_task")
    if options.refine and not asks_for_calibration(options):
        raise WrongOptions("--refine needs --calibration or --calibration_task")
    if options.sequential and options.damping == 0:
        raise WrongOptions("--sequential needs a --damping above 0; default: 0.01")
    if options.sequential and options.energy is not None:
        raise WrongOptions("--sequential needs --rank_ratio or --compression")
    is_drawn = options.method == "randomized" or options.allocation == "loss"
    if options.seed is not None and not is_drawn and options.whitening != "both":
        raise WrongOptions(
            "--seed has an effect with --method randomized, --allocation loss or --whitening both"
            " alone"
        )
    if options.energy is not None and options.method == "randomized":
        raise WrongOptions("--energy needs the whole spectrum: --method exact")


def check_output(output: Path, overwrite: bool) -> None:
    """Raises where a decomposition could not be written.

    The parts of one that a killed process had finished are removed.

    Raises:
        FileExistsError: ``output`` is there and not to be replaced, or is not a decomposition.
        NotADirectoryError: A part of its path is a file.
    """
    check_made_in_parts(output, overwrite, RECORD, "decomposition")
