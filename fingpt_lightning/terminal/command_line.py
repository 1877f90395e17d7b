"""What the option parsers of the commands share, without importing anything heavy."""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from typing_extensions import override

from fingpt_lightning.terminal.inputs import TASK_PREFIX, refuse_unknown_device
from fingpt_lightning.terminal.messages import nearest
from fingpt_lightning.terminal.numbers import positive_int


class WrongOptions(ValueError):
    """A command line that cannot be understood."""


@contextmanager
def options_as_arguments() -> Iterator[None]:
    """Within it, messages about wrong options are about a function's arguments, without dashes.

    Raises:
        ValueError: Raised in place of `WrongOptions`.
    """
    try:
        yield
    except WrongOptions as error:
        raise ValueError(str(error).replace("--", "")) from None


class OptionParser(argparse.ArgumentParser):
    """A parser that raises its errors instead of printing usage and ending the process.

    Args:
        command: Words before the options, as ``fingpt evaluate``.
        description: Sentence for ``--help``.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=command, description=description, allow_abbrev=False)

    def read(self, words: list[str]) -> argparse.Namespace:
        """The options in ``words``.

        Raises:
            WrongOptions: An option is unknown (the nearest is named), missing, or has an invalid
                value.
            SystemExit: With status 0, after ``--help`` has been answered.
        """
        known = self.option_names()
        try:
            options, unknown = self.parse_known_args(words)
        except WrongOptions:
            # An option that is missing may be the one that is misspelled.
            unknown = [word for word in words if word.startswith("--")]
            unknown = [word for word in unknown if word.partition("=")[0] not in known]
            if not unknown:
                raise
        if unknown:
            name = unknown[0].partition("=")[0]
            raise WrongOptions(f"unrecognized arguments: {' '.join(unknown)}{nearest(name, known)}")
        return options

    def read_beside_others(self, words: list[str]) -> argparse.Namespace:
        """The options in ``words`` of a command that takes those of another command too.

        Returns:
            The options, and the other words as ``words``; ``own_options`` has the names among which
            a misspelled one may be meant.

        Raises:
            WrongOptions: An option of this parser is missing, or has an invalid value.
            SystemExit: With status 0, after ``--help`` has been answered.
        """
        options, others = self.parse_known_args(words)
        options.words = others
        options.own_options = self.option_names()
        return options

    def option_names(self) -> list[str]:
        """All options, in all their forms."""
        return [text for action in self._actions for text in action.option_strings]

    @override
    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message):
            message += nearest(found[1], re.findall(r"[\w.-]+", found[2]))
        raise WrongOptions(message)


def names(text: str) -> list[str]:
    """The names in a list with commas.

    Raises:
        argparse.ArgumentTypeError: There is no name.
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError("no name is given")
    return found


def device_name(text: str) -> str:
    """What may be the name of a device; whether this machine has it is not asked.

    Raises:
        argparse.ArgumentTypeError: It is not such a name.
    """
    try:
        refuse_unknown_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("device ")) from None
    return text


def refuse_input_as_output(read: Path, written: Path) -> None:
    """Refuses to write over the file that is read, whatever ``--overwrite`` allows.

    Raises:
        WrongOptions: They are one file.
    """
    if read.resolve() == written.resolve():
        raise WrongOptions(f"--output {written} is the file that is read; name another one")


def named_paths(text: str) -> dict[str, Path]:
    """The paths in a list such as ``alice=a/adapter,bob=b/adapter``, by name.

    Raises:
        argparse.ArgumentTypeError: A part is not of that form, or a name occurs twice.
    """
    found: dict[str, Path] = {}
    for part in names(text):
        name, _, path = part.partition("=")
        if not name.strip() or not path.strip():
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form NAME=PATH")
        if name.strip() in found:
            raise argparse.ArgumentTypeError(f"the name {name.strip()!r} is given twice")
        found[name.strip()] = Path(path.strip())
    return found


