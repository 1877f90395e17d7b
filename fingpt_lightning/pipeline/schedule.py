"""The pipeline schedules: what each needs, where its stages lie, what time it wastes."""

from dataclasses import dataclass
from enum import StrEnum

from fingpt_lightning.terminal.messages import nearest_of


class Schedule(StrEnum):
    """The order in which a rank runs the forward and backward passes of its microbatches.

    Values are the names of ``torch.distributed.pipelining``, which runs them.
    """

    GPIPE = "GPipe"
    """All forward, then all backward. Source: https://arxiv.org/abs/1811.06965."""
    ONE_F_ONE_B = "1F1B"
    """The same idle time, fewer activations. Source: https://arxiv.org/abs/1806.03377."""
    INTERLEAVED_1F1B = "Interleaved1F1B"
    """Several stages per rank. Source: https://arxiv.org/abs/2104.04473, section 2.2."""
    INTERLEAVED_ZERO_BUBBLE = "InterleavedZeroBubble"
    """Gradients of weights fill idle time (ZB1P). Source: https://arxiv.org/abs/2401.10241."""
    ZBV_ZERO_BUBBLE = "ZBVZeroBubble"
    """Two stages per rank, in a V. Source: https://arxiv.org/abs/2401.10241, section 6."""
    DUAL_PIPE_V = "DualPipeV"
    """A V fed from both ends. Source: https://arxiv.org/abs/2412.19437, section 3.2.1."""

    @property
    def is_single(self) -> bool:
        """Whether each rank has exactly one stage."""
        return self in (Schedule.GPIPE, Schedule.ONE_F_ONE_B)

    @property
    def is_v_shaped(self) -> bool:
        """Whether each rank has two stages, the first rank the first and the last stage."""
        return self in (Schedule.ZBV_ZERO_BUBBLE, Schedule.DUAL_PIPE_V)

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed apart."""
        return not self.is_single and self is not Schedule.INTERLEAVED_1F1B

    @property
    def default_stages_per_rank(self) -> int:
        """What ``auto`` means."""
        return 1 if self.is_single else 2


def schedule_named(name: str) -> Schedule:
    """The schedule of a name, whatever its case.

    Raises:
        ValueError: No schedule has that name; the message gives the nearest one.

    >>> schedule_named("gpipe").value
    'GPipe'
    """
    by_lower = {schedule.lower(): schedule for schedule in Schedule}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = nearest_of(name.lower(), by_lower, cutoff=0.3)
    hint = f"; did you mean {by_lower[near].value}?" if near is not None else ""
    raise ValueError(f"schedule {name!r} is none of {', '.join(Schedule)}{hint}")


_MICROBATCHES_PER_RANK = 4
"""Most per rank in `largest_layout`: with more, less time is idle, but products become small."""


@dataclass(frozen=True)
class PipelineLayout:
    """A schedule over so many ranks, stages and microbatches.

    Args:
        schedule: Order of the passes.
        num_ranks: Number of processes of one pipeline.
        num_microbatches: Number of parts of a batch that follow each other through the stages.
        stages_per_rank: Number of stages of each rank.

    Raises:
        ValueError: The schedule cannot run so.
    """

    schedule: Schedule
    num_ranks: int
    num_microbatches: int
    stages_per_rank: int = 1

    def __post_init__(self) -> None:
        name, ranks, microbatches = self.schedule.value, self.num_ranks, self.num_microbatches
        for key in ("num_ranks", "num_microbatches", "stages_per_rank"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} {getattr(self, key)} is below 1")
        if self.schedule.is_single and self.stages_per_rank != 1:
            raise ValueError(
                f"num_virtual_stages {self.stages_per_rank}: {name} has one stage a rank; take"
                f" {Schedule.INTERLEAVED_1F1B.value} or leave it at auto"
            )
        if self.schedule.is_v_shaped and self.stages_per_rank != 2:
            raise ValueError(
                f"num_virtual_stages {self.stages_per_rank}: {name} has two stages a rank; leave it"
                " at auto"
            )
        needed = {Schedule.ONE_F_ONE_B: ranks, Schedule.DUAL_PIPE_V: 2 * ranks}
        if microbatches < needed.get(self.schedule, 1):
            raise ValueError(
                f"num_microbatches {microbatches} is below the {self.num_stages} stages of {name}:"
                f" raise it to {needed[self.schedule]} or more, or take GPipe"
            )
        rounds = max(1, microbatches // ranks)
        is_looped = not (self.schedule.is_single or self.schedule.is_v_shaped)
        if is_looped and microbatches % rounds:
            raise ValueError(
                f"num_microbatches {microbatches}: {name} on {ranks} ranks works in {rounds}"
                f" rounds of equal length; take {rounds * (microbatches // rounds)}"
            )

    @property
    def num_stages(self) -> int:
        """Number of stages of all ranks."""
        return self.num_ranks * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """The rank that has a stage: in turns, or down and up again in a V.

        >>> layout = PipelineLayout(Schedule.ZBV_ZERO_BUBBLE, 2, 4, stages_per_rank=2)
        >>> [layout.rank_of(stage) for stage in range(4)]
        [0, 1, 1, 0]
        """
        if self.schedule.is_v_shaped:
            return min(stage, self.num_stages - 1 - stage)
        return stage % self.num_ranks

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, in the order of the network."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]

    @property
    def bubble_share(self) -> float:
        """The share of the ranks' time that is idle, where all stages take equally long.

        Forward pass, gradients of inputs and gradients of weights count one unit each;
        communication counts nothing. The time is that from the first pass of any rank to the last
        one of any: those that take the backward pass apart are then idle alike, where their papers
        count from each rank's own first pass, or overlap passes, which torch does not.

        Source: the papers of `Schedule`; for the last three, `simulate`.
        """
        idle, microbatches = self.num_ranks - 1, self.num_microbatches
        match self.schedule:
            case Schedule.GPIPE | Schedule.ONE_F_ONE_B | Schedule.INTERLEAVED_1F1B:
                work = self.stages_per_rank * microbatches
            case _:
                work = 3 * self.stages_per_rank * microbatches
        return idle / (work + idle)

    def passes_in_flight(self, rank: int) -> int:
        """The most forward passes whose activations a rank holds at a time, over its stages.

        Source: the warm-up passes of the schedules in torch 2.13, plus the one under way.
        """
        ranks, all_passes = self.num_ranks, self.num_microbatches * self.stages_per_rank
        match self.schedule:
            case Schedule.GPIPE:
                return all_passes
            case Schedule.ONE_F_ONE_B:
                return min(all_passes, ranks - rank)
            case Schedule.INTERLEAVED_1F1B | Schedule.INTERLEAVED_ZERO_BUBBLE:
                a_round = self.num_microbatches // max(1, self.num_microbatches // ranks)
                warm_up = (self.stages_per_rank - 1) * a_round
                if self.schedule is Schedule.INTERLEAVED_1F1B:
                    warm_up += 2 * (ranks - 1 - rank)
                else:  # what a rank warms up less, its gradients of weights wait longer
                    warm_up += ranks - 1
                return min(all_passes, warm_up + 1)
            case _:
                return min(all_passes, 2 * ranks + (self.schedule is Schedule.DUAL_PIPE_V))


def largest_layout(
    schedule: Schedule, num_ranks: int, stages_per_rank: int, batch_size: int
) -> PipelineLayout:
    """The layout that cuts a batch into the most equal parts, up to four per rank.

    Raises:
        ValueError: The schedule can run with none of the numbers that divide the batch.

    >>> largest_layout(Schedule.ONE_F_ONE_B, 2, 1, batch_size=12).num_microbatches
    6
    """
    refusal = ""
    for count in range(min(batch_size, _MICROBATCHES_PER_RANK * num_ranks), 0, -1):
        if batch_size % count == 0:
            try:
                return PipelineLayout(schedule, num_ranks, count, stages_per_rank)
            except ValueError as error:
                refusal = refusal or str(error)
    raise ValueError(f"data.batch_size {batch_size}, cut into num_microbatches auto: {refusal}")
