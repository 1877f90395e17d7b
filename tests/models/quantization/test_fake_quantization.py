from pathlib import Path

import pytest
import torch

from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.low_rank import RankRule
from fingpt_lightning.models import GPT2Shape, build_network, vocabulary_loss
from fingpt_lightning.models.formats.peft_adapter import Base
from fingpt_lightning.models.loading import LoadedModel, load_model
from fingpt_lightning.models.quantization.fake_quantization import RoundedWeights
from fingpt_lightning.models.sources import ModelSource

SHAPE = GPT2Shape(num_layers=2, width=48, num_heads=2, num_positions=16)
IDS = torch.arange(12)[None]
# Pairs with a factorised and with a full embedding, pairs beside dense layers, the dense baseline.
NETWORKS = {
    "factorised": (RankRule(7), 11),
    "full_table": (RankRule(16), None),
    "mixed": (RankRule(7, {"*.mlp.*": None}), 11),
    "dense": (None, None),
}


@pytest.mark.parametrize("method", ["int8", "nf4"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_applied_weights_are_those_of_the_exported_folder(
    kind: str, method: str, tmp_path: Path
) -> None:
    network = build_network(SHAPE, 37, *NETWORKS[kind], seed=1).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = RoundedWeights(network, method)
    weights.apply()
    with torch.no_grad():
        rounded = network(IDS).logits
        loss = vocabulary_loss(network.lm_head, network.transformer(IDS).last_hidden_state, IDS)
    weights.restore()
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    found = ModelSource("made up", tmp_path, None, None, None, Base("made up", None))
    source = LoadedModel(network, None, found, "made up", "0")
    export(source, method, tmp_path / "out", tolerance=2.0, embeddings="quantized")
    again = load_model(tmp_path / "out").network
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, rounded, rtol=1e-5, atol=1e-5)
        hidden = again.base_model(IDS).last_hidden_state
        same = vocabulary_loss(again.get_submodule("lm_head"), hidden, IDS)
    torch.testing.assert_close(same.loss_sum, loss.loss_sum, rtol=1e-6, atol=1e-5)


def test_the_gradient_is_that_of_the_rounded_network_and_moves_the_weights_themselves() -> None:
    network, plain = (build_network(SHAPE, 37, RankRule(7), 11, seed=1) for _ in range(2))
    weights = RoundedWeights(network, "nf4")
    weights.apply()
    weights.apply()  # a second microbatch
    plain.load_state_dict(network.state_dict())
    start = RoundedWeights(plain, "nf4")._matrices
    for each in (network, plain):
        each(input_ids=IDS, labels=IDS).loss.backward()
    weights.restore()
    original = build_network(SHAPE, 37, RankRule(7), 11, seed=1)
    torch.optim.SGD(network.parameters(), lr=0.5).step()
    assert len(start) == 2 * 4 * 2 + 2
    moved = 0
    for now, rounded, first in zip(
        network.parameters(), plain.parameters(), original.parameters(), strict=True
    ):
        assert rounded.grad is not None
        torch.testing.assert_close(now, first - 0.5 * rounded.grad)
        moved += int(not torch.equal(rounded, first))
    assert moved == len(start)
