"""The thread that runs the network: texts join and leave its batch at any token.

Axes: B rows, D width, V vocabulary.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.labelling import Labeller, Row
from fingpt_lightning.deploy.sampling import Sampler, Sampling
from fingpt_lightning.deploy.written_text import WrittenText
from fingpt_lightning.low_rank.cpu_products import faster_products
from fingpt_lightning.models.decode_step import decode_step
from fingpt_lightning.models.decoding import end_tokens_of
from fingpt_lightning.models.families import logits_of
from fingpt_lightning.models.finite import not_finite
from fingpt_lightning.models.packed_attention import use_packed_attention
from fingpt_lightning.models.packed_prompts import packed_order, run_packed_prompts
from fingpt_lightning.serving.slots import SlotCache
from fingpt_lightning.tasks.encoding import end_tokens

_PROMPT_TOKENS = 2048
"""Tokens of prompts, if not of one alone, that are run before those being written go on."""


class TokenScore(NamedTuple):
    """A token, its log probability in nats, and those of the likeliest in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """Part of a completion: text that is ready, and the tokens since the last piece."""

    text: str
    scores: tuple[TokenScore, ...]


class Finished(NamedTuple):
    """The end of a completion: ``stop`` or ``length``, the number of tokens and the whole text."""

    reason: str
    num_tokens: int
    text: str


class Labelled(NamedTuple):
    """The rows of a `LabelJob` with their labels."""

    rows: list[dict[str, object]]


Event = Piece | Finished | Labelled | Exception


@dataclass(eq=False)
class Completing:
    """A prompt that is to be continued.

    Args:
        tokens: Tokens of the prompt.
        max_new_tokens: Largest number of tokens that are written.
        on_event: Function that gets the parts of the answer, in the engine's thread: pieces, then
            the end; or an exception.
        sampling: Settings of the draws; None takes the likeliest token.
        stops: Texts that end the completion.
        adapter: Name of the adapter; None is the base.
        num_logprobs: Number of likeliest tokens whose log probabilities are wanted beside that of
            the one chosen; None is neither.
        stream: Number of the text among those of one prompt: each has draws of its own.
        is_streamed: Whether pieces are wanted while the text is written; else one with the log
            probabilities, if any, comes before the end.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    on_event: Callable[[Event], None]
    sampling: Sampling | None = None
    stops: Sequence[str] = ()
    adapter: str | None = None
    num_logprobs: int | None = None
    stream: int = 0
    is_streamed: bool = True
    is_cancelled: bool = False
    deadline_s: float = field(default=float("inf"))


@dataclass(eq=False)
class LabelJob:
    """Rows that are to be labelled; those of one labeller are run together.

    Args:
        labeller: Labeller of the task.
        rows: Rows that have been checked.
        on_event: Function that gets the labelled rows or an exception, in the engine's thread.
    """

    labeller: Labeller
    rows: Sequence[Row]
    on_event: Callable[[Event], None]
    is_cancelled: bool = False
    deadline_s: float = field(default=float("inf"))


class OverloadedError(RuntimeError):
    """No more requests are taken: too many wait, or the server is about to stop."""


@dataclass
class Counts:
    """What an engine has done since its start."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    labelled_rows: int = 0
    finished: int = 0
    failed: int = 0


class _Writing:
    """A completion in the batch."""

    def __init__(self, job: Completing, tokenizer: PreTrainedTokenizerFast) -> None:
        self.job = job
        self.text = WrittenText(tokenizer, job.tokens, job.stops)
        self.sampler = None if job.sampling is None else Sampler(job.sampling, [job.stream])
        self.num_new, self.token = 0, 0
        self.scores: list[TokenScore] = []


