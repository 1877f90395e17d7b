from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from fingpt_lightning.deploy.chat import Chat, Exchange
from fingpt_lightning.deploy.sampling import Sampler, Sampling
from fingpt_lightning.models.decoding import decode
from fingpt_lightning.models.formats.tokenizer import use_chat_template
from fingpt_lightning.tasks.examples import Turn
from tests.evaluation.tiny_language import POSITIONS, VOCABULARY, tiny_network, tiny_tokenizer
from tests.tasks.chat_templates import BRACKETS, ENDED, PLAIN, TRIMMED, chat_tokenizer

MESSAGES = ["Shares of Foo", "Profit rose and the dividend", "Gold", "Was it kept?"]


def _sliding() -> PreTrainedModel:
    torch.manual_seed(3)
    network = MistralForCausalLM(
        MistralConfig(
            num_hidden_layers=2, hidden_size=24, intermediate_size=39, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, vocab_size=VOCABULARY,
            bos_token_id=1, eos_token_id=0, sliding_window=7,
        )
    )  # fmt: skip
    network.train(False)
    return network


NETWORKS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tiny_network("llama"),
    "gpt2": lambda: tiny_network("gpt2"),
    "low_rank": lambda: tiny_network("low_rank"),
    "sliding": _sliding,
}


def _chat(kind: str = "llama", template: str | None = ENDED, **settings: Any) -> Chat:
    tokenizer = tiny_tokenizer("<begin>")
    if template is not None:
        use_chat_template(tokenizer, template)
    return Chat(NETWORKS[kind]().double(), tokenizer, **{"max_new_tokens": 9, **settings})


def _ask(chat: Chat, message: str) -> str:
    pieces: list[str] = []
    answer = chat.ask(message, pieces.append)
    assert "".join(pieces) == answer
    return answer


def _from_the_whole(chat: Chat, message: str, choose: Any = None) -> str:
    """The answer by a network that has run nothing before."""
    prompt = chat._tokens(chat.exchanges[chat.num_left_out :], message)
    more = {} if choose is None else {"choose": choose}
    ends = chat._ends
    (new,) = decode(chat._network, [prompt], chat.max_new_tokens, end_tokens=ends, **more)
    decoded = chat._tokenizer.decode
    before = str(decoded(prompt, skip_special_tokens=True))
    return str(decoded(prompt + new, skip_special_tokens=True))[len(before) :]


