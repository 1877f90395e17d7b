"""Compiles the emulated device, once per installed torch, and runs modules on it."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.support.programs import ROOT

_SOURCE = Path(__file__).with_name("device.cpp")


def run_on_cuda(module: str, result: Path, timeout_s: float = 800.0) -> None:
    """Runs a module, ``python -m MODULE RESULT``, in a process that has the emulated device.

    The device has to be there before torch is loaded, so this is a fresh interpreter. The test is
    skipped where the device cannot be compiled.

    Args:
        module: Name of the module.
        result: File that it writes.
        timeout_s: Seconds after which it is killed.
    """
    environment = os.environ | {"LD_PRELOAD": str(_library()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, str(result)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{module} ended with {done.returncode}:\n{done.stdout}{done.stderr[-4000:]}")


def _library() -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        pytest.skip("no C++ compiler on Linux, with which to emulate a CUDA device")
    if torch.version.cuda is not None:
        pytest.skip("this build of torch has CUDA itself, which the emulation cannot replace")
    source = _SOURCE.read_bytes()
    # The library finds torch's where it was when it was compiled.
    of_torch = f"{torch.__version__} {Path(torch.__file__).resolve()}"
    digest = hashlib.blake2b(source + of_torch.encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"fingpt-cuda-emulation-{os.getuid()}"
    library = folder / f"{digest}.so"
    if not library.is_file():
        folder.mkdir(mode=0o700, exist_ok=True)
        own = folder / f"{digest}.{os.getpid()}"
        _compile(compiler, own)
        own.replace(library)  # another process may have been as quick
    return library


def _compile(compiler: str, library: Path) -> None:
    of_torch = Path(torch.__file__).parent
    includes = (of_torch / "include", of_torch / "include/torch/csrc/api/include")
    command = [
        compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(_SOURCE), "-o", str(library),
        *(f"-I{folder}" for folder in includes),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-L{of_torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{of_torch / 'lib'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        pytest.fail(f"{_SOURCE.name} was not compiled:\n{done.stderr[-4000:]}")
