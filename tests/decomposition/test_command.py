import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fingpt_lightning
from fingpt_lightning.cli.main import main
from fingpt_lightning.data import TextBlocks
from fingpt_lightning.decomposition import layer_files, options, refinement, runner, sequential
from fingpt_lightning.files import owned, put_in_place
from fingpt_lightning.low_rank import LowRankEmbedding, LowRankLinear
from fingpt_lightning.low_rank.decomposition import ShiftedMoments
from fingpt_lightning.low_rank.rank import resolve_rank
from fingpt_lightning.models.families import head_of
from fingpt_lightning.models.loading import load_model
from fingpt_lightning.models.output_gradients import gradient_moments
from fingpt_lightning.modules import LowRankPretraining
from tests.deploy.tiny_clients import save_clients, save_low_rank_model
from tests.evaluation.tiny_language import tiny_network, tiny_tokenizer
from tests.support.short_run import run_shortly

Decompose = Callable[..., tuple[int, str, str]]
LINES = ["Shares of Foo fell", "Profit rose", "The dividend of Foo Corp was kept as it was"]


def _save(kind: str, folder: Path) -> Path:
    tiny_network(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return _save(request.param, tmp_path / request.param)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES * 9))
    return file


@pytest.fixture
def decompose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Decompose:
    """Runs ``fingpt decompose`` into ``out``; gives status, output and error."""

    def call(model: Path | str, *words: str | Path) -> tuple[int, str, str]:
        status = 0
        capsys.readouterr()
        given = ["--model", str(model), "--device", "cpu"]
        if "--output" not in words:
            given += ["--output", str(tmp_path / "out")]
        try:
            main(["decompose", *given, *map(str, words)])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@torch.no_grad()
