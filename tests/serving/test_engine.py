import queue
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.generation import Prompt, complete
from fingpt_lightning.deploy.sampling import Sampling
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.serving.engine import (
    Completing,
    Engine,
    Event,
    Finished,
    OverloadedError,
    Piece,
    TokenScore,
)
from tests.deploy.tiny_clients import save_clients
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer

WORDS = ("Shares of Foo fell", "Profit", "The dividend of Foo Corp was kept as it", "rose and rose")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    tiny_network("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class _Asked:
    """A completion and what came of it."""

    def __init__(self, engine: Engine, text: str, num_new: int, **settings: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        tokens = tiny_tokenizer().encode(text)
        self.job = Completing(tokens, num_new, self.events.put, **settings)
        engine.submit(self.job)

    def answer(self) -> tuple[str, Finished]:
        text = ""
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Finished):
                assert text == event.text
                return text, event
            else:
                assert isinstance(event, Exception)
                raise event


def _started(network: PreTrainedModel, bank: AdapterBank | None = None, **settings: Any) -> Engine:
    engine = Engine(network, tiny_tokenizer(), bank, **settings)
    engine.start()
    return engine


def test_mixed_requests_are_answered_as_one_by_one(base: Path, tmp_path: Path) -> None:
    network = load_model(base, dtype="float64").network
    bank = AdapterBank(network)
    for folder in save_clients(base, tmp_path, 3):
        bank.load(folder.name, folder)
    asked = [
        (f"{WORDS[number % 4]} {WORDS[number % 3]}", 3 + number % 7, adapter, sampling)
        for number, (adapter, sampling) in enumerate(
            (adapter, sampling)
            for sampling in (None, Sampling(0.9, top_k=20, seed=7))
            for adapter in (None, "client0", "client1", "client2", None, "client1")
        )
    ]
    wanted = []
    for text, num_new, adapter, sampling in asked:
        prompts = [Prompt(text, adapter)]
        ((_, one),) = complete(
            network, tiny_tokenizer(), prompts, num_new, sampling=sampling, bank=bank
        )
        wanted.append((one.text, one.num_tokens, "stop" if one.has_ended else "length"))
    # A batch smaller than the requests: they join as others leave.
    engine = _started(network, bank, batch_size=5)
    made = [
        _Asked(engine, text, num_new, adapter=adapter, sampling=sampling)
        for text, num_new, adapter, sampling in asked
    ]
    found = [asked_for.answer() for asked_for in made]
    engine.stop(30.0)
    assert [(text, end.num_tokens, end.reason) for text, end in found] == wanted
    assert engine.counts.finished == len(asked)
    assert len({text for text, _ in found}) > 6


def test_log_probabilities_are_those_of_the_network(base: Path) -> None:
    network = load_model(base, dtype="float64").network
    engine = _started(network)
    asked = _Asked(engine, WORDS[0], 4, num_logprobs=2)
    scores: list[TokenScore] = []
    while not isinstance(event := asked.events.get(timeout=60), Finished):
        assert isinstance(event, Piece)
        scores += event.scores
    engine.stop(30.0)
    tokens = list(asked.job.tokens)
    for score in scores:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([tokens])).logits[0, -1]
        logprobs = logits.float().log_softmax(0)
        assert score.logprob == pytest.approx(float(logprobs[score.token]), abs=1e-5)
        assert [token for token, _ in score.top] == logprobs.topk(2).indices.tolist()
        tokens.append(score.token)
    assert len(scores) == event.num_tokens


@pytest.mark.parametrize("stops", [(), ("Foo",)])
def test_what_is_not_streamed_comes_in_one_piece(base: Path, stops: tuple[str, ...]) -> None:
    engine = _started(load_model(base, dtype="float64").network)
    settings: dict[str, Any] = {"num_logprobs": 1, "stops": stops}
    text, end = _Asked(engine, WORDS[0], 9, **settings).answer()
    whole = _Asked(engine, WORDS[0], 9, is_streamed=False, **settings)
    plain = _Asked(engine, WORDS[0], 9, is_streamed=False, stops=stops)
    piece, found = whole.events.get(timeout=60), whole.events.get(timeout=60)
    assert plain.events.get(timeout=60) == found == end
    engine.stop(30.0)
    assert end.text == text
    assert isinstance(piece, Piece)
    assert len(piece.scores) == end.num_tokens


class _Gate:
    """Holds a network before each of its passes until it is opened."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        network.base_model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: object) -> None:
        self.entered.set()
        assert self.open.wait(60)


def test_more_than_may_wait_and_what_comes_after_the_end_is_refused(base: Path) -> None:
    network = load_model(base).network
    gate = _Gate(network)
    engine = _started(network, batch_size=1, max_queue=2)
    accepted = [_Asked(engine, WORDS[0], 3)]
    assert gate.entered.wait(60)
    accepted += [_Asked(engine, WORDS[1], 3) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 requests are waiting already"):
        _Asked(engine, WORDS[1], 3)
    engine.drain()
    with pytest.raises(OverloadedError, match="about to stop"):
        _Asked(engine, WORDS[1], 3)
    gate.open.set()
    # Nothing that was accepted is lost.
    assert all(one.answer()[1].num_tokens for one in accepted)
    engine.stop(30.0)
    assert not engine.is_alive


def test_late_and_cancelled_requests_leave_and_a_failure_is_of_its_own_request(base: Path) -> None:
    network = load_model(base).network
    gate = _Gate(network)
    engine = _started(network, batch_size=1, timeout_s=4.0)
    first = _Asked(engine, WORDS[0], 100)
    assert gate.entered.wait(60)
    late, cancelled = _Asked(engine, WORDS[1], 3), _Asked(engine, WORDS[1], 3)
    engine.cancel(cancelled.job)
    time.sleep(4.2)
    gate.open.set()
    for one in (first, late):
        with pytest.raises(TimeoutError, match="not done after 4 s"):
            one.answer()
    assert _Asked(engine, WORDS[1], 3).answer()[1].num_tokens
    assert cancelled.events.empty()
    broken = _Asked(engine, WORDS[1], 3)
    broken.job.tokens = [10**6]
    with pytest.raises(IndexError):
        broken.answer()
    assert _Asked(engine, WORDS[1], 3).answer()[1].num_tokens
    engine.stop(30.0)
