import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from fingpt_lightning.data import TextBlocks
from fingpt_lightning.low_rank import cpu_products
from fingpt_lightning.low_rank.cpu_products import faster_products, has_faster_products, is_exact
from fingpt_lightning.modules import LowRankPretraining

_SETTINGS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_CPU = torch.device("cpu")


@pytest.fixture
def _is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "has_faster_products", lambda: True)


@pytest.mark.usefixtures("_is_faster")
def test_the_setting_is_put_back_by_the_last_who_leaves() -> None:
    before = _SETTINGS.fp32_precision
    entered, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with faster_products():
            entered.set()
            may_leave.wait(60)

    other = threading.Thread(target=stay)
    with faster_products():
        with faster_products():
            assert _SETTINGS.fp32_precision == "bf16"
        other.start()
        assert entered.wait(60)
    assert _SETTINGS.fp32_precision == "bf16"
    assert is_exact(_CPU)
    may_leave.set()
    other.join()
    assert _SETTINGS.fp32_precision == before


@pytest.mark.usefixtures("_is_faster")
def test_the_setting_is_put_back_after_an_error() -> None:
    before = _SETTINGS.fp32_precision

    @faster_products()
    def fail() -> None:
        raise ArithmeticError(_SETTINGS.fp32_precision)

    with pytest.raises(ArithmeticError, match="bf16"):
        fail()
    assert _SETTINGS.fp32_precision == before


def test_a_setting_of_the_user_is_not_called_exact() -> None:
    before = _SETTINGS.fp32_precision
    assert is_exact(_CPU)
    _SETTINGS.fp32_precision = "tf32"
    try:
        assert not is_exact(_CPU)
    finally:
        _SETTINGS.fp32_precision = before


def test_nobody_is_sent_where_products_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu_products, "_vendor", lambda: "GenuineIntel")
    assert not has_faster_products.__wrapped__()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpu_products, "_vendor", lambda: "AuthenticAMD")
    assert not has_faster_products.__wrapped__()
    monkeypatch.setattr(cpu_products, "has_faster_products", lambda: False)
    before = _SETTINGS.fp32_precision
    with faster_products():
        assert _SETTINGS.fp32_precision == before


@pytest.mark.parametrize(
    "name", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"]
)
@pytest.mark.parametrize("given", [None, "7"])
def test_compiled_products_are_kept_unless_the_user_decides(name: str, given: str | None) -> None:
    program = f"import os, fingpt_lightning.low_rank; print(os.environ.get({name!r}))"
    environment = {key: text for key, text in os.environ.items() if "PRIMITIVE_CACHE" not in key}
    if given is not None:
        environment[name] = given
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    ours = "16384" if name.startswith("ONEDNN") else "None"
    assert done.stdout.strip() == (given or ours)


@pytest.mark.usefixtures("_is_faster")
@pytest.mark.parametrize("optimizer", ["adamw", "spectron", "lora_muon"])
def test_every_part_of_training_has_them(
    tmp_path: Path, optimizer: Literal["adamw", "spectron", "lora_muon"]
) -> None:
    before = _SETTINGS.fp32_precision
    seen: dict[str, set[str]] = {}

    class Noting(LowRankPretraining):
        def hidden_states(self, batch: Any) -> Tensor:
            part = "training" if self.training else "validation"
            seen.setdefault(part, set()).add(_SETTINGS.fp32_precision)
            hidden = super().hidden_states(batch)
            if hidden.requires_grad:
                hidden.register_hook(
                    lambda _: seen.setdefault("backward", set()).add(_SETTINGS.fp32_precision)
                )
            return hidden

        def on_before_zero_grad(self, optimizer: Any) -> None:
            seen.setdefault("hooks of others", set()).add(_SETTINGS.fp32_precision)

    trainer = Trainer(
        max_steps=2, limit_val_batches=1, val_check_interval=1, accelerator="cpu", devices=1,
        default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Noting("gpt2-nano", rank=8, optimizer=optimizer)
    trainer.fit(
        module,
        TextBlocks(
            num_synthetic_items=40, val_share=0.2, vocab_size=300, block_length=16, batch_size=2
        ),
    )
    assert seen.pop("hooks of others") == {before}
    assert seen == {part: {"bf16"} for part in ("training", "validation", "backward")}
    assert _SETTINGS.fp32_precision == before
