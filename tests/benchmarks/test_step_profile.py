from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

from benchmarks.step_profile import part_of, table, time_by_part


def _event(key: str, device: DeviceType, cpu_us: float, device_us: float) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, device_type=device, self_cpu_time_total=cpu_us, self_device_time_total=device_us
    )


def _events() -> list[SimpleNamespace]:
    return [
        _event("aten::mm", DeviceType.CPU, 5.0, 700.0),
        _event("sm90_xmma_gemm_bf16bf16", DeviceType.CUDA, 0.0, 700.0),
        _event("aten::_flash_attention_forward", DeviceType.CPU, 3.0, 200.0),
        _event("void flash_fwd_kernel", DeviceType.CUDA, 0.0, 200.0),
    ]


def test_on_cuda_time_is_that_of_the_kernels_of_each_operator_once() -> None:
    taken = time_by_part(_events(), on_cuda=True)
    assert {part: round(s * 1e6, 3) for part, s in taken.items() if s} == {
        "products": 700.0, "attention": 200.0
    }  # fmt: skip


def test_on_the_cpu_time_is_the_operators_own() -> None:
    taken = time_by_part(_events(), on_cuda=False)
    assert {part: round(s * 1e6, 3) for part, s in taken.items() if s} == {
        "products": 5.0, "attention": 3.0
    }  # fmt: skip


def test_a_profile_without_time_is_no_record_of_zeros() -> None:
    with pytest.raises(RuntimeError, match="the profile has no time"):
        time_by_part([_event("void kernel", DeviceType.CUDA, 0.0, 9.0)], on_cuda=True)


@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_attention_of_cuda_is_attention(kernel: str) -> None:
    assert part_of(f"aten::_{kernel}_attention_backward") == "attention"


def test_a_part_without_time_has_no_ratio() -> None:
    row = {
        "contender": "dense", "precision": "bf16", "part": "attention", "time_s": {"median": 0.0},
        "bound_s": 0.5, "ratio_to_dense": None,
    }  # fmt: skip
    assert "0.00 | 0.50 | 0.0x |  |" in table([row])