def add_model_options(parser: argparse.ArgumentParser, *, stores: bool = False) -> None:
    """The options that select which model is loaded and how.

    Args:
        parser: Parser that gets them.
        stores: Whether the dtype is that of stored weights, which fits no device of its own accord.
    """
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="Hugging Face folder or hub name, GGUF, adapter, checkpoint or run folder",
    )
    add(
        "--adapter",
        help="LoRA adapter for the model: folder, or a finetuning's run folder or checkpoint",
    )
    add("--tokenizer", help="folder of the tokenizer, where the model has none beside it")
    add(
        "--dtype",
        default="float32" if stores else "auto",
        choices=(*(() if stores else ("auto",)), "float32", "bfloat16", "float16", "float64"),
        help="of weights and products; default: %(default)s"
        + ("" if stores else ", bfloat16 where the device is clearly faster in it, else float32"),
    )
    add(
        "--quantize",
        default="auto",
        choices=("auto", "none", "nf4", "int8"),
        help="the linear layers of the blocks; default: auto, as what the adapter was trained on",
    )
    if not stores:
        add(
            "--dequantize",
            default="auto",
            choices=("auto", "always", "never"),
            help="quantized weights once, when they are loaded, for speed; default: auto, on a CPU"
            " where half of the free memory is enough",
        )
    add(
        "--device",
        type=device_name,
        help="cpu, cuda or cuda:1; default: cuda where there is one",
    )


def add_chat_option(parser: argparse.ArgumentParser) -> None:
    """The option that says how prompts are rendered."""
    parser.add_argument(
        "--chat_template",
        default="auto",
        metavar="auto|none|FILE",
        help="text around prompts: that which the model was trained with, else the tokenizer's own"
        " of an instruct model; none; or a file in Jinja; default: %(default)s",
    )


def add_csv_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a CSV file does not say of itself."""
    add = parser.add_argument
    add(
        "--separator",
        metavar="CHARACTER",
        help="between the values of .csv and .tsv files, such as ';' or tab; default: as the first"
        " line has it",
    )
    add(
        "--encoding",
        help="of .csv and .tsv files, such as cp1252; default: of the byte order mark, else utf-8",
    )


def add_calibration_options(parser: OptionParser) -> None:
    """The options that select the tokens on which the outputs of compressed layers are kept."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE[=WEIGHT]",
        help="text files (.jsonl, .txt, .parquet): the layers' outputs on them are kept; with"
        " weights a mixture, in which task:NAME[=WEIGHT] is a task's prompts and answers",
    )
    group.add_argument(
        "--calibration_task",
        metavar="TASK",
        help="the same on prompts and answers of a task's train split, from --data_dir",
    )
    parser.add_argument(
        "--calibration_tokens", type=positive_int, help="that are read; default: 32768"
    )
    parser.add_argument(
        "--data_dir", type=Path, help="holds TASK/train.jsonl; left out: the Hugging Face hub"
    )


def asks_for_calibration(options: argparse.Namespace) -> bool:
    """Whether one of the sources of `add_calibration_options` is named."""
    return options.calibration is not None or options.calibration_task is not None


def check_calibration_options(options: argparse.Namespace) -> None:
    """Refuses options of calibration that have no effect.

    Raises:
        WrongOptions: There is such an option.
    """
    if options.calibration is not None and options.calibration_task is not None:
        raise WrongOptions("--calibration and --calibration_task: give one of them")
    named = as_list(options.calibration)
    if (
        options.data_dir is not None
        and options.calibration_task is None
        and not any(str(name).startswith(TASK_PREFIX) for name in named)
    ):
        raise WrongOptions(
            "--data_dir has an effect with task:NAME in --calibration or with --calibration_task"
            " alone"
        )
    if options.calibration_tokens is not None and not asks_for_calibration(options):
        raise WrongOptions(
            "--calibration_tokens has an effect with --calibration or --calibration_task alone"
        )


def as_list(given: Any) -> list[Any]:
    """A setting that may be given as one item, as a list of several, or be left out."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]
