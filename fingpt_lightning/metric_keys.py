"""The keys under which figures are logged, for those who write them and those who read them.

A key is ``group/name_unit``, ``eval/TASK/name`` for figures of a task. ``docs/metrics.md`` says
what each is; no other file spells one out.
"""

from collections.abc import Mapping

TASK = "TASK"
"""Stands for the name of a task in `LOGGED_BY`, `MEDIA` and docs/metrics.md."""

TRAIN_LOSS = "train/loss"
TRAIN_LEARNING_RATE = "train/learning_rate"
TRAIN_GRADIENT_NORM = "train/gradient_norm"
TRAIN_TOKENS = "train/tokens"
TRAIN_BYTES = "train/bytes"
VAL_LOSS = "val/loss"
VAL_PERPLEXITY = "val/perplexity"
VAL_BITS_PER_BYTE = "val/bits_per_byte"
TEST_LOSS = "test/loss"
TEST_PERPLEXITY = "test/perplexity"
TEST_BITS_PER_BYTE = "test/bits_per_byte"

MEMORY_PEAK_ALLOCATED = "memory/peak_allocated_mib"
MEMORY_PEAK_RESERVED = "memory/peak_reserved_mib"
MEMORY_PEAK_RSS = "memory/peak_rss_mib"
MEMORY_WEIGHTS = "memory/weights_mib"
MEMORY_GRADIENTS = "memory/gradients_mib"
MEMORY_OPTIMIZER = "memory/optimizer_mib"
MEMORY_ACTIVATIONS = "memory/activations_mib"
MEMORY_PARTS: Mapping[str, str] = {
    "weights": MEMORY_WEIGHTS,
    "optimizer": MEMORY_OPTIMIZER,
    "activations": MEMORY_ACTIVATIONS,
    "gradients": MEMORY_GRADIENTS,
}
"""The key of each part of the memory of a training step."""

THROUGHPUT_TOKENS_PER_S = "throughput/tokens_per_s"
THROUGHPUT_STEP_TIME_S = "throughput/step_time_s"
THROUGHPUT_TRAINING_TIME_S = "throughput/training_time_s"
THROUGHPUT_MFU = "throughput/mfu"
THROUGHPUT_GPU_UTILIZATION = "throughput/gpu_utilization_percent"

PIPELINE_BUBBLE_SHARE = "pipeline/bubble_share"
PIPELINE_BUBBLE_SHARE_FORMULA = "pipeline/bubble_share_formula"
PIPELINE_LARGEST_RANK = "pipeline/largest_rank_mib"
PIPELINE_SMALLEST_RANK = "pipeline/smallest_rank_mib"
PIPELINE_TIMELINE = "pipeline/timeline"
"""A picture."""

COMPRESSION_BITS = (32, 16, 8, 4)
COMPRESSION_FIGURES = (
    "block_parameter_ratio",
    "total_parameter_ratio",
    "parameters",
    "dense_parameters",
    *(f"total_mib_at_{bits}_bits" for bits in COMPRESSION_BITS),
    *(f"dense_mib_at_{bits}_bits" for bits in COMPRESSION_BITS),
    "linear_parameter_share",
    "linear_flop_share",
)

EVAL_FIGURES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "accuracy_norm": "by length",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "average_f1": "average F1",
    "mcc": "MCC",
    "exact_match": "exact match",
    "f1": "F1 of words",
    "close_match": "close",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "token_f1": "token F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "pearson": "Pearson",
    "rmse": "RMSE",
    "mae": "MAE",
    "missing": "missing",
    "perplexity": "perplexity",
}
"""What each figure of a task is called in tables; a task has those that its kind has."""
LESS_IS_BETTER = ("rmse", "mae", "missing", "perplexity")
"""The figures of `EVAL_FIGURES` of which less is better."""
EVAL_MEDIA = ("confusion", "predictions")

ACCURACY_BEFORE, ACCURACY_AFTER = "accuracy_before", "accuracy_after"
SUMMARY_FIGURES = (
    "steps",
    "block_parameters",
    "parameters",
    "dense_block_parameters",
    "dense_parameters",
    "block_parameter_ratio",
    "total_parameter_ratio",
    "trained_parameters",
    "trained_share",
    "base",
    "adapter",
    f"{TASK}/{ACCURACY_BEFORE}",
    f"{TASK}/{ACCURACY_AFTER}",
    "first_val_loss",
    "best_val_loss",
    "last_val_loss",
    "val_bits_per_byte",
    "skipped_rows",
    "first_skipped_row",
    "tokens_per_s",
    "timed_tokens_per_s",
    "dense_baseline_tokens_per_s",
    "speed_ratio",
    "peak_allocated_mib",
    "peak_rss_mib",
    "best_checkpoint",
    "last_checkpoint",
    "run_folder",
    "log_folder",
)
"""The keys of ``summary.json``."""


