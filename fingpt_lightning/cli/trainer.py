"""``fingpt fit|validate|test|predict``: LightningCLI with one folder per run and clear errors.

A setting comes from, weakest first: defaults, checkpoint, config files, command line.
"""

import logging
import os
import sys
import typing
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jsonargparse import Namespace
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.log_lines import LogLines
from callbacks.predictions import PredictionWriter
from callbacks.progress import TrainingProgress
from fingpt_lightning.cli.class_paths import class_at, is_same_class
from fingpt_lightning.cli.config_errors import check_configs, explain, undecodable
from fingpt_lightning.cli.early_checks import (
    check_predictions,
    check_start,
    check_trainer_inputs,
)
from fingpt_lightning.cli.errors import ConfigError, TerminatedError
from fingpt_lightning.cli.experiment_loggers import (
    MLFLOW_VARIABLES,
    RunTensorBoard,
    place_logger,
)
from fingpt_lightning.cli.experiment_loggers import record_config as record_text
from fingpt_lightning.cli.metrics_file import RunMetrics
from fingpt_lightning.cli.run_folders import (
    RUN_FOLDER_VARIABLE,
    AgreedFolder,
    claim_run_folder,
    find_checkpoint,
    read_checkpoint_lazily,
    remove_run_leftovers,
)
from fingpt_lightning.cli.shipped import with_config_files
from fingpt_lightning.cli.signals import sigterm_left_to
from fingpt_lightning.cli.trainer_numbers import check_trainer_numbers
from fingpt_lightning.cli.wandb_runs import (
    LIMIT_VARIABLES,
    begin_run,
    keep_offline_if_unreachable,
    log_adapter,
    place_wandb_run,
    record_config,
    runs_that_end,
)
from fingpt_lightning.files import write_whole
from fingpt_lightning.models.sources import tokenizer_of_model
from fingpt_lightning.modules.recipe import DEFAULTS
from fingpt_lightning.profiling import keep_freed_memory
from fingpt_lightning.reporting.environment import write_environment
from fingpt_lightning.strategies.checkpoint_files import WholeCheckpoints
from fingpt_lightning.strategies.rendezvous import START_S
from fingpt_lightning.terminal.command_line import as_list
from fingpt_lightning.terminal.messages import print_status, without_credentials

