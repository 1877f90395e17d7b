"""How long a run trains its low-rank layers beside dense matrices that it then drops."""

import gc
import math

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fingpt_lightning.low_rank import LowRankLinear
from fingpt_lightning.modules.language_modeling import PartialNetwork


class GuideSchedule:
    """Guides the low-rank layers of a network in the first S = round(share x steps) steps of a run.

    In step s of these a low-rank layer with the factors U, D and the bias b is

        x -> a x W' + (1 - a) x D' U' + b,      a = (1 + cos(pi s / S)) / 2

    where W starts as U D, so that guided and unguided networks start as the same function. After
    the last of these steps W is gone, from the module and from the optimizer.

    Args:
        share: Share of the steps; 0 guides nothing.

    Source: https://arxiv.org/abs/2406.16450, self-guided training (their share is 0.5).
    """

    def __init__(self, share: float) -> None:
        self._share = share
        # A rank of a pipeline may guide without a low-rank layer of its own.
        self._is_guiding = False
        self._layers: list[LowRankLinear] = []

    def attach(self, network: nn.Module) -> None:
        """Gives a network's low-rank layers their guides, those that it has not yet.

        Raises:
            ValueError: A low-rank layer has an activation between its factors.
        """
        if not self._share:
            return
        self._is_guiding = True
        self._layers = [m for m in network.modules() if isinstance(m, LowRankLinear)]
        for layer in self._layers:
            if layer.guide is None:
                layer.add_guide()

    def begin_step(self, trainer: Trainer) -> None:
        """Sets the guides' share in the step that is to come."""
        if not self._is_guiding:
            return
        # A run that is resumed with fewer steps may be past its guided ones.
        self.drop_after(trainer.global_step, trainer)
        progress = trainer.global_step / max(1, self._num_steps(trainer))
        for layer in self._layers:
            assert layer.guide_share is not None
            layer.guide_share.fill_((1 + math.cos(math.pi * progress)) / 2)

    def drop_after(self, num_steps: int, trainer: Trainer) -> None:
        """Drops the guides where ``num_steps`` steps are all that were to be guided."""
        if self._is_guiding and num_steps >= self._num_steps(trainer):
            self.drop(trainer)

    def drop(self, trainer: Trainer) -> None:
        """Drops the guides and leaves the factors alone; all ranks call this together."""
        if not self._is_guiding:
            return
        guides = {layer.guide for layer in self._layers if layer.guide is not None}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [p for p in group["params"] if p not in guides]
            for guide in guides:
                optimizer.state.pop(guide, None)
        for layer in self._layers:
            layer.drop_guide()
        self._is_guiding, self._layers = False, []
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and isinstance(
            strategy.model, DistributedDataParallel
        ):
            # The wrapper would wait for the gradients of all parameters that it was made with.
            strategy.model = strategy.lightning_module
            strategy.configure_ddp()
            gc.collect()  # it refers to itself, and would go on adding up and holding buckets
        if isinstance(strategy, PartialNetwork):
            strategy.parameters_changed()

    def _num_steps(self, trainer: Trainer) -> int:
        return round(self._share * trainer.estimated_stepping_batches)
