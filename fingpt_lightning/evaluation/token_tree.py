"""Texts that begin alike as one tree of tokens, in which every token is run once.

A prompt is the trunk, its possible answers are the branches. Nodes are numbered in preorder, so
that node ``j`` is ``i`` or before it on its path exactly if ``j <= i < ends[j]``: the whole
attention mask in one number per node.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from fingpt_lightning.tasks.encoding import Text


class Step(NamedTuple):
    """One token of an answer, predicted at the node before it."""

    node: int
    token: int


class TokenTree(NamedTuple):
    """What a network runs to score several texts.

    ``tokens``, ``positions`` (in the text) and ``ends`` have one entry per node; ``steps`` has the
    answer of each text. The last token of a text is only a node where another text continues it.
    """

    tokens: list[int]
    positions: list[int]
    ends: list[int]
    steps: list[list[Step]]


def build_tree(texts: Sequence[Text], num_before: int = 0) -> TokenTree:
    """Joins texts from their beginnings.

    Args:
        texts: Texts, each with at least one token before the answer and one in it.
        num_before: Number of tokens that all texts share and that have been run already, fewer than
            there are before any answer; they are not nodes.

    >>> build_tree([Text((5, 6, 7, 8), 2), Text((5, 6, 9), 2)])
    TokenTree(tokens=[5, 6, 7], positions=[0, 1, 2], ends=[3, 3, 3], \
steps=[[Step(node=1, token=7), Step(node=2, token=8)], [Step(node=1, token=9)]])
    """
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    steps: list[list[Step]] = [[] for _ in texts]
    path: list[int] = []
    # In this order texts with a common beginning follow each other, which makes a preorder.
    for index in sorted(range(len(texts)), key=lambda i: texts[i].tokens):
        text, first_scored = texts[index]
        run = text[num_before:-1]
        num_shared = _num_equal([tokens[node] for node in path], run)
        for node in path[num_shared:]:
            ends[node] = len(tokens)
        del path[num_shared:]
        for position, token in enumerate(run[num_shared:], num_before + num_shared):
            path.append(len(tokens))
            tokens.append(token)
            positions.append(position)
            ends.append(0)
        for position in range(first_scored, len(text)):
            steps[index].append(Step(path[position - num_before - 1], text[position]))
    for node in path:
        ends[node] = len(tokens)
    return TokenTree(tokens, positions, ends, steps)


def num_common_tokens(rows: Sequence[Sequence[Text]]) -> int:
    """How many tokens all texts begin with, at most one less than those before each answer.

    >>> num_common_tokens([[Text((1, 2, 3, 4), 3)], [Text((1, 2, 3, 5), 3)]])
    2
    """
    texts = [text for texts in rows for text in texts]
    # What the first and the last in order share, all between them share too.
    num_equal = _num_equal(min(texts).tokens, max(texts).tokens)
    return min(num_equal, *(text.first_scored - 1 for text in texts))


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    positions = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], positions))
