from types import SimpleNamespace

import pytest
import torch

from fingpt_lightning.profiling import measured_peak_flops_per_s


def test_the_best_of_the_products_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times_s = iter([0.0, 4.0, 10.0, 12.0, 20.0, 25.0])
    clock = SimpleNamespace(perf_counter=lambda: next(times_s))
    monkeypatch.setattr("fingpt_lightning.profiling.throughput.time", clock)
    rate = measured_peak_flops_per_s(torch.device("cpu"), torch.float32, seconds=1.0)
    assert rate == 2 * 1024**3 / 2.0


def test_a_real_measurement_is_plausible_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    rate = measured_peak_flops_per_s(torch.device("cpu"), torch.float32, seconds=0.001)
    assert 1e8 < rate < 1e14
    assert torch.equal(state, torch.get_rng_state())


def test_no_time_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seconds=0\.0"):
        measured_peak_flops_per_s(torch.device("cpu"), torch.float32, seconds=0.0)
