"""Rows that are too long lose tokens of their own text, in training as in evaluation."""

from collections.abc import Sequence
from difflib import SequenceMatcher


def cut_own_text(
    context: Sequence[int], own_text: Sequence[int], num_excess: int
) -> tuple[int, ...] | None:
    """The context without ``num_excess`` tokens of the row's own text.

    They are the end of the text where the prompt goes on after it, else its beginning.

    Args:
        context: The prompt's tokens, instruction and all.
        own_text: The text's tokens by itself; what both have in common longest is what is cut, so
            that the text may be a part of the prompt that is put otherwise there.
        num_excess: Above 0.

    Returns:
        None where the text has fewer tokens than that.
    """
    # From the end: of what is there twice, the text is the later, the instruction comes before it.
    # The text's first and last token may be others in the prompt, where it touches other text.
    matcher = SequenceMatcher(None, context[::-1], own_text[::-1], autojunk=False)
    block = matcher.find_longest_match()
    if block.size < num_excess:
        return None
    end = len(context) - block.a
    first = end - block.size if end == len(context) else end - num_excess
    return (*context[:first], *context[first + num_excess :])
