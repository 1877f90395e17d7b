"""What a schedule would do on so many ranks: the orders that torch runs, played with given times.

Source: the orders are those of torch 2.13's ``torch.distributed.pipelining.schedules``, to which
the tests compare them.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fingpt_lightning.pipeline.schedule import PipelineLayout, Schedule
from fingpt_lightning.pipeline.timeline import Pass, Work


class StageTimes(NamedTuple):
    """What one microbatch takes on a stage: forward, gradients of inputs, gradients of weights."""

    forward_s: float
    input_s: float
    weight_s: float


class Planned(NamedTuple):
    """A pass in the order of a rank."""

    stage: int
    microbatch: int
    work: Work


def rank_order(layout: PipelineLayout, rank: int) -> list[Planned]:
    """The passes of a rank in the order in which it runs them.

    >>> layout = PipelineLayout(Schedule.ONE_F_ONE_B, num_ranks=2, num_microbatches=2)
    >>> [f"{p.work.value} {p.microbatch}" for p in rank_order(layout, 0)]
    ['forward 0', 'forward 1', 'backward 0', 'backward 1']
    """
    match layout.schedule:
        case Schedule.GPIPE:
            works = [Work.FORWARD, Work.BACKWARD]
            return [Planned(rank, mb, w) for w in works for mb in range(layout.num_microbatches)]
        case Schedule.ONE_F_ONE_B:
            return list(_one_forward_one_backward(layout, rank))
        case Schedule.INTERLEAVED_1F1B | Schedule.INTERLEAVED_ZERO_BUBBLE:
            return list(_interleaved(layout, rank))
        case Schedule.ZBV_ZERO_BUBBLE:
            made = _zero_bubble_v(layout, rank)
            return [p for p in made if p.microbatch < layout.num_microbatches]
        case Schedule.DUAL_PIPE_V:
            return _dual_pipe_v(layout, rank)


def simulate(layout: PipelineLayout, times: Sequence[StageTimes]) -> list[Pass]:
    """When each pass of a step begins and ends, where only passes take time.

    Args:
        layout: Schedule and its sizes.
        times: Times of each stage, in the order of the network.

    Raises:
        ValueError: There are not as many times as stages.
    """
    if len(times) != layout.num_stages:
        raise ValueError(f"{len(times)} times for the {layout.num_stages} stages")
    waiting = [deque(rank_order(layout, rank)) for rank in range(layout.num_ranks)]
    free_s = [0.0] * layout.num_ranks
    ended_s: dict[Planned, float] = {}
    passes: list[Pass] = []
    while any(waiting):
        before = len(passes)
        for rank, queue in enumerate(waiting):
            while queue and (ready_s := _ready_s(queue[0], layout, ended_s)) is not None:
                planned = queue.popleft()
                start_s = max(free_s[rank], ready_s)
                end_s = start_s + _length_s(planned, times[planned.stage])
                free_s[rank] = ended_s[planned] = end_s
                passes.append(Pass(rank, *planned, start_s, end_s))
        assert len(passes) > before, f"{layout} waits for itself"
    return passes


def peak_held(
    passes: Sequence[Pass], size_of: Callable[[int], float] = lambda stage: 1
) -> dict[int, float]:
    """The most that forward passes hold at a time for their backward passes, by rank.

    Args:
        passes: Passes of one step, recorded or simulated.
        size_of: Amount that a pass of a stage holds; 1 counts passes.
    """
    splits = {p.stage for p in passes if p.work is Work.WEIGHT}
    held: Counter[int] = Counter()
    peak: dict[int, float] = {p.rank: 0.0 for p in passes}
    now: dict[int, float] = dict(peak)
    # Ends come before begins at the same time; the loss, which is noted as a pass, holds nothing.
    events = [(p.start_s, 1, p) for p in passes if p.work is Work.FORWARD]
    events += [(p.end_s, 0, p) for p in passes if p.work is not Work.FORWARD]
    for _, begins, p in sorted(events, key=lambda event: event[:2]):
        if begins:
            if held[key := hash((p.stage, p.microbatch))]:
                continue
            held[key] = 1
            now[p.rank] += size_of(p.stage)
            peak[p.rank] = max(peak[p.rank], now[p.rank])
        elif p.work is Work.WEIGHT or p.work is Work.BACKWARD or p.stage not in splits:
            now[p.rank] -= size_of(p.stage)
    return peak


def _ready_s(
    planned: Planned, layout: PipelineLayout, ended_s: dict[Planned, float]
) -> float | None:
    """When all that a pass needs is there; None while it is not known."""
    stage, microbatch, work = planned
    last = layout.num_stages - 1
    if work is Work.FORWARD:
        return ended_s.get(Planned(stage - 1, microbatch, work)) if stage else 0.0
    if work is Work.WEIGHT:
        return ended_s.get(Planned(stage, microbatch, Work.INPUT))
    if stage == last:
        return ended_s.get(Planned(stage, microbatch, Work.FORWARD))
    behind = (Planned(stage + 1, microbatch, kind) for kind in (Work.BACKWARD, Work.INPUT))
    return next((ended_s[before] for before in behind if before in ended_s), None)


def _length_s(planned: Planned, times: StageTimes) -> float:
    match planned.work:
        case Work.FORWARD:
            return times.forward_s
        case Work.BACKWARD:
            return times.input_s + times.weight_s
        case Work.INPUT:  # the first stage has nobody to send them to: torch makes all at once
            return times.input_s if planned.stage else 0.0
        case Work.WEIGHT:
            return times.weight_s if planned.stage else times.input_s + times.weight_s


def _one_forward_one_backward(layout: PipelineLayout, rank: int) -> Iterator[Planned]:
    ahead = layout.num_ranks - 1 - rank
    for mb in range(layout.num_microbatches + ahead):
        if mb < layout.num_microbatches:
            yield Planned(rank, mb, Work.FORWARD)
        if mb >= ahead:
            yield Planned(rank, mb - ahead, Work.BACKWARD)


def _interleaved(layout: PipelineLayout, rank: int) -> Iterator[Planned]:
    """Rounds of as many microbatches as ranks through each stage of the rank in turn."""
    ranks, own = layout.num_ranks, layout.stages_of(rank)
    a_round = layout.num_microbatches // max(1, layout.num_microbatches // ranks)
    num_passes = layout.num_microbatches * len(own)
    splits = layout.schedule.splits_backward
    ahead = (len(own) - 1) * a_round + (1 if splits else 2) * (ranks - 1 - rank)
    ahead = min(ahead, num_passes)

    def nth(stages: Sequence[int], n: int) -> tuple[int, int]:
        of_round, within = divmod(n, a_round * len(stages))
        stage, microbatch = divmod(within, a_round)
        return stages[stage], of_round * a_round + microbatch

    for n in range(num_passes + ahead):
        if n < num_passes:
            yield Planned(*nth(own, n), Work.FORWARD)
        if n >= ahead:
            work = Work.INPUT if splits else Work.BACKWARD
            yield Planned(*nth(own[::-1], n - ahead), work)
            if splits and n - ahead >= rank:  # later ranks keep more of them for the end
                yield Planned(*nth(own[::-1], n - ahead - rank), Work.WEIGHT)
    if splits:
        for n in range(max(0, num_passes - rank), num_passes):
            yield Planned(*nth(own[::-1], n), Work.WEIGHT)


class _Chunks:
    """Hands out the microbatches of a rank's two stages, each kind of pass by its own count."""

    def __init__(self, layout: PipelineLayout, rank: int) -> None:
        self._own = layout.stages_of(rank)
        self._next: Counter[tuple[int, Work]] = Counter()
        self.order: list[Planned] = []
        self.pending: deque[tuple[int, int]] = deque()

    def count(self, chunk: int, work: Work) -> int:
        """How many there have been."""
        return self._next[chunk, work]

    def add(self, chunk: int, *works: Work) -> None:
        """Appends the next pass of each kind."""
        for work in works:
            # A whole backward pass counts as one of inputs.
            key = (chunk, Work.INPUT if work is Work.BACKWARD else work)
            microbatch, self._next[key] = self._next[key], self._next[key] + 1
            self.order.append(Planned(self._own[chunk], microbatch, work))
            if work is Work.INPUT:
                self.pending.append((self._own[chunk], microbatch))

    def add_pending_weights(self) -> None:
        """Appends the oldest gradients of weights that are due, if there are any."""
        if self.pending:
            self.order.append(Planned(*self.pending.popleft(), Work.WEIGHT))


