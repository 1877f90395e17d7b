import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fingpt_lightning.data import FinancialInstructions
from fingpt_lightning.data.batch import IGNORED_LABEL
from fingpt_lightning.data.instruction_batches import Batching, Collate
from fingpt_lightning.data.instruction_rows import InstructionRow, InstructionRows, encode_rows
from fingpt_lightning.data.tokenizers import train_tokenizer
from fingpt_lightning.tasks import Example

TOKENIZER = train_tokenizer(["Input: profit rose\nAnswer: positive negative"] * 3, 300)
COUNTS = {"negative": 3, "neutral": 12, "positive": 6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for task in ("fpb", "tfns"):
        rows = [
            {"text": f"{task} {label} {i}", "label": label}
            for label, count in COUNTS.items()
            for i in range(count)
        ]
        (tmp_path / task).mkdir()
        for split in ("train", "validation"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / task / f"{split}.jsonl").write_text(lines)
    alpaca = {"instruction": "Add", "input": "1 2", "output": "3"}
    (tmp_path / "alpaca").mkdir()
    (tmp_path / "alpaca" / "train.jsonl").write_text((json.dumps(alpaca) + "\n") * 9)
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def _data(folder: Path, **settings: Any) -> FinancialInstructions:
    given: dict[str, Any] = {
        "tasks": "fpb", "data_dir": str(folder), "tokenizer": str(folder / "tokenizer"),
        "batch_size": 4, "val_share": 0.2,
    }  # fmt: skip
    data = FinancialInstructions(**(given | settings))
    data.prepare_data()
    data.setup()
    return data


def _decoded(tokens: Iterable[int]) -> str:
    text = TOKENIZER.decode(list(tokens))
    assert isinstance(text, str)
    return text


def _supervised(batch: Any) -> list[str]:
    """The answers of a batch."""
    labels = batch["labels"].flatten()
    kept = labels[labels != IGNORED_LABEL]
    return _decoded(kept.tolist()).split("<|endoftext|>")[:-1]


def _answers(data: FinancialInstructions, epoch: int = 0) -> list[str]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [answer for batch in loader for answer in _supervised(batch)]


rows_of_tokens = st.lists(
    st.tuples(
        st.integers(0, 2), st.lists(st.integers(0, 2), min_size=2, max_size=7), st.integers(1, 3)
    ),
    min_size=1,
    max_size=6,
)


@given(rows_of_tokens)
def test_every_way_of_batching_holds_the_same_rows(
    drawn: list[tuple[int, list[int], int]],
) -> None:
    rows = [
        InstructionRow((*context, *(range(9, 9 + num)), 99), len(context), task, None)
        for task, context, num in drawn
    ]
    data = InstructionRows(rows, 99)
    batches = {
        batching: Collate(batching, 99)([data[i] for i in range(len(rows))])
        for batching in Batching
    }
    padded = batches[Batching.PADDED]
    assert int((padded["labels"] != IGNORED_LABEL).sum()) == sum(n + 1 for _, _, n in drawn)
    for i, row in enumerate(rows):
        assert tuple(padded["input_ids"][i, : len(row.tokens) - 1].tolist()) == row.tokens[:-1]
    tasks = dict.fromkeys(row.task for row in rows)
    by_task = [
        row
        for task in tasks
        for row in sorted(rows, key=lambda row: len(row.tokens))
        if row.task == task
    ]
    for batching in (Batching.PACKED, Batching.SHARED_PREFIX):
        batch = batches[batching]
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        found = []
        for group in batch["packing"]:
            begin = group.first + group.num_shared
            shared = ids[group.first : begin].tolist()
            assert (labels[group.first : begin] == IGNORED_LABEL).all()
            assert (group.num_shared == 0) or batching is Batching.SHARED_PREFIX
            for bucket in group.buckets:
                rows_of_slot = bucket.slots // bucket.row_length
                for row_number in range(bucket.num_rows):
                    own = begin + bucket.first + (rows_of_slot == row_number).nonzero().squeeze(1)
                    assert batch["position_ids"][0, own].tolist() == list(
                        range(group.num_shared, group.num_shared + len(own))
                    )
                    targets = labels[own][labels[own] != IGNORED_LABEL].tolist()
                    found.append((tuple(shared + ids[own].tolist()), targets))
        assert found == [(row.tokens[:-1], list(row.tokens[row.num_context :])) for row in by_task]


def test_the_instruction_is_shared_and_answers_alone_have_labels(folder: Path) -> None:
    data = _data(folder)
    batch = next(iter(data.train_dataloader()))
    (group,) = batch["packing"]
    shared = _decoded(batch["input_ids"][0, : group.num_shared].tolist())
    assert shared.startswith("Instruction: What is the sentiment of this news? Please choose")
    assert "Input: fpb" in shared
    assert all(answer.strip() in COUNTS for answer in _supervised(batch))
    plain = next(iter(_data(folder, batching="padded").train_dataloader()))
    assert sorted(_supervised(plain)) == sorted(_supervised(batch))


def test_balanced_labels_are_drawn_equally_often_and_rare_ones_repeat(folder: Path) -> None:
    plain = Counter(_answers(_data(folder, batch_size=1)))
    assert plain[" neutral"] > plain[" negative"]
    balanced = Counter(_answers(_data(folder, batch_size=1, balance_labels=True)))
    assert max(balanced.values()) - min(balanced.values()) <= 1
    assert balanced[" neutral"] == plain[" neutral"]


def test_a_mixture_has_the_shares_that_were_asked_for(folder: Path) -> None:
    data = _data(folder, tasks={"fpb": 1.0, "tfns": 3.0}, batch_size=1)
    tasks = [int(data._rows["train"][i].task) for i in data.train_dataloader().sampler]
    assert Counter(tasks)[1] == pytest.approx(3 * Counter(tasks)[0], abs=1)
    both = _data(folder, tasks="fpb, alpaca", batch_size=24)
    batch = next(iter(both.train_dataloader()))
    assert len(batch["packing"]) == 2
    assert "3" in _supervised(batch)


def test_held_out_rows_are_not_trained_on_and_the_split_is_the_same_each_time(
    folder: Path,
) -> None:
    data = _data(folder)
    train, val = data._rows["train"], data._rows["val"]
    assert len(val) == 4
    assert len(train) == 17
    assert not {row.tokens for row in train} & {row.tokens for row in val}
    assert _data(folder)._rows == data._rows
    assert _data(folder, seed=2)._rows["val"] != val
    assert sum(len(_supervised(batch)) for batch in data.val_dataloader()) == 4
    assert set(data.split_sha256) == {"fpb/train"}


def test_two_ranks_read_what_one_reads_and_go_on_where_they_stopped(folder: Path) -> None:
    data = _data(folder, balance_labels=True)

    def rows(rank: int, num_ranks: int, batch_size: int, skip: int = 0) -> list[Any]:
        twin = _data(folder, balance_labels=True, batch_size=batch_size, batching="padded")
        twin._ranks = lambda: {"num_replicas": num_ranks, "rank": rank}  # type: ignore[method-assign]
        loader = twin.train_dataloader()
        if skip:
            first = twin.train_dataloader()
            taken = list(itertools.islice(first, skip))
            assert len(taken) == skip
            loader.load_state_dict(first.state_dict())  # type: ignore[attr-defined]
        return [_supervised(batch) for batch in loader]

    one = rows(0, 1, 4)
    pairs = zip(rows(0, 2, 2), rows(1, 2, 2), strict=True)
    assert [sorted(first + second) for first, second in pairs] == [sorted(batch) for batch in one]
    assert rows(0, 1, 4, skip=2) == one[2:]
    assert len(data.train_dataloader()) == len(one)


def test_what_is_asked_of_one_row_is_held_out_together(folder: Path) -> None:
    (folder / "headline").mkdir()
    questions = ("price_up", "price_constant", "price_down", "asset_comparison", "past_info")
    answers = dict.fromkeys((*questions, "future_info"), 1)
    rows = [{"text": f"gold {number}", **answers} for number in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "headline" / "train.jsonl").write_text(text)
    data = _data(folder, tasks="headline")
    texts: dict[str, set[str]] = {}
    for part in ("train", "val"):
        decoded = [_decoded(row.tokens) for row in data._of(part)]
        texts[part] = {re.search(r"gold \d+", text)[0] for text in decoded}  # type: ignore[index]
    assert len(texts["val"]) == 4
    assert len(texts["train"]) == 16
    assert not texts["val"] & texts["train"]


def _example(text: str, prompt: str, answer: str = " positive") -> Example:
    begin = prompt.index("{}")
    spans = ((begin, begin + len(text)),)
    return Example("Say.\n", (prompt.format(text),), (answer,), 0, 7, text, spans)


@given(st.text("ab ", max_size=40), st.integers(2, 60))
def test_a_row_that_is_too_long_loses_tokens_of_its_text_alone(text: str, length: int) -> None:
    text = text.strip()
    example = _example(text, "Input: {}\nAnswer:")
    whole = encode_rows(TOKENIZER, [example], 999).kept[0]
    assert _decoded(whole.tokens) == f"Say.\nInput: {text}\nAnswer: positive<|endoftext|>"
    (row,), num_cut = encode_rows(TOKENIZER, [example], length)
    if row is None:
        assert num_cut == 0
        bare = encode_rows(TOKENIZER, [_example("", "Input: {}\nAnswer:")], 999).kept[0]
        assert len(bare.tokens) > length - 4
        return
    assert len(row.tokens) - 1 <= length
    joined = _decoded(row.tokens)
    assert joined.startswith("Say.\nInput:")
    assert joined.endswith(f"\nAnswer: positive{TOKENIZER.eos_token}")
    assert num_cut == (len(whole.tokens) - 1 > length)
    assert num_cut or row == whole


def test_rows_cut_and_left_out_are_counted_and_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Add", "input": "1 2 " * 99, "output": "3"},
        {"instruction": "Add 1 2 " * 99, "input": "", "output": "3"},
    ]
    file = folder / "alpaca" / "train.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows * 4))
    data = _data(folder, tasks="alpaca", max_length=400)
    assert capsys.readouterr().out.splitlines() == [
        "alpaca: 4 of 12 rows were cut to 400 tokens",
        "alpaca: 4 of 12 rows do not fit 400 tokens and were left out",
    ]
    kept = [_decoded(row.tokens) for part in ("train", "val") for row in data._of(part)]
    assert len(kept) == 8
    assert all("### Instruction:\nAdd\n\n### Input:\n1 2" in text for text in kept)
    _data(folder, tasks="alpaca", max_length=400, too_long="drop")
    assert "alpaca: 8 of 12 rows do not fit 400" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"alpaca: row 2: .* tokens, which are more than 400; "):
        _data(folder, tasks="alpaca", max_length=400, too_long="error")
    assert capsys.readouterr().out == ""


