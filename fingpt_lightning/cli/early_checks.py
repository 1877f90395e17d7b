"""What a command needs, checked before it imports torch: a mistake is named at once.

The commands check the same things by the same functions when they come to them. What costs time to
find out, such as whether a file holds what its name says, is left to them.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fingpt_lightning.cli.checkpoint_names import checkpoints_named
from fingpt_lightning.cli.early_options import GivenSettings, check_ranges, given_settings
from fingpt_lightning.cli.errors import ConfigError
from fingpt_lightning.cli.logger_packages import refuse_missing_package
from fingpt_lightning.cli.shipped import SWEEPS, find_file, with_config_files
from fingpt_lightning.cli.trainer_numbers import check_trainer_numbers
from fingpt_lightning.compression.options import check_output as check_compression
from fingpt_lightning.decomposition.options import check_output as check_decomposition
from fingpt_lightning.deploy.labelled_file import LabelledFile
from fingpt_lightning.evaluation.run_evaluations import (
    PREDICTIONS,
    check_output,
    refuse_predictions,
)
from fingpt_lightning.files import check_replaceable, refuse_existing, refuse_unwritable
from fingpt_lightning.hub.card import EXPORT_MARK, has_mark, refuse_missing_results
from fingpt_lightning.hub.pushing import refuse_no_access
from fingpt_lightning.reporting.compare_options import check_inputs
from fingpt_lightning.shards.folders import find_shards
from fingpt_lightning.sweeping.folders import refuse_no_sweep, refuse_used_folder
from fingpt_lightning.tasks.library import find_label_task, find_scored_task, find_task
from fingpt_lightning.tasks.row_files import check_csv_settings, open_rows
from fingpt_lightning.tasks.sources import find_folder, open_split
from fingpt_lightning.terminal.command_line import as_list
from fingpt_lightning.terminal.inputs import (
    TASK_PREFIX,
    TEMPLATE_CHOICES,
    refuse_file_as_cache,
    refuse_missing_adapter,
    refuse_missing_model,
    refuse_missing_prompts,
    refuse_missing_run,
    refuse_missing_template,
    refuse_missing_texts,
    refuse_missing_tokenizer,
    weighted_name,
)

OFF_VARIABLE = "FINGPT_NO_EARLY_CHECKS"
"""Set to 1, every mistake is left to the command itself; benchmarks compare the two."""

_WEIGHTS = ("init_from", "base")
"""The settings that name what a run starts from."""
_TEXTS = ("train_files", "val_files", "test_files", "validation_files")


def check_trainer_command(
    command: str, words: list[str], runs: bool = True, own_options: Sequence[str] = ()
) -> None:
    """Refuses words of a Trainer command that it would refuse.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        words: Words after the command.
        runs: Whether the command reads its data; ``plan`` does not.
        own_options: Options of a command that takes those of ``command`` beside them.

    Raises:
        ConfigError: The command line or a config is wrong.
        OSError: What is to be read is missing.
        ValueError: A task is unknown.
    """
    if not is_on():
        return
    given = given_settings(command, with_config_files(words), own_options)
    if given is None:
        return
    if runs:
        _check_checkpoint(command, given)
    if command == "predict":
        keys = ("predictions.path", "predictions.overwrite", "trainer.default_root_dir")
        check_predictions(*map(given.values.get, keys))
    check_ranges(given)
    check_trainer_numbers(given.values)
    _check_loggers(given.values.get("trainer.logger"))
    if runs and given.values.get("ckpt_path") is None:
        # Of a class that is not ours, settings of these names may mean anything.
        ours = {key: given.init_args[key] if given.known[key] else {} for key in ("model", "data")}
        check_trainer_inputs(command, ours["model"], ours["data"])


def _check_loggers(given: Any) -> None:
    for logger in as_list(given):
        class_path = logger.get("class_path") if isinstance(logger, dict) else logger
        if isinstance(class_path, str):
            refuse_missing_package(class_path)


def _check_checkpoint(command: str, given: GivenSettings) -> None:
    ckpt_path = given.values.get("ckpt_path")
    if ckpt_path is not None:
        run_name = Path(given.configs[0]).stem if given.configs else "run"
        runs_dir = Path(str(given.values.get("runs_dir", "runs")))
        checkpoints_named(str(ckpt_path), run_name, runs_dir)
    elif command != "fit":
        model = given.init_args["model"]
        check_start(command, {key: model.get(key) for key in given.known["model"]})


def check_start(command: str, settings: Mapping[str, Any]) -> str | None:
    """The setting that names the weights to evaluate; None for a class that loads its own.

    Args:
        command: ``validate``, ``test`` or ``predict``.
        settings: All settings of the model's class.

    Raises:
        ConfigError: None of them names any.
    """
    keys = [key for key in _WEIGHTS if key in settings]
    if not keys:
        return None
    start = next((key for key in keys if settings[key] is not None), None)
    if start is None:
        raise ConfigError(
            f"{command} has no trained weights: give --ckpt_path (a file, last or best), or"
            f" model.{keys[0]}"
        )
    return start


def check_predictions(path: Any, overwrite: Any, run_folder: Any) -> None:
    """Refuses to write predictions over a file that is there.

    Args:
        path: File of the predictions; None for the one in the run folder.
        overwrite: Whether a file that is there is replaced.
        run_folder: Run folder, where one is named; None for a new one.

    Raises:
        FileExistsError: The file is there, and is not to be replaced.
        ValueError: It is a folder, or its ending is that of another form.
    """
    if path is not None:
        refuse_predictions(Path(str(path)).expanduser(), bool(overwrite))
    elif run_folder is not None:
        refuse_predictions(Path(str(run_folder)) / PREDICTIONS, bool(overwrite))


def check_trainer_inputs(command: str, model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Refuses files, folders, models and tasks of a run that are not there.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        model: Settings of the model's class that are given.
        data: Settings of the data's class that are given.

    Raises:
        ConfigError: A task is unknown.
        OSError: Something is missing.
    """
    names = _task_names(data.get("tasks"))
    try:
        tasks = [find_task(name) for name in names]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key in _TEXTS if command == "fit" else ():
        if isinstance(data.get(key), str | list):
            refuse_missing_texts(data[key], key)
    if data.get("data_dir") is not None:
        for task in tasks:
            find_folder(task, data["data_dir"])
    if data.get("tokenizer") is not None:
        refuse_missing_tokenizer(str(data["tokenizer"]))
    if data.get("cache_dir") is not None:
        refuse_file_as_cache(str(data["cache_dir"]))
    if data.get("chat_template") is not None:
        refuse_missing_template(str(data["chat_template"]))
    for key in _WEIGHTS:
        if model.get(key) is not None:
            refuse_missing_model(str(model[key]), model.get("revision"))
    if model.get("teacher") is not None:
        refuse_missing_model(str(model["teacher"]))