def _linear(network: nn.Module) -> dict[str, Tensor]:
    """The map of each linear layer of the blocks, multiplied out."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, LowRankLinear):
            found[name] = (module.up @ module.down).detach()
        elif "lm_head" not in name and type(module).__name__ in ("Linear", "Conv1D"):
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight = weight.detach()
            found[name] = weight.T if type(module).__name__ == "Conv1D" else weight
    return found


def test_each_layer_is_the_nearest_of_its_rank_and_all_else_as_it_was(
    decompose: Decompose, model: Path, tmp_path: Path
) -> None:
    status, output, error = decompose(model, "--rank_ratio", "0.4")
    assert status == 0, error
    source, made = load_model(model), load_model(tmp_path / "out")
    assert made.description.endswith(f"(low-rank {source.network.config.model_type})")
    record = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    rows = {row["name"]: row for row in record["layers"]}
    dense, pairs = _linear(source.network), _linear(made.network)
    assert rows.keys() == dense.keys() == pairs.keys()
    num_pairs = 0
    for name, weight in dense.items():
        out_features, in_features = weight.shape
        rank = resolve_rank(0.4, in_features, out_features)
        assert rows[name]["rank"] == rank
        truth = weight.double()
        if rank is not None:
            u, s, vh = torch.linalg.svd(truth, full_matrices=False)
            truth = (u[:, :rank] * s[:rank]) @ vh[:rank]
            num_pairs += 1
        torch.testing.assert_close(pairs[name].double(), truth, rtol=0, atol=1e-5)
        error_ = float((weight - pairs[name]).norm() / weight.norm())
        assert rows[name]["weight_error"] == pytest.approx(error_, abs=1e-5)
    assert num_pairs > 4
    own = dict(made.network.named_parameters())
    for name, parameter in source.network.named_parameters():
        if name.removesuffix(".weight") not in dense:
            assert torch.equal(own[name], parameter), name
    assert record["parameters"] == sum(p.numel() for p in own.values())
    assert made.tokenizer is not None
    ratio = record["total_compression_ratio"]
    assert f"{ratio:.2f}x smaller in total" in output
    assert not list(tmp_path.glob("out.*"))


def test_calibration_loses_less_of_the_outputs(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path
) -> None:
    errors = {}
    for name, words in (("plain", ()), ("whitened", ("--calibration", text))):
        folder = tmp_path / name
        status, output, error = decompose(model, "--rank_ratio", "0.3", "--output", folder, *words)
        assert status == 0, error
        network, dense = load_model(folder).network, load_model(model).network
        tokens = torch.tensor([tiny_tokenizer().encode(" ".join(LINES))])
        with torch.no_grad():
            gap = network(input_ids=tokens).logits - dense(input_ids=tokens).logits
        errors[name] = float(gap.norm())
        rows = json.loads((folder / "decomposition.json").read_text())["layers"]
        assert all((row["output_error"] is None) == (name == "plain") for row in rows)
    assert "outputs on the calibration text" in output
    assert errors["whitened"] < 0.8 * errors["plain"]


def test_damping_trades_outputs_for_weights(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path
) -> None:
    rows = {}
    for damping in ("0", "1"):
        folder = tmp_path / damping
        words = ("--compression", "1.3", "--allocation", "spectrum", "--calibration", text)
        assert decompose(model, *words, "--damping", damping, "--output", folder)[0] == 0
        record = json.loads((folder / "decomposition.json").read_text())
        assert record["settings"]["damping"] == float(damping)
        rows[damping] = [row for row in record["layers"] if row["rank"] is not None]
    ranks = [[row["rank"] for row in found] for found in rows.values()]
    assert ranks[0] != ranks[1]  # spectra are damped too
    weight, output = (
        [sum(row[error] for row in found) / len(found) for found in rows.values()]
        for error in ("weight_error", "output_error")
    )
    assert weight[1] < weight[0]
    assert output[1] > output[0]


@torch.no_grad()
def _logit_gap(folder: Path, model: Path) -> float:
    tokens = torch.tensor([tiny_tokenizer().encode(" ".join(LINES))])
    made, dense = (load_model(x).network(input_ids=tokens).logits for x in (folder, model))
    return float((made - dense).norm())


@pytest.mark.parametrize("damping", ["0.001", "0.1"])
def test_in_sequence_layers_make_up_for_those_before_them(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path, damping: str
) -> None:
    gaps = []
    words = ("--compression", "1.4", "--calibration", text, "--damping", damping)
    for name, extra in (("at_once", ()), ("in_sequence", ("--sequential",))):
        status, _, error = decompose(model, *words, *extra, "--output", tmp_path / name)
        assert status == 0, error
        gaps.append(_logit_gap(tmp_path / name, model))
    assert gaps[1] < gaps[0]
    at_once, in_sequence = (
        json.loads((tmp_path / name / "decomposition.json").read_text())
        for name in ("at_once", "in_sequence")
    )
    assert in_sequence["settings"]["sequential"] is True
    assert "sequential" not in at_once["settings"]
    ranks = [[row["rank"] for row in record["layers"]] for record in (at_once, in_sequence)]
    assert ranks[0] == ranks[1]


def test_a_sequence_that_was_killed_goes_on(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--rank_ratio", "0.4", "--calibration", text, "--sequential")
    status, _, error = decompose(model, *words, "--output", tmp_path / "whole")
    assert status == 0, error
    record = json.loads((tmp_path / "whole" / "decomposition.json").read_text())
    assert record["settings"]["damping"] == 0.01
    real = layer_files.decompose_reached
    done: list[str] = []

    def killed(work: object, layer: layer_files.LayerWeight, moments: object) -> object:
        if len(done) == 3:
            raise RuntimeError("killed")
        done.append(layer.name)
        return real(work, layer, moments)  # type: ignore[arg-type]

    monkeypatch.setattr(sequential, "decompose_reached", killed)
    status, _, error = decompose(model, *words)
    assert (status, "killed" in error) == (1, True)
    monkeypatch.setattr(sequential, "decompose_reached", real)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.partial/layers").iterdir()}
    assert len(kept) >= 3
    status, _, error = decompose(model, *words)
    assert status == 0, error
    first, second = (_linear(load_model(tmp_path / n).network) for n in ("whole", "out"))
    torch.testing.assert_close(first, second)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that has learned the lines: to a random one all directions matter alike."""
    folder = tmp_path_factory.mktemp("trained")
    network, tokenizer = tiny_network("llama"), tiny_tokenizer()
    tokens = torch.tensor([tokenizer.encode(" ".join(LINES))])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        network(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _divergence(folder: Path, model: Path) -> float:
    """Mean KL(model || what was made of it) on the lines."""
    tokens = torch.tensor([tiny_tokenizer().encode(" ".join(LINES))])
    made, dense = (load_model(x).network(input_ids=tokens).logits for x in (folder, model))
    before, after = dense.log_softmax(-1), made.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


LOSS = ("--allocation", "loss")
BOTH = ("--whitening", "both")


def test_by_the_loss_the_prediction_changes_less(
    decompose: Decompose, trained: Path, text: Path, tmp_path: Path
) -> None:
    words = ("--compression", "1.15", "--calibration", text, "--damping", "0.001")
    found, ranks, settings = {}, {}, {}
    for name, extra in {"plain": (), "loss": LOSS, "both": BOTH, "all": (*LOSS, *BOTH)}.items():
        status, _, error = decompose(trained, *words, *extra, "--output", tmp_path / name)
        assert status == 0, error
        found[name] = _divergence(tmp_path / name, trained)
        record = json.loads((tmp_path / name / "decomposition.json").read_text())
        assert record["total_compression_ratio"] == pytest.approx(1.15, rel=0.02)
        ranks[name] = {row["name"]: row["rank"] for row in record["layers"]}
        settings[name] = record["settings"]
    assert found["loss"] < found["plain"], found
    assert found["both"] < found["plain"], found
    assert found["all"] < found["both"], found
    assert ranks["plain"] == ranks["both"] != ranks["loss"]
    assert len(set(ranks["loss"].values())) > len(set(ranks["plain"].values()))
    assert "whitening" not in settings["loss"]
    assert (settings["all"]["whitening"], settings["all"]["allocation"]) == ("both", "loss")
    again = ("--output", tmp_path / "again", "--seed", "2")
    assert decompose(trained, *words, *LOSS, *BOTH, *again)[0] == 0
    first, second = (_linear(load_model(tmp_path / n).network) for n in ("all", "again"))
    assert any(not torch.equal(first[name], second[name]) for name in first), "labels are drawn"


@pytest.mark.parametrize(
    "extra",
    [
        (*LOSS, "--sequential"),
        (*BOTH, "--sequential", "--refine", "2"),
        (*LOSS, *BOTH, "--method", "randomized", "--seed", "3"),
        (*LOSS, "--embedding_rank", "0.5"),
    ],
    ids=["loss in sequence", "both in sequence", "randomized", "embedding"],
)
def test_both_go_with_what_they_are_defined_for(
    decompose: Decompose, text: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    model = _save("gpt2", tmp_path / "gpt2")
    words = ("--compression", "1.3", "--calibration", text)
    status, _, error = decompose(model, *words, *extra)
    assert status == 0, error
    record = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    assert record["total_compression_ratio"] == pytest.approx(1.3, rel=0.02)
    assert _logit_gap(tmp_path / "out", model) < 1e3


def test_in_sequence_both_sides_are_the_nearest_by_the_loss(tmp_path: Path) -> None:
    """To what the target of a sequence is, in float64, with moments of both sides."""
    weight, gradient = (torch.randn(size, dtype=torch.float64) for size in ((7, 11), (9, 7)))
    before, now = torch.randn(2, 40, 11, dtype=torch.float64)
    moments = ShiftedMoments(*(x.T @ y / 40 for x, y in
                               ((before, before), (before, now), (now, now))))  # fmt: skip
    g = (gradient.T @ gradient).float().double()
    save_file({"w": weight}, tmp_path / "w.safetensors")
    layer_files.write_tensors(layer_files.gradients_file(tmp_path, "a"), {"gradients": g})
    reader = layer_files.SafetensorsReader({"w": tmp_path / "w.safetensors"})
    work = layer_files.Work(
        reader, tmp_path, {"a": 3}, dtype=torch.float64, damping=1e-9, both_sides=True
    )
    layer = layer_files.LayerWeight("a", "w", 11, 7, has_gradients=True)
    layer_files.decompose_reached(work, layer, moments)
    pair = layer_files.read_factors(tmp_path, "a")
    product = (pair.up @ pair.down).requires_grad_()

    def lost(product: Tensor) -> Tensor:
        error = before @ weight.T - now @ product.T
        mean: Tensor = ((error @ g) * error).sum() / 40
        return mean

    (slope,) = torch.autograd.grad(lost(product), product)
    # At the least of all products of this rank the slope has no part along the factors.
    scale = slope.norm() * pair.up.norm()
    assert (pair.up.T @ slope).norm() < 1e-6 * scale
    assert (slope @ pair.down.T).norm() < 1e-6 * scale
    nearest = float(lost(product.detach()))
    layer_files.decompose_reached(replace(work, both_sides=False), layer, moments)
    one_side = layer_files.read_factors(tmp_path, "a")
    assert nearest < 0.99 * float(lost(one_side.up @ one_side.down))


def test_gradients_that_were_killed_go_on(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--compression", "1.3", "--calibration", text, *LOSS, *BOTH)
    status, _, error = decompose(model, *words, "--output", tmp_path / "whole")
    assert status == 0, error
    real = gradient_moments
    starts: list[object] = []

    def killed(*arguments: Any, **settings: Any) -> Any:
        yield next(real(*arguments, **settings))
        raise RuntimeError("killed")

    def watched(network: Any, ids: Tensor, seed: int, *, start: Any) -> Any:
        starts.append(start.block)
        return real(network, ids, seed, start=start)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "gradient_moments", killed)
        status, _, error = decompose(model, *words)
        assert (status, "killed" in error) == (1, True)
    status, _, error = decompose(model, *words, "--seed", "2")
    assert (status, "of an unfinished run with seed 1, now 2" in error) == (1, True)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "gradient_moments", watched)
        patch.setattr(runner, "decompose_batch", killed)
        assert decompose(model, *words)[0] == 1
    status, _, error = decompose(model, *words)
    assert status == 0, error
    assert starts == [1], "one block was left, and then none"
    first, second = (_linear(load_model(tmp_path / n).network) for n in ("whole", "out"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("extra", [(), ("--sequential",)], ids=["at_once", "in_sequence"])
def test_refined_blocks_come_nearer_and_are_what_is_written(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    words = ("--compression", "1.4", "--calibration", text, *extra)
    gaps = []
    for name, refine in (("plain", "0"), ("refined", "60")):
        status, output, error = decompose(
            model, *words, "--refine", refine, "--output", tmp_path / name
        )
        assert status == 0, error
        gaps.append(_logit_gap(tmp_path / name, model))
    assert gaps[1] < gaps[0]
    assert "refined: median error of a block's outputs" in output
    plain, refined = (
        json.loads((tmp_path / name / "decomposition.json").read_text())
        for name in ("plain", "refined")
    )
    assert "refine" not in plain["settings"]
    assert refined["settings"]["refine"] == 60
    assert not plain["blocks"]
    assert len(refined["blocks"]) == 2
    assert all(0 < row["after"] < row["before"] for row in refined["blocks"])
    ranks = [[row["rank"] for row in record["layers"]] for record in (plain, refined)]
    assert ranks[0] == ranks[1]
    own, source = (dict(load_model(x).network.named_parameters()) for x in
                   (tmp_path / "refined", model))  # fmt: skip
    kept = [name for name in own.keys() & source.keys() if torch.equal(own[name], source[name])]
    assert kept == list(own.keys() & source.keys()), "factors alone change"


def test_a_refinement_that_was_killed_goes_on(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--rank_ratio", "0.4", "--calibration", text, "--sequential", "--refine", "5")
    status, _, error = decompose(model, *words, "--output", tmp_path / "whole")
    assert status == 0, error
    real = refinement.refine_block
    done: list[int] = []

    def killed(*arguments: Any, **settings: Any) -> tuple[float, float]:
        if done:
            raise RuntimeError("killed")
        done.append(1)
        return real(*arguments, **settings)

    monkeypatch.setattr(sequential, "refine_block", killed)
    status, _, error = decompose(model, *words)
    assert (status, "killed" in error) == (1, True)
    monkeypatch.setattr(sequential, "refine_block", real)
    (kept,) = (tmp_path / "out.partial/refined").iterdir()
    time_of = kept.stat().st_mtime_ns
    monkeypatch.setattr(runner, "clear_owned", lambda folder: None)
    status, _, error = decompose(model, *words)
    assert status == 0, error
    assert kept.stat().st_mtime_ns == time_of
    first, second = (_linear(load_model(tmp_path / n).network) for n in ("whole", "out"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
def test_a_compression_is_met_as_nearly_as_ranks_allow(
    decompose: Decompose, model: Path, tmp_path: Path, allocation: str
) -> None:
    words: tuple[str, ...] = ("--compression", "1.3", "--allocation", allocation)
    if model.name == "gpt2":  # whose embedding is tied
        words = (*words, "--embedding_rank", "0.5")
    status, _, error = decompose(model, *words)
    assert status == 0, error
    network = load_model(tmp_path / "out").network
    record = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    is_factorised = isinstance(network.get_input_embeddings(), LowRankEmbedding)
    assert is_factorised == (model.name == "gpt2")
    assert record["total_compression_ratio"] == pytest.approx(1.3, rel=0.02)
    ranks = {row["rank"] for row in record["layers"]}
    assert len(ranks) >= 2


def test_an_embedding_that_is_not_tied_stays_dense(decompose: Decompose, tmp_path: Path) -> None:
    llama = _save("llama", tmp_path / "llama")
    status, _, error = decompose(llama, "--rank_ratio", "0.4", "--embedding_rank", "4")
    assert status == 1
    assert "embedding_rank: the embedding is not tied to the head" in error


def test_a_factorised_embedding_is_the_nearest_to_the_logits(
    decompose: Decompose, text: Path, tmp_path: Path
) -> None:
    gpt2 = _save("gpt2", tmp_path / "gpt2")
    words = ("--energy", "1.0", "--embedding_rank", "8")
    for extra in ((), ("--calibration", text)):
        status, _, error = decompose(
            gpt2, *words, *extra, "--output", tmp_path / f"out{len(extra)}"
        )
        assert status == 0, error
    dense = load_model(gpt2).network
    table = dense.get_parameter("transformer.wte.weight").detach()
    u, s, vh = torch.linalg.svd(table.double(), full_matrices=False)
    embedding = load_model(tmp_path / "out0").network.get_input_embeddings()
    assert isinstance(embedding, LowRankEmbedding)
    truth = (u[:, :8] * s[:8]) @ vh[:8]
    product = (embedding.table @ embedding.up.T).detach().double()
    torch.testing.assert_close(product, truth, rtol=0, atol=1e-5)
    rows = json.loads((tmp_path / "out2" / "decomposition.json").read_text())["layers"]
    assert rows[-1]["name"] == "transformer.wte"
    assert rows[-1]["output_error"] < rows[-1]["weight_error"]


def test_energy_one_keeps_every_layer_dense_and_the_logits(
    decompose: Decompose, model: Path, tmp_path: Path
) -> None:
    status, _, error = decompose(model, "--energy", "1", "--dtype", "float64")
    assert status == 0, error
    tokens = torch.arange(12)[None]
    made, source = (load_model(x, dtype="float64").network for x in (tmp_path / "out", model))
    with torch.no_grad():
        assert torch.equal(made(input_ids=tokens).logits, source(input_ids=tokens).logits)


def test_the_random_method_comes_near(decompose: Decompose, model: Path, tmp_path: Path) -> None:
    errors = []
    for words in (("--method", "exact"), ("--method", "randomized", "--seed", "3")):
        status, _, error = decompose(model, "--rank_ratio", "0.2", *words, "--overwrite")
        assert status == 0, error
        rows = json.loads((tmp_path / "out" / "decomposition.json").read_text())["layers"]
        errors.append(sum(row["weight_error"] for row in rows))
    assert errors[0] <= errors[1] * (1 + 1e-6)
    assert errors[1] < 1.01 * errors[0]


def test_two_processes_write_what_one_does(decompose: Decompose, tmp_path: Path) -> None:
    gpt2 = _save("gpt2", tmp_path / "gpt2")
    for workers in ("1", "2"):
        folder = tmp_path / workers
        words = ("--rank_ratio", "0.4", "--workers", workers, "--output", folder)
        status, _, error = decompose(gpt2, *words)
        assert status == 0, error
    one, two = (_linear(load_model(tmp_path / n).network) for n in ("1", "2"))
    torch.testing.assert_close(one, two)


def test_a_run_that_was_killed_goes_on(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--compression", "1.3", "--calibration", text)
    status, _, error = decompose(model, *words, "--output", tmp_path / "whole")
    assert status == 0, error
    done: list[str] = []
    real = layer_files.decompose_batch

    def killed(work: object, batch: object) -> object:
        if len(done) >= 2:
            raise RuntimeError("killed")
        results = real(work, batch)  # type: ignore[arg-type]
        done.extend(result.name for result in results)
        return results

    monkeypatch.setattr(runner, "decompose_batch", killed)
    status, _, error = decompose(model, *words)
    assert (status, "killed" in error) == (1, True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(runner, "decompose_batch", real)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("spectra and moments were there already")

    for name in ("measure_batch", "build_model"):
        monkeypatch.setattr(runner, name, again)
    status, _, error = decompose(model, "--compression", "1.2", "--calibration", text)
    assert status == 1
    assert "out.partial is of an unfinished run with compression 1.3, now 1.2" in error
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.partial/layers").iterdir()}
    assert len(kept) >= 2
    status, _, error = decompose(model, *words)
    assert status == 0, error
    first, second = (_linear(load_model(tmp_path / n).network) for n in ("whole", "out"))
    torch.testing.assert_close(first, second)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_kill_after_the_rename_leaves_nothing_that_matters(
    decompose: Decompose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: tuple[str, ...],
) -> None:
    model, parts = _save("gpt2", tmp_path / "gpt2"), tmp_path / "out.partial"

    def killed(finished: Path, output: Path) -> None:
        put_in_place(finished, output)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "put_in_place", killed)
        assert decompose(model, "--rank_ratio", "0.5")[0] == 130
    assert (tmp_path / "out" / "config.json").is_file()
    assert parts.is_dir()
    status, _, error = decompose(model, "--rank_ratio", "0.25", *overwrite)
    assert status == (0 if overwrite else 1), error
    assert not parts.exists()
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "put_in_place", killed)
        assert decompose(model, "--rank_ratio", "0.5")[0] == 130
    shutil.rmtree(tmp_path / "out")  # the parts of other settings do not block it
    status, _, error = decompose(model, "--rank_ratio", "0.25")
    assert status == 0, error


def test_one_output_has_one_writer_and_an_empty_beginning_counts_as_none(
    decompose: Decompose, tmp_path: Path
) -> None:
    model, parts = _save("gpt2", tmp_path / "gpt2"), tmp_path / "out.partial"
    with owned(parts):
        (parts / "settings.json").write_text('{"rank_ratio": 0.1}')
        status, _, error = decompose(model, "--rank_ratio", "0.5", "--overwrite")
        assert status == 1
        assert f"{parts} is in use by process {os.getpid()} on " in error
    assert parts.is_dir()
    status, _, error = decompose(model, "--rank_ratio", "0.5")
    assert status == 0, error
    assert not parts.exists()


def test_large_models_are_written_in_shards(
    decompose: Decompose, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = runner._written_shards
    monkeypatch.setattr(runner, "_written_shards", lambda x, y: written(x, y, 20_000))
    status, _, error = decompose(model, "--rank_ratio", "0.4")
    assert status == 0, error
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert load_model(tmp_path / "out").network is not None


def test_the_tables_name_rank_and_error_of_each_layer(decompose: Decompose, model: Path) -> None:
    status, output, error = decompose(model, "--rank_ratio", "0.4")
    assert status == 0, error
    blocks = re.findall(r"^([01])((?: +(?:dense|\d+ \d+\.\d))+)$", output, re.MULTILINE)
    assert [block for block, _ in blocks] == ["0", "1"]
    kinds = re.findall(r"^(\w+) +2(?:, 2 dense)? +(\d+) x (\d+) ", output, re.MULTILINE)
    assert len(kinds) == (4 if model.name == "gpt2" else 7)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--rank_ratio", "0"), 2, r"--rank_ratio: 0 is outside \(0, 1\]"),
        (("--rank_ratio", "1.5"), 2, r"--rank_ratio: 1.5 is outside \(0, 1\]"),
        (("--energy", "x"), 2, "--energy: 'x' is not a number"),
        (("--compression", "0.5"), 2, "--compression: 0.5 is not above 1"),
        (("--compression", "9"), 1, "compression 9 is out of reach: rank 1 everywhere gives"),
        ((), 2, "one of the arguments --rank_ratio --compression --energy is required"),
        (("--rank_ratio", "0.3", "--compression", "2"), 2, "not allowed with argument"),
        (("--rank_ratio", "0.3", "--method", "svd"), 2, "invalid choice: 'svd'"),
        (("--rank_ratio", "0.3", "--workers", "0"), 2, "--workers: 0 is below 1"),
        (("--rank_ratio", "0.3", "--seed", "2"), 2, "--seed has an effect with --method random"),
        (("--rank_ratio", "0.3", "--allocation", "uniform"), 2, "with --compression alone"),
        (("--rank_ratio", "0.3", "--calibration_tokens", "9"), 2, "or --calibration_task alone"),
        (("--rank_ratio", "0.3", "--damping", "0.1"), 2, "--damping has an effect with a calib"),
        (("--rank_ratio", "0.3", "--damping", "-1"), 2, "--damping: -1 is below 0"),
        (("--rank_ratio", "0.3", "--refine", "3"), 2, "--refine needs --calibration or"),
        (("--rank_ratio", "0.3", "--sequential"), 2, "--sequential needs --calibration or"),
        (("--rank_ratio", "0.3", "--sequential", "--damping", "0", "--calibration", "{}/a.txt"), 2,
         "--sequential needs a --damping above 0"),
        (("--energy", "0.3", "--sequential", "--calibration", "{}/empty.txt"), 2,
         "--sequential needs --rank_ratio or --compression"),
        (("--energy", "0.9", "--method", "randomized"), 2, "needs the whole spectrum"),
        (("--compression", "2", "--allocation", "loss"), 2, "--allocation loss needs --calib"),
        (("--rank_ratio", "0.3", "--whitening", "both"), 2, "--whitening has an effect with a cal"),
        (("--rank_ratio", "0.3", "--whitening", "both", "--damping", "0", "--calibration",
          "{}/a.txt"), 2, "--whitening both needs a --damping above 0"),
        (("--rank_ratio", "0.3", "--whitening", "out"), 2, "invalid choice: 'out'"),
        (("--compression", "2", "--seed", "2", "--allocation", "spectrum"), 2, "--seed has an eff"),
        (("--rank_ratio", "0.3", "--embedding_rank", "99"), 1, r"embedding_rank 99 is outside \[1"),
        (("--rank_ratio", "0.3", "--calibration", "{}/none.txt"), 1, "none.txt does not exist"),
        (("--rank_ratio", "0.3", "--calibration", "{}/empty.txt"), 1, "empty.txt holds no text"),
        (("--rank_ratio", "0.3", "--output", "{}"), 1, "is there, and no decomposition"),
        (("--rank_ratio", "0.3", "--device", "cuda:7"), 1, "device 'cuda:7'"),
        (("--rank_ratio", "0.3", "--model", "{}/gpt"), 1, "did you mean .*gpt2"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    decompose: Decompose, tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    gpt2 = _save("gpt2", tmp_path / "gpt2")
    (tmp_path / "empty.txt").write_text(" \n")
    found, _, error = decompose(gpt2, *[word.format(tmp_path) for word in words])
    assert found == status, error
    (line,) = error.strip().splitlines()
    assert re.search(message, line)
    assert not list(tmp_path.glob("out/*"))


def test_models_that_are_not_dense_are_refused(decompose: Decompose, tmp_path: Path) -> None:
    gpt2 = _save("gpt2", tmp_path / "gpt2")
    (client,) = save_clients(gpt2, tmp_path / "clients", 1)
    save_low_rank_model(tmp_path / "spectron")
    main(["export", "--model", str(gpt2), "--format", "nf4", "--output", str(tmp_path / "nf4"),
          "--tolerance", "9"])  # fmt: skip
    for model, message in (
        (client, "is an adapter; fingpt export --format merged"),
        (tmp_path / "spectron", "has low-rank layers already; fingpt export --format hf"),
        (tmp_path / "nf4", "is stored in nf4; decompose the model it was made of"),
    ):
        status, _, error = decompose(model, "--rank_ratio", "0.4")
        assert (status, message in error) == (1, True), error


@pytest.fixture(scope="module", params=["shared", "own"])
def dense_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A run of ours with dense blocks behind a factorized embedding: its checkpoint, its folder."""
    folder = tmp_path_factory.mktemp(f"dense_run_{request.param}")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    text = folder / "text.txt"
    text.write_text(" ".join(LINES * 40))
    module = LowRankPretraining(
        "gpt2-nano", num_layers=2, width=24, num_heads=2, num_positions=64, rank=None,
        embedding_rank=7, head_map=request.param, learning_rate=0.01,
    )  # fmt: skip
    data = TextBlocks(
        str(text), str(text), tokenizer=str(folder / "tokenizer"), block_length=16, batch_size=2,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    run_shortly(module, data, folder / "run.ckpt", 2)
    main(["export", "--model", str(folder / "run.ckpt"), "--format", "low_rank", "--output",
          str(folder / "exported")])  # fmt: skip
    return {"checkpoint": folder / "run.ckpt", "folder": folder / "exported"}


@pytest.mark.parametrize("form", ["checkpoint", "folder"])
@pytest.mark.parametrize("way", [(), ("--calibration",), ("--calibration", "--sequential")])
def test_a_dense_run_with_a_factorized_embedding_is_decomposed_in_every_form(
    decompose: Decompose, dense_run: dict[str, Path], text: Path, tmp_path: Path, form: str,
    way: tuple[str, ...],
) -> None:  # fmt: skip
    words = [*way[:1], *([text] if way else []), *way[1:]]
    if way:
        words += ["--refine", "2"]
    source = dense_run[form]
    status, _, error = decompose(source, "--rank_ratio", "0.4", *words)
    assert status == 0, error
    before, made = (load_model(path).network for path in (source, tmp_path / "out"))
    ends = []
    for network in (before, made):
        embedding, head = network.get_input_embeddings(), head_of(network)
        assert isinstance(embedding, LowRankEmbedding)
        assert head.table is embedding.table
        has_own_map = "own" in str(source.parent.name)
        assert (head.up is not embedding.up) == has_own_map
        assert torch.equal(head.get_parameter("up"), embedding.up) == (not has_own_map)
        ends.append((embedding.table, embedding.up, head.get_parameter("up")))
    assert all(map(torch.equal, *ends))
    kinds = [{type(m).__name__ for m in network.modules()} for network in (before, made)]
    assert "LowRankLinear" not in kinds[0]
    assert "LowRankLinear" in kinds[1]
    record = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    assert record["dense_parameters"] == sum(p.numel() for p in before.parameters())
    assert record["parameters"] == sum(p.numel() for p in made.parameters())


def test_a_dense_run_goes_on_with_factors(
    decompose: Decompose, dense_run: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Dense first, then factors: the checkpoint of a run taken apart, and trained on."""
    words = ("--rank_ratio", "0.4", "--calibration", text, "--sequential")
    status, _, error = decompose(dense_run["checkpoint"], *words)
    assert status == 0, error
    module = LowRankPretraining(
        init_from=str(tmp_path / "out"), optimizer="spectron", embedding_optimizer="mixed",
        embedding_learning_rate=0.03, learning_rate=0.002,
    )  # fmt: skip
    module.configure_model()
    made = load_model(tmp_path / "out").network.state_dict()
    for name, weight in module.network.state_dict().items():
        assert torch.equal(weight, made[name]), name
    data = TextBlocks(
        str(text), str(text), block_length=16, batch_size=2, cache_dir=str(tmp_path / "cache"),
        tokenizer=str(tmp_path / "out"),
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_steps=4, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=2,
        default_root_dir=tmp_path,
    )  # fmt: skip
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["val/loss"] < before["val/loss"]
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    description = load_model(tmp_path / "end.ckpt").description
    assert description.endswith("(low-rank gpt2)")


def test_an_embedding_that_is_factorized_already_has_its_rank(
    decompose: Decompose, dense_run: dict[str, Path]
) -> None:
    words = ("--rank_ratio", "0.4", "--embedding_rank", "4")
    status, _, error = decompose(dense_run["folder"], *words)
    assert (status, "embedding_rank 4: the embedding is factorized already" in error) == (1, True)


def test_an_output_is_replaced_when_asked(
    decompose: Decompose, model: Path, tmp_path: Path
) -> None:
    assert decompose(model, "--rank_ratio", "0.4")[0] == 0
    status, _, error = decompose(model, "--rank_ratio", "0.2")
    assert status == 1
    assert "is there already; --overwrite replaces it" in error
    assert decompose(model, "--rank_ratio", "0.2", "--overwrite")[0] == 0
    record = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    assert record["settings"]["rank_ratio"] == 0.2


def test_fit_trains_on_from_the_folder_and_its_checkpoint_exports(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way on the command line: taken apart, trained on, evaluated, made dense."""
    monkeypatch.chdir(tmp_path)
    assert decompose(model, "--rank_ratio", "0.4")[0] == 0
    words = [
        "fit", "--model.init_from", "out", "--data.train_files", str(text),
        "--data.val_files", str(text), "--data.block_length", "16", "--data.batch_size", "2",
        "--data.cache_dir", str(tmp_path / "cache"), "--trainer.max_steps", "2",
        "--trainer.max_epochs", "-1", "--trainer.logger", "false", "--trainer.accelerator", "cpu",
        "--trainer.val_check_interval", "2", "--trainer.check_val_every_n_epoch", "null",
        "--trainer.callbacks", "callbacks.CompressionMonitor", "--runs_dir", "runs",
    ]  # fmt: skip
    main(words)
    (run,) = Path("runs").iterdir()
    record = json.loads(Path("out/decomposition.json").read_text())
    assert LowRankPretraining(init_from="out").budget().total_parameters == record["parameters"]
    assert "tokenizer: out" in (run / "config.yaml").read_text()
    trained = load_model(run)
    assert trained.description.startswith(f"{run} (low-rank ")
    assert trained.tokenizer is not None
    main(["export", "--model", str(run), "--format", "hf", "--output", "dense"])
    main(["export", "--model", str(run), "--format", "low_rank", "--output", "spectron"])
    for folder, kind in (("dense", ""), ("spectron", "low-rank ")):
        family = trained.network.config.model_type
        assert load_model(folder).description == f"{folder} ({kind}{family})"
    with pytest.raises(SystemExit):
        main([*words, "--model.rank", "4"])


def test_python_and_the_command_line_write_the_same(
    decompose: Decompose, model: Path, text: Path, tmp_path: Path
) -> None:
    assert decompose(model, "--compression", "1.3", "--calibration", text)[0] == 0
    told = json.loads((tmp_path / "out" / options.RECORD).read_text())
    made = fingpt_lightning.decompose(
        model, tmp_path / "again", compression=1.3, calibration=text, device="cpu"
    )
    assert json.loads(made.to_json()) == told
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give exactly one of rank_ratio, compression, energy; none is given"),
        ({"compression": 1.0}, "compression 1.0 is not a finite number above 1"),
        ({"rank_ratio": 0.5, "energy": 0.5}, "rank_ratio and energy is given"),
        ({"rank_ratio": 0.0}, r"rank_ratio 0.0 is outside \(0, 1\]"),
        ({"energy": 1.5}, r"energy 1.5 is outside \(0, 1\]"),
        ({"compression": 0.5}, "compression 0.5 is not a finite number above 1"),
        ({"compression": 2.0, "allocation": "uniformly"}, "did you mean uniform"),
        ({"compression": 2.0, "allocation": "loss"}, "^allocation loss needs calibration or"),
        ({"rank_ratio": 0.5, "calibration": "a", "whitening": "bth"}, "did you mean both"),
        (
            {"rank_ratio": 0.5, "allocation": "uniform"},
            "^allocation has an effect with compression",
        ),
        ({"rank_ratio": 0.5, "method": "exakt"}, "did you mean exact"),
        ({"rank_ratio": 0.5, "method": "randomized", "seed": -1}, "seed -1 is below 0"),
        ({"rank_ratio": 0.5, "dtype": "float8"}, "dtype 'float8' is none of"),
        ({"rank_ratio": 0.5, "workers": 0}, "workers 0 is below 1"),
        ({"rank_ratio": 0.5, "damping": 0.1}, "^damping has an effect with a calibration alone$"),
        (
            {"rank_ratio": 0.5, "calibration": "a.txt", "calibration_task": "fpb"},
            "^calibration and calibration_task: give one of them$",
        ),
        (
            {"rank_ratio": 0.5, "calibration": "a.txt", "damping": -1.0},
            "damping -1.0 is not a number from 0 on",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_argument_is_refused_by_its_name(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fingpt_lightning.decompose(tmp_path / "no_model", tmp_path / "out", **given, device="cpu")


def _with_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert name in tensors
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, {"format": "pt"})
    return folder


def _put(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "words",
    [
        ("--rank_ratio", "0.4"),
        ("--energy", "0.9"),
        ("--compression", "1.5", "--allocation", "spectrum"),
        ("--compression", "1.5", "--workers", "2"),
        ("--rank_ratio", "0.4", "--calibration", "TEXT"),
        ("--rank_ratio", "0.4", "--calibration", "TEXT", "--sequential"),
        ("--rank_ratio", "0.4", "--calibration", "TEXT", "--whitening", "both"),
    ],
    ids=["ratio", "energy", "spectrum", "workers", "calibration", "sequential", "both"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(
    words: tuple[str, ...], value: float, decompose: Decompose, text: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = _with_tensor(_save("llama", tmp_path / "llama"), name, _put(value))
    status, _, error = decompose(model, *(str(text) if w == "TEXT" else w for w in words))
    assert status == 1
    assert f"error: the tensor {name} holds a NaN or an infinity" in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_norm_that_is_not_finite_and_integers_are_named(
    decompose: Decompose, tmp_path: Path
) -> None:
    model = _save("llama", tmp_path / "llama")
    _with_tensor(model, "model.norm.weight", _put(math.nan))
    _, _, error = decompose(model, "--rank_ratio", "0.4")
    assert "the tensor model.norm.weight holds a NaN" in error
    _with_tensor(model, "model.norm.weight", lambda x: torch.ones_like(x))
    _with_tensor(model, "model.layers.0.mlp.up_proj.weight", lambda x: x.to(torch.int32))
    status, _, error = decompose(model, "--rank_ratio", "0.4", "--overwrite")
    assert status == 1
    assert "model.layers.0.mlp.up_proj.weight is stored as int32, a weight has floating" in error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.norm.weight", "model.norm.weight has a number of 1e+06, beyond float16"),
        ("model.layers.1.mlp.up_proj.weight", "layer model.layers.1.mlp.up_proj: its factors are"),
    ],
)
def test_what_is_beyond_the_stored_dtype_is_named(
    name: str, message: str, decompose: Decompose, tmp_path: Path
) -> None:
    scale = 1e6 if "norm" in name else 1e12
    model = _with_tensor(
        _save("llama", tmp_path / "llama"), name, lambda x: torch.ones_like(x) * scale
    )
    status, _, error = decompose(model, "--rank_ratio", "0.4", "--dtype", "float16")
    assert status == 1
    assert message in error
    assert "take bfloat16 or float32" in error
