"""Adapters on the base that they fit."""

import warnings

from transformers import PreTrainedModel

from fingpt_lightning.models.loading import LoadedModel


def adapted_network(model: LoadedModel) -> PreTrainedModel:
    """The network with the model's adapter in its layers, or the network itself without one.

    Args:
        model: Its adapter has been checked against its network, and is safetensors.

    Raises:
        ValueError: The adapter is on a layer that PEFT does not adapt, as a low-rank pair.
    """
    if model.adapter is None:
        return model.network
    from peft import PeftModel  # takes a second

    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by an old name.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted = PeftModel.from_pretrained(model.network, str(model.adapter), is_trainable=False)
    network = adapted.get_base_model()
    assert isinstance(network, PreTrainedModel)
    network.eval()
    return network