def _zero_bubble_v(layout: PipelineLayout, rank: int) -> list[Planned]:
    ranks = layout.num_ranks
    wanted = max(2 * ranks - 1, layout.num_microbatches)  # those too many are taken out again
    forward, inputs, weights = Work.FORWARD, Work.INPUT, Work.WEIGHT
    chunks = _Chunks(layout, rank)
    for _ in range(2 * (ranks - rank) - 1):
        chunks.add(0, forward)
    for _ in range(rank):
        chunks.add(1, forward)
        chunks.add(0, forward)
    for _ in range(ranks - rank):
        chunks.add(1, forward, inputs, weights)
    while chunks.count(1, forward) < chunks.count(0, forward) or chunks.count(0, forward) < wanted:
        if chunks.count(0, forward) < wanted:
            chunks.add(0, forward)
        chunks.add(0, inputs, weights)
        chunks.add(1, forward, inputs, weights)
    for _ in range(rank):
        chunks.add(0, inputs)
        chunks.add(1, inputs)
    for _ in range(ranks - rank):
        chunks.add(0, inputs, weights)
    for chunk in (1, 0):
        while chunks.count(chunk, weights) < chunks.count(chunk, inputs):
            chunks.add(chunk, weights)
    return chunks.order


def _dual_pipe_v(layout: PipelineLayout, rank: int) -> list[Planned]:
    """What DualPipeV overlaps runs one after the other."""
    ranks = layout.num_ranks
    after = ranks - rank - 1
    forward, inputs, backward = Work.FORWARD, Work.INPUT, Work.BACKWARD
    chunks = _Chunks(layout, rank)
    for _ in range(2 * after):
        chunks.add(0, forward)
    for _ in range(rank + 1):
        chunks.add(0, forward)
        chunks.add(1, forward)
    for _ in range(after):
        chunks.add(1, inputs)
        chunks.add_pending_weights()
        chunks.add(1, forward)
    for _ in range(layout.num_microbatches - 2 * ranks + rank + 1):
        chunks.add(0, forward)
        chunks.add(1, backward)
        chunks.add(1, forward)
        chunks.add(0, backward)
    for _ in range(after):
        chunks.add(1, backward)
        chunks.add(1, forward)
        chunks.add(0, backward)
    # From half of the rest on, gradients of weights wait for idle time.
    half, splits = (rank + 1) // 2, False
    for n in range(rank + 1):
        splits = splits or (n == half and rank % 2 == 1)
        chunks.add(1, inputs if splits else backward)
        splits = splits or (n == half and rank % 2 == 0)
        chunks.add(0, inputs if splits else backward)
    for _ in range(after):
        chunks.add_pending_weights()
        chunks.add(0, inputs if splits else backward)
    for _ in range(rank + 1):
        chunks.add_pending_weights()
    return chunks.order