_OWN = [
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"context": "Up?\nAnswer: ", "target": "yes"},
    {"instruction": "Add", "output": "none"},
    {"prompt": "Down?", "completion": "no"},
]
_CHATS = [
    {"messages": [
        {"role": "user", "content": "Up?"}, {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Profit."},
    ]},
    {"conversations": [{"from": "human", "value": "Up?"}, {"from": "gpt", "value": "No."}]},
]  # fmt: skip


def _write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _own(folder: Path, **settings: Any) -> FinancialInstructions:
    return _data(folder, tasks=None, data_dir=None, **settings)


def test_own_files_are_read_by_path_whatever_their_layout(folder: Path) -> None:
    (folder / "own").mkdir()
    _write_rows(folder / "own" / "a.jsonl", _OWN)
    (folder / "own" / "b.csv").write_text("question;answer\nUp?;yes\nDown?;no\n")
    (folder / "own" / "c.json").write_text(json.dumps(_OWN))
    (folder / "own" / "notes.md").write_text("not read")
    data = _own(folder, train_files=str(folder / "own"), separator=None)
    kept = [_decoded(row.tokens[row.num_context :]) for row in data._of("train") + data._of("val")]
    answers = [text.removesuffix("<|endoftext|>") for text in kept]
    assert Counter(answers) == Counter(["3", " yes", "none", " no"] * 2 + ["yes", "no"])
    assert data.task_names == []
    assert list(data.split_sha256) == ["train_files/train"]
    first = _own(folder, train_files=[f"{folder}/own/*.jsonl"], val_share=0.5)
    assert len(first._of("train")) == len(first._of("val")) == 2


def test_own_files_are_read_in_place_of_tasks_which_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = _write_rows(folder / "own.jsonl", _OWN)
    data = _data(folder, tasks=["fpb", "tfns"], train_files=train)
    assert capsys.readouterr().out == "train_files are read in place of the tasks fpb, tfns\n"
    assert len(data._of("train")) + len(data._of("val")) == 4


def test_validation_files_take_the_place_of_a_held_out_share(folder: Path) -> None:
    train = _write_rows(folder / "train.jsonl", _OWN * 3)
    validation = _write_rows(folder / "validation.jsonl", _OWN[:1])
    data = _own(folder, train_files=train, validation_files=validation)
    assert len(data._of("train")) == 12
    assert len(data._of("val")) == 1
    assert set(data.split_sha256) == {"train_files/train", "train_files/validation"}


def test_conversations_are_trained_on_with_a_chat_template(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = _write_rows(folder / "chats.jsonl", _CHATS * 4)
    with pytest.raises(ValueError, match="train_files: row 1: conversations need a chat template"):
        _own(folder, train_files=train)
    (folder / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    settings = {"train_files": train, "chat_template": str(folder / "chat.jinja")}
    data = _own(folder, **settings, batch_size=8, val_share=0.1)
    assert capsys.readouterr().out.startswith(f"chat template: {folder}/chat.jinja\n")
    rows = data._of("train") + data._of("val")
    assert {tuple(_supervised(_batch_of(row))) for row in rows} == {
        ("Yes.", "Profit."),
        ("No.",),
    }
    for batching in ("packed", "padded"):
        other = _own(folder, **settings, batch_size=4, batching=batching)
        batches = [answer for batch in other.train_dataloader() for answer in _supervised(batch)]
        assert set(batches) <= {"Yes.", "Profit.", "No."}
    data.tokenizer.save_pretrained(folder / "adapter")
    again = _own(folder, train_files=train, tokenizer=str(folder / "adapter"))
    assert again._of("train")[0] in rows
    with pytest.raises(ValueError, match="conversations need a chat template"):
        _own(folder, **(settings | {"chat_template": "none"}))


def _batch_of(row: InstructionRow) -> dict[str, Tensor]:
    return InstructionRows([row], 0)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_files": "nowhere.jsonl"}, r"train_files: nowhere\.jsonl does not exist"),
        ({"train_files": []}, "train_files: no path is given"),
        ({"train_files": "{}/empty"}, "train_files: .*empty has no file that ends in"),
        ({"train_files": "{}/a.md"}, r"train_files: .*a\.md ends in none of \.jsonl, "),
        ({"train_files": "{}/a.csv"}, r"a\.csv:2: the fields text, label are of none of the lay"),
        ({"train_files": "{}/a.jsonl", "separator": ";"}, r"separator ';' has an effect on \.csv"),
        ({"validation_files": "{}/a.jsonl"}, "validation_files has an effect with train_files al"),
        ({"train_files": "{}/a.jsonl", "validation_files": "b"}, "validation_files: b does not ex"),
        ({"train_files": "{}/a.jsonl", "chat_template": "b"}, "chat_template 'b' is neither auto"),
        ({"tasks": "train_files"}, "task 'train_files' is neither shipped"),
    ],
)
def test_wrong_own_files_are_named(folder: Path, settings: Any, message: str) -> None:
    _write_rows(folder / "a.jsonl", _OWN * 3)
    (folder / "a.md").write_text("x")
    (folder / "a.csv").write_text("text,label\nUp,1\n")
    (folder / "empty").mkdir()
    filled = {
        name: value.format(folder) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _data(folder, **({"tasks": None, "data_dir": None} | filled))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "fbp"}, "did you mean"),
        ({"tasks": {"fpb": 0.0}}, r"weight 0\.0 of fpb"),
        ({"tasks": "fpb,fpb"}, "fpb is there 2 times"),
        ({"val_share": 1.0}, r"val_share 1\.0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"max_length": 5}, r"fpb: none of its 21 rows fits max_length 5"),
        ({"val_share": 0.001}, r"val_share 0\.001 of the 21"),
        ({"data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_setting_is_named(folder: Path, settings: Any, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _data(folder, **settings)


def test_too_few_rows_for_a_batch_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="17 rows, but one batch takes 50"):
        _data(folder, batch_size=50).train_dataloader()


def test_without_settings_the_news_is_synthetic_and_its_tokenizer_trained() -> None:
    data = FinancialInstructions(num_synthetic_items=20, batch_size=3)
    data.prepare_data()
    data.setup()
    batch: dict[str, Tensor] = next(iter(data.train_dataloader()))
    kept = batch["labels"][batch["labels"] != IGNORED_LABEL]
    assert set(str(data.tokenizer.decode(kept)).split("<|endoftext|>")) <= {
        " negative", " neutral", " positive", ""
    }  # fmt: skip
    assert batch["input_ids"].dtype == torch.int64
    assert data.vocabulary_size <= 1024


def test_real_tasks_are_read(shared_data: Path, folder: Path) -> None:
    names = ["fiqa_sa", "openbookqa"]
    data = _data(shared_data, tasks=names, tokenizer=str(shared_data / "tokenizers" / "gpt2"))
    batch = next(iter(data.train_dataloader()))
    assert sum(b.num_rows for group in batch["packing"] for b in group.buckets) == 4
    assert len(data._rows["train"]) + len(data._rows["val"]) == 821 + 296


@pytest.mark.parametrize("doing", ["fitting", "validating", "testing", "predicting"])
def test_a_tokenizer_trained_on_the_rows_is_one_whatever_is_done(doing: str) -> None:
    """Checkpoints of a run are refused by a tokenizer that they were not trained with."""
    state = SimpleNamespace(fn=TrainerFn[doing.upper()])
    done, alone = (FinancialInstructions(num_synthetic_items=24, vocab_size=300) for _ in range(2))
    done.trainer = SimpleNamespace(state=state, lightning_module=None)  # type: ignore[assignment]
    for data in (done, alone):
        data.setup()
    assert done.tokenizer_reference() == alone.tokenizer_reference()
