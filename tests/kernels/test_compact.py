"""Matrices in twelve bits a number: nothing is lost, and who gets them."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import (
    OPS,
    POCKET,
    few,
    greedy,
    kernels_on,  # noqa: F401  fixtures, this one and two more
    model,  # noqa: F401
    off,
    stories,  # noqa: F401
)

from gptoss.kernels import compact
from gptoss.model.layers import Linear
from gptoss.model.transformer import GptOss

needs_compact = pytest.mark.skipif(not hasattr(OPS, "pack_compact"),
                                   reason="no kernel for twelve bits")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


def test_every_bf16_number_comes_back():
    """All 65,536, also those that stand apart: most of them, here."""
    every = torch.arange(2 ** 16).to(torch.int16).view(torch.bfloat16)
    for weight in (every.view(512, 128), every.view(128, 512).flip(0, 1)):
        assert same_bits(compact.unpack(compact.pack(weight)), weight)
        assert same_bits(compact.unpack(compact.pack_by_torch(weight)), weight)


@few
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 99),
       st.sampled_from([0.0, 1e-38, 0.02, 1e30]), st.floats(0, 1))
def test_packing_is_that_of_torch_and_loses_nothing(rows, blocks, seed, size,
                                                    odd):
    torch.manual_seed(seed)
    weight = (size * torch.randn(rows, 64 * blocks)).bfloat16()
    wild = torch.randint(-2 ** 15, 2 ** 15, weight.shape).to(torch.int16)
    weight = torch.where(torch.rand(weight.shape) < odd ** 4,
                         wild.view(torch.bfloat16), weight)
    ours, slow = compact.pack(weight), compact.pack_by_torch(weight)
    assert all(map(torch.equal, ours, slow))
    assert same_bits(compact.unpack(ours), weight)


def test_a_column_beyond_two_to_the_fifteen():
    weight = torch.ones(2, 2 ** 16, dtype=torch.bfloat16)
    weight[:, ::4096] = torch.arange(1, 17).bfloat16().exp2() * 1e-30
    packed = compact.pack(weight)
    assert (packed.others < 0).any()
    assert same_bits(compact.unpack(packed), weight)


@needs_compact
def test_rows_that_are_not_counted_lose_nothing():
    """Codes come from every eighth row; the others hold other sizes here."""
    weight = torch.randn(16, 128).bfloat16()
    weight[torch.arange(16) % 8 > 0] *= 2.0 ** 60
    packed = compact.pack(weight)
    assert len(packed.others) == 14 * 128
    assert same_bits(compact.unpack(packed), weight)
    for mine, slow in zip(packed, compact.pack_by_torch(weight), strict=True):
        assert torch.equal(mine, slow)


@needs_compact
@few
@given(st.integers(1, 7), st.integers(1, 150), st.integers(1, 6),
       st.booleans(), st.integers(0, 99))
def test_compact_linear(tokens, rows, blocks, with_bias, seed):
    """With numbers that stand apart; more tokens than FEW read the weight."""
    torch.manual_seed(seed)
    layer = Linear(64 * blocks, rows, with_bias, dtype=torch.bfloat16)
    layer.requires_grad_(False)
    layer.weight[torch.rand(layer.weight.shape) < 0.02] *= 1e-9
    layer.weight[0, :20] = 2.0 ** -torch.arange(20)
    copy = compact.CompactLinear(layer, compact.pack(layer.weight))
    assert len(copy.others) > 0
    x = torch.randn(tokens, 64 * blocks).bfloat16()
    with torch.inference_mode():
        y, plain = copy(x), layer(x)
        exact = x.double() @ layer.weight.double().T
        exact += layer.bias.double() if with_bias else 0
    assert off(y, exact) <= max(1.1 * off(plain, exact), 2e-3)
    assert tokens <= 4 or torch.equal(y, plain)


@needs_compact
def test_a_compact_model_writes_what_the_model_writes(
        model, stories):  # noqa: F811
    copy = compact.make_compact(GptOss.from_pretrained(POCKET))
    made = [m for m in copy.modules()
            if isinstance(m, compact.CompactLinear)]
    layers = model.config.num_hidden_layers
    assert len(made) == 4 * layers + 1  # q, k, v, o of each, and the head
    dense = sum(layer.weight.nbytes for layer in made)
    assert 0.2 * dense < compact.saved_bytes(copy) <= 0.25 * dense
    assert compact.saved_bytes(model) == 0
    assert list(copy.state_dict()) == list(model.state_dict())
    for story in stories[:4]:
        assert (greedy(copy, story[:16], 40)
                == greedy(model, story[:16], 40))


@needs_compact
def test_what_is_not_frozen_or_not_bf16_stays():
    for other in (GptOss.from_pretrained(POCKET).requires_grad_(),
                  GptOss.from_pretrained(POCKET, dtype=torch.float32)):
        compact.make_compact(other)
        assert not any(isinstance(m, compact.CompactLinear)
                       for m in other.modules())


@needs_compact
def test_a_weight_that_learns_is_read_itself():
    layer = Linear(64, 8, False, dtype=torch.bfloat16).requires_grad_(False)
    copy = compact.CompactLinear(layer, compact.pack(layer.weight))
    x = torch.randn(2, 64).bfloat16()
    copy.requires_grad_()
    copy(x).sum().backward()
    with torch.no_grad():
        copy.weight -= copy.weight.grad
        assert torch.equal(copy(x), layer(x)) and copy.weight is layer.weight


@needs_compact
def test_a_matrix_without_regularity_stays():
    other = GptOss.from_pretrained(POCKET)
    wild = torch.randint(-2 ** 15, 2 ** 15, other.lm_head.weight.shape)
    other.lm_head.weight = torch.nn.Parameter(
        wild.to(torch.int16).view(torch.bfloat16), requires_grad=False)
    compact.make_compact(other)
    assert type(other.lm_head) is Linear


@pytest.mark.parametrize("shape", [(4, 96), (4, 2 ** 16 + 64)])
def test_what_cannot_be_packed_is_refused(shape):
    with pytest.raises(ValueError, match="weight: expected"):
        compact.pack(torch.ones(shape, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="weight: expected"):
        compact.pack(torch.ones(4, 64))


def test_without_a_kernel_the_model_stays_and_one_line_says_so():
    code = ("import logging, gptoss.kernels.compact as k;"
            "from gptoss import GptOss;"
            f"m = k.make_compact(GptOss.from_pretrained({str(POCKET)!r}));"
            "print(type(m.lm_head).__name__)")
    done = subprocess.run([sys.executable, "-c", code], text=True,
                          capture_output=True, env=os.environ | {
                              "GPTOSS_KERNELS": "torch"})
    assert done.stdout == "Linear\n"
    assert done.stderr.startswith("gptoss: matrices stay in sixteen bits")
    assert len(done.stderr.splitlines()) == 1
