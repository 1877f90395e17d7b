"""Child processes that have AMX, emulated where the processor does not, and poisoned memory."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("amx_emulation.c")
_EMULATED_ON = {"cpuid_fault", "avx512f", "avx512_bf16", "avx512_fp16"}
"""Features that the emulation needs: to answer CPUID, and those that oneDNN assumes beside AMX."""


def with_amx(folder: Path) -> dict[str, str]:
    """Variables with which a process has AMX; the test is skipped where that is not possible.

    Args:
        folder: Folder for what is compiled.
    """
    features = _features()
    if "amx_bf16" in features:
        return poisoned(folder)
    if missing := _EMULATED_ON - features:
        pytest.skip(f"no AMX, and to emulate it the processor lacks {', '.join(sorted(missing))}")
    variables = poisoned(folder)
    if not variables:
        pytest.skip("no AMX, and no C compiler for its emulation")
    return variables | {"EMULATE_AMX": "1"}


def without_amx(folder: Path) -> dict[str, str]:
    """Variables with which oneDNN does not use AMX.

    Args:
        folder: Folder for what is compiled.
    """
    return poisoned(folder) | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


def poisoned(folder: Path) -> dict[str, str]:
    """Variables with which new memory holds NaN; none where that cannot be compiled.

    Args:
        folder: Folder for what is compiled.
    """
    compiler = shutil.which("cc")
    if compiler is None or platform.system() != "Linux" or platform.machine() != "x86_64":
        return {}
    library = folder / "amx_emulation.so"
    command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return {"LD_PRELOAD": str(library), "POISON_ALLOCATIONS": "1"}


def _features() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())
