"""Heads that share the parameters of their embedding."""

from transformers import PreTrainedModel

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.low_rank_config import has_own_head
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedEmbedding


def tie_head(network: PreTrainedModel) -> None:
    """Makes the head share the embedding's parameters, again after ``to_empty``."""
    embedding = network.get_input_embeddings()
    if not list(embedding.parameters()):  # another process has it
        return
    if isinstance(embedding, QuantizedEmbedding):  # tied where it was placed
        return
    if has_own_head(network.config):
        return
    if isinstance(embedding, LowRankEmbedding):
        head = family_of(network).head
        network.set_submodule(head, LowRankHead(embedding))
        name = next(name for name, module in network.named_modules() if module is embedding)
        # So that save_pretrained writes them once.
        network._tied_weights_keys = {
            f"{head}.{part}": f"{name}.{part}" for part in ("table", "up")
        }
    else:
        network.tie_weights()
