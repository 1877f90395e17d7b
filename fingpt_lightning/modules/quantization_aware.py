"""When a run trains with rounded weights."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedModel

from fingpt_lightning.models.quantization.fake_quantization import RoundedWeights
from fingpt_lightning.models.quantization.layers import QUANTIZATIONS

DEFAULT_START = 0.8


class RoundingSchedule:
    """Rounds weights for the passes of the last steps of a run.

    They are rounded once per optimizer step, whatever number of microbatches it has, and for
    validations among these steps, whose loss is then that of the quantized network. Any caller that
    asks for the module's state gets the weights themselves.

    Args:
        method: Method, ``nf4`` or ``int8``; None rounds nothing.
        start: Share of the steps before the first rounded one.
    """

    def __init__(self, method: str | None, start: float) -> None:
        self._method, self._start = method, start
        self._weights: RoundedWeights | None = None

    @classmethod
    def checked(cls, method: str | None, start: float) -> "RoundingSchedule":
        """The schedule of two hyper-parameters.

        Raises:
            ValueError: A value outside its range, or one that has no effect.
        """
        if method is not None and method not in QUANTIZATIONS:
            raise ValueError(f"quantization_aware {method!r} is none of {', '.join(QUANTIZATIONS)}")
        if not 0 <= start <= 1:
            raise ValueError(f"quantization_start {start} is outside [0, 1]")
        if method is None and start != DEFAULT_START:
            raise ValueError(f"quantization_start {start} has no effect without quantization_aware")
        return cls(method, start)

    def attach(self, module: LightningModule) -> None:
        """Takes hold of a module's network.

        Args:
            module: Module with its ``network``.

        Raises:
            ValueError: The network is to be sharded, which leaves no rank whole rows.
        """
        if self._method is None:
            return
        if module.device_mesh is not None:
            raise ValueError(
                f"quantization_aware {self._method} rounds whole matrices, which FSDP leaves no"
                " rank: train with ddp or a pipeline with data_parallel replicate, or set it to"
                " null"
            )
        network = module.network
        assert isinstance(network, PreTrainedModel)
        self._weights = RoundedWeights(network, self._method)
        module.register_state_dict_pre_hook(self._give_whole_state)  # type: ignore[no-untyped-call]

    def apply(self, trainer: Trainer) -> None:
        """Rounds the weights where the run is far enough."""
        if self._weights is None:
            return
        if trainer.global_step >= round(self._start * trainer.estimated_stepping_batches):
            self._weights.apply()

    def restore(self) -> None:
        """Puts the weights themselves back where they are rounded."""
        if self._weights is not None:
            self._weights.restore()

    def _give_whole_state(self, *_: Any) -> None:
        self.restore()
