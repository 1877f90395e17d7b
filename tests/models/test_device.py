import pytest
import torch

from fingpt_lightning.models.device import dtype_remark, find_dtype

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
