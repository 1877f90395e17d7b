"""Lets a Trainer run inside the processes of `run_ranks`."""

import torch.distributed
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from typing_extensions import override


class RanksEnvironment(LightningEnvironment):
    """Rank and world size of the existing process group."""

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @override
    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    @override
    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    @override
    def local_rank(self) -> int:
        return torch.distributed.get_rank()

    @override
    def set_world_size(self, size: int) -> None:
        assert size == self.world_size()

    @override
    def set_global_rank(self, rank: int) -> None:
        assert rank == self.global_rank()