@pytest.mark.parametrize("template", [None, ENDED, PLAIN], ids=["plain", "ended", "text"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_an_answer_is_that_from_the_whole_history(kind: str, template: str | None) -> None:
    chat = _chat(kind, template)
    for message in MESSAGES:
        wanted = _from_the_whole(chat, message)
        assert _ask(chat, message) == wanted
    assert any(exchange.answer for exchange in chat.exchanges)


def test_only_what_follows_the_history_is_run() -> None:
    chat = _chat()
    first = _ask(chat, "Shares of Foo")
    num_first = len(chat._tokens([], "Shares of Foo"))
    assert chat.num_run == num_first
    whole = len(chat._tokens(chat.exchanges, "Gold"))
    _ask(chat, "Gold")
    assert chat.num_run <= whole - num_first
    chat.reset()
    assert _ask(chat, "Shares of Foo") == first
    assert chat.num_run == 1, "the prompt has been run; its last token gives the next"


def test_drawn_answers_are_those_from_the_whole_history() -> None:
    sampling = Sampling(temperature=1.5, seed=3)
    chat = _chat(sampling=sampling)
    for number, message in enumerate(MESSAGES):
        wanted = _from_the_whole(chat, message, Sampler(sampling, [number]))
        assert _ask(chat, message) == wanted


def test_a_template_that_trims_texts_is_followed() -> None:
    tokenizer = chat_tokenizer(TRIMMED)
    network = tiny_network("llama")
    network.resize_token_embeddings(len(tokenizer))
    chat = Chat(network.double(), tokenizer, max_new_tokens=9)
    for message in MESSAGES:
        wanted = _from_the_whole(chat, message)
        assert _ask(chat, message) == wanted


def test_the_oldest_exchanges_are_left_out_until_the_rest_fits() -> None:
    chat = _chat(context=90)
    chat.system = "Shares"
    numbers = []
    for message in MESSAGES * 2:
        answer = _ask(chat, message)
        numbers.append(chat.num_left_out)
        own = chat.exchanges[chat.num_left_out : -1]
        fits = len(chat._tokens(own, message)) + 9
        assert fits <= 90
        if chat.num_left_out:  # one more would not
            more = chat.exchanges[chat.num_left_out - 1 : -1]
            assert len(chat._tokens(more, message)) + 9 > 90
        chat.exchanges.pop()
        assert answer == _from_the_whole(chat, message)
        chat.exchanges.append(Exchange(message, answer))
    assert numbers == sorted(numbers)
    assert numbers[0] == 0 < numbers[-1]
    turns = chat.turns()
    assert turns[0] == Turn("system", "Shares")
    assert len(turns) == 1 + 2 * len(MESSAGES * 2), "what is left out is not forgotten"


def test_a_message_that_does_not_fit_alone_is_refused_and_nothing_changes() -> None:
    chat = _chat(context=30)
    _ask(chat, "Foo")
    with pytest.raises(ValueError, match=r"has \d+ tokens .* max_new_tokens 9 .* context of 30"):
        chat.ask("Profit " * 30, print)
    assert [exchange.message for exchange in chat.exchanges] == ["Foo"]
    assert chat.num_left_out == 0


class _Interrupted:
    """Raises at the n-th piece of text, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        self.left, self.pieces = number, list[str]()

    def __call__(self, piece: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        self.pieces.append(piece)


@pytest.mark.parametrize("number", [1, 3])
def test_an_interrupted_answer_is_kept_as_far_as_it_is_written(number: int) -> None:
    chat = _chat()
    _ask(chat, "Shares of Foo")
    whole = _from_the_whole(chat, "Gold")
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Gold", _Interrupted(number))
    kept = chat.exchanges[1:]
    assert kept
    assert whole.startswith(kept[0].answer)
    assert kept[0].answer != whole
    assert _from_the_whole(chat, "Profit") == _ask(chat, "Profit")


def test_an_interrupt_amid_the_layers_leaves_keys_and_values_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chat = _chat()
    _ask(chat, "Shares of Foo")
    layer = chat._network.get_submodule("model.layers.1")
    with monkeypatch.context() as patched:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(layer, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("Gold", print)
    assert len(chat.exchanges) == 1, "of a message without an answer nothing stays"
    assert len({len(chat._cached), *(found.length for found in chat._layers)}) > 1
    assert _from_the_whole(chat, "Profit") == _ask(chat, "Profit")


def test_reset_keeps_the_system_text() -> None:
    chat = _chat()
    chat.system = "You help"
    first = _ask(chat, "Gold")
    _ask(chat, "Profit")
    chat.reset()
    assert chat.turns() == [Turn("system", "You help")]
    assert _ask(chat, "Gold") == first


def test_a_system_text_that_the_template_refuses_changes_nothing() -> None:
    chat = Chat(tiny_network("llama"), chat_tokenizer(BRACKETS))
    with pytest.raises(ValueError, match="no system turn"):
        chat.system = "You help"
    assert chat.system is None


def test_a_plain_chat_is_one_text() -> None:
    chat = _chat(template=None)
    chat.system = "News"
    chat.exchanges = [Exchange("Shares", " fell")]
    decoded = chat._tokenizer.decode(chat._tokens(chat.exchanges, "Gold"))
    assert decoded == "<begin>News\nShares fell\nGold"


def test_context_and_answer_have_defaults_that_fit_the_model() -> None:
    chat = Chat(tiny_network("llama"), tiny_tokenizer())
    assert (chat.context, chat.max_new_tokens) == (POSITIONS, POSITIONS // 4)
    assert chat.turns() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": POSITIONS + 1}, "context 331 is beyond the model's 330 positions"),
        ({"context": 9, "max_new_tokens": 9}, "max_new_tokens 9 leaves no token of the context"),
    ],
)
def test_settings_that_leave_no_place_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chat(tiny_network("llama"), tiny_tokenizer(), **settings)  # type: ignore[arg-type]
