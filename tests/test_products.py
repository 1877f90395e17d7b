import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.amx import with_amx, without_amx
from tests.support.product_table import LIMITS
from tests.support.programs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Measured(NamedTuple):
    """What the table's program found.

    Attributes:
        output: Of oneDNN, about one product.
        errors: Of each case of each kernel.
    """

    output: str
    errors: dict[str, dict[str, float]]


def _measured(variables: dict[str, str], folder: Path) -> Measured:
    path = folder / "errors.json"
    # bitsandbytes compiles its kernels anew for each size.
    variables = {"PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.product_table", str(path)],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Measured(done.stdout, json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(with_amx, id="amx", marks=pytest.mark.xdist_group("products, AMX")),
        pytest.param(without_amx, id="no_amx", marks=pytest.mark.xdist_group("products, no AMX")),
    ],
)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[Path], dict[str, str]], Measured]:
    folder = tmp_path_factory.mktemp("products")
    return request.param, _measured(request.param(folder), folder)


@pytest.mark.parametrize("kernel", [kernel.__name__ for kernel in LIMITS])
def test_a_kernel_is_near_the_truth_in_poisoned_memory(
    measured: tuple[Callable[[Path], dict[str, str]], Measured], kernel: str
) -> None:
    errors = measured[1].errors[kernel]
    limit = next(limit for function, limit in LIMITS.items() if function.__name__ == kernel)
    assert errors
    # Written so that a NaN is too far.
    assert {case: error for case, error in errors.items() if not error <= limit} == {}


def test_a_product_runs_on_tiles_only_where_it_is_to(
    measured: tuple[Callable[[Path], dict[str, str]], Measured],
) -> None:
    setting, (output, _) = measured
    lines = [line for line in output.splitlines() if ",exec,cpu,matmul," in line]
    assert any("amx" in line for line in lines) == (setting is with_amx), lines
