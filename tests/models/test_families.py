"""Each family's record is what transformers' networks of that family are."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fingpt_lightning.models.budget import model_budget
from fingpt_lightning.models.families import (
    FAMILIES,
    Family,
    family_named,
    family_of,
    family_of_gguf,
    head_of,
)
from fingpt_lightning.models.quantization.layers import is_linear
from tests.models.tiny_models import TINY, ids


def test_every_family_has_its_row() -> None:
    assert TINY.keys() == FAMILIES.keys()
    assert all(name == family.model_type for name, family in FAMILIES.items())


@pytest.fixture(params=sorted(FAMILIES))
def network(request: pytest.FixtureRequest) -> PreTrainedModel:
    return TINY[request.param]().double()


@pytest.fixture
def family(network: PreTrainedModel) -> Family:
    return family_of(network)


def test_the_parts_are_where_the_record_says(network: PreTrainedModel, family: Family) -> None:
    assert type(network) is family.network_class
    assert type(network.config) is family.config_class
    assert network.get_submodule(family.body) is network.base_model
    assert network.get_submodule(family.embedding) is network.get_input_embeddings()
    assert head_of(network) is network.get_output_embeddings()
    assert type(network.get_submodule(family.norm)) is type(
        network.get_submodule(family.layer_name(0, family.block_norm))
    )
    blocks = network.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    assert len(blocks) == network.config.num_hidden_layers == 2
    named = [family.embedding, *filter(None, [family.positions]), *family.front, family.norm]
    outside = {n for n, p in network.base_model.named_parameters() if p.ndim}
    prefixes = tuple(f"{n.removeprefix(f'{family.body}.')}." for n in [*named, family.blocks])
    assert all(name.startswith(prefixes) for name in outside)


def test_the_linear_layers_of_a_block_are_those_of_the_record_in_their_order(
    network: PreTrainedModel, family: Family
) -> None:
    block = network.get_submodule(f"{family.blocks}.1")
    called: list[tuple[str, Tensor]] = []
    for name, module in block.named_modules():
        if is_linear(module):
            assert type(module) is family.dense_layer
            module.register_forward_pre_hook(
                lambda _, args, name=name: called.append((name, args[0]))
            )
    network(ids())
    assert tuple(name for name, _ in called) == family.linear_layers
    inputs: dict[int, list[str]] = {}
    for name, x in called:
        inputs.setdefault(id(x), []).append(name)
    shared = tuple(tuple(names) for names in inputs.values() if len(names) > 1)
    assert shared == family.shared_inputs


@torch.no_grad()
def test_layers_into_the_residual_stream_are_those_that_silence_a_block(
    network: PreTrainedModel, family: Family
) -> None:
    for name in family.into_residual:
        for parameter in network.get_submodule(family.layer_name(1, name)).parameters():
            parameter.zero_()
    block = network.get_submodule(f"{family.blocks}.1")
    seen: list[Tensor] = []
    block.register_forward_hook(
        lambda _, args, out: seen.extend((args[0], out[0] if isinstance(out, tuple) else out))
    )
    network(ids())
    before, after = seen
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert set(family.into_residual) < set(family.linear_layers)


def test_settings_of_dropout_are_the_configs(network: PreTrainedModel, family: Family) -> None:
    for setting in (family.attention_dropout, *family.dropouts):
        assert isinstance(getattr(network.config, setting), float)
    has_modules = any(isinstance(module, nn.Dropout) for module in network.modules())
    assert has_modules == bool(family.dropouts)


def test_the_budget_counts_blocks_embedding_and_head(
    network: PreTrainedModel, family: Family
) -> None:
    budget = model_budget(network, 7)
    blocks = sum(p.numel() for p in network.get_submodule(family.blocks).parameters())
    assert budget.block_parameters == blocks
    kinds = {layer.name: layer.kind.value for layer in budget.layers}
    assert (kinds[family.embedding], kinds[family.head]) == ("embedding", "head")


def test_a_family_that_is_not_there_is_refused_with_those_that_are() -> None:
    told = f"architecture 'gpt' is not supported; {', '.join(FAMILIES)} are; did you mean gpt2?"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        family_named("gpt")
    told = (
        "a.gguf: architecture 'lama' is not supported; gpt2, llama, qwen2, qwen3, gemma2, gemma3,"
        " phi3 are; did you mean llama?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        family_of_gguf("lama", "a.gguf")
    with pytest.raises(ValueError, match=r"config.json: architecture None is not supported; gpt2"):
        family_named(None, "config.json")


def test_a_record_is_frozen_and_its_network_is_what_transformers_would_make(
    network: PreTrainedModel, family: Family
) -> None:
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(network.config)
    assert type(made) is family.network_class
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.head = "other"  # type: ignore[misc]


def test_a_network_of_an_unusual_config_takes_transformers_own_step() -> None:
    config = GPT2Config(n_layer=1, n_embd=12, n_head=3, vocab_size=7, reorder_and_upcast_attn=True)
    assert not family_of(GPT2LMHeadModel(config)).is_plain(config)
