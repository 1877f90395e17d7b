"""A frozen network whose predictions another one is trained on.

Axes: B batch, T tokens, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from fingpt_lightning.data.batch import TokenBatch
from fingpt_lightning.models import LossSums
from fingpt_lightning.models.distillation_loss import DistillationHead, distillation_loss
from fingpt_lightning.models.families import head_of, logit_cap, max_positions
from fingpt_lightning.models.loading import DTYPES, load_model
from fingpt_lightning.models.packed_attention import use_packed_attention
from fingpt_lightning.models.quantization.layers import QUANTIZATIONS
from fingpt_lightning.modules.ranges import check_above_0
from fingpt_lightning.terminal.messages import nearest

WITHOUT_TEACHER: Mapping[str, Any] = {
    "teacher_quantize": None, "teacher_dtype": "bfloat16", "teacher_weight": 1.0,
    "teacher_temperature": 1.0,
}  # fmt: skip
"""Settings that have no effect without a teacher."""

HiddenStates = Callable[[PreTrainedModel, TokenBatch], Tensor]


class Teacher:
    """A network that stays as it is and is no part of the module that learns from it.

    It has no place in the module's parameters, checkpoints and averages; each process has the whole
    of it on its device.

    Args:
        path: Model as `load_model` takes it.
        quantize: ``nf4``, ``int8`` or None, of its linear layers.
        dtype: Name of the dtype of its other weights and of its products.
        weight: Share of the divergence in the loss, in (0, 1]; the rest is cross-entropy.
        temperature: Divisor of the logits of both networks in the divergence.
    """

    def __init__(
        self, path: str, quantize: str | None, dtype: str, weight: float, temperature: float
    ) -> None:
        self.path, self.quantize, self.dtype = path, quantize, dtype
        self.weight, self.temperature = weight, temperature
        self.revision = ""
        self._network: PreTrainedModel | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Itself: a copy of the module that learns, such as an average, has the same teacher."""
        return self

    @classmethod
    def checked(cls, settings: Mapping[str, Any]) -> "Teacher | None":
        """The teacher of a module's settings; None where they name none.

        Raises:
            ValueError: A value outside its range, or one that has no effect.
        """
        if not 0 < (weight := settings["teacher_weight"]) <= 1:
            raise ValueError(f"teacher_weight {weight} is outside (0, 1]")
        temperature = settings["teacher_temperature"]
        check_above_0(teacher_temperature=temperature)
        path = settings["teacher"]
        if path is None:
            for key, plain in WITHOUT_TEACHER.items():
                if settings[key] != plain:
                    raise ValueError(f"{key} {settings[key]} has no effect without teacher")
            return None
        for key, known in (
            ("teacher_quantize", (None, *QUANTIZATIONS)),
            ("teacher_dtype", tuple(DTYPES)),
        ):
            value = settings[key]
            if value not in known:
                named = ["null" if name is None else name for name in known]
                raise ValueError(
                    f"{key} {value!r} is none of {', '.join(named)}{nearest(str(value), named)}"
                )
        return cls(
            path, settings["teacher_quantize"], settings["teacher_dtype"], weight, temperature
        )

    def load(self, module: LightningModule, network: PreTrainedModel) -> None:
        """Loads the teacher's weights onto the module's device.

        Args:
            module: Module that learns.
            network: Network of the module.

        Raises:
            OSError: There is no model at the path.
            ValueError: The teacher does not fit the network or the data.
        """
        if self._network is not None:
            return
        trainer = module._trainer
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        loaded = load_model(
            self.path, dtype=self.dtype, device=device, quantize=self.quantize or "auto"
        )
        rows, own = loaded.network.config.vocab_size, network.config.vocab_size
        if rows != own:
            raise ValueError(
                f"model.teacher {self.path} knows {rows} tokens, the network that learns from it"
                f" {own}: take a teacher with the same tokenizer"
            )
        source: Any = None if trainer is None else getattr(trainer, "datamodule", None)
        reader = getattr(source, "tokenizer", None)
        if reader is not None and loaded.tokenizer is not None:
            self._check_tokens(reader, loaded.tokenizer, rows)
        length = getattr(source, "block_length", None)
        if isinstance(length, int) and length > (longest := max_positions(loaded.network.config)):
            raise ValueError(
                f"model.teacher {self.path} reads {longest} tokens, fewer than the {length} per row"
                " of the data"
            )
        self.revision = loaded.revision
        self._network = loaded.network.eval().requires_grad_(False)
        use_packed_attention(self._network)

    def _check_tokens(self, reader: Any, own: Any, num_rows: int) -> None:
        """Raises where a row is a token of the data's tokenizer, and not of the teacher's.

        Tokens of the teacher alone do no harm: in a GGUF file each row has one, and transformers
        adds one without a row.
        """
        missing = reader.get_vocab().items() - own.get_vocab().items()
        others = [(number, token) for token, number in missing if number < num_rows]
        if others:
            number, token = min(others)
            raise ValueError(
                f"model.teacher {self.path} does not have the token {token!r}, id {number}, of the"
                " data's tokenizer: take a teacher with the same tokenizer"
            )

    def check_revision(self, checkpoint: Mapping[str, Any]) -> None:
        """Raises where a checkpoint to resume from had a teacher of other weights.

        Raises:
            ValueError: It had, or it had none and there is one now.
        """
        before = checkpoint.get("teacher_revision")
        if before != self.revision:
            raise ValueError(
                f"model.teacher {self.path} has the weights {self.revision}, the checkpoint was"
                f" trained with {'no teacher' if before is None else before}"
            )

    @property
    def network(self) -> PreTrainedModel:
        """The frozen network."""
        assert self._network is not None, "the teacher is loaded by `load`"
        return self._network

    def hidden_states(
        self, batch: TokenBatch, hidden_states: HiddenStates
    ) -> Float[Tensor, "B T D"]:
        """The teacher's final hidden states, in its own dtype whatever the run's precision.

        Args:
            batch: Batch as the network that learns reads it.
            hidden_states: Function that runs a network's body on a batch.
        """
        device_type = batch["input_ids"].device.type
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            return hidden_states(self.network, batch)

    def loss(
        self,
        student: PreTrainedModel,
        hidden: Float[Tensor, "B T D"],
        teacher_hidden: Float[Tensor, "B T D2"],
        labels: Int[Tensor, "B T"],
        chunk_size: int | None,
    ) -> LossSums:
        """The summed loss of `distillation_loss` at the positions that have labels.

        Args:
            student: Network that learns.
            hidden: Its final hidden states.
            teacher_hidden: Those of the teacher.
            labels: Labels of both.
            chunk_size: Tokens whose logits are held at a time, as `distillation_loss` takes it.
        """
        return distillation_loss(
            DistillationHead(head_of(student), hidden, logit_cap(student)),
            DistillationHead(head_of(self.network), teacher_hidden, logit_cap(self.network)),
            labels,
            self.weight,
            self.temperature,
            chunk_size,
        )
