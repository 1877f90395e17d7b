"""Rows that are too long lose tokens of their own text, in training as in evaluation."""

from array import array
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
    begin, end = _common(context, own_text)
    if end - begin < num_excess:
        return None
    first = begin if end == len(context) else end - num_excess
    return (*context[:first], *context[first + num_excess :])


def _common(context: Sequence[int], own_text: Sequence[int]) -> tuple[int, int]:
    """Where the longest run of tokens that is in the text too begins and ends in the context.

    From the end: of what is there twice, the text is the later, the instruction comes before it.
    The text's first and last token may be others in the prompt, where it touches other text.
    """
    for at_begin, at_end in ((0, 0), (1, 0), (0, 1), (1, 1)):
        part = own_text[at_begin : len(own_text) - at_end]
        begin = _last_place(context, part) if part else -1
        if begin >= 0:
            return begin, begin + len(part)
    # Quadratic, but few tasks put the text otherwise in the prompt, and theirs is short.
    matcher = SequenceMatcher(None, context[::-1], own_text[::-1], autojunk=False)
    block = matcher.find_longest_match()
    end = len(context) - block.a
    return end - block.size, end


def _last_place(whole: Sequence[int], part: Sequence[int]) -> int:
    """Where ``part`` is in ``whole`` for the last time, or -1; in time of the length of both."""
    haystack, needle = array("Q", whole).tobytes(), array("Q", part).tobytes()
    found = haystack.rfind(needle)
    while found > 0 and found % 8:  # begins within a number
        found = haystack.rfind(needle, 0, found + len(needle) - 1)
    return found // 8
