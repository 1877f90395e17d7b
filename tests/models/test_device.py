from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from fingpt_lightning.models.device import dtype_remark, find_dtype, free_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


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
    assert dtype_remark("auto", "float32") is None
    assert dtype_remark("bfloat16", "bfloat16") is None
    assert "computed in bfloat16" in str(dtype_remark("auto", "bfloat16"))


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
