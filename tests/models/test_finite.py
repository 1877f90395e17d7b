import math
import re

import pytest
import torch
from torch import nn

from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.finite import first_not_finite, not_finite
from fingpt_lightning.models.loading import load_model
from tests.evaluation.tiny_language import tiny_network


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(value: float) -> None:
    network = tiny_network("llama")
    assert first_not_finite(network) is None
    weight = network.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight[3, 4] = value
    assert first_not_finite(network) == "model.layers.1.mlp.up_proj.weight"
    network.register_buffer("scales", torch.tensor([value]))
    with torch.no_grad():
        weight[3, 4] = 0
    assert first_not_finite(network) == "scales"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_weight_that_was_quantised_is_named_too(
    quantize: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    network = tiny_network("llama")
    with torch.no_grad():
        network.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = math.nan
    network.save_pretrained(folder)
    loaded = load_model(str(folder), quantize=quantize).network
    name = first_not_finite(loaded)
    assert name is not None
    assert name.startswith("model.layers.1.mlp.up_proj.")


def test_the_error_says_what_to_do() -> None:
    layer = nn.Linear(3, 2)

    def message() -> str:
        return str(not_finite(layer, "row 3: the scores"))

    overflow = "row 3: the scores are not finite: all weights are finite, but activations overflow"
    assert message() == (f"{overflow} float32; its weights are damaged, or the training diverged")
    layer.half()
    assert message() == f"{overflow} float16; take bfloat16 or float32"
    with torch.no_grad():
        layer.weight[1, 2] = math.inf
    damaged = "row 3: the scores are not finite: the tensor weight holds a NaN or an infinity; it"
    assert (
        message()
        == f"{damaged} was beyond float16 (take bfloat16 or float32), or its file is damaged"
    )
    layer.bfloat16()
    assert message() == f"{damaged}s file is damaged, or the training that wrote it diverged"
    with torch.no_grad():
        layer.weight[1, 2] = 0
    with torch.autocast("cpu", torch.float16):
        assert "overflow float16; take" in message()


def test_decoding_stops_at_a_logit_that_is_not_finite() -> None:
    network = tiny_network("llama")
    # Only the rows whose text holds token 7 are touched.
    with torch.no_grad():
        network.model.embed_tokens.weight[7] = math.nan
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone().nan_to_num(0))
    decode(network, [[1, 2], [3, 4]], 2)
    expected = "second: the logits are not finite: the tensor model.embed_tokens.weight holds"
    with pytest.raises(FloatingPointError, match=f"^{re.escape(expected)}"):
        decode(network, [[1, 2], [3, 7]], 2, names=["first", "second"])
    with pytest.raises(FloatingPointError, match=r"^row 1: the logits"):
        decode(network, [[7, 2], [3, 4]], 2)
