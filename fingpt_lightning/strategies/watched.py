"""What all strategies of several processes have in common: they meet, and miss each other."""

import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from typing_extensions import override

from fingpt_lightning.strategies.rank_watch import RankWatch
from fingpt_lightning.strategies.rendezvous import START_S, meet
from fingpt_lightning.terminal.messages import first_line

_SIGNS_OF_A_LOST_RANK = (
    "gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out",
    "timeout", "timed out",
)  # fmt: skip
_LAST_WORDS_S = 2.0
"""How long the ranks that this process started have to end by themselves and give a reason."""
_NO_WORDS_S = 0.5
"""How long they have where this process has waited for its own end already."""


class WatchedRanks(ParallelStrategy):
    """A mixin before a strategy of Lightning: every wait for another rank ends.

    Ranks meet within ``start_timeout_s``; afterwards one that dies, stops, hangs or cannot be
    reached is given up after ``timeout_s`` by all others, which name it and end.

    Args:
        timeout_s: Seconds that a rank may keep others waiting, once all are set up.
        start_timeout_s: Seconds that ranks may be apart until then.
        settings: Settings of the underlying strategy.
    """

    def __init__(
        self,
        timeout_s: float | int = START_S,
        start_timeout_s: float | int = START_S,
        **settings: Any,
    ) -> None:
        for name, seconds in (("timeout_s", timeout_s), ("start_timeout_s", start_timeout_s)):
            if not 0 < seconds < float("inf"):
                raise ValueError(f"{name} {seconds} is not a number of seconds above 0")
        settings["timeout"] = timedelta(seconds=start_timeout_s)
        super().__init__(**settings)
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._watch: RankWatch | None = None

    @override
    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        launcher = self.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            self._launcher = _Launcher(
                launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
            )

    @override
    def setup_environment(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        if not dist.is_initialized():
            self._meet_others()
        super().setup_environment()
        if self._watch is None and self.world_size > 1:
            self._watch = RankWatch(
                self.global_rank, self.world_size, environment.main_address, _get_default_store(),
                self._start_timeout_s, partial(self._end_own, _NO_WORDS_S),
            )  # fmt: skip

    def _meet_others(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        self.set_world_ranks()  # type: ignore[attr-defined]  # of each strategy behind this
        rank, size = environment.global_rank(), environment.world_size()
        store = meet(
            environment.main_address, environment.main_port, rank, size, self._start_timeout_s,
            self._who_ended,
        )  # fmt: skip
        backend = self._get_process_group_backend()  # type: ignore[attr-defined]
        is_on_device = self.root_device.type != "cpu"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size,
            timeout=timedelta(seconds=self._start_timeout_s),
            device_id=self.root_device if is_on_device else None,
        )  # fmt: skip

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self.barrier()
        self.wait_less()

    def wait_less(self) -> None:
        """From now on, when all are set up, no rank waits longer than ``timeout_s`` for another."""
        _set_pg_timeout(timedelta(seconds=self._timeout_s), dist.group.WORLD)
        if self._watch is not None:
            self._watch.timeout_s = self._timeout_s

    @override
    def on_exception(self, exception: BaseException) -> None:
        watch = self._watch
        text = str(exception)
        if watch is None:
            pass
        elif isinstance(exception, RuntimeError) and any(s in text for s in _SIGNS_OF_A_LOST_RANK):
            reason = watch.explain(exception)
            if reason is None:
                reason = (
                    f"another rank failed (its own message says why) or gave no answer for"
                    f" timeout_s {self._timeout_s:g} ({first_line(exception)})"
                )
            exception.args = (reason,)
        else:
            ended = isinstance(exception, KeyboardInterrupt | SIGTERMException)
            watch.leave("it was interrupted" if ended else first_line(exception))
        self._end_own()

    @override
    def teardown(self) -> None:
        if self._watch is not None:
            self._watch.leave()
            self._watch = None
        super().teardown()

    def _end_own(self, grace_s: float = _LAST_WORDS_S) -> None:
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            _end(self.launcher.procs, grace_s)

    def _who_ended(self) -> str | None:
        if not isinstance(self.launcher, _SubprocessScriptLauncher):
            return None
        for index, process in enumerate(self.launcher.procs, 1):
            if process.poll() is not None:
                return (
                    f"rank {self.global_rank + index} (process {process.pid}) ended with status"
                    f" {process.returncode} before it met the others; its own message says why"
                )
        return None


class _Launcher(_SubprocessScriptLauncher):
    """Lightning's without its observer, which kills all, this process too, without a word."""

    @override
    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any
    ) -> Any:
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


def _end(processes: list[subprocess.Popen[Any]], grace_s: float) -> None:
    """Leaves no process behind: one that hangs would never notice that the others are gone."""
    deadline_s = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


class DataParallel(WatchedRanks, DDPStrategy):
    """Lightning's ``DDPStrategy``, of which no rank waits for ever for a lost one.

    Args:
        gradient_as_bucket_view: Whether gradients are views into the buffers of communication,
            which takes less memory.
        process_group_backend: Backend such as ``nccl`` or ``gloo``; null goes by the device.
        timeout_s: Seconds that a rank waits for another before it ends the run, once all are set
            up. One that dies, stops, hangs or is cut off is named, and all others end.
        start_timeout_s: Seconds that ranks may be apart until then.
    """

    def __init__(
        self,
        gradient_as_bucket_view: bool = True,
        process_group_backend: str | None = None,
        timeout_s: float | int = START_S,
        start_timeout_s: float | int = START_S,
    ) -> None:
        super().__init__(
            timeout_s,
            start_timeout_s,
            gradient_as_bucket_view=gradient_as_bucket_view,
            process_group_backend=process_group_backend,
        )