def _task_names(given: Any) -> list[str]:
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, dict):
        names = as_list(names)
    stripped = (str(name).strip() for name in names)
    return [name for name in stripped if name and name != "synthetic"]


def _check_evaluate(options: argparse.Namespace) -> None:
    if options.output is not None and options.shard is None:
        check_output(options.output, options.overwrite)
    tasks = [find_scored_task(name) for name in options.tasks]
    if options.data_dir is not None:
        form = {"separator": options.separator, "encoding": options.encoding}
        for task in tasks:
            open_split(task, options.data_dir, options.split, **form)
    _check_shards_or_model(options)


def _check_label(options: argparse.Namespace) -> None:
    find_task(options.task)
    check_csv_settings(options.input, options.separator, options.encoding)
    output = LabelledFile(options.output, {})
    if options.shard is None:
        output.check_replaceable(options.overwrite)
    open_rows(options.input)
    _check_shards_or_model(options)


def _check_shards_or_model(options: argparse.Namespace) -> None:
    if options.merge is None:
        _check_model(options)
    else:  # for which the model is not loaded
        find_shards(options.output, options.merge, options.shard_command)


def _check_generate(options: argparse.Namespace) -> None:
    if options.prompts is not None:
        refuse_missing_prompts(options.prompts)
    if options.output is not None:
        refuse_existing(options.output, "output", options.overwrite)
    _check_model(options)


def _check_decompose(options: argparse.Namespace) -> None:
    check_decomposition(options.output, options.overwrite)
    _check_compression(options)