def split_keys(split: str) -> tuple[str, str, str]:
    """The keys of the loss, the perplexity and the bits per byte of a split.

    Args:
        split: ``val`` or ``test``.
    """
    return {
        "val": (VAL_LOSS, VAL_PERPLEXITY, VAL_BITS_PER_BYTE),
        "test": (TEST_LOSS, TEST_PERPLEXITY, TEST_BITS_PER_BYTE),
    }[split]


def compression_key(figure: str) -> str:
    """The key of a figure of the budget.

    Args:
        figure: One of `COMPRESSION_FIGURES`.
    """
    assert figure in COMPRESSION_FIGURES, figure
    return f"compression/{figure}"


def eval_key(task: str, figure: str) -> str:
    """The key of a figure, or of a table or picture, of a task.

    Args:
        task: Name of the task.
        figure: One of `EVAL_FIGURES` or `EVAL_MEDIA`.
    """
    assert figure in EVAL_FIGURES or figure in EVAL_MEDIA, figure
    return f"eval/{task}/{figure}"


def summary_key(figure: str) -> str:
    """The key in the summary of a W&B run of a figure in ``summary.json``.

    Args:
        figure: One of `SUMMARY_FIGURES`, the name of a task in place of `TASK`.
    """
    assert _of_any_task(figure) in SUMMARY_FIGURES, figure
    return f"summary/{figure}"


def summary_figure(key: str) -> str | None:
    """The key in ``summary.json`` of a `summary_key`; None where ``key`` is another one.

    >>> summary_figure("summary/steps"), summary_figure("val/loss")
    ('steps', None)
    """
    group, _, figure = key.partition("/")
    return figure if group == "summary" else None


def _of_any_task(figure: str) -> str:
    task, _, name = figure.rpartition("/")
    return f"{TASK}/{name}" if task else figure


LOGGED_BY: Mapping[str, tuple[str, ...]] = {
    "LanguageModelingModule": (
        TRAIN_LOSS,
        TRAIN_LEARNING_RATE,
        TRAIN_GRADIENT_NORM,
        TRAIN_TOKENS,
        TRAIN_BYTES,
        VAL_LOSS,
        VAL_PERPLEXITY,
        VAL_BITS_PER_BYTE,
        TEST_LOSS,
        TEST_PERPLEXITY,
        TEST_BITS_PER_BYTE,
    ),
    "MemoryMonitor": (
        MEMORY_PEAK_ALLOCATED,
        MEMORY_PEAK_RESERVED,
        MEMORY_PEAK_RSS,
        *MEMORY_PARTS.values(),
    ),
    "ThroughputMonitor": (
        THROUGHPUT_TOKENS_PER_S,
        THROUGHPUT_STEP_TIME_S,
        THROUGHPUT_TRAINING_TIME_S,
        THROUGHPUT_MFU,
        THROUGHPUT_GPU_UTILIZATION,
    ),
    "CompressionMonitor": tuple(map(compression_key, COMPRESSION_FIGURES)),
    "PipelineTrace": (
        PIPELINE_BUBBLE_SHARE,
        PIPELINE_BUBBLE_SHARE_FORMULA,
        PIPELINE_LARGEST_RANK,
        PIPELINE_SMALLEST_RANK,
    ),
    "FinancialEvaluation": tuple(eval_key(TASK, figure) for figure in EVAL_FIGURES),
    "RunSummary": tuple(map(summary_key, SUMMARY_FIGURES)),
}
"""The keys that each class logs, by its name; a subclass logs those of its base."""

MEDIA: Mapping[str, tuple[str, ...]] = {
    "PipelineTrace": (PIPELINE_TIMELINE,),
    "FinancialEvaluation": tuple(eval_key(TASK, name) for name in EVAL_MEDIA),
}
"""The keys of the pictures and tables that each class gives W&B: no numbers to chart or to tune."""
