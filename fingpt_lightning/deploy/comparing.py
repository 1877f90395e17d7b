"""How far an exported model is from its source: logits on random and on real prompts.

Axes: N positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.tokenizer import check_tokens

_NUM_RANDOM, _RANDOM_TOKENS = 4, 32
TEXTS = (
    "Instruction: What is the sentiment of this news? Please choose an answer from"
    " {negative/neutral/positive}.\nInput: Operating profit rose to EUR 13.1 mn from EUR 8.7 mn in"
    " the corresponding period in 2007.\nAnswer:",
    "The Federal Open Market Committee decided to keep the target range for the federal funds rate"
    " unchanged, and expects that inflation will return to",
    "Shares of the company fell 4.2 % after it cut its outlook for the year; analysts had expected"
    " revenue of $1.3 billion and a dividend of",
)
"""Real prompts, where none are given."""


class Probe(NamedTuple):
    """The tokens of a prompt, and the set that it belongs to."""

    kind: str
    tokens: tuple[int, ...]


class Difference(NamedTuple):
    """Differences on one set of prompts, over all positions.

    Args:
        kind: Kind of the prompts, ``random`` or ``real``.
        num_positions: Number of tokens at which logits are compared.
        max_logit_difference: Largest absolute difference of two logits.
        relative_error: |difference| / |source|, after the mean over the vocabulary, which
            changes no probability, has been taken out at each position.
        equal_predictions: Share of positions with the same most likely token.
    """

    kind: str
    num_positions: int
    max_logit_difference: float
    relative_error: float
    equal_predictions: float


def probes(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    texts: Sequence[str] = TEXTS,
) -> list[Probe]:
    """Random prompts, the same at each call, and real ones where there is a tokenizer.

    A prompt that is longer than the network's positions loses its end.
    """
    num_positions = max_positions(network.config)
    stream = torch.Generator().manual_seed(1)
    shape = (_NUM_RANDOM, min(_RANDOM_TOKENS, num_positions))
    drawn = torch.randint(network.config.vocab_size, shape, generator=stream)
    found = [Probe("random", tuple(row)) for row in drawn.tolist()]
    if tokenizer is not None:
        encoded = [tokenizer.encode(text, verbose=False)[:num_positions] for text in texts]
        check_tokens(tokenizer, encoded, network.config.vocab_size)
        found += [Probe("real", tuple(tokens)) for tokens in encoded if tokens]
    return found


@torch.no_grad()
@faster_products()
def logits_of(network: PreTrainedModel, prompts: Sequence[Probe]) -> list[Float[Tensor, "N V"]]:
    """The logits at each position of each prompt, each prompt run alone."""
    found = []
    for probe in prompts:
        ids = torch.tensor([probe.tokens], device=network.device)
        logits = network(input_ids=ids, use_cache=False).logits[0]
        found.append(logits.to("cpu", torch.promote_types(logits.dtype, torch.float32)))
    return found


def differences(
    prompts: Sequence[Probe], source: Sequence[Tensor], found: Sequence[Tensor]
) -> list[Difference]:
    """Differences between the logits of an export and its source, by set of prompts.

    Args:
        prompts: Prompts that were run.
        source: Logits of the model that was exported.
        found: Logits of the export.

    Raises:
        ValueError: They have different vocabularies, or are not finite numbers.
    """
    made = []
    for kind in dict.fromkeys(probe.kind for probe in prompts):
        rows = [row for row, probe in enumerate(prompts) if probe.kind == kind]
        expected, got = (torch.cat([x[row] for row in rows]).double() for x in (source, found))
        if expected.shape != got.shape:
            raise ValueError(f"{got.shape[1]} tokens in place of {expected.shape[1]}")
        if not bool(got.isfinite().all()):
            raise ValueError("its logits are no finite numbers")
        centred, gap = (x - x.mean(1, keepdim=True) for x in (expected, got - expected))
        made.append(
            Difference(
                kind,
                len(expected),
                float((got - expected).abs().max()),
                float(gap.norm() / centred.norm().clamp_min(1e-300)),
                float((expected.argmax(1) == got.argmax(1)).double().mean()),
            )
        )
    return made
