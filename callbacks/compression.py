"""How much smaller than its dense baseline the network is."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from callbacks.recording import (
    Budgeted,
    ParameterTotals,
    parameter_totals,
    record_in_wandb_summary,
)
from fingpt_lightning.metric_keys import COMPRESSION_BITS, compression_key
from fingpt_lightning.units import MIB, format_bytes, format_count


class CompressionMonitor(Callback):
    """Prints the budget of the network when fit starts, and logs its figures once.

    They go to W&B as summary values (columns of the runs table, not charts of one point) and to
    other loggers as one row at step 0. Ratios are dense over stored: above 1 is smaller.

    A module without ``budget()`` has its parameters counted; it has a dense baseline where some of
    its layers are our low-rank ones. Figures that take more than that are left out.

    Keys:

    - ``compression/block_parameter_ratio``, ``compression/total_parameter_ratio``: the decoder
      blocks alone, and everything.
    - ``compression/parameters``, ``compression/dense_parameters``: stored, and in the dense
      baseline.
    - ``compression/total_mib_at_32_bits``, ``compression/total_mib_at_16_bits``,
      ``compression/total_mib_at_8_bits``, ``compression/total_mib_at_4_bits``: MiB of the stored
      parameters at so many bits each, without quantization constants.
    - ``compression/dense_mib_at_32_bits``, ``compression/dense_mib_at_16_bits``,
      ``compression/dense_mib_at_8_bits``, ``compression/dense_mib_at_4_bits``: of the dense
      baseline.
    - ``compression/linear_parameter_share``, ``compression/linear_flop_share``: what linear layers
      hold and compute of the dense baseline, between 0 and 1.

    Cost: one walk over the modules when fit starts.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        totals = parameter_totals(trainer, pl_module)  # which all ranks count together
        if not trainer.is_global_zero:
            return
        figures: dict[str, float | int]
        if isinstance(pl_module, Budgeted):
            budget = pl_module.budget()
            table = budget.to_table()
            figures = {
                "block_parameter_ratio": budget.block_compression_ratio,
                "total_parameter_ratio": budget.total_compression_ratio,
                "parameters": budget.total_parameters,
                "dense_parameters": budget.dense_total_parameters,
                "linear_parameter_share": budget.linear_parameter_share,
                "linear_flop_share": budget.linear_flop_share,
            }
        else:
            figures = counted_figures(totals)
            table = _counted_table(figures, type(pl_module).__name__)
        for whole, count in (("total", "parameters"), ("dense", "dense_parameters")):
            if count in figures:
                for bits in COMPRESSION_BITS:
                    figures[f"{whole}_mib_at_{bits}_bits"] = figures[count] * bits // 8 / MIB
        Console().print(table)
        logged = {compression_key(name): value for name, value in figures.items()}
        record_in_wandb_summary(trainer, logged)
        for logger in trainer.loggers:
            if not isinstance(logger, WandbLogger):
                logger.log_metrics({key: float(value) for key, value in logged.items()}, step=0)
                logger.save()


def counted_figures(totals: ParameterTotals) -> dict[str, float | int]:
    """The figures of a module without a budget: its parameters, and those of its dense baseline.

    Only a module with low-rank layers of ours has a known dense baseline.
    """
    stored, dense = totals.stored, totals.dense
    figures: dict[str, float | int] = {"parameters": stored}
    if dense != stored:
        figures |= {"dense_parameters": dense, "total_parameter_ratio": dense / stored}
    return figures


def _counted_table(figures: dict[str, float | int], name: str) -> Table:
    dense = figures.get("dense_parameters")
    table = Table(title=f"Parameters of {name}")
    table.add_column("")
    for column in ("this network", *(["dense baseline"] if dense else [])):
        table.add_column(column, justify="right")
    counts = [figures["parameters"], *([dense] if dense else [])]
    table.add_row("parameters", *map(format_count, counts))
    for bits in COMPRESSION_BITS:
        table.add_row(f"at {bits} bits", *(format_bytes(count * bits // 8) for count in counts))
    return table
