import random

import pytest
from transformers import PreTrainedTokenizerFast

from fingpt_lightning.deploy.written_text import WrittenText
from tests.evaluation.tiny_language import metaspace_tokenizer, tiny_tokenizer


def _decoded(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _written(text: WrittenText, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.has_stopped:
            break
    return [*pieces, text.finish()]


TEXT = "Shares of Foo Corp fell 3 % in Zürich, as profit rose by €1,100 (für „Bar“).\n\n Yes 株価 "


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), metaspace_tokenizer()])
def test_pieces_join_to_the_text_of_all_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.encode(TEXT * 4, add_special_tokens=False)
    for num_prompt in (0, 3, 10, 100):
        text = WrittenText(tokenizer, tokens[:num_prompt])
        pieces = _written(text, tokens[num_prompt:])
        before = _decoded(tokenizer, tokens[:num_prompt])
        whole = _decoded(tokenizer, tokens)
        after = _decoded(tokenizer, tokens[num_prompt:])
        # Ten tokens end amid a character.
        wanted = whole[len(before) :] if whole.startswith(before) else after
        assert "".join(pieces) == text.text == wanted


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), metaspace_tokenizer()])
def test_the_whole_text_of_any_tokens_is_theirs(tokenizer: PreTrainedTokenizerFast) -> None:
    draw = random.Random(1)
    for _ in range(20):
        # Among them bytes that are no characters, which join into some.
        tokens = [draw.randrange(3, len(tokenizer)) for _ in range(30)]
        text = WrittenText(tokenizer, tokens[:10])
        _written(text, tokens[10:])
        before = _decoded(tokenizer, tokens[:10])
        whole = _decoded(tokenizer, tokens)
        after = _decoded(tokenizer, tokens[10:])
        assert text.text == (whole[len(before) :] if whole.startswith(before) else after)


def test_a_character_of_several_tokens_is_handed_out_whole() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("€é", add_special_tokens=False)
    assert len(tokens) > 2
    pieces = _written(WrittenText(tokenizer, []), tokens)
    assert "".join(pieces) == "€é"
    assert all("\ufffd" not in piece for piece in pieces)
    # One that is never completed shows at the end.
    assert _written(WrittenText(tokenizer, []), tokens[:1])[-1] == "\ufffd"


def test_a_stop_ends_the_text_and_is_never_shown() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer.encode("profit rose Answer: negative", add_special_tokens=False)
    text = WrittenText(tokenizer, [], ("Answer: neg",))
    pieces = _written(text, tokens)
    assert text.has_stopped
    assert text.text == "".join(pieces) == "profit rose "
    # What only begins like a stop is held back until it is not one.
    text = WrittenText(tokenizer, [], ("negatively",))
    assert "".join(_written(text, tokens)) == "profit rose Answer: negative"
    assert not text.has_stopped
