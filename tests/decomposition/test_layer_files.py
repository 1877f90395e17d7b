from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fingpt_lightning.decomposition.layer_files import (
    Batch,
    LayerWeight,
    SafetensorsReader,
    Work,
    batches_of,
    decompose_batch,
    read_result,
    read_tensors,
    result_file,
)
from fingpt_lightning.low_rank import factorize
from fingpt_lightning.low_rank.decomposition import Method

LAYERS = [LayerWeight(f"block.{index}", f"w{index}", 7, 11) for index in range(3)]


@pytest.fixture
def reader(tmp_path: Path) -> SafetensorsReader:
    file = tmp_path / "weights.safetensors"
    save_file({f"w{index}": torch.randn(11, 7) for index in range(3)}, file)
    return SafetensorsReader({f"w{index}": file for index in range(3)})


def test_pairs_and_dense_layers_are_written_and_read_again(
    reader: SafetensorsReader, tmp_path: Path
) -> None:
    ranks = {"block.0": 2, "block.1": None, "block.2": 4}
    work = Work(reader, tmp_path, ranks, dtype=torch.float64)
    assert read_result(tmp_path, "block.0") is None
    results = decompose_batch(work, Batch(tuple(LAYERS)))
    assert [result.rank for result in results] == [2, None, 4]
    assert results == [read_result(tmp_path, layer.name) for layer in LAYERS]
    pair = read_tensors(result_file(tmp_path, "block.2"))
    weight = reader.read("w2")
    truth = factorize(weight.double(), 4)
    torch.testing.assert_close(pair["up"] @ pair["down"], truth.up @ truth.down)
    error = (weight - pair["up"] @ pair["down"]).norm() / weight.norm()
    assert results[2].weight_error == pytest.approx(float(error))
    assert results[2].output_error is None
    assert not list(tmp_path.rglob("*.aside"))


def test_a_transposed_weight_gives_the_same_pair(tmp_path: Path) -> None:
    weight = torch.randn(11, 7)
    file = tmp_path / "weights.safetensors"
    save_file({"straight": weight, "turned": weight.T.contiguous()}, file)
    reader = SafetensorsReader(dict.fromkeys(("straight", "turned"), file))
    layers = [
        LayerWeight("straight", "straight", 7, 11),
        LayerWeight("turned", "turned", 7, 11, is_transposed=True),
    ]
    decompose_batch(Work(reader, tmp_path, {"straight": 3, "turned": 3}), Batch(tuple(layers)))
    first, second = (read_tensors(result_file(tmp_path, layer.name)) for layer in layers)
    torch.testing.assert_close(first, second)


def test_energy_decides_the_rank_of_each_layer(reader: SafetensorsReader, tmp_path: Path) -> None:
    results = decompose_batch(Work(reader, tmp_path, energy=0.5), Batch(tuple(LAYERS)))
    for layer, result in zip(LAYERS, results, strict=True):
        squares = torch.linalg.svdvals(reader.read(layer.stored).double()).square()
        shares = squares.cumsum(0) / squares.sum()
        assert result.rank == int((shares < 0.5).sum()) + 1
        assert result.weight_error**2 == pytest.approx(float(1 - shares[result.rank - 1]), abs=1e-6)
    all_of_it = decompose_batch(Work(reader, tmp_path, energy=1.0), Batch(tuple(LAYERS)))
    assert [result.rank for result in all_of_it] == [None] * 3


def test_a_random_pair_depends_on_the_layer_and_the_seed_alone(
    reader: SafetensorsReader, tmp_path: Path
) -> None:
    ranks = {layer.name: 2 for layer in LAYERS}
    found = []
    for place, seed in (("together", 1), ("alone", 1), ("seeded", 2)):
        work = Work(reader, tmp_path / place, ranks, None, Method.RANDOMIZED, seed=seed)
        for layers in [LAYERS] if place == "together" else [LAYERS[2:]]:
            decompose_batch(work, Batch(tuple(layers)))
        found.append(read_tensors(result_file(tmp_path / place, "block.2"))["up"])
    torch.testing.assert_close(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@given(
    sizes=st.lists(st.sampled_from([(7, 11), (7, 7), (11, 7)]), min_size=1, max_size=30),
    num_workers=st.integers(1, 5),
)
def test_every_layer_is_in_one_batch_of_its_shape(
    sizes: list[tuple[int, int]], num_workers: int
) -> None:
    layers = [LayerWeight(str(index), "", *size) for index, size in enumerate(sizes)]
    batches = batches_of(layers, num_workers, max_bytes=5 * 8 * 77)
    assert sorted(x.name for b in batches for x in b.layers) == sorted(x.name for x in layers)
    costs = [batch.cost for batch in batches]
    assert costs == sorted(costs, reverse=True)
    share = sum(costs) / num_workers / 4
    for batch in batches:
        assert len({layer.size for layer in batch.layers}) == 1
        assert len(batch.layers) <= 5 * 77 // (
            batch.layers[0].in_features * batch.layers[0].out_features
        )
        assert num_workers == 1 or len(batch.layers) == 1 or batch.cost <= share * (1 + 1e-9)
