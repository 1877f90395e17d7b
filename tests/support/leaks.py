"""State that one test could leave to the next: variables, threads, groups, torch's defaults."""

import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed

_THREAD_GRACE_S = 2.0
# Threads that stay alive by their library's design, by the start of their name or type.
_LASTING_THREADS = {
    "MlflowLocalArtifactRepository": "mlflow: copies of artifacts",
    "Dummy-": "native threads, such as autograd's on a GPU, that once called into Python",
    "TMonitor": "tqdm: one monitor of all progress bars",
    "wandb-": "wandb: the connection to its service process",
}
# Variables that a library sets for its child processes; they are restored all the same.
_LIBRARY_VARIABLES = {
    "CRC32C_SW_MODE": "the checksums of tensorboard's event files",
    "KMP_DUPLICATE_LIB_OK": "the OpenMP runtime",
    "KMP_INIT_AT_FORK": "the OpenMP runtime",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR": "torch.compile",
    "LOCAL_RANK": "lightning, when it launches processes",
    "PL_GLOBAL_SEED": "lightning.seed_everything",
    "PL_SEED_WORKERS": "lightning.seed_everything",
    "PYTEST_CURRENT_TEST": "pytest",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "lightning, when it is imported",
    "TORCHINDUCTOR_CACHE_DIR": "torch.compile",
    "WANDB_SERVICE": "wandb: the address of its service process",
}


class ProcessState(NamedTuple):
    """What a test shares with the next one."""

    environment: dict[str, str]
    folder: Path
    dtype: torch.dtype
    num_torch_threads: int
    threads: frozenset[threading.Thread]

    @classmethod
    def now(cls) -> "ProcessState":
        """Reads the state of this process."""
        return cls(
            dict(os.environ),
            Path.cwd(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            frozenset(threading.enumerate()),
        )

    def leaks(self) -> list[str]:
        """Reports what has changed; a thread that is about to end gets the time to."""
        now = ProcessState.now()
        found = [
            f"environment variable {name}: {self.environment.get(name)} -> {os.environ.get(name)}"
            for name in sorted(self.environment.keys() | now.environment.keys())
            if self.environment.get(name) != now.environment.get(name)
            and name not in _LIBRARY_VARIABLES
        ]
        if now.folder != self.folder:
            found.append(f"working directory {now.folder}")
        if now.dtype != self.dtype:
            found.append(f"default dtype {now.dtype}")
        if now.num_torch_threads != self.num_torch_threads:
            found.append(f"number of torch threads {now.num_torch_threads}")
        if torch.distributed.is_initialized():
            found.append("torch.distributed process group")
        return found + [f"thread {thread.name}" for thread in self._new_threads()]

    def restore(self) -> None:
        """Restores everything except threads, so that only one test fails because of a leak."""
        for name in os.environ.keys() - self.environment.keys():
            del os.environ[name]
        os.environ.update(self.environment)
        os.chdir(self.folder)
        torch.set_default_dtype(self.dtype)
        torch.set_num_threads(self.num_torch_threads)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _new_threads(self) -> list[threading.Thread]:
        deadline = time.monotonic() + _THREAD_GRACE_S
        new = [
            thread
            for thread in threading.enumerate()
            if thread not in self.threads and not _is_lasting(thread)
        ]
        for thread in new:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [thread for thread in new if thread.is_alive()]


def _is_lasting(thread: threading.Thread) -> bool:
    names = (thread.name, type(thread).__name__)
    is_named = any(name.startswith(lasting) for name in names for lasting in _LASTING_THREADS)
    return is_named or _is_of_compiler(thread)


def _is_of_compiler(thread: threading.Thread) -> bool:
    """Whether torch.compile keeps the thread for its next kernels; bitsandbytes calls it too."""
    module = sys.modules.get("torch._inductor.async_compile")
    pool = None if module is None else module.AsyncCompile.pool
    return pool is not None and pool.cache_info().currsize > 0 and thread in pool()._threads