def _check_compression(options: argparse.Namespace, results: Sequence[str] = ()) -> None:
    if getattr(options, "prompts", None) is not None:
        refuse_missing_prompts(options.prompts)
    _check_calibration(options)
    refuse_missing_results(results)
    if options.calibration_task is not None:
        _check_calibration_task(options.calibration_task, options.data_dir)
    _check_model(options)


def _check_export(options: argparse.Namespace) -> None:
    if options.push is not None:
        refuse_no_access()
    else:  # with it, what is there may be uploaded
        is_ours = has_mark(options.output, EXPORT_MARK)
        check_replaceable(options.output, options.overwrite, is_ours, "export")
    _check_compression(options, options.results or ())


def _check_calibration(options: argparse.Namespace) -> None:
    for word in options.calibration or ():
        name, _ = weighted_name(str(word))
        if name.startswith(TASK_PREFIX):
            _check_calibration_task(name.removeprefix(TASK_PREFIX), options.data_dir)
        else:
            refuse_missing_texts(name, "calibration")


def _check_compress(options: argparse.Namespace) -> None:
    check_compression(options.output, options.overwrite)
    _check_calibration(options)
    for text in options.texts:
        refuse_missing_texts(text, "texts")
    tasks = [find_scored_task(name) for name in options.tasks]
    _check_model(options)
    if options.data_dir is not None:
        for task in tasks:
            open_split(task, options.data_dir, "validation")


def _check_serve(options: argparse.Namespace) -> None:
    for name in options.tasks or ():
        find_label_task(name)
    _check_model(options)


def _check_calibration_task(name: str, data_dir: Path | None) -> None:
    task = find_task(name)
    if data_dir is not None:
        find_folder(task, data_dir)


def _check_model(options: argparse.Namespace) -> None:
    refuse_missing_model(options.model)
    refuse_missing_template(getattr(options, "chat_template", TEMPLATE_CHOICES[0]))
    adapters = dict(getattr(options, "adapters", None) or {})
    for path in (getattr(options, "adapter", None), *adapters.values()):
        if path is not None:
            refuse_missing_adapter(path)
    if options.tokenizer is not None:
        refuse_missing_tokenizer(options.tokenizer)


def _check_sweep(options: argparse.Namespace) -> None:
    if options.sweep is not None:
        find_file(str(options.sweep), SWEEPS, "sweep")
        if options.output is not None and options.storage is None:
            refuse_used_folder(options.output)
    else:
        refuse_no_sweep(options.resume)


WITHOUT_LOGGERS = ("--trainer.logger", "false")
"""What commands that log nothing add to the words of a run: its loggers need no package."""


def _check_plan(options: argparse.Namespace) -> None:
    if options.json is not None:
        refuse_unwritable(options.json, "json")
    words = [*options.words, *WITHOUT_LOGGERS]
    check_trainer_command("fit", words, runs=False, own_options=options.own_options)


def _check_tokenize(options: argparse.Namespace) -> None:
    words = [*options.words, *WITHOUT_LOGGERS]
    check_trainer_command("fit", words, own_options=options.own_options)


def _check_report(options: argparse.Namespace) -> None:
    refuse_unwritable(options.output, "output")
    for path in options.paths:
        refuse_missing_run(path)


_CHECKS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "evaluate": _check_evaluate,
    "label": _check_label,
    "generate": _check_generate,
    "decompose": _check_decompose,
    "export": _check_export,
    "sweep": _check_sweep,
    "plan": _check_plan,
    "tokenize": _check_tokenize,
    "report": _check_report,
    "serve": _check_serve,
    "chat": _check_model,
    "compare": check_inputs,
    "compress": _check_compress,
}


def check_command(command: str, options: argparse.Namespace) -> None:
    """Refuses options of a command that it would refuse.

    Args:
        command: Name of a command that is not one of the Trainer.
        options: Result of its ``parse_options``.

    Raises:
        ConfigError: A config or a sweep is wrong.
        OSError: What is to be read is missing.
        ValueError: A task is unknown, or a folder is not there.
    """
    if is_on() and command in _CHECKS:
        _CHECKS[command](options)


def is_on() -> bool:
    """Whether mistakes are looked for before the command."""
    return os.environ.get(OFF_VARIABLE) != "1"
