"""Heads that share the parameters of their embedding."""

from transformers import PreTrainedModel

from fingpt_lightning.low_rank import LowRankEmbedding, LowRankHead
from fingpt_lightning.low_rank.embedding import OwnLowRankHead
from fingpt_lightning.models.families import family_of
from fingpt_lightning.models.low_rank_config import has_own_head, has_own_head_map
from fingpt_lightning.models.quantization.quantized_embedding import QuantizedEmbedding


def tie_head(network: PreTrainedModel) -> None:
    """Makes the head share the embedding's parameters, again after ``to_empty``."""
    embedding = network.get_input_embeddings()
    if not list(embedding.parameters()):  # another process has it
        return
    if isinstance(embedding, QuantizedEmbedding):  # tied where it was placed
        return
    head = family_of(network).head
    if has_own_head_map(network.config) and isinstance(embedding, LowRankEmbedding):
        own_head = network.get_submodule(head)
        assert isinstance(own_head, OwnLowRankHead)
        own_head.share_table(embedding)
        _note_tied(network, embedding, head, ["table"])
    elif has_own_head(network.config):
        return
    elif isinstance(embedding, LowRankEmbedding):
        network.set_submodule(head, LowRankHead(embedding))
        _note_tied(network, embedding, head, ["table", "up"])
    else:
        network.tie_weights()


def _note_tied(
    network: PreTrainedModel, embedding: LowRankEmbedding, head: str, parts: list[str]
) -> None:
    """Has save_pretrained write the shared parts once."""
    name = next(name for name, module in network.named_modules() if module is embedding)
    network._tied_weights_keys = {f"{head}.{part}": f"{name}.{part}" for part in parts}
