"""The data of finetuning: tasks in, batches of prompts with their answers out."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from fingpt_lightning.data.block_order import (
    BlockOrder,
    ShuffledOrder,
    WeightedOrder,
    WeightedPart,
)
from fingpt_lightning.data.blocks import BlockSampler, ResumableDataLoader
from fingpt_lightning.data.instruction_batches import Batching, Collate
from fingpt_lightning.data.instruction_rows import InstructionRow, InstructionRows, encode_rows
from fingpt_lightning.data.predicted_rows import CollateQuestions, Questions
from fingpt_lightning.data.synthetic_news import SENTIMENTS, synthetic_news
from fingpt_lightning.data.tokenized_data import TokenizedData
from fingpt_lightning.data.tokenizers import (
    MIN_VOCAB_SIZE,
    load_tokenizer,
    train_tokenizer,
)
from fingpt_lightning.models.sources import tokenizer_of_model
from fingpt_lightning.tasks import Example, TaskRows, find_task, read_rows
from fingpt_lightning.tasks.chat import AUTO, choose_chat_template
from fingpt_lightning.tasks.encoding import TooLong, length_remarks
from fingpt_lightning.tasks.row_files import find_row_files
from fingpt_lightning.tasks.rows import read_files
from fingpt_lightning.terminal.messages import nearest

SYNTHETIC, OWN_FILES, VALIDATION = "synthetic_news", "train_files", "validation"


@runtime_checkable
class HasBase(Protocol):
    """A module that trains on top of a pretrained model."""

    base: str | None


class FinancialInstructions(TokenizedData):
    """Rows of one task or of a mixture, with labels on the answers alone.

    Args:
        tasks: Names of shipped tasks or paths of YAML files: one, several by commas or as a list,
            read as they come, or a mapping from task to its share of the rows. Null for the
            sentiment of synthetic news, or the rows of ``train_files``.
        data_dir: Folder of ``<task>/<split>.jsonl``; null reads from the Hugging Face hub.
        tokenizer: Folder or hub name; null takes that of the model's base, or trains one on the
            rows of the training split where there is no base.
        batching: Layout of the rows, ``shared_prefix``, ``packed`` or ``padded``: equal gradients,
            different cost.
        batch_size: Rows of a batch on one device.
        max_length: Tokens of a row at most.
        too_long: Treatment of longer rows: ``cut``, they lose tokens of their own text, never of
            instruction or answer (one with too little text is left out); ``drop``, they are left
            out; ``error``, they end the run. How many were cut or left out is printed.
        balance_labels: Whether the labels of a task are drawn equally often; rows of rare labels
            then repeat within an epoch.
        val_share: Share of each task's training rows that is held out to validate on, in (0, 1).
        test_split: Name of the split that ``test`` reads, and ``predict`` answers.
        num_workers: Processes that read ahead; rows are in memory, so 0 is fast.
        seed: Seed of the held-out rows, of the order, and of the synthetic news.
        num_synthetic_items: Number of rows of synthetic news.
        vocab_size: Largest number of entries of a tokenizer that is trained here.
        train_files: Own files, read in place of ``tasks``: paths, folders and globs, of rows with
            the columns ``instruction``, ``input``, ``output``, with ``context``, ``target``, or
            with ``messages`` or ``conversations``, each row in any of these.
        validation_files: Files as ``train_files`` to validate on; null holds out ``val_share``.
        separator: Character between the values of CSV files; null takes what their first line has.
        encoding: Encoding of CSV files; null takes that of their byte order mark, else UTF-8.
        chat_template: Text around prompts and answers: ``auto``, the base's own where it is an
            instruct model, or the one that an adapter was trained with; ``none``; or a file with a
            template in Jinja. It is stored with the tokenizer beside the adapter.
        max_new_tokens: Largest number of tokens that ``predict`` writes as an answer, where a task
            does not say it itself.

    Attributes:
        tokenizer: The tokenizer, after ``setup``.
        split_sha256: Digest of each split of each task that was read, after ``setup``.

    Raises:
        ValueError: An argument is outside its range, or there is no such task.
    """

    def __init__(
        self,
        tasks: list[str] | dict[str, float] | str | None = None,
        data_dir: str | None = None,
        tokenizer: str | None = None,
        batching: Literal["shared_prefix", "packed", "padded"] = "shared_prefix",
        batch_size: int = 16,
        max_length: int = 512,
        too_long: Literal["cut", "drop", "error"] = "cut",
        balance_labels: bool = False,
        val_share: float = 0.1,
        test_split: str = "validation",
        num_workers: int = 0,
        seed: int = 1,
        num_synthetic_items: int = 400,
        vocab_size: int = 1024,
        train_files: str | list[str] | None = None,
        validation_files: str | list[str] | None = None,
        separator: str | None = None,
        encoding: str | None = None,
        chat_template: str = AUTO,
        max_new_tokens: int = 128,
    ) -> None:
        super().__init__()
        least = {
            "batch_size": (batch_size, 1),
            "max_length": (max_length, 2),
            "num_workers": (num_workers, 0),
            "num_synthetic_items": (num_synthetic_items, 1),
            "vocab_size": (vocab_size, MIN_VOCAB_SIZE),
            "max_new_tokens": (max_new_tokens, 1),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} {value} is below {minimum}")
        if not 0 < val_share < 1:
            raise ValueError(f"val_share {val_share} is outside (0, 1)")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} is outside [0, 2**32)")
        if batching not in list(Batching):
            raise ValueError(f"batching {batching!r} is none of {', '.join(Batching)}")
        if too_long not in list(TooLong):
            advice = nearest(too_long, TooLong)
            raise ValueError(f"too_long {too_long!r} is none of {', '.join(TooLong)}{advice}")
        self._replaced = ""
        if train_files is not None:
            if tasks is not None:
                self._replaced = ", ".join(_weights(tasks))
            tasks = [OWN_FILES]
        elif validation_files is not None:
            raise ValueError("validation_files has an effect with train_files alone")
        self.weights = _weights(tasks)
        self._tasks = {
            name: find_task("alpaca" if name == OWN_FILES and train_files is not None else name)
            for name in self.weights
            if name != SYNTHETIC
        }
        self.save_hyperparameters(logger=False)
        self.data_dir = data_dir
        self.train_files = train_files
        self.validation_files = validation_files
        self.separator, self.encoding = separator, encoding
        self.chat_template = chat_template
        self.max_new_tokens = max_new_tokens
        self.tokenizer_name = tokenizer
        self.batching = Batching(batching)
        self.batch_size = batch_size
        self.block_length = max_length
        self.too_long = TooLong(too_long)
        self.balance_labels = balance_labels
        self.val_share = val_share
        self.test_split = test_split
        self.num_workers = num_workers
        self.seed = seed
        self.num_synthetic_items = num_synthetic_items
        self.max_vocab_size = vocab_size
        self.split_sha256: dict[str, str] = {}
        self._examples: dict[tuple[str, str], list[Example]] = {}
        self._rows: dict[str, list[InstructionRow]] = {}

    @property
    def task_names(self) -> list[str]:
        """The tasks that it reads, except synthetic news and own files."""
        return [name for name in self._tasks if name != OWN_FILES]

    @override
    def prepare_data(self) -> None:
        """Reads the rows, so that errors in them show before a run begins."""
        for split in self._splits():
            self._read(split)
            if split == "train" and self.validation_files is not None:
                self._read(VALIDATION)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenizes the rows, each split once."""
        # Lightning's advice for loaders that compute; a row is a list in memory.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        splits = self._splits()
        found = {split: self._read(split) for split in splits}
        if not hasattr(self, "tokenizer"):
            self.tokenizer = self._load_tokenizer()
            name = self._base() or self.tokenizer_name or "the base"
            if self._replaced:
                _print(f"train_files are read in place of the tasks {self._replaced}")
            if remark := choose_chat_template(self.tokenizer, self.chat_template, name):
                _print(remark)
        if "train" in splits and "train" not in self._rows:
            if self.validation_files is None:
                self._hold_out(found["train"])
            else:
                for split, name in (("train", "train"), (VALIDATION, "val")):
                    (own,) = self._encode(self._read(split))
                    self._rows[name] = [row for row in own if row is not None]
        if self._predicts():
            self._check_questions(found[self.test_split])
        elif self.test_split in splits and "test" not in self._rows:
            rows = self._encode(found[self.test_split])
            self._rows["test"] = [row for part in rows for row in part if row is not None]

    @override
    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled rows; the loader's position is stored in checkpoints.

        Raises:
            ValueError: The rows do not fill one batch on all ranks.
        """
        rows = self._of("train")
        order = self._order(rows)
        ranks = self._ranks()
        needed = self.batch_size * ranks["num_replicas"]
        if len(order) < needed:
            raise ValueError(
                f"the training split has {len(order)} rows, but one batch takes {needed}"
                f" (batch_size {self.batch_size} x {ranks['num_replicas']} ranks): lower batch_size"
                f"{self._finder_advice()}"
            )
        data = InstructionRows(rows, self.eos_token_id)
        if self._overfits():
            return DataLoader(data, drop_last=True, **self._loading())
        sampler = BlockSampler(
            data, self.batch_size, training=True, seed=self.seed, order=order, **ranks
        )
        return ResumableDataLoader(data, sampler=sampler, drop_last=True, **self._loading())

    @override
    def _evaluated(self, split: str) -> InstructionRows:
        # By length, so that padded rows have little padding; sums do not depend on the order.
        rows = sorted(self._of(split), key=lambda row: (row.task, len(row.tokens)))
        return InstructionRows(rows, self.eos_token_id)

    @override
    def _predicted(self) -> Questions:
        tasks = []
        for name, examples in zip(self.weights, self._read(self.test_split), strict=True):
            task = find_task("fpb") if name == SYNTHETIC else self._tasks[name]
            if task.kind == "instructions":
                task = replace(task, max_new_tokens=self.max_new_tokens)
            tasks.append((name, task, examples))
        return Questions(tasks)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """The questions of the test split, each once and in their order."""
        data = self._predicted()
        sampler = BlockSampler(data, self.batch_size, training=False, **self._ranks())
        collate = CollateQuestions(self.too_long)
        return DataLoader(data, sampler=sampler, **{**self._loading(), "collate_fn": collate})

    def _predicts(self) -> bool:
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING

    def _check_questions(self, tasks: Sequence[Sequence[Example]]) -> None:
        for name, examples in zip(self.weights, tasks, strict=True):
            row = next((example.row for example in examples if example.turns), None)
            if row is not None:
                raise ValueError(
                    f"{name}: row {row} is a conversation of several turns, and predict answers"
                    " single questions"
                )

    def _splits(self) -> list[str]:
        """The splits that the trainer is about to read, or all without a trainer."""
        doing = None if self.trainer is None else self.trainer.state.fn
        splits = []
        if doing in (None, TrainerFn.FITTING, TrainerFn.VALIDATING):
            splits.append("train")
        if doing in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            splits.append(self.test_split)
        return splits

    def _read(self, split: str) -> list[list[Example]]:
        """The examples of each task."""
        for name in self.weights:
            if (name, split) in self._examples:
                continue
            if name == SYNTHETIC:
                self._examples[name, split] = _synthetic_examples(
                    self.num_synthetic_items, self.seed + (split != "train")
                )
                continue
            rows = self._task_rows(name, split)
            if not rows.examples:
                raise ValueError(f"{rows.path} has no rows of {name}")
            self._examples[name, split] = rows.examples
            self.split_sha256[f"{name}/{split}"] = rows.sha256
        return [self._examples[name, split] for name in self.weights]

    def _task_rows(self, name: str, split: str) -> TaskRows:
        task, separator, encoding = self._tasks[name], self.separator, self.encoding
        if name != OWN_FILES:
            return read_rows(task, self.data_dir, split, separator=separator, encoding=encoding)
        key = "train_files" if split == "train" else "validation_files"
        paths = getattr(self, key)
        if paths is None:
            raise ValueError(f"{key} is null, so that there are no rows for {split}")
        return read_files(task, find_row_files(paths, key), separator=separator, encoding=encoding)

    def _encode(self, tasks: Sequence[Sequence[Example]]) -> list[list[InstructionRow | None]]:
        encoded = []
        for number, (name, examples) in enumerate(zip(self.weights, tasks, strict=True)):
            is_labeled = name == SYNTHETIC or self._tasks[name].kind == "labels"
            try:
                rows, num_cut = encode_rows(
                    self.tokenizer,
                    examples,
                    self.block_length,
                    number,
                    is_labeled,
                    self.too_long,
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            num_dropped = rows.count(None)
            if num_dropped == len(rows):
                raise ValueError(
                    f"{name}: none of its {len(rows):,} rows fits max_length {self.block_length},"
                    " even without its text; raise max_length"
                )
            for remark in length_remarks(name, len(rows), num_cut, num_dropped, self.block_length):
                _print(remark)
            encoded.append(rows)
        return encoded

    def _hold_out(self, tasks: Sequence[Sequence[Example]]) -> None:
        self._rows["train"], self._rows["val"] = [], []
        for number, (examples, rows) in enumerate(zip(tasks, self._encode(tasks), strict=True)):
            seed = (self.seed * 1_000_003 + number) % 2**32  # of which torch reads 32 bits
            generator = torch.Generator().manual_seed(seed)
            # The examples of one row of the file stay together: its text must not be in both.
            kept = [
                (example.row, row)
                for example, row in zip(examples, rows, strict=True)
                if row is not None
            ]
            of_file = list(dict.fromkeys(number_in_file for number_in_file, _ in kept))
            order = torch.randperm(len(of_file), generator=generator).tolist()
            num_held_out = round(self.val_share * len(of_file))
            if not 0 < num_held_out < len(of_file):
                name = list(self.weights)[number]
                raise ValueError(
                    f"val_share {self.val_share} of the {len(of_file)} training rows of {name}"
                    " leaves nothing to train on or to validate on"
                )
            held_out = {of_file[i] for i in order[:num_held_out]}
            for number_in_file, row in kept:
                self._rows["val" if number_in_file in held_out else "train"].append(row)
        if self.balance_labels:  # the parts of the order follow each other
            self._rows["train"].sort(key=lambda row: (row.task, row.answer or 0))

    def _order(self, rows: Sequence[InstructionRow]) -> BlockOrder:
        names = list(self.weights)
        if self.balance_labels:
            sizes = Counter((row.task, row.answer) for row in rows)
        elif any(self.weights[name] is not None for name in names):
            sizes = Counter((row.task, None) for row in rows)
        else:
            return ShuffledOrder(len(rows))
        rows_of_task = Counter(row.task for row in rows)
        num_labels = Counter(task for task, _ in sizes)
        common = math.lcm(*num_labels.values())
        parts = []
        for (task, label), size in sizes.items():
            weight = self.weights[names[task]]
            share = float(rows_of_task[task]) if weight is None else weight
            name = names[task] if label is None else f"{names[task]} label {label}"
            parts.append(WeightedPart(name, size, share * (common // num_labels[task])))
        return WeightedOrder(parts)

    def _of(self, split: str) -> list[InstructionRow]:
        if split not in self._rows:
            raise RuntimeError(f"the {split} rows are not read: setup has to run first")
        return self._rows[split]

    @override
    def _loading(self) -> dict[str, Any]:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        collate = Collate(self.batching, self.eos_token_id, device.type)
        return {**super()._loading(), "collate_fn": collate}

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        if self.tokenizer_name is not None:
            return load_tokenizer(self.tokenizer_name)
        if (base := self._base()) is not None:
            return load_tokenizer(tokenizer_of_base(base))
        # Those of training whatever is done, so that all commands find the tokenizer of a run.
        texts = (
            example.prefix + example.prompts[0] + choice + "".join(t.content for t in example.turns)
            for examples in self._read("train")
            for example in examples
            for choice in example.choices
        )
        return train_tokenizer(texts, self.max_vocab_size)

    def _base(self) -> str | None:
        module = None if self.trainer is None else self.trainer.lightning_module
        return module.base if isinstance(module, HasBase) else None


@rank_zero_only
def _print(line: str) -> None:
    Console().print(line, soft_wrap=True, markup=False, highlight=False)


def tokenizer_of_base(base: str) -> str:
    """`tokenizer_of_model` of a module's base, or the base itself, where one may be found."""
    return tokenizer_of_model(base) or base


def _weights(
    tasks: Sequence[str] | Mapping[str, float] | str | None,
) -> dict[str, float | None]:
    if isinstance(tasks, Mapping):
        for name, weight in tasks.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"tasks: the weight {weight} of {name} is not above 0")
        weights: dict[str, float | None] = dict(tasks)
    else:
        given = tasks.split(",") if isinstance(tasks, str) else tasks or [SYNTHETIC]
        names = [name.strip() for name in given]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"tasks: {name} is there {names.count(name)} times")
        weights = dict.fromkeys(names)
    if not weights:
        raise ValueError("tasks: there is none")
    return weights


def _synthetic_examples(num_items: int, seed: int) -> list[Example]:
    """The sentiment of synthetic news, with the prompt of Financial PhraseBank."""
    task = find_task("fpb")
    (template,) = task.templates
    choices = tuple(f" {label}" for label in SENTIMENTS)
    examples = []
    for number, item in enumerate(synthetic_news(num_items, seed), 1):
        fields = {"text": item.text}
        prompts, spans = (template.render(fields),), (template.span(fields, "text"),)
        gold = SENTIMENTS.index(item.label)
        examples.append(Example(task.instruction, prompts, choices, gold, number, item.text, spans))
    return examples
