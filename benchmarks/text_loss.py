"""How well a network predicts text."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.models import vocabulary_loss


@torch.no_grad()
def text_loss(
    network: PreTrainedModel, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, int]:
    """Nats per token, and over how many tokens.

    Args:
        network: Network in evaluation mode.
        batches: Token ids and labels, aligned.
    """
    loss_sum, num_tokens = 0.0, 0
    head = network.get_submodule("lm_head")
    for ids, labels in batches:
        hidden = network.base_model(input_ids=ids, use_cache=False).last_hidden_state
        sums = vocabulary_loss(head, hidden, labels)
        loss_sum += float(sums.loss_sum)
        num_tokens += int(sums.num_tokens)
    return loss_sum / num_tokens, num_tokens
