"""A Llama whose every operation is in the dtype of its weights, to be compared in float64."""

from torch import nn
from transformers import PreTrainedModel


def exact_norms(network: PreTrainedModel) -> PreTrainedModel:
    """Replaces transformers' RMS norms, which always compute in float32, by torch's.

    Args:
        network: Network that is changed in place; names and weights stay.
    """
    for name, part in list(network.named_modules()):
        if type(part).__name__ == "LlamaRMSNorm":
            weight: nn.Parameter = part.weight
            norm = nn.RMSNorm(len(weight), network.config.rms_norm_eps)
            norm.weight = weight
            network.set_submodule(name, norm)
    return network
