import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fingpt_lightning.models import Recompute, recompute_blocks, vocabulary_loss
from fingpt_lightning.models.block_calls import blocks_of
from fingpt_lightning.models.families import FAMILIES, head_of, logit_cap
from fingpt_lightning.models.residual_stream import keep_residual_in
from tests.models.tiny_models import TINY, ids
from tests.support.numerics import assert_no_worse


def _step(network: PreTrainedModel, autocast: bool) -> tuple[list[torch.dtype], list[Tensor]]:
    """Dtypes of what the blocks put out; the loss and the gradients, each of one step."""
    dtypes = []

    def note(block: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        dtypes.append((output if isinstance(output, Tensor) else output[0]).dtype)

    handles = [block.register_forward_hook(note) for block in blocks_of(network)[1]]
    tokens = ids()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = network.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        sums = vocabulary_loss(head_of(network), hidden, tokens[:, 1:], softcap=logit_cap(network))
    sums.loss_sum.backward()
    for handle in handles:
        handle.remove()
    gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return dtypes[:2], [sums.loss_sum.detach(), gradients]


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.BLOCK])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_add_in_bfloat16_and_stay_near_the_truth(family: str, recompute: Recompute) -> None:
    torch.manual_seed(2)
    network = TINY[family]().train()
    exact = copy.deepcopy(network).double()  # but for norms in float32
    dtypes, truth = _step(exact, autocast=False)
    assert dtypes == [torch.float64, torch.float64]
    plain_network = copy.deepcopy(network)
    dtypes, plain = _step(plain_network, autocast=True)
    assert dtypes[-1] == torch.float32
    keep_residual_in(network, torch.bfloat16)
    recompute_blocks(network, recompute)
    dtypes, ours = _step(network, autocast=True)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(ours[0].double(), truth[0].double(), rtol=2**-7, atol=0)
    # The sums of two blocks are rounded to 8 bits, as the operands of all products are.
    assert_no_worse(ours[1], plain=plain[1], truth=truth[1].double(), slack=3.0)


def test_without_autocast_not_a_bit_changes() -> None:
    network = TINY["llama"]().train()
    other = copy.deepcopy(network)
    keep_residual_in(other, torch.bfloat16)
    for ours, theirs in zip(_step(network, False)[1], _step(other, False)[1], strict=True):
        assert torch.equal(ours, theirs)
