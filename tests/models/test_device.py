from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fingpt_lightning.models import device
from fingpt_lightning.models.device import dtype_remark, find_device, find_dtype, free_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.mark.parametrize("name", ["hpu", "mtia:1", "xla", "xpu"])
def test_a_device_that_this_machine_does_not_have_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is not to be had here; there is cpu"):
        find_device(name)


@pytest.mark.parametrize(
    ("device", "capability", "dtype"),
    [(GPU, (9, 0), "bfloat16"), (GPU, (8, 0), "bfloat16"), (GPU, (7, 5), "float32"),
     (CPU, None, "float32")],
)  # fmt: skip
def test_auto_is_the_dtype_that_the_device_computes_in(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    capability: tuple[int, int] | None,
    dtype: str,
) -> None:
    asked = []

    def get_device_capability(of: torch.device) -> tuple[int, int] | None:
        asked.append(of)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    assert find_dtype("auto", device) == dtype
    assert asked == ([device] if device.type == "cuda" else [])


def test_another_name_is_taken_as_it_is() -> None:
    assert find_dtype("float32", GPU) == "float32"


def test_only_a_choice_that_changes_results_is_told() -> None:
    for where, why in ((GPU, "the GPU is fastest"), (CPU, "this CPU was measured faster")):
        assert dtype_remark("auto", "float32", where) is None
        assert dtype_remark("bfloat16", "bfloat16", where) is None
        remark = str(dtype_remark("auto", "bfloat16", where))
        assert "computed in bfloat16" in remark
        assert why in remark


@pytest.mark.parametrize(
    ("sizes", "has_it", "speedup", "dtype"),
    [
        ((576, 1536), True, 1.2, "bfloat16"),
        ((576, 1536), True, 1.19, "float32"),
        ((576, 1536), False, None, "float32"),
        ((255, 1536), True, None, "float32"),
        (None, True, None, "float32"),
    ],
)
def test_a_cpu_that_is_clearly_faster_in_bfloat16_computes_in_it(
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int] | None,
    has_it: bool,
    speedup: float | None,
    dtype: str,
) -> None:
    def measured(*given: int) -> float:
        assert given == sizes
        assert speedup is not None, "nothing is to be measured"
        return speedup

    monkeypatch.setattr(device, "_has_bfloat16", lambda: has_it)
    monkeypatch.setattr(device, "bfloat16_speedup", measured)
    assert find_dtype("auto", CPU, sizes) == dtype
    assert find_dtype("float32", CPU, sizes) == "float32"


def test_the_speed_is_measured_once_and_draws_no_number() -> None:
    before = torch.random.get_rng_state()
    found = device.bfloat16_speedup(64, 32)
    assert found > 0
    assert device.bfloat16_speedup(64, 32) is found
    assert torch.equal(torch.random.get_rng_state(), before)
    assert device._has_bfloat16() in (True, False)


@pytest.mark.parametrize(
    ("limit", "free"),
    [("max\n", 900), ("1000\n", 750), ("700\n", 450), ("100\n", 0), ("5000\n", 900), (None, 900)],
)
def test_free_memory_is_that_of_the_container_where_it_is_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, free: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=900))
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("300\n")
        (tmp_path / "memory.stat").write_text("anon 250\ninactive_file 50\n")
    assert free_bytes(CPU, tmp_path) == free


def test_free_memory_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {GPU: (7, 9)}[device])
    assert free_bytes(GPU) == 7
