"""How much smaller than its dense baseline the network is."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from typing_extensions import override

from callbacks.recording import Budgeted, record_in_wandb_summary
from fingpt_lightning.units import MIB


class CompressionMonitor(Callback):
    """Prints the budget of the network when fit starts, and logs its figures once.

    They go to W&B as summary values (columns of the runs table, not charts of one point) and to
    other loggers as one row at step 0. Ratios are dense over stored: above 1 is smaller.

    Keys:

    - ``compression/block_parameter_ratio``, ``compression/total_parameter_ratio``: the decoder
      blocks alone, and everything.
    - ``compression/parameters``, ``compression/dense_parameters``: stored, and in the dense
    baseline. - ``compression/total_mib_at_32_bits``, ``compression/total_mib_at_16_bits``,
      ``compression/total_mib_at_8_bits``, ``compression/total_mib_at_4_bits``: MiB of the stored
      parameters at so many bits each, without quantisation constants.
    - ``compression/dense_mib_at_32_bits``, ``compression/dense_mib_at_16_bits``,
      ``compression/dense_mib_at_8_bits``, ``compression/dense_mib_at_4_bits``: of the dense
      baseline.
    - ``compression/linear_parameter_share``, ``compression/linear_flop_share``: what linear layers
      hold and compute of the dense baseline, between 0 and 1.

    Cost: one walk over the modules when fit starts.

    Raises:
        TypeError: The module has no ``budget()``.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, Budgeted):
            raise TypeError(
                "CompressionMonitor needs a module with budget(), which"
                f" {type(pl_module).__name__} has not"
            )
        if not trainer.is_global_zero:
            return
        budget = pl_module.budget()
        Console().print(budget.to_table())
        figures: dict[str, float | int | str] = {
            "compression/block_parameter_ratio": budget.block_compression_ratio,
            "compression/total_parameter_ratio": budget.total_compression_ratio,
            "compression/parameters": budget.total_parameters,
            "compression/dense_parameters": budget.dense_total_parameters,
            "compression/linear_parameter_share": budget.linear_parameter_share,
            "compression/linear_flop_share": budget.linear_flop_share,
        }
        for bits in (32, 16, 8, 4):
            figures[f"compression/total_mib_at_{bits}_bits"] = budget.bytes_at(bits) / MIB
            figures[f"compression/dense_mib_at_{bits}_bits"] = budget.dense_bytes_at(bits) / MIB
        record_in_wandb_summary(trainer, figures)
        for logger in trainer.loggers:
            if not isinstance(logger, WandbLogger):
                logger.log_metrics({key: float(value) for key, value in figures.items()}, step=0)
                logger.save()
