"""Computing activations again in the backward pass in place of keeping them."""

from transformers import PreTrainedModel


def recompute_blocks(network: PreTrainedModel) -> None:
    """Keeps each decoder block's input only; the rest is computed again in the backward pass.

    Costs one more forward pass through the blocks. Gradients are equal to the bit, dropout
    included. Source: https://arxiv.org/abs/1604.06174.
    """
    # transformers renamed the method in 5.2x and warns of the old name.
    old_name, new_name = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    enable = getattr(network, new_name, None) or getattr(network, old_name)
    enable({"use_reentrant": False})
