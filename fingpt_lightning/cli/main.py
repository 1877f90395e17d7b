"""The ``fingpt`` program: picks the command and turns every failure into one line.

Nothing heavy is imported before a command needs it, so that ``fingpt --help`` answers at once.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from fingpt_lightning.cli.errors import ConfigError, TerminatedError
from fingpt_lightning.cli.signals import raised_sigterm
from fingpt_lightning.terminal.command_line import WrongOptions
from fingpt_lightning.terminal.messages import (
    error_line,
    is_panic,
    nearest,
    print_status,
    process_rank,
    without_credentials,
)


class Command(NamedTuple):
    """A line of ``fingpt --help`` about a command, and the modules that implement it.

    Attributes:
        purpose: Description for people.
        options: Module whose ``parse_options`` reads the command's words and imports nothing heavy;
            None for a command of the Trainer.
        entry: Module whose ``run`` takes the options.
    """

    purpose: str
    options: str | None = None
    entry: str | None = None


COMMANDS = {
    "fit": Command("train; continues with --ckpt_path last or a checkpoint file"),
    "validate": Command("loss and perplexity on the validation text"),
    "test": Command("loss and perplexity on the test text"),
    "tokenize": Command(
        "the text of a run into its token cache, before the run or by many jobs",
        "fingpt_lightning.cli.tokenize_options",
        "fingpt_lightning.cli.tokenize",
    ),
    "predict": Command("answers to the rows of tasks, or the loss of each block, as JSON lines"),
    "evaluate": Command(
        "accuracy and F1 of a model on financial and general tasks",
        "fingpt_lightning.evaluation.options",
        "fingpt_lightning.evaluation.command",
    ),
    "compare": Command(
        "results of the same rows side by side, with intervals and McNemar's test",
        "fingpt_lightning.reporting.compare_options",
        "fingpt_lightning.reporting.compare_command",
    ),
    "generate": Command(
        "text that goes on from prompts",
        "fingpt_lightning.deploy.generate_options",
        "fingpt_lightning.deploy.generate_command",
    ),
    "chat": Command(
        "a conversation with a model in the terminal, or over lines of a pipe",
        "fingpt_lightning.deploy.chat_options",
        "fingpt_lightning.deploy.chat_command",
    ),
    "label": Command(
        "labels with probabilities for the texts of a file of any size",
        "fingpt_lightning.deploy.label_options",
        "fingpt_lightning.deploy.label_command",
    ),
    "serve": Command(
        "a model and its adapters behind OpenAI's routes: completions, chats, labels",
        "fingpt_lightning.serving.options",
        "fingpt_lightning.serving.command",
    ),
    "decompose": Command(
        "a dense model's layers as low-rank layers; the folder trains on, evaluates and exports",
        "fingpt_lightning.decomposition.options",
        "fingpt_lightning.decomposition.command",
    ),
    "compress": Command(
        "a dense model made small in one command: decomposed, refined, healed, rounded, measured",
        "fingpt_lightning.compression.options",
        "fingpt_lightning.compression.command",
    ),
    "export": Command(
        "a model in the form that other tools read, compared before it is handed over",
        "fingpt_lightning.deploy.export_options",
        "fingpt_lightning.deploy.export_command",
    ),
    "sweep": Command(
        "many runs by a W&B sweep file, checked first, with a server or without one",
        "fingpt_lightning.sweeping.options",
        "fingpt_lightning.cli.sweep",
    ),
    "configs": Command(
        "the configs and sweeps that come with fingpt; shows one, or copies it to change it",
        "fingpt_lightning.cli.configs_options",
        "fingpt_lightning.cli.configs",
    ),
    "tasks": Command(
        "the tasks that are shipped, with source and license; one with its template and a row",
        "fingpt_lightning.tasks.options",
        "fingpt_lightning.tasks.command",
    ),
    "report": Command(
        "one page about runs, sweeps and evaluations: curves, memory, accuracy, mistakes",
        "fingpt_lightning.reporting.options",
        "fingpt_lightning.reporting.command",
    ),
    "plan": Command(
        "what a run would need: parameters, memory by part, steps, time, and whether it fits",
        "fingpt_lightning.planning.options",
        "fingpt_lightning.cli.plan",
    ),
}

_LONGEST_MESSAGE = 2000
_HELP = """usage: fingpt COMMAND [--config NAME_OR_FILE ...] [--KEY VALUE ...]

Pretrain and finetune financial language models in little memory and time.

commands:
{commands}

options:
  -h, --help   this text; fingpt COMMAND --help lists the options of a command
  --version    the version
  --debug      show the traceback of a failure

start with:    fingpt fit --config quickstart
exit status:   0 done, 1 failed, 2 wrong command line or config, 130 interrupted,
               143 ended by SIGTERM"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        argv: Words after the program's name; None takes those of the process.

    Raises:
        SystemExit: With status 1 when the command fails, 2 when the command line or a config is
            wrong, 130 when interrupted, 143 when ended by SIGTERM. A success returns None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        lines = [f"  {name:{width}}{command.purpose}" for name, command in COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)))
        return
    if words[0] == "--version":
        from fingpt_lightning import __version__

        print(f"fingpt {__version__}")
        return
    try:
        with raised_sigterm():
            _run(words)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except TerminatedError as error:
        _fail(str(error), 143)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if debug:
            traceback.print_exc()
        _fail(one_line(error), 2 if isinstance(error, ConfigError) else 1)


def _run(words: list[str]) -> None:
    command = words[0]
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise ConfigError(f"command {command!r} is none of {known}{nearest(command, COMMANDS)}")
    # Not at the top: it reads YAML, which --help does without.
    from fingpt_lightning.cli.early_checks import check_command, check_trainer_command

    _, options, entry = COMMANDS[command]
    if options is not None and entry is not None:
        try:
            read = importlib.import_module(options).parse_options(words[1:])
        except WrongOptions as error:
            raise ConfigError(str(error)) from error
        check_command(command, read)
        importlib.import_module(entry).run(read)
        return
    check_trainer_command(command, words[1:])
    _tell_start(words)
    _check_callbacks_package()
    from fingpt_lightning.cli.trainer import run_trainer_command

    run_trainer_command(words)


def _tell_start(words: list[str]) -> None:
    """A line before the imports, which take seconds."""
    print_status(without_credentials(" ".join(words)))


def _check_callbacks_package() -> None:
    import callbacks

    if getattr(callbacks, "DISTRIBUTION", None) != "fingpt-lightning":
        raise ImportError(
            f"the package 'callbacks' found at {callbacks.__file__} is another project's; run from"
            " another folder or remove it"
        )


def one_line(error: BaseException) -> str:
    """A failure as the program reports it.

    Args:
        error: Exception that ended the command.
    """
    text = without_credentials(" ".join(str(error).split()))
    if len(text) > _LONGEST_MESSAGE:  # one that echoes a whole file
        text = f"{text[:_LONGEST_MESSAGE]} ... ({len(text)} characters)"
    if isinstance(error, OSError) and error.errno is not None:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        named = f"{' to '.join(names)}: " if names else ""
        return f"{named}{error.strerror}{'' if names else ' (--debug shows where)'}"
    expected = (ValueError, TypeError, OSError, FloatingPointError, ImportError, RuntimeError)
    if not text or not isinstance(error, expected):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text


def _fail(message: str, status: int) -> NoReturn:
    print(error_line(message, process_rank()), file=sys.stderr, flush=True)
    raise SystemExit(status)