DEFAULT_CLASSES = {
    "model": "fingpt_lightning.modules.LowRankPretraining",
    "data": "fingpt_lightning.data.TextBlocks",
}
_PROFILERS: dict[str, Callable[[], Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}
_CHECKPOINT_HYPER_PARAMETERS = {
    "model": "hyper_parameters",
    "data": "datamodule_hyper_parameters",
}


def run_trainer_command(words: list[str]) -> None:
    """Parses, builds and runs one Trainer command.

    Args:
        words: Command and its options.

    Raises:
        ConfigError: The command line or a config is wrong.
        KeyboardInterrupt: Lightning has ended the run after an interrupt.
        TerminatedError: Lightning has ended the run after SIGTERM.
    """
    with _quiet():
        try:
            with runs_that_end():
                FinGPTCLI(words)
        except SIGTERMException as error:
            # A SystemExit without a status, which would count as a success.
            raise TerminatedError("ended by SIGTERM") from error
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise


def build_trainer_command(words: list[str], own_options: Sequence[str] = ()) -> "FinGPTCLI":
    """Parses and builds what a Trainer command would run, and runs nothing: no folder is made.

    Args:
        words: Command and its options.
        own_options: Options that the caller takes beside them, for messages.

    Raises:
        ConfigError: The command line or a config is wrong.
    """
    with _quiet():
        return _Built(words, own_options)


def build_data(words: list[str], own_options: Sequence[str] = ()) -> LightningDataModule:
    """Parses what a Trainer command would run, and builds its data alone, whatever the devices.

    Args:
        words: Command and its options.
        own_options: Options that the caller takes beside them, for messages.

    Raises:
        ConfigError: The command line or a config is wrong.
    """
    with _quiet():
        data: LightningDataModule = _DataAlone(words, own_options).datamodule
    return data


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides library messages that do not concern the run, and leaves the environment as it was."""
    # Blocks are read from memory-mapped files: workers would cost more than they gain.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # The run folder already holds the config.
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists and is not empty.*")
    # Averaging a network of which a process holds a part is refused.
    warnings.filterwarnings("ignore", ".*using the WeightAveraging callback with a model that.*")
    # Our modules count by optimizer steps, whatever a GradientAccumulationScheduler does.
    warnings.filterwarnings("ignore", ".*the hooks will not be called on every batch.*")
    warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
    # Advertisements and device lists, which the summaries of a run make needless.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    before = dict(os.environ)
    try:
        yield
    finally:
        ours = (RUN_FOLDER_VARIABLE, "WANDB_SILENT", *MLFLOW_VARIABLES, *LIMIT_VARIABLES)
        for name in ours:
            if name not in before:
                os.environ.pop(name, None)


class RaisingParser(LightningArgumentParser):
    """A parser that raises its errors instead of printing usage and ending the process.

    The parsers of nested classes are of this class too: their messages become part of another.
    """

    @override
    def add_lightning_class_args(
        self, lightning_class: Any, nested_key: str, subclass_mode: bool = False, *_: Any, **__: Any
    ) -> Any:  # Lightning's list[str] is None in subclass mode
        # Model and data have defaults, which a config need not repeat.
        required = not subclass_mode
        return super().add_lightning_class_args(
            lightning_class, nested_key, subclass_mode, required
        )

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(message) from ex


def forget_unions() -> None:
    """Keeps the order of types in a union as each class has it.

    typing hands out the Union[float, int] of lightning.fabric for our int | float where it still
    remembers it, and jsonargparse 4.53 would make a rank of 8 the share 8.0.
    """
    for forget in typing._cleanups:  # type: ignore[attr-defined]
        forget()


def options_of(parser: ArgumentParser) -> Iterator[str]:
    """All options of a parser and of those of its commands."""
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        if isinstance(action.choices, Mapping):  # the parsers of the commands
            for below in action.choices.values():
                yield from options_of(below)


class RunRecord(SaveConfigCallback):
    """Writes config, environment and tokenizer into the run folder, and the config to loggers.

    Lightning's own callback refuses a second run into the same logger folder, which ends a sweep.
    """

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        write_whole(folder / "config.yaml", text)
        write_environment(folder)
        uploaded = without_credentials(text)  # such as those of a tracking server
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                record_config(logger, uploaded)
            else:
                record_text(logger, uploaded)
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / "tokenizer")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_adapter(trainer)


class FinGPTCLI(LightningCLI):
    """LightningCLI with our defaults; parses, builds and runs when made.

    Args:
        words: Command and its options.
        own_options: Options that the caller takes beside them: among them, too, the one is searched
            that an unknown option may mean.
    """

    runs: ClassVar[bool] = True
    """Whether the command is run, not only built."""

    _resumed_step = 0

    def __init__(self, words: list[str], own_options: Sequence[str] = ()) -> None:
        self.command = words[0]
        self._own_options = own_options
        with ExitStack() as self._on_failure:
            self._build_and_run(words)
            self._on_failure.pop_all()

    def _build_and_run(self, words: list[str]) -> None:
        words = with_config_files(words)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=RunRecord,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "log_every_n_steps": 10,
                "enable_progress_bar": sys.stderr.isatty(),
                "enable_model_summary": False,
            },
            parser_kwargs={"prog": "fingpt"},
            args=words,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # One parser takes a tenth of a second to build: only that of this command.
        # Checkpoints are always read with weights_only=True: there is no option to run a pickle.
        left_out = {"weights_only", "return_predictions"}  # they are in the file, not in memory
        return {self.command: LightningCLI.subcommands()[self.command] | left_out}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        self.parser_class = RaisingParser
        return super().init_parser(**kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--runs_dir", type=str, default="runs", help="Where each run gets a folder of its own."
        )
        parser.set_defaults({key: {"class_path": c} for key, c in DEFAULT_CLASSES.items()})
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        if self.command == "predict":
            parser.add_lightning_class_args(PredictionWriter, "predictions")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        forget_unions()
        try:
            check_configs(args)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            given = parser.parse_args(args, defaults=False)[self.command]
            # Where another class is chosen, the default one must not leave its settings of the
            # same names behind (jsonargparse 4.53).
            for key, default in DEFAULT_CLASSES.items():
                chosen = given.get(f"{key}.class_path")
                if chosen is not None and not is_same_class(chosen, default):
                    self._parser(self.command).set_defaults({key: {"class_path": chosen}})
            self.config = parser.parse_args(args)
        except UnicodeDecodeError as error:
            raise ConfigError(undecodable(args)) from error
        except ConfigError as error:
            known = [*self._own_options, *sorted(options_of(parser))]
            line = explain(str(error), known, DEFAULT_CLASSES, args)
            raise ConfigError(line) from error
        settings = self.config[self.command]
        check_trainer_numbers(dict(settings.items()))
        if ckpt_path := settings.get("ckpt_path"):
            runs_dir = Path(settings.runs_dir)
            path = find_checkpoint(ckpt_path, _run_name(settings), runs_dir, print_status)
            settings.ckpt_path = str(path)
            if self.runs:
                remove_run_leftovers(path)
            self._resumed_step = read_checkpoint_lazily(path).get("global_step", 0)
            _fill_from_checkpoint(settings, given, path)
        elif self.command != "fit":
            self._check_start(settings)
        if self.command == "predict":
            written = settings.predictions
            root = settings.trainer.default_root_dir
            check_predictions(written.path, written.overwrite, root)
        if self.runs and not settings.get("ckpt_path"):
            groups = [_init_args_of_ours(settings[key]) for key in ("model", "data")]
            check_trainer_inputs(self.command, *groups)
        _take_tokenizer_of_model(settings)

    def _check_start(self, settings: Namespace) -> None:
        """Refuses to evaluate random weights; reports which weights are evaluated untrained."""
        model = (settings.model.get("init_args") or Namespace()).as_dict()
        start = check_start(self.command, model)
        if start is None:  # a user's own class, which loads its weights itself
            return
        print_status(
            f"{self.command} of model.{start} {model[start]} as it is, without a checkpoint"
        )

    @override
    def _parse_ckpt_path(self) -> None:
        """Lightning's method would let the checkpoint win over config and command line."""

    @override
    def before_instantiate_classes(self) -> None:
        settings = self.config[self.command]
        self._as_given = settings.clone()
        trainer = settings.trainer
        if trainer.default_root_dir is None:
            strategy = trainer.get("strategy")
            own = strategy.get("init_args") if isinstance(strategy, Namespace) else None
            limit_s = (own or {}).get("start_timeout_s", START_S)
            self._agreed = AgreedFolder(self._new_run_folder, limit_s)
            trainer.default_root_dir = self._agreed.path
        self.run_folder = Path(trainer.default_root_dir)
        os.environ[RUN_FOLDER_VARIABLE] = str(self.run_folder)
        checkpoints = [
            callback.init_args
            for callback in as_list(trainer.callbacks)
            if "dirpath" in callback.get("init_args", {})
        ]
        for checkpoint in [settings.best_checkpoint, settings.last_checkpoint, *checkpoints]:
            if checkpoint.dirpath is None:
                checkpoint.dirpath = str(self.run_folder / "checkpoints")
        for logger in as_list(trainer.logger):
            if not isinstance(logger, Namespace):
                continue
            if class_at(logger.class_path) is WandbLogger:
                place_wandb_run(logger.init_args, self.run_folder)
                if self.runs:
                    keep_offline_if_unreachable(logger.init_args)
            else:
                place_logger(logger, self.run_folder, Path(settings.runs_dir))

    def _new_run_folder(self) -> str:
        settings = self.config[self.command]
        name = _run_name(settings)
        name = name if self.command == "fit" else f"{name}-{self.command}"
        on_failure = self._on_failure if self.runs else None
        return claim_run_folder(Path(settings.runs_dir), name, on_failure)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
            if hasattr(self.model, "check_block_length"):
                self.model.check_block_length(self.datamodule.block_length)
        except (ValueError, TypeError, MisconfigurationException) as error:
            line = explain(str(error))
            if line.startswith("`devices` selected"):  # Lightning does not say which
                line = f"trainer.devices {self.config[self.command].trainer.devices!r}: {line}"
            raise ConfigError(line) from error

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | ({"return_predictions": False} if subcommand == "predict" else {})

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        # While its handlers are in place, Lightning ends the run at the end of the batch.
        with sigterm_left_to(lambda: bool(self.trainer._signal_connector._original_handlers)):
            super()._run_subcommand(subcommand)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        loggers = [logger for logger in as_list(settings.logger) if isinstance(logger, Logger)]
        if self.command == "fit" and not any(isinstance(x, CSVLogger) for x in loggers):
            loggers = [*loggers, RunMetrics(self.run_folder)]
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                # Lightning 2.6.6 names it even where it is not set, and wandb 0.25 warns of it.
                logger._wandb_init.pop("anonymous", None)
            elif isinstance(logger, RunTensorBoard):
                # Only what is trained again takes the place of later steps.
                logger.resumed_step = self._resumed_step if self.command == "fit" else None
        own = as_list(settings.callbacks)
        if settings.enable_progress_bar and not any(isinstance(x, ProgressBar) for x in own):
            # First, so that it is gone from the screen when others print the results of the run.
            own = [TrainingProgress(), *own]
        if not any(isinstance(x, LogLines) for x in own):
            # After the others, so that what they did in a step is told.
            own = [*own, LogLines()]
        plugins = as_list(settings.plugins)
        strategy_writes = getattr(settings.strategy, "_checkpoint_io", None) is not None
        if not strategy_writes and not any(isinstance(x, CheckpointIO) for x in plugins):
            plugins = [*plugins, WholeCheckpoints()]
        # What is saved, also for other runs, does not contain the folder of this one.
        self.config[self.command] = self._as_given
        _note_resolved(self._as_given.model, getattr(self.model, "resolved_settings", {}))
        trainer = super().instantiate_trainer(
            logger=loggers or False,
            callbacks=own or None,
            plugins=plugins,
            profiler=_placed_profiler(settings.profiler, self.run_folder),
            **kwargs,
        )
        if isinstance(trainer.accelerator, CPUAccelerator):
            keep_freed_memory()
        for logger in trainer.loggers:  # none with fast_dev_run
            if self.runs and isinstance(logger, WandbLogger):
                begin_run(logger)
        return trainer


def _note_resolved(settings: Namespace, resolved: Mapping[str, Any]) -> None:
    """Puts what a module decided in the place of a null into the config that the run records."""
    init_args = settings.get("init_args") or Namespace()
    for key, value in resolved.items():
        if value is not None and key in init_args and init_args[key] is None:
            init_args[key] = value


def _placed_profiler(given: Profiler | str | None, run_folder: Path) -> Profiler | str | None:
    """A profiler that writes into the run's folder, unless it has a place of its own."""
    profiler = _PROFILERS[given]() if isinstance(given, str) and given in _PROFILERS else given
    if isinstance(profiler, Profiler) and profiler.dirpath is None and profiler.filename is None:
        profiler.dirpath, profiler.filename = run_folder, "profile"
    return profiler


class _Built(FinGPTCLI):
    """Ends before the command is run."""

    runs = False

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        assert subcommand == self.command


class _DataAlone(_Built):
    """Needs none of the devices that the run is for, and no run folder."""

    @override
    def before_instantiate_classes(self) -> None:
        self.config[self.command].trainer.default_root_dir = "."
        super().before_instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=1,
            plugins=LightningEnvironment(),  # whatever SLURM says of the job
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )


def read_hyper_parameters(path: Path) -> dict[str, dict[str, Any]]:
    """The settings of model and data in a checkpoint, read without its weights.

    Raises:
        ValueError: The file is not a checkpoint.
    """
    checkpoint = read_checkpoint_lazily(path)
    return {
        part: dict(checkpoint.get(key, {})) for part, key in _CHECKPOINT_HYPER_PARAMETERS.items()
    }


def _fill_from_checkpoint(settings: Namespace, given: Namespace, path: Path) -> None:
    """Uses the checkpoint's values where neither a config nor the command line gives one."""
    for part, saved in read_hyper_parameters(path).items():
        class_path = saved.pop("_class_path", None)
        saved.pop("_instantiator", None)
        chosen = given.get(part)
        given_args = Namespace()
        if chosen is not None:
            given_args = chosen.get("init_args") or Namespace()
            own = chosen.get("class_path")
            if class_path and own is not None and not is_same_class(own, class_path):
                continue  # another class: the checkpoint's values do not apply to it
        elif class_path and not is_same_class(settings[part].class_path, class_path):
            settings[part] = Namespace(class_path=class_path, init_args=Namespace())
        is_recipe = saved.get("recipe") is not None
        for key, value in saved.items():
            is_decided = is_recipe and key in DEFAULTS and given_args.get(key) is None
            if key not in given_args or is_decided:
                settings[part].init_args[key] = value
            # As parsed: a class in the place of a value has its defaults there.
            elif (now := _plain(settings[part].init_args[key])) != value:
                print_status(f"{part}.{key}: {now} as given, in place of {value} in {path}")


def _init_args_of_ours(given: Namespace) -> dict[str, Any]:
    """The settings of a class of this package; of others the names may mean anything."""
    if not str(given.get("class_path")).startswith("fingpt_lightning."):
        return {}
    found: dict[str, Any] = (given.get("init_args") or Namespace()).as_dict()
    return found


def _take_tokenizer_of_model(settings: Namespace) -> None:
    """Data without a tokenizer get that of the model that is trained."""
    start = (settings.model.get("init_args") or Namespace()).get("init_from")
    data = settings.data.get("init_args") or Namespace()
    if start is None or "tokenizer" not in data or data.tokenizer is not None:
        return
    if (found := tokenizer_of_model(start)) is not None:
        data.tokenizer = found


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return value.as_dict()
    return getattr(value, "value", value)


def _run_name(settings: Namespace) -> str:
    configs = settings.get("config") or []
    return Path(str(configs[0])).stem if configs else "run"
