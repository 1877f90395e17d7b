import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.models.quantization.gptq import DAMPING, round_with_feedback
from fingpt_lightning.models.quantization.layers import quantized_layer
from fingpt_lightning.models.quantization.rounding import round_to_int8, rounded
from tests.reference.rounding import rounded_with_feedback

CPU = torch.device("cpu")


def _inputs(features: int, seed: int = 0) -> Tensor:
    """Few directions carry most of what a layer reads, as in a network."""
    stream = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=stream, dtype=torch.float64)
    sizes = torch.logspace(0, -2, features, dtype=torch.float64)
    return torch.randn(400, features, generator=stream, dtype=torch.float64) * sizes @ mix


def _moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def _weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))


@given(rows=st.integers(1, 6), columns=st.integers(1, 150), seed=st.integers(0, 9))
@settings(max_examples=12, deadline=None)
def test_errors_are_handed_on_as_by_the_slow_way(rows: int, columns: int, seed: int) -> None:
    weight, moments = _weight(rows, columns), _moments(_inputs(columns, seed))

    def nearest(column: Tensor, place: int) -> Tensor:
        step = 0.25 + 0.01 * (place % 3)  # the grid goes with the column
        return (column / step).round() * step

    expected = rounded_with_feedback(weight, moments, nearest, DAMPING)
    made = round_with_feedback(weight, moments, nearest).double()
    # A number midway between two levels may go either way in float32, and then others follow.
    assert ((made - expected).abs() < 1e-4).double().mean() > 0.97
    lost = [torch.trace((weight - q) @ moments @ (weight - q).T) for q in (made, expected)]
    torch.testing.assert_close(lost[0], lost[1], rtol=0.05, atol=1e-9)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_inputs_that_tell_nothing_of_each_other_leave_plain_rounding(method: str) -> None:
    weight = _weight(9, 64)
    made = rounded(weight, method, torch.diag(torch.linspace(1, 2, 64, dtype=torch.float64)))
    plain = rounded(weight, method)
    if method == "int8":
        torch.testing.assert_close(made, plain)
    else:  # a scale is rounded after bitsandbytes has chosen codes by it, before ours are chosen
        assert (made - weight).norm() <= (plain - weight).norm() * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(32, 64), (20, 96), (7, 23), (40, 224)])
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_outputs_are_kept_better_than_by_rounding_each_number(
    shape: tuple[int, int], method: str
) -> None:
    weight, x = _weight(*shape), _inputs(shape[1])
    errors = [
        ((made.double() - weight) @ x.T).norm()
        for made in (rounded(weight, method, _moments(x)), rounded(weight, method))
    ]
    assert errors[0] < 0.7 * errors[1]


def test_codes_stay_within_int8_and_dead_inputs_are_rounded_plainly() -> None:
    weight = _weight(8, 40)
    x = _inputs(40)
    x[:, ::2] = 0
    made = round_to_int8(weight, _moments(x))
    assert made.codes.abs().amax() <= 127
    torch.testing.assert_close(
        rounded(weight, "int8", _moments(x))[:, ::2], rounded(weight, "int8")[:, ::2]
    )
    zero = torch.zeros(40, 40, dtype=torch.float64)
    torch.testing.assert_close(rounded(weight, "int8", zero), rounded(weight, "int8"))


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_the_second_factor_of_a_pair_reads_what_the_quantised_first_gives(method: str) -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(64, 48, 16)
    x = _inputs(64).float()
    expected = layer(x)
    errors = [
        (quantized_layer(layer, method, CPU, moments)(x) - expected).norm()
        for moments in (_moments(x.double()), None)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_layers_of_gpt2_are_read_the_right_way_round(method: str) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 24)
    turned = Conv1D(24, 64)
    turned.weight.data, turned.bias.data = plain.weight.data.T.contiguous(), plain.bias.data
    x = _inputs(64)
    made = [quantized_layer(m, method, CPU, _moments(x))(x.float()) for m in (plain, turned)]
    torch.testing.assert_close(made[0], made[1])
