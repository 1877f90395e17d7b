"""Tokens of text and of tasks' rows, on which the outputs of compressed layers are kept."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.data.documents import short_pieces
from fingpt_lightning.data.instruction_rows import encode_rows
from fingpt_lightning.data.text_files import TextFiles, find_text_files
from fingpt_lightning.models.families import max_positions
from fingpt_lightning.models.formats.tokenizer import check_tokens
from fingpt_lightning.models.input_moments import InputMoments, input_moments
from fingpt_lightning.tasks import find_task, read_rows
from fingpt_lightning.terminal.inputs import TASK_PREFIX, weighted_name
from fingpt_lightning.terminal.progress import shown_progress

CALIBRATION_TOKENS = 32768
BLOCK_LENGTH = 512


class Calibration(NamedTuple):
    """Tokens in rows, and their name in a record."""

    ids: Int[Tensor, "N T"]
    name: str

    def described(self) -> str:
        """The name for people."""
        return f"{self.ids.numel():,} tokens of {self.name}"


def read_calibration(
    tokenizer: PreTrainedTokenizerFast | None,
    config: PretrainedConfig,
    *,
    calibration: str | Path | Sequence[str | Path] | None,
    calibration_task: str | None,
    calibration_tokens: int | None,
    data_dir: str | Path | None,
) -> Calibration | None:
    """The tokens that the options of a command select; None where they name no source.

    Args:
        tokenizer: Tokenizer of the network.
        config: Config of the network.
        calibration: Paths of text files, or a mixture as `calibration_sources` reads it.
        calibration_task: Name of a task, in place of files.
        calibration_tokens: Largest number of tokens that are read; None is `CALIBRATION_TOKENS`.
        data_dir: Folder of the task's rows; None reads them from the hub.

    Raises:
        ValueError: As in `text_calibration` and `task_calibration`.
        OSError: A path does not exist.
    """
    number = CALIBRATION_TOKENS if calibration_tokens is None else calibration_tokens
    if number < 1:
        raise ValueError(f"calibration_tokens {number} is below 1")
    if calibration is not None:
        sources = calibration_sources(calibration)
        if len(sources) == 1 and isinstance(sources[0].read, TextFiles):
            return text_calibration(sources[0].read, tokenizer, config, number)
        return mixed_calibration(sources, data_dir, tokenizer, config, number)
    if calibration_task is not None:
        return task_calibration(calibration_task, data_dir, tokenizer, config, number)
    return None


class CalibrationSource(NamedTuple):
    """One part of a mixture.

    Args:
        read: Text files, or the name of a task.
        weight: Number of its tokens in proportion to those of the other parts, above 0.
    """

    read: TextFiles | str
    weight: float = 1.0


def calibration_sources(
    calibration: str | Path | Sequence[str | Path],
) -> tuple[CalibrationSource, ...]:
    """The parts of a calibration.

    Paths alone are one part, read one after the other. Where one is written ``PATH=WEIGHT``,
    ``task:NAME`` or ``task:NAME=WEIGHT``, each is a part of its own, with weight 1 if none is
    given.

    Args:
        calibration: Paths, folders, globs, and tasks after ``task:``.

    Raises:
        ValueError: There is no file, one is of another kind, or a weight is not above 0.
        FileNotFoundError: A path does not exist.
    """
    given = [calibration] if isinstance(calibration, str | Path) else calibration
    words = [str(word) for word in given]
    parts = [weighted_name(word) for word in words]
    is_mixture = any(
        name.startswith(TASK_PREFIX) or name != word
        for word, (name, _) in zip(words, parts, strict=True)
    )
    if not is_mixture:
        return (CalibrationSource(TextFiles(find_text_files(words, "calibration"))),)
    found = []
    for name, weight in parts:
        if name.startswith(TASK_PREFIX):
            read: TextFiles | str = find_task(name.removeprefix(TASK_PREFIX)).name
        else:
            read = TextFiles(find_text_files(name, "calibration"))
        found.append(CalibrationSource(read, weight))
    return tuple(found)


def text_calibration(
    files: TextFiles,
    tokenizer: PreTrainedTokenizerFast | None,
    config: PretrainedConfig,
    num_tokens: int = CALIBRATION_TOKENS,
    block_length: int = BLOCK_LENGTH,
) -> Calibration:
    """The first tokens of some text, in rows; documents follow each other, each with its end token.

    Args:
        files: Text files.
        tokenizer: Tokenizer of the network.
        config: Config of the network.
        num_tokens: Largest number of tokens.
        block_length: Tokens of a row, or fewer where the network reads fewer.

    Raises:
        ValueError: There is no text, or the model has no tokenizer for it.
    """
    tokens = _text_tokens(files, _needed(tokenizer), num_tokens)
    check_tokens(_needed(tokenizer), [tokens], config.vocab_size, "calibration")
    return _rows(tokens, config, block_length, f"{files}, {files.fingerprint()}")


def _text_tokens(
    files: TextFiles, tokenizer: PreTrainedTokenizerFast, num_tokens: int
) -> list[int]:
    tokens: list[int] = []
    for piece in short_pieces(files.pieces()):  # of which the first may be enough
        tokens += tokenizer.encode(piece.text, add_special_tokens=False, verbose=False)
        if piece.ends_document and piece.text and tokenizer.eos_token_id is not None:
            tokens.append(int(tokenizer.eos_token_id))
        if len(tokens) >= num_tokens:
            break
    if not tokens:
        raise ValueError(f"calibration: {files} holds no text")
    return tokens[:num_tokens]


def task_calibration(
    name: str,
    data_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerFast | None,
    config: PretrainedConfig,
    num_tokens: int = CALIBRATION_TOKENS,
    block_length: int = BLOCK_LENGTH,
) -> Calibration:
    """Prompts of a task's ``train`` split with their answers, drawn evenly from all of it.

    Args:
        name: Name of the task.
        data_dir: Folder of all sets; None reads from the hub.
        tokenizer: Tokenizer of the network.
        config: Config of the network.
        num_tokens: Largest number of tokens.
        block_length: As in `text_calibration`; rows of tokens are independent of rows of the task.

    Raises:
        ValueError: There is no such task, no row, or no tokenizer.
        FileNotFoundError: The split is missing.
    """
    tokens, described = _task_tokens(name, data_dir, _needed(tokenizer), config, num_tokens)
    check_tokens(_needed(tokenizer), [tokens], config.vocab_size, "calibration")
    return _rows(tokens, config, block_length, described)


def mixed_calibration(
    sources: Sequence[CalibrationSource],
    data_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerFast | None,
    config: PretrainedConfig,
    num_tokens: int = CALIBRATION_TOKENS,
    block_length: int = BLOCK_LENGTH,
) -> Calibration:
    """Tokens of several sources by their weights, one source after the other.

    Args:
        sources: Parts of the mixture.
        data_dir: Folder of all sets of the tasks; None reads from the hub.
        tokenizer: Tokenizer of the network.
        config: Config of the network.
        num_tokens: Number of tokens of all parts.
        block_length: As in `text_calibration`; a row may hold the end of a part and the beginning
            of the next.

    Raises:
        ValueError: As in `text_calibration` and `task_calibration`; or a source has fewer tokens
            than its weight gives it.
    """
    tokenizer = _needed(tokenizer)
    whole = math.fsum(source.weight for source in sources)
    tokens: list[int] = []
    names: list[str] = []
    for read, weight in sources:
        number = round(num_tokens * weight / whole)
        if number < 1:
            raise ValueError(
                f"calibration: weight {weight:g} leaves {read} no token of {num_tokens}"
            )
        if isinstance(read, TextFiles):
            part, name = _text_tokens(read, tokenizer, number), f"{read}, {read.fingerprint()}"
        else:
            part, name = _task_tokens(read, data_dir, tokenizer, config, number)
        if len(part) < number:
            raise ValueError(
                f"calibration: {read} has {len(part):,} tokens, fewer than the {number:,} of weight"
                f" {weight:g}; lower --calibration_tokens or the weight"
            )
        tokens += part
        names.append(f"{len(part)} of {name}")
    check_tokens(tokenizer, [tokens], config.vocab_size, "calibration")
    return _rows(tokens, config, block_length, "; ".join(names))


def _task_tokens(
    name: str,
    data_dir: str | Path | None,
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainedConfig,
    num_tokens: int,
) -> tuple[list[int], str]:
    """The tokens, and what they are."""
    task = find_task(name)
    rows = read_rows(task, data_dir, "train")
    known = [example for example in rows.examples if example.gold is not None]
    if not known:
        raise ValueError(f"calibration_task {name}: {rows.path} has no row with a right answer")
    longest = max_positions(config)
    # A few rows show how many are needed; neighbors in a file are often alike.
    sample = encode_rows(tokenizer, known[:64], longest).kept
    if not sample:
        raise ValueError(
            f"calibration_task {name}: the first rows of {rows.path} do not fit the {longest}"
            " tokens of the network"
        )
    mean_length = sum(len(row.tokens) for row in sample) / len(sample)
    stride = max(1, int(len(known) * mean_length / num_tokens))
    tokens: list[int] = []
    for first in range(stride):  # further rounds where the sample's rows are the longer ones
        encoded = encode_rows(tokenizer, known[first::stride], longest)
        tokens += [token for row in encoded.kept for token in row.tokens]
        if len(tokens) >= num_tokens:
            break
    return tokens[:num_tokens], f"train of {task.name}, {rows.sha256}"


def shown_moments(network: PreTrainedModel, calibration: Calibration) -> Iterator[InputMoments]:
    """`input_moments`, refreshed, with progress."""
    num_tokens, ids = calibration.ids.numel(), calibration.ids.to(network.device)
    num_blocks = int(network.config.num_hidden_layers)
    with shown_progress(f"rounding on {num_tokens:,} tokens", num_blocks, "blocks") as show:
        for number, found in enumerate(input_moments(network, ids, refresh=True)):
            yield found
            show(min(number + 1, num_blocks))


def _needed(tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedTokenizerFast:
    if tokenizer is None:
        raise ValueError("the model has no tokenizer for the calibration; name --tokenizer")
    return tokenizer


def _rows(tokens: list[int], config: PretrainedConfig, length: int, name: str) -> Calibration:
    length = min(length, max_positions(config), len(tokens))
    num_rows = len(tokens) // length
    return Calibration(torch.tensor(tokens[: num_rows * length]).view(num_rows, length), name)
