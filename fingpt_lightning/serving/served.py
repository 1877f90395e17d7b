"""What a server answers with."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.deploy.adapter_bank import AdapterBank
from fingpt_lightning.deploy.labelling import Labeller
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.serving.engine import Engine
from fingpt_lightning.serving.errors import ApiError
from fingpt_lightning.tasks import Task
from fingpt_lightning.tasks.chat import template_of
from fingpt_lightning.terminal.messages import nearest


@dataclass
class Served:
    """What a server answers with.

    Args:
        name: Name of the model itself.
        network: Network in evaluation mode.
        tokenizer: Tokenizer of the network.
        engine: Engine that runs them, started.
        bank: Bank of the network's adapters.
        tasks: Tasks of ``/v1/label``, by name.
        api_key: Key that requests have to name; None is none.
        max_body_bytes: Largest body of a request.
        timeout_s: Seconds in which a body has to arrive.
    """

    name: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    engine: Engine
    bank: AdapterBank | None = None
    tasks: Mapping[str, Task] = field(default_factory=dict)
    api_key: str | None = None
    max_body_bytes: int = 2**20
    timeout_s: float = 300.0
    started_at: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.num_positions = max_positions(self.network.config)
        # The engine's thread has the other one: a tokenizer is not for several at once.
        self.tokenizer = copy.deepcopy(self.tokenizer)
        self.template = template_of(self.tokenizer)
        self.labellers: dict[str, Labeller] = {}

    @property
    def models(self) -> list[str]:
        """The names that requests may ask for."""
        return [self.name, *([] if self.bank is None else self.bank.names)]

    def adapter(self, model: str) -> str | None:
        """The adapter of a model's name; None is the base.

        Raises:
            ApiError: There is no such model.
        """
        if model not in self.models:
            hint = nearest(model, self.models)
            text = f"model {model!r} is none of {', '.join(self.models)}{hint}"
            raise ApiError(404, text, "model", "model_not_found")
        return None if model == self.name else model
