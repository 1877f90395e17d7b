"""Training on the predictions of a frozen teacher."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fingpt_lightning.data import FinancialInstructions, TextBlocks
from fingpt_lightning.decomposition.runner import Request, decompose_model
from fingpt_lightning.decomposition.source import open_source
from fingpt_lightning.deploy.exporting import export
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.modules import LowRankPretraining, QuantizedFinetuning
from fingpt_lightning.modules.base_model import RandomLlama
from fingpt_lightning.modules.teacher import WITHOUT_TEACHER, Teacher
from fingpt_lightning.strategies import PipelineStrategy
from tests.evaluation.tiny_language import VOCABULARY, tiny_network, tiny_tokenizer
from tests.models.tiny_models import tiny_gpt2, tiny_llama
from tests.support.token_data import TokenData


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "dense"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(dense: Path) -> Path:
    """The teacher, decomposed."""
    decompose_model(open_source(dense), Request(rank_ratio=0.2), dense.with_name("small"))
    return dense.with_name("small")


def _trainer(root: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 4, "max_epochs": -1, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0,
        "enable_model_summary": False, "default_root_dir": root, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**(settings | changes))


def _pretraining(small: Path, dense: Path, **changes: Any) -> LowRankPretraining:
    settings: dict[str, Any] = {
        "init_from": str(small), "teacher": str(dense), "teacher_dtype": "float32",
        "learning_rate": 0.003, "weight_decay": 0.0, "warmup": 1,
    }  # fmt: skip
    return LowRankPretraining(**(settings | changes))


def _divergence(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """KL(teacher || student) in nats per token on the data of `TokenData`."""
    ids = torch.stack([row for row, _ in TokenData(1).rows])
    with torch.no_grad():
        log_q, log_p = (
            F.log_softmax(network.eval()(input_ids=ids).logits, -1).flatten(0, 1)
            for network in (student, teacher)
        )
    return float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))


def _ids(batch_size: int = 2) -> dict[str, Tensor]:
    rows = TokenData(1).rows[:batch_size]
    return {
        "input_ids": torch.stack([ids for ids, _ in rows]),
        "labels": torch.stack([labels for _, labels in rows]),
    }


def test_healing_brings_a_decomposed_network_nearer_to_its_teacher(
    dense: Path, small: Path, tmp_path: Path
) -> None:
    before = _divergence(load_model(small).network, load_model(dense).network)
    module = _pretraining(small, dense)
    _trainer(tmp_path, max_steps=40).fit(module, datamodule=TokenData(4))
    after = _divergence(module.network, load_model(dense).network)
    assert 0 < after < 0.5 * before


@pytest.mark.parametrize(
    ("dtype", "quantize", "tolerance"),
    [("float64", None, 1e-12), ("float32", None, 1e-5), ("bfloat16", None, 0.05),
     ("float32", "int8", 0.1), ("float32", "nf4", 0.3)],
)  # fmt: skip
def test_the_loss_is_that_of_the_formula_in_every_dtype_of_the_teacher(
    dense: Path, small: Path, dtype: str, quantize: str | None, tolerance: float
) -> None:
    module = _pretraining(
        small, dense, teacher_dtype=dtype, teacher_quantize=quantize, teacher_weight=0.8,
        teacher_temperature=1.5,
    )  # fmt: skip
    module.configure_model()
    module.network.double()
    assert module.teacher is not None
    module.teacher.load(module, module.network)
    batch: Any = _ids()
    sums = module.training_sums(batch, module.hidden_states(batch))
    teacher = load_model(dense, dtype="float64").network
    kept = batch["labels"] != -100
    with torch.no_grad():
        logits, targets = (
            network(input_ids=batch["input_ids"]).logits[kept]
            for network in (module.network, teacher)
        )
    log_p, log_q = (F.log_softmax(x / 1.5, -1) for x in (targets, logits))
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    truth = 0.8 * 1.5**2 * divergence
    truth += 0.2 * F.cross_entropy(logits, batch["labels"][kept], reduction="sum")
    torch.testing.assert_close(sums.loss_sum.detach(), truth, rtol=tolerance, atol=0)
    assert sums.num_tokens == kept.sum()


def test_the_teacher_is_no_part_of_the_module(dense: Path, small: Path, tmp_path: Path) -> None:
    module = _pretraining(small, dense)
    plain = LowRankPretraining(init_from=str(small))
    plain.configure_model()
    trainer = _trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=TokenData(2))
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert len(list(module.parameters())) == len(list(plain.parameters()))
    assert copy.deepcopy(module).teacher is module.teacher
    was = dict(load_model(dense).network.named_parameters())
    assert module.teacher is not None
    for name, weight in module.teacher.network.named_parameters():
        assert torch.equal(weight, was[name])
        assert not weight.requires_grad


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_is_exact_and_wants_the_same_teacher(
    dense: Path, small: Path, tmp_path: Path
) -> None:
    def fit(module: LowRankPretraining, name: str, **resumed: Any) -> None:
        half = ModelCheckpoint(tmp_path / name, "half", every_n_train_steps=4)  # of 8 rows
        trainer = _trainer(tmp_path, callbacks=[half], enable_checkpointing=True, max_steps=6)
        trainer.fit(module, datamodule=TokenData(2), **resumed)

    whole, again = _pretraining(small, dense), _pretraining(small, dense)
    fit(whole, "kept")
    checkpoint: dict[str, Any] = {
        "ckpt_path": tmp_path / "kept" / "half.ckpt",
        "weights_only": True,
    }
    fit(again, "again", **checkpoint)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match=r"model\.teacher .*small has the weights .* trained with"):
        fit(_pretraining(small, small), "other", **checkpoint)
    # What reads a checkpoint as a network needs no teacher.
    kept = LowRankPretraining.load_from_checkpoint(checkpoint["ckpt_path"], weights_only=True)
    assert kept.teacher is not None
    assert not kept.teacher.revision


def test_adapters_learn_from_a_teacher_whatever_the_batching(tmp_path: Path) -> None:
    def data(batching: Any) -> FinancialInstructions:
        return FinancialInstructions(
            num_synthetic_items=30, batch_size=4, vocab_size=400, max_length=400, batching=batching
        )

    first = data("padded")
    first.prepare_data()
    first.setup()
    config = tiny_llama().config
    config.vocab_size, config.max_position_embeddings = first.vocabulary_size, 400
    teacher = type(tiny_llama())(config)
    teacher.save_pretrained(tmp_path / "teacher")
    found = []
    for batching, only in (("padded", False), ("padded", True), ("packed", True),
                           ("shared_prefix", True)):  # fmt: skip
        torch.manual_seed(5)
        module = QuantizedFinetuning(
            random_base=RandomLlama(num_positions=400), rank=3, dtype="float64", quantize=None,
            teacher=str(tmp_path / "teacher"), teacher_dtype="float64", teacher_weight=0.6,
            supervised_logits_only=only,
        )  # fmt: skip
        trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
        rows = data(batching)
        rows.prepare_data()
        rows.setup()
        trainer.datamodule = rows  # type: ignore[attr-defined]
        trainer.state.fn = TrainerFn.FITTING
        module.trainer = trainer
        module.configure_model()
        batch = next(iter(rows.train_dataloader()))
        loss = module.training_step(batch, 0)
        loss.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        assert any(g.abs().max() > 0 for g in gradients)
        found.append((loss.detach(), gradients))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-5, atol=1e-7)


def test_a_pipeline_is_refused_by_name(dense: Path, small: Path, tmp_path: Path) -> None:
    module, trainer = _pretraining(small, dense), _trainer(tmp_path)
    trainer._accelerator_connector.strategy = PipelineStrategy()
    trainer.state.fn = TrainerFn.FITTING
    module.trainer = trainer
    with pytest.raises(ValueError, match=r"model\.teacher .*dense is a second network, which"):
        module.load_teacher()


def test_a_teacher_that_does_not_fit_is_refused(dense: Path, small: Path, tmp_path: Path) -> None:
    config = tiny_llama().config
    config.vocab_size += 1
    type(tiny_llama())(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match=r"wider knows 24 tokens, the network .* from it 23"):
        _trainer(tmp_path).fit(_pretraining(small, tmp_path / "wider"), datamodule=TokenData(2))
    tiny_gpt2().save_pretrained(tmp_path / "short")
    data = TokenData(2, num_rows=4, block_length=13)
    with pytest.raises(ValueError, match=r"short reads 11 tokens, fewer than the 13 per row"):
        _trainer(tmp_path).fit(_pretraining(small, tmp_path / "short"), datamodule=data)


def _words(folder: Path, tokenizer: PreTrainedTokenizerFast) -> TextBlocks:
    tokenizer.save_pretrained(folder / "tokenizer")
    text = folder / "text.txt"
    text.write_text("Foo Corp kept its dividend as profit rose. " * 20)
    return TextBlocks(
        str(text), str(text), tokenizer=str(folder / "tokenizer"), block_length=16, batch_size=2,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip


@pytest.mark.parametrize("num_rows", [VOCABULARY, VOCABULARY + 9])
def test_a_gguf_file_teaches_the_model_that_it_was_made_of(num_rows: int, tmp_path: Path) -> None:
    """Its tokenizer has more tokens: one for each row without a token, and one without a row."""
    network, tokenizer = tiny_network("llama"), tiny_tokenizer()
    network.resize_token_embeddings(num_rows, mean_resizing=False)
    network.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    export(load_model(tmp_path / "hf"), "gguf", tmp_path / "gguf")
    trainer = _trainer(tmp_path, max_steps=1)
    module = _pretraining(tmp_path / "hf", tmp_path / "gguf")
    trainer.fit(module, datamodule=_words(tmp_path, tokenizer))
    assert trainer.callback_metrics["train/loss"] < 1e-5, "they are the same"


@pytest.mark.parametrize(
    ("num_rows", "message"),
    [
        (VOCABULARY + 9, "does not have the token '<pad>', id 320, of the data's"),
        (VOCABULARY, None),
    ],
)
def test_a_token_of_the_data_alone_is_refused_where_it_has_a_row(
    num_rows: int, message: str | None, tmp_path: Path
) -> None:
    network = tiny_network("llama")
    network.resize_token_embeddings(num_rows, mean_resizing=False)
    for name in ("student", "teacher"):
        network.save_pretrained(tmp_path / name)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "teacher")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    module = _pretraining(tmp_path / "student", tmp_path / "teacher")
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        _trainer(tmp_path, max_steps=1).fit(module, datamodule=_words(tmp_path, tokenizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_weight": 1.5}, r"teacher_weight 1\.5 is outside \(0, 1\]"),
        ({"teacher_weight": 0.5}, r"teacher_weight 0\.5 has no effect without teacher"),
        ({"teacher_quantize": "nf4"}, "teacher_quantize nf4 has no effect without teacher"),
        ({"teacher": "x", "teacher_weight": 0.0}, r"teacher_weight 0\.0 is outside \(0, 1\]"),
        ({"teacher": "x", "teacher_temperature": 0.0}, r"teacher_temperature 0\.0 is not above 0"),
    ],
)
def test_a_setting_outside_its_range_is_refused(settings: dict[str, Any], message: str) -> None:
    for made in (
        lambda: LowRankPretraining(**settings),
        lambda: QuantizedFinetuning("base", **settings),
    ):
        with pytest.raises(ValueError, match=message):
            made()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_dtype": "bfloat"}, "teacher_dtype 'bfloat' .* did you mean"),
        ({"teacher_quantize": "int4"}, "teacher_quantize 'int4' is none of null, nf4, int8"),
    ],
)
def test_an_unknown_name_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher.checked({"teacher": "x", **WITHOUT_TEACHER, **settings})
