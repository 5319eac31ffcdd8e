"""parallel/shards, who holds which part: tables alone."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from splits import POCKET, RELEASED, TINY, ranks, write_tiny

from gptoss.model.cache import Cache
from gptoss.parallel.plan import rank_bytes
from gptoss.parallel.shards import (
    MeshRank,
    ParallelError,
    Shard,
    cut,
    fits,
    layer_of,
    mesh_rank,
    on_stage,
    owned,
    rank_config,
    shard_rule,
    stage_layers,
)
from gptoss.parallel.split import rank_cache
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.layout import LAYOUTS, tensor_table
from gptoss.weights.sizes import checkpoint_bytes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_has_a_rule(layout) -> None:
    for name, spec in tensor_table(TINY, layout).items():
        if layout != "original":  # read under the names of "hf"
            assert len(shard_rule(name)[0]) == len(spec.shape), name
    with pytest.raises(ParallelError, match="rotary"):
        shard_rule("model.rotary")


@pytest.mark.parametrize(("world", "stages"), [
    (1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (4, 2), (8, 4), (5, 5), (10, 5)])
def test_parts_cover_every_number_once(world, stages) -> None:
    """Each element of each tensor is read by somebody; twice only where the
    table says copies, or where heads of a group are on several ranks."""
    for name, spec in tensor_table(TINY).items():
        times = torch.zeros(spec.shape)
        for mesh in ranks(TINY, world, stages):
            if on_stage(TINY, mesh, name):
                index, shape, held = cut(TINY, mesh, spec)
                assert times[index].shape == shape
                times[index] += held
        letters, holder = shard_rule(name)
        copies = 1
        if set(letters) == {"-"} and not holder:
            copies = world // stages
        if letters[0] == "KV":
            copies = max(1, world // stages // TINY.num_key_value_heads)
        assert (times == copies).all(), name


def test_gate_and_up_stay_together() -> None:
    """A slice begins at a gate row, at a border of blocks of F."""
    assert not fits(TINY, 3)
    config = replace(TINY, num_attention_heads=24, num_key_value_heads=3,
                     vocab_size=99)
    for mesh in ranks(config, 3):
        mine = owned(config, mesh)
        assert mesh.slices == 3 and mesh.ep_size == 1
        assert mine["2F"].start == 64 * mine["F/32"].start
        assert mine["2F"].stop == 2 * mine["F"].stop


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_bytes_of_a_rank(name, world) -> None:
    """The sharded part within 5 % of total / world, on every rank."""
    config = RELEASED[name]
    copied = sum(
        spec.nbytes for spec in tensor_table(config).values()
        if set(shard_rule(spec.name)[0]) == {"-"})
    even = (checkpoint_bytes(config) - copied) / world
    for mesh in ranks(config, world):
        mine = 0
        for spec in tensor_table(config).values():
            _, shape, held = cut(config, mesh, spec)
            if set(shard_rule(spec.name)[0]) != {"-"} and held:
                mine += math.prod(shape) * spec.nbytes // math.prod(
                    spec.shape)
        assert abs(mine / even - 1) < 0.05
        total = sum(rank_bytes(config, mesh).values())
        assert total < 1.01 * (even + copied)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8, 24])
def test_stages_are_of_one_size(stages) -> None:
    config = RELEASED["20b"]
    layers = stage_layers(config, stages)
    assert list(itertools.chain(*layers)) == list(range(24))
    assert all(layers)
    sizes = [sum(rank_bytes(config, mesh).values())
             for mesh in ranks(config, stages, stages)]
    layer = (checkpoint_bytes(config) - 2 * 2 * 201088 * 2880) / 24
    slack = max(layer, 2 * 201088 * 2880 - layer)  # a layer, or the head
    assert sum(sizes) == checkpoint_bytes(config)
    assert max(sizes) <= max(checkpoint_bytes(config) / stages + slack,
                             2 * 201088 * 2880 + layer + 10_000)


@pytest.mark.parametrize(("world", "stages", "said"), [
    (3, 1, "expected one of 1, 2, 4, 8, found 3"),
    (16, 1, "expected one of 1, 2, 4, 8, found 16"),
    (6, 2, "in 2 stages: expected one of 2, 4, 8, 16, found 6"),
    (3, 2, "in 2 stages: expected one of 2, 4, 8, 16, found 3"),
    (4, 0, "--stages: expected 1 to 4 .* found 0"),
    (8, 5, "--stages: expected 1 to 4 .* found 5")])
def test_sizes_that_do_not_divide(world, stages, said) -> None:
    config = GptOssConfig.from_pretrained(POCKET)
    with pytest.raises(ParallelError, match=said):
        mesh_rank(config, 0, world, stages)


def test_bytes_read_are_counted(tiny) -> None:
    with Checkpoint.open(tiny["hf"]) as checkpoint:
        total = 0
        for mesh in ranks(TINY, 4, 2):
            shard = Shard(checkpoint, mesh)
            for name in shard.names():
                assert shard.read(name).is_contiguous()
            total += shard.bytes_read
        copied = sum(spec.nbytes for spec in tensor_table(TINY).values()
                     if set(shard_rule(spec.name)[0]) == {"-"}
                     and not shard_rule(spec.name)[1])
        assert total == checkpoint.nbytes + copied


def test_cache_of_a_rank() -> None:
    mine = rank_config(TINY, mesh_rank(TINY, 3, 4, 2))
    assert mine.num_key_value_heads == 4
    assert mine.num_hidden_layers == len(mine.layer_types) == len(
        stage_layers(TINY, 2)[1])
    # a stage has fewer sliding layers; all replay as the whole model does
    caches = [rank_cache(TINY, mesh_rank(TINY, rank, 4, 2), 1, 20)
              for rank in range(4)]
    assert {cache.replay for cache in caches} == {Cache(TINY).replay}
    assert Cache(mine).replay < Cache(TINY).replay


@pytest.mark.parametrize("tensors", [1, 2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("size", [201_088, 201_089, 200_019, 101, 65])
def test_rows_cover_a_vocabulary_of_any_size(size, tensors) -> None:
    config = replace(RELEASED["20b"], vocab_size=size)
    rows = [len(range(size)[owned(config, MeshRank(n, tensors))["V"]])
            for n in range(tensors)]
    assert sum(rows) == size and max(rows) == rows[0] == -(-size // tensors)
    assert rows == sorted(rows, reverse=True)
    divides = not 64 % tensors and not min(8 % tensors, tensors % 8)
    assert fits(config, tensors) == (divides and rows[-1] > 0)


@pytest.mark.parametrize(("world", "stages"), [(1, 1), (8, 1), (16, 1),
                                               (5, 5), (8, 4)])
def test_a_rank_has_a_smaller_model(world, stages) -> None:
    """The shapes of its layers are those of the parts of the whole."""
    for mesh in ranks(TINY, world, stages):
        mine = rank_config(TINY, mesh)
        layers = stage_layers(TINY, stages)[mesh.pp_rank]
        for name, spec in tensor_table(mine).items():
            if layer_of(name) is not None:
                there = name.replace(f"layers.{layer_of(name)}", "layers."
                                     f"{layer_of(name) + layers.start}")
                whole = tensor_table(TINY)[there]
                shape = cut(TINY, mesh, whole)[1]
                if ".router." in name:  # it knows all experts
                    shape = (mine.num_local_experts, *shape[1:])
                assert spec.shape == shape, name