class Engine:
    """Answers requests with one network, as many at once as fit its batch.

    Args:
        network: Network in evaluation mode.
        tokenizer: Tokenizer, which no other thread uses.
        bank: Bank of the network's adapters.
        batch_size: Largest number of texts that are written at once.
        max_queue: Largest number of requests that wait.
        timeout_s: Seconds after which a request fails.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        bank: AdapterBank | None = None,
        *,
        batch_size: int = 32,
        max_queue: int = 256,
        timeout_s: float = 300.0,
    ) -> None:
        self._network, self._tokenizer, self._bank = network, tokenizer, bank
        self._batch_size, self._max_queue, self._timeout_s = batch_size, max_queue, timeout_s
        use_packed_attention(network)
        self._ends = set(end_tokens_of(network, *end_tokens(tokenizer)))
        self._slots, self._rows = SlotCache(network.config), list[_Writing]()
        self._waiting, self._labels = deque[Completing](), deque[LabelJob]()
        self._changed = threading.Condition()
        self._is_draining = self._is_stopping = False
        self._active: list[str | None] | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.counts = Counts()

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Tokenizer of the engine's thread."""
        return self._tokenizer

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, *jobs: Completing | LabelJob) -> None:
        """Takes the parts of a request, all or none; their events come in the engine's thread.

        Raises:
            OverloadedError: Too many wait, or the engine is about to stop.
            ValueError: An adapter is not loaded, or there are more parts than may ever wait.
        """
        for job in jobs:
            if isinstance(job, Completing) and job.adapter is not None and self._bank is not None:
                self._bank.check(job.adapter)
        if len(jobs) > self._max_queue:
            raise ValueError(f"{len(jobs)} texts in one request, {self._max_queue} may wait")
        with self._changed:
            if self._is_draining or not self._thread.is_alive():
                raise OverloadedError("the server is about to stop")
            if self.num_waiting + len(jobs) > self._max_queue:
                raise OverloadedError(f"{self.num_waiting} requests are waiting already")
            for job in jobs:
                job.deadline_s = time.monotonic() + self._timeout_s
                if isinstance(job, Completing):
                    self._waiting.append(job)
                else:
                    self._labels.append(job)
            self._changed.notify()

    def cancel(self, job: Completing | LabelJob) -> None:
        """Gives up a request; its events end."""
        job.is_cancelled = True

    def drain(self) -> None:
        """Takes no more requests; those that it has taken go on."""
        with self._changed:
            self._is_draining = True

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the thread, after the requests that it has taken or so many seconds."""
        with self._changed:
            self._is_draining = self._is_stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    @property
    def is_draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._is_draining

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Number of requests that wait."""
        return len(self._waiting) + len(self._labels)

    @property
    def num_running(self) -> int:
        """Number of texts that are being written."""
        return len(self._rows)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._changed:
            return not (self._rows or self._waiting or self._labels)

    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return self._slots.num_bytes()

    def _run(self) -> None:
        with torch.inference_mode(), faster_products():
            while self._has_work():
                try:
                    self._drop_late()
                    self._label()
                    self._admit()
                    self._step()
                except Exception as error:  # such as too little memory: smaller requests may fit
                    for writing in self._rows:
                        self._fail(writing.job, error)
                    self._rows.clear()
                    self._slots = SlotCache(self._network.config)
        self._adapt(None)

    def _has_work(self) -> bool:
        """Waits for work; False once the engine is to stop and has none."""
        with self._changed:
            while not (self._rows or self._waiting or self._labels):
                if self._is_stopping:
                    return False
                self._changed.wait()
        return True

    def _drop_late(self) -> None:
        """Removes requests that were cancelled or took too long."""
        now_s = time.monotonic()

        def is_over(job: Completing | LabelJob) -> bool:
            if not job.is_cancelled and now_s < job.deadline_s:
                return False
            if not job.is_cancelled:
                self._fail(job, TimeoutError(f"not done after {self._timeout_s:g} s"))
            return True

        with self._changed:
            for queue in (self._waiting, self._labels):
                kept = [job for job in queue if not is_over(job)]
                queue.clear()
                queue.extend(kept)  # type: ignore[arg-type]
        for row in reversed(range(len(self._rows))):
            if is_over(self._rows[row].job):
                self._remove(row)

    def _label(self) -> None:
        """Labels the rows of all waiting jobs that share a labeller with the first."""
        with self._changed:
            if not self._labels:
                return
            labeller = self._labels[0].labeller
            jobs = [job for job in self._labels if job.labeller is labeller]
            for job in jobs:
                self._labels.remove(job)
        self._adapt(None)
        try:
            rows = labeller.label([row for job in jobs for row in job.rows], 1)
        except Exception as error:  # whatever it is, it is the answer to these requests
            for job in jobs:
                self._fail(job, error)
            return
        found = iter(rows)
        for job in jobs:
            self.counts.labelled_rows += len(job.rows)
            self.counts.finished += 1
            self._tell(job, Labelled([next(found) for _ in job.rows]))

    def _admit(self) -> None:
        """Runs prompts that fit the batch, and adds them to it."""
        jobs: list[Completing] = []
        num_tokens = 0
        with self._changed:
            while self._waiting and len(self._rows) + len(jobs) < self._batch_size:
                num_tokens += len(self._waiting[0].tokens)
                if jobs and num_tokens > _PROMPT_TOKENS:
                    break
                jobs.append(self._waiting.popleft())
        if not jobs:
            return
        try:
            prompts = [job.tokens for job in jobs]
            # The clients of tokens, of which each is a row to the adapters.
            names = [jobs[place].adapter for place in packed_order(prompts) for _ in prompts[place]]
            self._adapt(names)
            made = run_packed_prompts(self._network, prompts)
            logits_BV = logits_of(self._network, made.hidden)
        except Exception as error:  # the fault of these prompts: the others go on
            for job in jobs:
                self._fail(job, error)
            return
        first = len(self._rows)
        for row, job in enumerate(jobs):
            try:
                self._slots.add(made.keys_and_values(row))
            except Exception as error:  # such as too little memory, of which rows are a part
                for left in jobs[row:]:
                    self._fail(left, error)
                raise
            self.counts.prompt_tokens += len(job.tokens)
            self._rows.append(_Writing(job, self._tokenizer))
        self._take(range(first, len(self._rows)), logits_BV)

    def _step(self) -> None:
        """One token more of each row."""
        if not self._rows:
            return
        self._adapt([row.job.adapter for row in self._rows])
        position_B, allowed_BS = self._slots.begin_step()
        token_B = torch.tensor([row.token for row in self._rows], device=position_B.device)
        hidden_BD = decode_step(self._network, token_B, position_B, self._slots, allowed_BS)
        logits_BV = logits_of(self._network, hidden_BD)
        self._slots.end_step()
        self.counts.steps += 1
        self._take(range(len(self._rows)), logits_BV)

    def _take(self, rows: range, logits_BV: Tensor) -> None:
        """Chooses the next token of some rows, and removes those that end with it."""
        # One pass over the logits: a NaN or an infinity makes the sum one.
        are_finite = logits_BV.sum(1, dtype=torch.float32).isfinite().tolist()
        likeliest = logits_BV.argmax(1).tolist()
        over = []
        for place, row in enumerate(rows):
            writing = self._rows[row]
            if not are_finite[place]:
                self._fail(writing.job, not_finite(self._network, "the request: the logits"))
                over.append(row)
                continue
            token = likeliest[place]
            try:
                if writing.sampler is not None:
                    token = int(writing.sampler(logits_BV[place : place + 1]))
                is_over = self._write(writing, token, logits_BV[place])
            except Exception as error:  # the fault of this request: the others go on
                self._fail(writing.job, error)
                is_over = True
            if is_over:
                over.append(row)
        for row in reversed(over):
            self._remove(row)

    def _write(self, writing: _Writing, token: int, logits_V: Tensor) -> bool:
        """Adds a token to a text; whether the text is over."""
        job = writing.job
        if token in self._ends:
            self._finish(writing, "stop")
            return True
        writing.token = token
        writing.num_new += 1
        self.counts.new_tokens += 1
        if job.num_logprobs is not None:
            writing.scores.append(_score(token, logits_V, job.num_logprobs))
        is_read = job.is_streamed or bool(job.stops)
        piece = writing.text.add(token) if is_read else writing.text.keep(token)
        if writing.text.has_stopped or writing.num_new == job.max_new_tokens:
            if piece:
                self._give(writing, piece)
            self._finish(writing, "stop" if writing.text.has_stopped else "length")
            return True
        if piece:
            self._give(writing, piece)
        return False

    def _give(self, writing: _Writing, piece: str, *, is_last: bool = False) -> None:
        if not (writing.job.is_streamed or is_last):
            return
        self._tell(writing.job, Piece(piece, tuple(writing.scores)))
        writing.scores = []

    def _finish(self, writing: _Writing, reason: str) -> None:
        rest = writing.text.finish()
        if writing.text.has_stopped:
            reason = "stop"
        if writing.scores or (rest and writing.job.is_streamed):
            self._give(writing, rest, is_last=True)
        self.counts.finished += 1
        self._tell(writing.job, Finished(reason, writing.num_new, writing.text.text))

    def _fail(self, job: Completing | LabelJob, error: Exception) -> None:
        self.counts.failed += 1
        self._tell(job, error)

    def _tell(self, job: Completing | LabelJob, event: Event) -> None:
        if not job.is_cancelled:
            job.on_event(event)

    def _remove(self, row: int) -> None:
        self._slots.remove(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def _adapt(self, names: list[str | None] | None) -> None:
        """Puts in use the adapters of a batch's rows, unless they are already."""
        if self._bank is None or names == self._active:
            return
        self._active = None
        if names is None:
            self._bank.deactivate()
        else:
            self._bank.activate(names)
            self._active = names


def _score(token: int, logits_V: Tensor, num_top: int) -> TokenScore:
    logprobs_V = logits_V.float().log_softmax(0)
    values, tokens = logprobs_V.topk(min(num_top, len(logprobs_V)))
    top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenScore(token, float(logprobs_V[token]), top)
