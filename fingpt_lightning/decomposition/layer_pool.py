"""Layers taken apart side by side: in processes of one thread, or on several devices."""

import os
import queue
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from fingpt_lightning.decomposition.layer_files import (
    Batch,
    LayerWeight,
    Work,
    batches_of,
    begin_worker,
)
from fingpt_lightning.terminal.progress import shown_progress


class LayerPool:
    """Shares batches of layers out over processes or devices.

    Args:
        workers: Processes, where the only device is the CPU.
        devices: Devices, with a thread each where there are several.
    """

    def __init__(self, workers: int, devices: Sequence[str]) -> None:
        self._devices = list(devices)
        self._workers = workers if self._devices == ["cpu"] else len(self._devices)

    def run(
        self,
        task: Callable[[Work, Batch], Sequence[Any]],
        pending: Sequence[tuple[Work, LayerWeight]],
        what: str,
    ) -> None:
        """Does a task to all layers, in batches; costliest first, so that none ends up alone."""
        works = {id(work): work for work, _ in pending}
        tasks = [
            (works[key], batch)
            for key in works
            for batch in batches_of([x for w, x in pending if id(w) == key], self._workers)
        ]
        if not tasks:
            return
        with (
            shown_progress(what, len(pending), "layers") as show,
            closing(self._done(task, tasks)) as finished,
        ):
            done = 0
            for number in finished:
                done += number
                show(done)

    def _done(
        self, task: Callable[[Work, Batch], Sequence[Any]], tasks: list[tuple[Work, Batch]]
    ) -> Generator[int, None, None]:
        """The number of layers of each batch, when it is done."""
        if self._workers == 1:
            for work, batch in tasks:
                yield len(task(replace(work, device=self._devices[0]), batch))
            return
        executor: Executor
        if self._devices == ["cpu"]:
            executor = ProcessPoolExecutor(
                min(self._workers, len(tasks)), get_context("spawn"), begin_worker, (os.getpid(),)
            )
            call: Callable[[Work, Batch], Sequence[Any]] = task
        else:
            executor = ThreadPoolExecutor(len(self._devices))
            free: queue.SimpleQueue[str] = queue.SimpleQueue()
            for device in self._devices:
                free.put(device)

            def call(work: Work, batch: Batch) -> Sequence[Any]:
                device = free.get()
                try:
                    return task(replace(work, device=device), batch)
                finally:
                    free.put(device)

        try:
            futures = [executor.submit(call, work, batch) for work, batch in tasks]
            for future in as_completed(futures):
                yield len(future.result())
        finally:
            executor.shutdown(cancel_futures=True)
