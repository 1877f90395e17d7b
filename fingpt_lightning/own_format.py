"""``config.json`` of the folders that this package alone reads, under a model type of their own.

transformers knows no low-rank layers and no quantized embeddings. Under the ``model_type`` of the
family it would fill the layers whose weights it does not find with random numbers; under one that
it does not know it refuses the folder, until `fingpt_lightning` is imported and registers it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fingpt_lightning.terminal.messages import shortened

MODEL_TYPE, ARCHITECTURE = "fingpt_lightning", "FinGPTForCausalLM"
HOW_TO_LOAD = (
    "pip install fingpt-lightning; import fingpt_lightning; then load it with AutoModelForCausalLM"
    " of transformers or with fingpt_lightning.load_model"
)
_BASE_TYPE, _BASE, _HINT = "base_model_type", "text_config", "how_to_load"
_NO_NUMBER = "vocab_size"
"""A number in the configs of all families: text in its place, and no class of transformers that is
named itself (``GPT2LMHeadModel.from_pretrained``) builds a network from this config either."""
_QUANTIZATION = "quantization_config"
_KNOWN = {"dtype", "torch_dtype", "transformers_version", _QUANTIZATION}


def wrapped(described: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of ``config.json`` for a network that only this package reads.

    Args:
        described: Contents as transformers has them for the family.

    >>> wrapped({"model_type": "gpt2", "n_layer": 2})["base_model_type"]
    'gpt2'
    """
    base = {k: v for k, v in described.items() if k not in ("model_type", _QUANTIZATION)}
    outer = {key: described[key] for key in ("dtype", _QUANTIZATION) if key in described}
    return outer | {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        _BASE_TYPE: described["model_type"],
        _BASE: base,
        _HINT: HOW_TO_LOAD,
        _NO_NUMBER: f"in {_BASE}: import fingpt_lightning",
    }


def unwrapped(contents: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The contents as transformers has them for the family; others are left as they are.

    Args:
        contents: Contents of a ``config.json``.
        where: File of the contents, for messages.

    Raises:
        ValueError: It is of this package's model type, and not as `wrapped` makes it.

    >>> unwrapped(wrapped({"model_type": "gpt2", "n_layer": 2}), Path("config.json"))
    {'n_layer': 2, 'model_type': 'gpt2'}
    """
    if contents.get("model_type") != MODEL_TYPE:
        return dict(contents)
    made = wrapped({"model_type": None})
    if not isinstance(base := contents.get(_BASE), dict):
        raise ValueError(f"{where}: {_BASE} {shortened(base)} is not an object")
    if contents.get("architectures") != made["architectures"]:
        found = shortened(contents.get("architectures"))
        raise ValueError(f"{where}: architectures {found} is not supported; {ARCHITECTURE} is")
    for key, value in contents.items():
        if key not in _KNOWN and key not in made and value not in (None, False, "", [], {}):
            raise ValueError(f"{where}: {key} {shortened(value)} is not supported")
    quantization = {k: contents[k] for k in (_QUANTIZATION,) if k in contents}
    return base | quantization | {"model_type": contents.get(_BASE_TYPE)}
