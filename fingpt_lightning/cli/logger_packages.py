"""The packages that loggers need beyond our own requirements, named where one is missing."""

from importlib.util import find_spec

from fingpt_lightning.cli.errors import ConfigError

_PACKAGES = {"TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}
"""Name of the class, and that of its package, which is also our extra."""
_OF_LIGHTNING = "lightning.pytorch.loggers."


def refuse_missing_package(class_path: str) -> None:
    """Refuses a logger whose package is not installed.

    Args:
        class_path: Class of the logger, with or without its module.

    Raises:
        ConfigError: It is not installed; the message names the extra.
    """
    module, _, name = class_path.rpartition(".")
    is_of_lightning = not module or f"{module}.".startswith(_OF_LIGHTNING)
    package = _PACKAGES.get(name) if is_of_lightning else None
    if package is None or find_spec(package) is not None:
        return
    raise ConfigError(
        f"trainer.logger {name} needs the package {package}, which is not installed: pip install"
        f" 'fingpt-lightning[{package}]'"
    )
