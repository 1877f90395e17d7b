"""The scoring engine: which of the possible answers a model finds most likely."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.evaluation.answer_scores import answer_scores
from fingpt_lightning.evaluation.batches import batches_of, default_batch_tokens, plan_batches
from fingpt_lightning.evaluation.forward import SharedPrefix, run_trees
from fingpt_lightning.evaluation.token_tree import build_tree, num_common_tokens
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models.families import head_of, logit_cap, max_positions
from fingpt_lightning.models.finite import not_finite
from fingpt_lightning.models.formats.tokenizer import check_tokens
from fingpt_lightning.shards.options import Shard
from fingpt_lightning.tasks import Example
from fingpt_lightning.tasks.encoding import EncodedExample, TooLong, encode_examples


class Prediction(NamedTuple):
    """The answer of a model to one example.

    Args:
        choice: Index of the answer; None where it cannot be read or the row was left out.
        scores: Log-probability of each choice; none where text was generated.
        is_cut: Whether the prompt was cut to fit the context.
        answer: Generated text; empty where choices were scored.
        is_dropped: Whether the row was left out because it does not fit the context.
        is_pending: Whether another shard answers the row.
    """

    choice: int | None
    scores: tuple[float, ...]
    is_cut: bool
    answer: str = ""
    is_dropped: bool = False
    is_pending: bool = False


DROPPED = Prediction(None, (), is_cut=False, is_dropped=True)
"""What stands for the answer to a row that was left out."""
PENDING = Prediction(None, (), is_cut=False, is_pending=True)
"""What stands for the answer to a row of another shard."""


@torch.no_grad()
@faster_products()
def score(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    *,
    relative: bool = False,
    batch_tokens: int | None = None,
    too_long: TooLong = TooLong.CUT,
    on_answered: Callable[[int], None] | None = None,
    shard: Shard | None = None,
) -> list[Prediction]:
    """Scores every choice of every example; the most likely is the prediction.

    Equal to running each joined text alone, to rounding. What all texts begin with is run once;
    of each example every token that its texts share is run once; logits are made only where an
    answer is read. A single choice counts as the prediction if greedy decoding would write it.

    Args:
        network: Network in evaluation mode, with a head that `head_factors` knows.
        tokenizer: Tokenizer of the network.
        examples: Examples of one task, in any order.
        relative: Whether scores are log-probabilities among the choices, whose probabilities add up
            to 1: the cheaper way for labels. Else they are those of the texts.
        batch_tokens: Tokens of a batch, padding included; None derives it from the device.
        too_long: Treatment of rows that do not fit the context; one that is left out is
            `DROPPED`.
        on_answered: Callback, called after each batch with the number of examples scored.
        shard: Share of the batches that is run; the batches are those of all examples, so that
            scores are the same to the last digit. Rows of other shards are `PENDING`.

    Raises:
        ValueError: ``batch_tokens`` is below 1, an answer has no token, or a row does not fit
            the context and ``too_long`` is ``error``.
        FloatingPointError: A score is NaN or infinite: the row and the likely cause are named.
    """
    if batch_tokens is None:
        batch_tokens = default_batch_tokens(network.device.type)
    num_positions = max_positions(network.config)
    encoded = encode_examples(tokenizer, examples, num_positions, too_long=too_long)
    places, rows = kept_rows(encoded)
    predictions = unanswered(len(encoded), places)
    if not rows:
        return predictions
    for place, row in zip(places, rows, strict=True):
        tokens = (text.tokens for text in row.texts)
        check_tokens(tokenizer, tokens, network.config.vocab_size, f"row {examples[place].row}")
    num_shared = num_common_tokens([row.texts for row in rows])
    prefix = SharedPrefix(network, rows[0].texts[0].tokens[:num_shared])
    trees = [build_tree(row.texts, num_shared) for row in rows]
    head = head_of(network)
    num_answered = 0
    batches = plan_batches([len(tree.tokens) for tree in trees], batch_tokens)
    for batch in batches_of(shard, batches):
        of_batch = [trees[index] for index in batch]
        hidden_BTD = run_trees(network, of_batch, prefix)
        found = answer_scores(
            head, hidden_BTD, of_batch, relative=relative, softcap=logit_cap(network)
        )
        for place, index in enumerate(batch):
            if not all(map(math.isfinite, found.scores[place])):
                raise not_finite(network, f"row {examples[places[index]].row}: the scores")
            greedy = [] if relative else found.are_greedy[place]
            answer = _prediction(rows[index], found.scores[place], greedy)
            predictions[places[index]] = answer
        num_answered += len(batch)
        if on_answered is not None:
            on_answered(num_answered)
    return predictions


def unanswered(num_rows: int, kept: Sequence[int]) -> list[Prediction]:
    """What stands for the answers before there are any: rows that are not kept are left out.

    Args:
        num_rows: Number of all rows.
        kept: Places of those that will be answered.
    """
    predictions = [DROPPED] * num_rows
    for place in kept:
        predictions[place] = PENDING
    return predictions


def kept_rows(
    encoded: Sequence[EncodedExample | None],
) -> tuple[list[int], list[EncodedExample]]:
    """The rows that are not left out, and their places among all."""
    kept = [(place, row) for place, row in enumerate(encoded) if row is not None]
    return [place for place, _ in kept], [row for _, row in kept]


def _prediction(row: EncodedExample, scores: list[float], greedy: list[bool]) -> Prediction:
    if len(scores) == 1:
        return Prediction(0 if greedy[0] else None, tuple(scores), row.is_cut)
    if not greedy:
        total = math.log(sum(math.exp(x - max(scores)) for x in scores)) + max(scores)
        scores = [x - total for x in scores]
    return Prediction(scores.index(max(scores)), tuple(scores), row.is_cut)
