"""FSDP2 over all ranks, with checkpoints that any number of devices can read."""

from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from typing_extensions import override

from fingpt_lightning.strategies.rendezvous import START_S
from fingpt_lightning.strategies.watched import WatchedRanks

_FROM_ONE_FILE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class FullySharded(WatchedRanks, ModelParallelStrategy):
    """Each rank keeps its share of weights, gradients and optimizer state, and reads its own data.

    The module splits itself in ``configure_model``, over the axis ``data_parallel`` of its
    ``device_mesh``. A checkpoint is the one file of a run on one device, put together in the host
    memory of rank 0.

    What differs from Lightning 2.6.6's ``ModelParallelStrategy``, of whose two axes this is one:
    there ``data_parallel_size: auto`` is the number of nodes, not of ranks; and a checkpoint of
    one device is read as if its optimizer had a single group of parameters in the module's order,
    which gives the state of one parameter to another.

    Evaluation needs ``Trainer(inference_mode=False)``: weights that were first gathered in
    inference mode cannot be trained with.

    Args:
        process_group_backend: Backend such as ``nccl`` or ``gloo``; null goes by the device.
        timeout_s: Seconds that a rank waits for another before it ends the run, once all are set
            up. One that dies, stops, hangs or is cut off is named, and all others end.
        start_timeout_s: Seconds that ranks may be apart until then.

    Raises:
        ValueError: There is one rank only, and nothing to split.
    """

    def __init__(
        self,
        process_group_backend: str | None = None,
        timeout_s: float | int = START_S,
        start_timeout_s: float | int = START_S,
    ) -> None:
        super().__init__(
            timeout_s,
            start_timeout_s,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def _configure_launcher(self) -> None:
        # The first hook that knows the number of ranks, before any process is started.
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self._data_parallel_size == 1:
            raise ValueError(
                "trainer.strategy FullySharded splits a model over ranks, and there is one: raise"
                " trainer.devices or leave the strategy out"
            )
        super()._configure_launcher()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        state = super().lightning_module_state_dict()  # empty but on rank 0
        assert self.model is not None
        first_name: dict[nn.Parameter, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in state:  # gathering made a copy of each tied weight
                state[name] = state[first_name.setdefault(parameter, name)]
        return state

    @override
    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=_FROM_ONE_FILE)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        assert self.model is not None
        saved = checkpoint["optimizer_states"]
        for optimizer, state in zip(self.optimizers, saved, strict=True):
            named = _by_name(state, optimizer, self.model)
            set_optimizer_state_dict(self.model, optimizer, named, options=_FROM_ONE_FILE)


def _by_name(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """A saved state with parameters named, in place of counted over the optimizer's groups."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    saved_ids = [i for group in state["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {i: name_of[p] for i, p in zip(saved_ids, parameters, strict=True)}
    return {
        "state": {names[i]: value for i, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[i] for i in group["params"]]}
            for group in state["param_groups"]
        ],
    }
