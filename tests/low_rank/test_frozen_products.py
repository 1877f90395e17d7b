import pytest
import torch
import torch.nn.functional as F

from fingpt_lightning.low_rank import cpu_products, frozen_products
from fingpt_lightning.low_rank.cpu_products import has_faster_products
from fingpt_lightning.low_rank.frozen_products import frozen_linear
from tests.support.numerics import assert_no_worse


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    # Where oneDNN is not as exact, nobody may be sent there, a test neither.
    if request.param and not has_faster_products():
        pytest.skip("this processor's float32 products are MKL's, or oneDNN rounds them")
    for module in (cpu_products, frozen_products):
        monkeypatch.setattr(module, "has_faster_products", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("sizes", [(7, 11, 13), (129, 576, 192)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_and_gradient_are_as_exact_as_plain_ones(
    library: bool, sizes: tuple[int, int, int], has_bias: bool
) -> None:
    num_rows, in_features, out_features = sizes
    torch.manual_seed(0)
    x, plain_x = (torch.empty(num_rows, in_features) for _ in range(2))
    plain_x.copy_(x.normal_())
    weight = torch.randn(out_features, in_features)
    bias = torch.randn(out_features) if has_bias else None
    along = torch.randn(num_rows, out_features)
    ours = frozen_linear(x.requires_grad_(), weight, bias)
    plain = F.linear(plain_x.requires_grad_(), weight, bias)
    assert type(ours.grad_fn).__name__.startswith("_FrozenLinear") == library
    ours.backward(along)
    plain.backward(along)
    assert x.grad is not None
    assert plain_x.grad is not None
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Sums of other order round differently: up to twice plain's error has been seen.
    assert_no_worse(ours, plain=plain, truth=truth, slack=2.5)
    truth = along.double() @ weight.double()
    assert_no_worse(x.grad, plain=plain_x.grad, truth=truth, slack=2.5)


def test_a_trained_weight_gets_its_gradient(library: bool) -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    frozen_linear(torch.randn(2, 5), weight, None).sum().backward()
    assert weight.grad is not None


def test_the_setting_of_products_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    x = torch.randn(7, 11, requires_grad=True)
    frozen_linear(x, torch.randn(5, 11), None).sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]
