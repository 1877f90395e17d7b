"""Log-probabilities of answers from hidden states, without computing logits that are not needed.

Axes: B rows, T nodes, D width, N nodes that are read, K features of the head's last product,
S steps, V vocabulary.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fingpt_lightning.evaluation.token_tree import Step, TokenTree
from fingpt_lightning.low_rank.embedding import head_factors
from fingpt_lightning.models.families import capped

_LOGIT_BYTES = 2**26
"""Bytes of logits over the vocabulary that are held at a time."""


class AnswerScores(NamedTuple):
    """Per row: the score of each answer, and whether greedy decoding would write it."""

    scores: list[list[float]]
    are_greedy: list[list[bool]]


def answer_scores(
    head: nn.Module,
    hidden: Float[Tensor, "B T D"],
    trees: Sequence[TokenTree],
    *,
    relative: bool,
    softcap: float | None = None,
) -> AnswerScores:
    """The log-probability of each answer.

    Sums are taken in float32 at least, whatever the network's dtype.

    Args:
        head: A `LowRankHead` or a ``torch.nn.Linear`` without bias.
        hidden: Final hidden states of the trees' nodes.
        trees: Token trees, one per row.
        relative: Whether to leave out what all answers of a row have in common: scores are then
            known up to a constant of the row, ``are_greedy`` is empty, and answers of one token
            need only their own rows of the head.
        softcap: Bound of the logits, as in `logit_cap`.

    Raises:
        TypeError: The head is of another class or has a bias.
    """
    reads: dict[tuple[int, int], int] = {}
    places, tokens, kept = [], [], []
    for row, tree in enumerate(trees):
        common = _common_nodes(tree.steps) if relative else frozenset[int]()
        for step in (step for steps in tree.steps for step in steps):
            places.append(reads.setdefault((row, step.node), len(reads)))
            tokens.append(step.token)
            kept.append(step.node not in common)
    device = hidden.device
    rows_N, nodes_N = torch.tensor(list(reads), device=device).unbind(1)
    features_NK, weight_VK = head_factors(head, hidden[rows_N, nodes_N])
    place_S = torch.tensor(places, device=device)
    token_S = torch.tensor(tokens, device=device)
    kept_S = torch.tensor(kept, device=device)
    wide = torch.promote_types(features_NK.dtype, torch.float32)
    score_S = (features_NK[place_S].to(wide) * weight_VK[token_S].to(wide)).sum(1)
    score_S = capped(score_S, softcap)
    greedy_S = torch.zeros_like(kept_S)
    if any(kept):
        needed_N, place_of_kept = place_S[kept_S].unique(return_inverse=True)
        normalizer_N, likeliest_N = _over_vocabulary(features_NK[needed_N], weight_VK, softcap)
        score_S[kept_S] -= normalizer_N[place_of_kept]
        greedy_S[kept_S] = likeliest_N[place_of_kept] == token_S[kept_S]
    return _by_answer(trees, score_S, greedy_S, relative)


def _common_nodes(steps: Sequence[Sequence[Step]]) -> frozenset[int]:
    """The nodes on all answers' paths: their normalizers change no comparison."""
    return frozenset.intersection(*(frozenset(step.node for step in answer) for answer in steps))


def _over_vocabulary(
    features_NK: Tensor, weight_VK: Tensor, softcap: float | None
) -> tuple[Float[Tensor, "N"], Int[Tensor, "N"]]:
    wide = torch.promote_types(features_NK.dtype, torch.float32)
    num_rows = max(1, _LOGIT_BYTES // (len(weight_VK) * wide.itemsize))
    weight_VK = weight_VK.to(features_NK.dtype)
    normalizers, likeliest = [], []
    for features_CK in features_NK.split(num_rows):
        logits_CV = capped((features_CK @ weight_VK.T).to(wide), softcap)
        normalizers.append(logits_CV.logsumexp(1))
        likeliest.append(logits_CV.argmax(1))
    return torch.cat(normalizers), torch.cat(likeliest)


def _by_answer(
    trees: Sequence[TokenTree],
    score_S: Float[Tensor, "S"],
    greedy_S: Bool[Tensor, "S"],
    relative: bool,
) -> AnswerScores:
    scores, greedy = iter(score_S.tolist()), iter(greedy_S.tolist())
    all_scores, all_greedy = [], []
    for tree in trees:
        lengths = [len(steps) for steps in tree.steps]
        all_scores.append([sum(islice(scores, length)) for length in lengths])
        if not relative:
            all_greedy.append([all(list(islice(greedy, length))) for length in lengths])
    return AnswerScores(all_scores, all_greedy)
