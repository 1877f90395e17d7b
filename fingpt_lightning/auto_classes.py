"""What transformers' Auto classes load folders of this package's model type with.

``import fingpt_lightning`` has this module registered as soon as transformers' Auto classes are
imported, before or afterwards.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig

from fingpt_lightning.own_format import MODEL_TYPE, wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_WITHOUT_EFFECT = {
    "_from_auto", "_from_pipeline", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors",
    "weights_only",
}  # fmt: skip
"""Arguments of transformers' `from_pretrained` that hold here anyway: nothing is unpickled, no code
of a model runs."""
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class FinGPTConfig(PreTrainedConfig):
    """The config of a network that only this package reads, around that of its family.

    Args:
        text_config: Config of the family, or its entries; None for a GPT-2 of the usual sizes.
        base_model_type: Family's ``model_type``, where there are entries.
        **settings: Entries that all configs have.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        base_model_type: str = "gpt2",
        **settings: Any,
    ) -> None:
        from transformers import AutoConfig

        if not isinstance(text_config, PreTrainedConfig):
            text_config = AutoConfig.for_model(base_model_type, **(text_config or {}))
        of_family = wrapped({"model_type": text_config.model_type})
        super().__init__(**{k: v for k, v in settings.items() if k not in of_family})
        self.text_config, self.vocab_size = text_config, text_config.vocab_size

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``config.json``."""
        own = {k: v for k, v in super().to_dict().items() if k in ("dtype", "quantization_config")}
        return wrapped(self.text_config.to_dict()) | own

    def is_of_the_same_network(self, other: PreTrainedConfig) -> bool:
        """Whether another config has the same entries for the network."""
        if not isinstance(other, FinGPTConfig):
            return False
        return bool(other.text_config.to_dict() == self.text_config.to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: what a family's own class leaves out as usual is not usual here."""
        return self.to_dict()


class FinGPTForCausalLM:
    """The loader of such folders, for ``AutoModelForCausalLM``."""

    config_class = FinGPTConfig

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> "PreTrainedModel":
        """The network as `load_model` gives it: of its family's class, with other layers within.

        Args:
            name: Folder or hub name.
            config: Config of the folder, unchanged.
            dtype: Dtype of the weights; None or ``auto`` takes the stored one.
            torch_dtype: Older name of ``dtype``.
            device_map: Device of the whole network; None is the CPU, ``auto`` a GPU if there is
                one.
            adapter_kwargs: Arguments by which transformers names an adapter in PEFT's format.
            **others: Arguments for the hub; all else is refused unless it holds here anyway.

        Raises:
            TypeError: An argument is not supported here.
            ValueError: The folder cannot be loaded, or the config is not its own.
        """
        from transformers import AutoConfig

        from fingpt_lightning.models.device import find_device
        from fingpt_lightning.models.loading import load_model

        hub = {key: others.pop(key) for key in _OF_THE_HUB if key in others}
        for key, value in others.items():
            if key not in _WITHOUT_EFFECT and value not in (None, False):
                raise TypeError(
                    f"{key} is not supported for models of type {MODEL_TYPE}; see"
                    " fingpt_lightning.load_model"
                )
        folder = _local(name, hub)
        stored = AutoConfig.from_pretrained(folder)
        assert isinstance(stored, FinGPTConfig)
        if config is not None and not stored.is_of_the_same_network(config):
            raise ValueError(f"{name}: a config with other values than the folder's is not used")
        if (dtype := dtype or torch_dtype) in (None, "auto"):
            dtype = stored.dtype or "float32"
        named = (adapter_kwargs or {}).get("_adapter_model_path")
        network = load_model(
            folder,
            dtype=dtype,
            device=find_device(_one_device(device_map)),
            adapter=None if named is None else _local(named, hub),
        ).network
        if (attention := getattr(config, "_attn_implementation", None)) is not None:
            network.set_attn_implementation(attention)
        return network

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **_: Any) -> "PreTrainedModel":
        raise ValueError(
            f"a model of type {MODEL_TYPE} is not made from a config alone, which does not have the"
            " ranks of its layers; from_pretrained loads it"
        )


def _local(name: str | Path, hub: Mapping[str, Any]) -> Path:
    """A folder, or that of a hub name in the local cache, fetched where it is not there."""
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), allow_patterns=_FILES, **hub))


def _one_device(device_map: Any) -> str | None:
    if isinstance(device_map, dict) and len(device_map) == 1 and "" in device_map:
        device_map = device_map[""]
    if device_map is None:
        return "cpu"
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    if device_map == "auto":
        return None
    if isinstance(device_map, dict) or device_map in ("balanced", "balanced_low_0", "sequential"):
        raise TypeError(
            f"device_map {device_map!r} is not supported for models of type {MODEL_TYPE}: name one"
            " device, such as cuda:0"
        )
    return str(device_map)


def register(module: ModuleType) -> None:
    """Makes transformers' Auto classes know the model type.

    Args:
        module: Module of transformers with the Auto classes, as soon as it has been imported.
    """
    if hasattr(module, "AutoModelForCausalLM"):
        module.AutoModelForCausalLM.register(FinGPTConfig, FinGPTForCausalLM, exist_ok=True)
    else:
        module.AutoConfig.register(MODEL_TYPE, FinGPTConfig, exist_ok=True)
