"""The text of a completion while it is being written, and where it stops."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"
"""What stands for the beginning of a character whose other bytes are still to come."""
_MOST_BYTES = 4
"""Bytes of a character at most, and so tokens."""
_NUM_CONTEXT = 48
"""Tokens before the new ones that are decoded with them."""


class WrittenText:
    """The text of new tokens after a prompt, handed out as far as it can no longer change.

    Args:
        tokenizer: Tokenizer of the network.
        prompt: Tokens before the new ones.
        stops: Texts before the first of which the completion ends.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens, self._num_prompt, self._num_pending = list(prompt), len(prompt), 0
        self._text = ""
        self._num_given = 0
        self.has_stopped = False

    @property
    def text(self) -> str:
        """The whole text so far, a stop and what follows it left out."""
        return self._text

    def add(self, token: int) -> str:
        """The part of the text that a token completes; may be empty."""
        self._tokens.append(token)
        self._num_pending += 1
        piece = self._pending()
        if piece.endswith(_REPLACEMENT) and self._num_pending < _MOST_BYTES:
            return ""
        self._text += piece
        self._num_pending = 0
        return self._given(held_back=True)

    def keep(self, token: int) -> str:
        """Adds a token whose text nobody reads before the end; gives no part of the text."""
        self._tokens.append(token)
        self._num_pending += 1
        return ""

    def finish(self) -> str:
        """What has been held back; `text` is then exact."""
        if not self.has_stopped:
            self._text += self._pending()
        piece = self._given(held_back=False)
        if not self.has_stopped:
            self._text = self._after(0, self._num_prompt)
        return piece

    def _pending(self) -> str:
        """The text of the tokens that are not in `text` yet."""
        # Tokens are not decoded alone: some tokenizers drop the blank before the first. So many are
        # enough, and the cost of a token does not grow with the text.
        end = len(self._tokens) - self._num_pending
        return self._after(max(0, end - _NUM_CONTEXT), end)

    def _after(self, first: int, middle: int) -> str:
        before, whole = (
            self._decoded(self._tokens[first:middle]),
            self._decoded(self._tokens[first:]),
        )
        if whole.startswith(before):
            return whole[len(before) :]
        # Bytes before the middle and after it make one character.
        return self._decoded(self._tokens[middle:])

    def _given(self, *, held_back: bool) -> str:
        end = len(self._text)
        if not self.has_stopped:
            begin = max(0, self._num_given)
            places = [self._text.find(stop, begin) for stop in self._stops]
            found = [place for place in places if place >= 0]
            if found:
                self.has_stopped = True
                end = min(found)
                self._text = self._text[:end]
            elif held_back:
                end -= max((_overlap(self._text, stop) for stop in self._stops), default=0)
        piece = self._text[self._num_given : end]
        self._num_given = max(self._num_given, end)
        return piece

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text a stop begins with.

    >>> _overlap("one, tw", "two"), _overlap("one", "two")
    (2, 0)
    """
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
