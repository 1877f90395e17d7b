"""The ``fingpt`` program: picks the command and turns every failure into one line.

Nothing heavy is imported before a command needs it, so that ``fingpt --help`` answers at once.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fingpt_lightning.nearest import nearest

COMMANDS = {
    "fit": "train; continues with --ckpt_path last or a checkpoint file",
    "validate": "loss and perplexity on the validation text",
    "test": "loss and perplexity on the test text",
    "predict": "the likeliest next tokens, for a prediction writer among the callbacks",
    "evaluate": "accuracy and F1 of a model on financial and general tasks",
}

_HELP = """usage: fingpt COMMAND [--config FILE ...] [--KEY VALUE ...]

Pretrain and finetune financial language models in little memory and time.

commands:
{commands}

options:
  -h, --help   this text; fingpt COMMAND --help lists the options of a command
  --version    the version
  --debug      show the traceback of a failure

start with:    fingpt fit --config configs/quickstart.yaml
exit status:   0 done, 1 failed, 2 wrong command line or config"""


class ConfigError(ValueError):
    """A wrong command line or config: exit status 2."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: The words after the program's name; None takes those of the process.

    Raises:
        SystemExit: With status 1 when the command fails, 2 when the command line or a config is
            wrong, 130 when interrupted. A success returns None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        print(_HELP.format(commands="\n".join(f"  {c:{width}}{t}" for c, t in COMMANDS.items())))
        return
    if words[0] == "--version":
        from fingpt_lightning import __version__

        print(f"fingpt {__version__}")
        return
    try:
        _run(words)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(_one_line(error), 2 if isinstance(error, ConfigError) else 1)


def _run(words: list[str]) -> None:
    command = words[0]
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ConfigError(f"command {command!r} is none of {known}{nearest(command, COMMANDS)}")
    if command == "evaluate":
        _evaluate(words[1:])
        return
    _check_callbacks_package()
    from fingpt_lightning.lightning_cli import run_trainer_command

    run_trainer_command(words)


def _evaluate(words: list[str]) -> None:
    from fingpt_lightning.evaluation.options import WrongOptions, parse_options

    try:
        options = parse_options(words)
    except WrongOptions as error:
        raise ConfigError(str(error)) from error
    from fingpt_lightning.evaluation.command import run_evaluate

    run_evaluate(options)


def _check_callbacks_package() -> None:
    import callbacks

    if getattr(callbacks, "DISTRIBUTION", None) != "fingpt-lightning":
        raise ImportError(
            f"the package 'callbacks' found at {callbacks.__file__} is another project's; run from"
            " another folder or remove it"
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    expected = (ValueError, TypeError, OSError, FloatingPointError, ImportError, RuntimeError)
    if not text or not isinstance(error, expected):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text


def _fail(message: str, status: int) -> NoReturn:
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    process_rank = next((rank for rank in ranks if rank is not None), "0")
    where = "" if process_rank == "0" else f" (rank {process_rank})"
    print(f"fingpt: error{where}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)
