"""The settings of a compression."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a compression depends on; a killed one goes on with the same alone.

    Args:
        model: Path of the model.
        size: Share of all parameters that is kept.
        format: Form of the stored weights.
        dtype: Dtype of them, where they are not rounded.
        calibration: Sources of the calibration, with weights.
        calibration_tokens: Number of tokens of it.
        data_dir: Folder of tasks' rows.
        allocation: Way of sharing parameters out.
        whitening: Sides by which the factors are the nearest.
        drop_blocks: Number of blocks left out.
        embedding_rank: Rank of a tied embedding; None is dense.
        refine: Steps for each block.
        heal: Steps of training.
        heal_quantized: Steps of training with rounded weights.
        batch_size: Rows of a step.
        block_length: Tokens per row.
        learning_rate: Highest learning rate.
        warmup: Share of the steps of training in which the rate rises.
        weight_decay: Weight decay of matrices in training.
        precision: Precision of the training.
        teacher_weight: Share of the original's predictions in the loss of training.
        teacher_dtype: Dtype of the original as teacher.
        texts: Digests of the texts that are measured, by name.
        text_tokens: Tokens of each of them.
        tasks: Tasks that are scored.
        limit: Rows of each task.
        seed: Seed of refinement, training and the labels drawn for gradients.
        tokenizer: Folder of the tokenizer, where one is named.
    """

    model: str
    size: float
    format: str
    dtype: str
    calibration: tuple[str, ...]
    calibration_tokens: int
    data_dir: str | None
    allocation: str
    whitening: str
    drop_blocks: int
    embedding_rank: int | None
    refine: int
    heal: int
    heal_quantized: int
    batch_size: int
    block_length: int
    learning_rate: float
    warmup: float
    weight_decay: float
    precision: str
    teacher_weight: float
    teacher_dtype: str
    texts: Mapping[str, str]
    text_tokens: int
    tasks: tuple[str, ...]
    limit: int | None
    seed: int
    tokenizer: str | None
