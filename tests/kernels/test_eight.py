"""Matrices in eight bits a number: how far off they may be, what computes
with them, and who gets them."""

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

from gptoss.kernels import build, compact, eight
from gptoss.model.layers import Linear, Router
from gptoss.model.ops import has_kernel
from gptoss.model.transformer import GptOss

needs_eight = pytest.mark.skipif(not has_kernel("eight_linear"),
                                 reason="no kernel for eight bits")


def exactly(packed: eight.EightWeight) -> torch.Tensor:
    """Value times step, in float64, without `unpack_eight`."""
    m, n = packed.values.shape
    found = torch.empty(m, n, dtype=torch.float64)
    for i in range(n):
        group, j = divmod(i, 64)
        at = 64 * group + (j & 15 | (j & 16) << 1 | (j & 32) >> 1)
        step = packed.scales[:, i // 32].view(torch.bfloat16)
        found[:, i] = packed.values[:, at] * step.double()
    return found


@few
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 99),
       st.sampled_from([0.0, 1e-40, 1e-38, 0.02, 1e30]), st.floats(0, 1))
def test_a_weight_is_off_by_half_a_step_at_most(rows, groups, seed, size,
                                                odd):
    """Zeros, outliers and subnormal numbers included; C++ and torch alike."""
    torch.manual_seed(seed)
    weight = size * torch.randn(rows, 64 * groups)
    wild = torch.rand(weight.shape) < odd ** 4
    weight = torch.where(wild, 1e3 * weight, weight).bfloat16()
    weight[torch.rand(weight.shape) < odd ** 2] = 0
    ours, slow = eight.pack_eight(weight), eight.pack_by_steps(weight)
    assert all(map(torch.equal, ours, slow))
    back = exactly(ours)
    assert torch.equal(eight.unpack_eight(ours).double(), back)
    step = ours.scales.view(torch.bfloat16).double()
    top = weight.double().unflatten(1, (-1, 32)).abs().amax(-1)
    assert (step <= top / 127 * (1 + 2.0 ** -7) + 1e-40).all()
    wrong = (back - weight.double()).abs()
    assert (wrong <= 0.5 * step.repeat_interleave(32, 1)).all()
    assert (back[weight == 0] == 0).all()


def test_normal_numbers_are_off_by_half_a_percent():
    weight = (0.02 * torch.randn(256, 2880)).bfloat16()
    packed = eight.pack_eight(weight)
    assert packed.nbytes * 32 == weight.numel() * 34  # as Q8_0 of llama.cpp
    assert 4.5e-3 < off(eight.unpack_eight(packed), weight) < 6e-3


@pytest.mark.parametrize("weight", [
    torch.ones(4, 96).bfloat16(), torch.ones(4, 64), torch.ones(64).bfloat16(),
    torch.ones(0, 64).bfloat16(),
    *(torch.full((2, 64), value).bfloat16()
      for value in (float("nan"), float("inf"), -float("inf")))])
def test_what_cannot_be_rounded_is_refused(weight):
    with pytest.raises(ValueError, match="weight: expected"):
        eight.pack_eight(weight)


def in_integers(x: torch.Tensor) -> torch.Tensor:
    """x as the kernels read it: in whole steps, a power of two for each 32."""
    blocks = x.double().unflatten(-1, (-1, 32))
    top = blocks.abs().amax(-1, keepdim=True)
    step = 2.0 ** (top.frexp().exponent - 14)
    return ((blocks / step).round() * step).flatten(-2)


@needs_eight
@few
@given(st.integers(1, 19), st.integers(1, 150), st.integers(1, 6),
       st.booleans(), st.integers(0, 99))
def test_eight_linear(tokens, rows, groups, with_bias, seed):
    """Few tokens: one rounding from exact. Many, in bf16: two."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, 64 * groups)
    weight[torch.rand(weight.shape) < 0.01] *= 100
    packed = eight.pack_eight(weight.bfloat16())
    bias = torch.randn(rows).bfloat16() if with_bias else None
    x = torch.randn(2, tokens, 64 * groups)
    x[torch.rand(x.shape) < 0.01] *= 300
    x = x.bfloat16()
    if seed % 2:
        x = x[:1]
    with torch.inference_mode():
        y = OPS.eight_linear(x, *packed, bias)
        with build.plain_torch():
            plain = OPS.eight_linear(x, *packed, bias)
    exact = x.double() @ exactly(packed).T
    exact += bias.double() if with_bias else 0
    assert y.shape == plain.shape and y.dtype == plain.dtype
    # by integers, or in floats; they part where x has outliers
    whole = in_integers(x) @ exactly(packed).T
    whole += bias.double() if with_bias else 0
    assert (off(y, whole) <= 1.001 * off(whole.bfloat16(), whole)
            or off(y, exact) <= 2e-3
            or off(y, exact) <= 1.1 * off(plain, exact))
    assert off(plain, exact) < 8e-3


@needs_eight
@torch.inference_mode()
def test_strips_join_where_they_meet():
    """Pieces of 128 rows, of 8 Mi weights, or tiles; the last one is short."""
    packed = eight.pack_eight(torch.randn(4300, 4096).bfloat16())
    x, bias = torch.randn(13, 4096).bfloat16(), torch.randn(4300).bfloat16()
    many = OPS.eight_linear(x, *packed, bias)
    one = torch.cat([OPS.eight_linear(row, *packed, bias)
                     for row in x.split(1)])
    assert off(many, one) < 4e-3


@pytest.mark.skipif("AVX2" not in build.kernel_path(),
                    reason="no tiles: bf16 units, or no AVX2")
@torch.inference_mode()
@pytest.mark.parametrize(("tokens", "rows"), [(1, 15), (12, 33), (13, 15),
                                              (17, 33), (64, 16)])
def test_by_tiles_all_numbers_are_rounded_once(tokens, rows):
    """As float64 would, few tokens and many."""
    packed = eight.pack_eight(0.02 * torch.randn(rows, 2880).bfloat16())
    x, bias = torch.randn(tokens, 2880).bfloat16(), torch.randn(
        rows).bfloat16()
    y = OPS.eight_linear(x, *packed, bias)
    exact = x.double() @ exactly(packed).T + bias.double()
    assert off(y, exact) < 1.001 * off(exact.bfloat16(), exact)
    one = torch.cat([OPS.eight_linear(row, *packed, bias)
                     for row in x.split(1)])
    assert off(y, one) < 1e-3


@needs_eight
@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 13])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(tokens, odd):
    packed = eight.pack_eight(torch.randn(40, 128).bfloat16())
    x = torch.randn(tokens, 128).bfloat16()
    x[0, 5] = odd
    y = OPS.eight_linear(x, *packed, None)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


@needs_eight
@torch.inference_mode()
def test_other_types_and_sizes_go_to_plain_torch():
    packed = eight.pack_eight(torch.randn(40, 128).bfloat16())
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 128, dtype=dtype)
        y = OPS.eight_linear(x, *packed, None)
        assert y.dtype == dtype
        assert off(y, x.double() @ exactly(packed).T) < 1e-6
    assert OPS.eight_linear(torch.ones(0, 128).bfloat16(), *packed,
                            None).shape == (0, 40)
    with pytest.raises(RuntimeError):
        OPS.eight_linear(torch.ones(2, 64).bfloat16(), *packed, None)


def held(which: type, holder: GptOss) -> int:
    return sum(isinstance(layer, which) for layer in holder.modules())


@needs_eight
def test_one_table_and_every_way_back():
    other = GptOss.from_pretrained(POCKET)
    matrices = 4 * other.config.num_hidden_layers + 1
    weights = {name: x.data_ptr() for name, x in other.named_parameters()}
    dense = sum(layer.weight.nbytes for layer in other.modules()
                if type(layer) is Linear)
    for bits in (8, 16, 12, 8, 12, 16, 8, 8):
        assert eight.hold_dense(other, bits) is other
        assert held(eight.EightLinear, other) == matrices * (bits == 8)
        if hasattr(OPS, "pack_compact") and has_kernel("pack_compact"):
            assert held(compact.CompactLinear, other) == (
                matrices * (bits == 12))
        assert held(Router, other) == other.config.num_hidden_layers
        assert {name: x.data_ptr() for name, x
                in other.named_parameters()} == weights
    assert compact.saved_bytes(other) * 32 == dense * 15
    for wrong in (4, 0, "8"):
        with pytest.raises(ValueError, match="bits: expected 16, 12, 8"):
            eight.hold_dense(other, wrong)


@needs_eight
def test_a_rounded_model_saves_what_was_loaded(tmp_path):
    stored = GptOss.from_pretrained(POCKET)
    rounded = eight.hold_dense(GptOss.from_pretrained(POCKET), 8)
    assert list(rounded.state_dict()) == list(stored.state_dict())
    rounded.save_pretrained(tmp_path / "saved")
    again = GptOss.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], x)
               for name, x in stored.state_dict().items())


@needs_eight
def test_what_learns_is_not_bf16_or_not_finite_stays():
    for other in (GptOss.from_pretrained(POCKET).requires_grad_(),
                  GptOss.from_pretrained(POCKET, dtype=torch.float32)):
        assert held(eight.EightLinear, eight.hold_dense(other, 8)) == 0
    other = GptOss.from_pretrained(POCKET)
    weight = other.lm_head.weight.clone()
    weight[3, 7] = float("inf")
    other.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    eight.hold_dense(other, 8)
    assert type(other.lm_head) is Linear and held(eight.EightLinear, other)


@needs_eight
def test_a_weight_that_learns_is_read_itself():
    layer = Linear(64, 8, False, dtype=torch.bfloat16).requires_grad_(False)
    rounded = eight.EightLinear(layer, eight.pack_eight(layer.weight))
    x = torch.randn(2, 64).bfloat16()
    assert not torch.equal(rounded(x), layer(x))
    x.requires_grad_()
    rounded(x).sum().backward()  # through what it computes with
    assert off(x.grad, exactly(eight.EightWeight(
        rounded.values, rounded.scales)).sum(0).expand(2, -1)) < 1e-2
    rounded.requires_grad_()
    assert torch.equal(rounded(x), layer(x))


@needs_eight
def test_the_rounded_model_is_near_and_its_two_paths_are_one(
        model, stories):  # noqa: F811
    """Nine in ten tokens hardly notice; the others stood between experts."""
    def nats(found, right):
        p, q = right.log_softmax(-1), found.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    rounded = eight.hold_dense(GptOss.from_pretrained(POCKET), 8)
    lost, apart, same = [], [], 0
    with torch.inference_mode():
        for story in stories[:6]:
            story = torch.tensor([story[:60]])
            stored, at_once = (each(story)[0].double()
                               for each in (model, rounded))
            cache = rounded.new_cache()
            single = torch.cat([rounded(token.view(1, 1), cache=cache)[0]
                                for token in story[0]]).double()
            lost.append(nats(at_once, stored))
            apart.append(nats(single, at_once))
            same += int((at_once.argmax(-1) == stored.argmax(-1)).sum())
    lost, apart = torch.cat(lost), torch.cat(apart)
    assert 0 < lost.quantile(0.9) < 0.02
    assert apart.quantile(0.9) < 0.01 and same > 0.9 * len(lost)


@needs_eight
def test_it_writes_and_is_recorded(caplog):
    rounded = eight.hold_dense(GptOss.from_pretrained(POCKET), 8)
    text = greedy(rounded, [1, 2, 3], 12)
    assert len(text) == 12 and "not recorded" not in caplog.text
    assert greedy(rounded, [1, 2, 3], 12) == text


def test_without_a_kernel_the_model_stays_and_one_line_says_so():
    code = ("import gptoss.kernels.eight as k;"
            "from gptoss import GptOss;"
            f"m = k.hold_dense(GptOss.from_pretrained({str(POCKET)!r}), 8);"
            "print(type(m.lm_head).__name__)")
    done = subprocess.run([sys.executable, "-c", code], text=True,
                          capture_output=True, env=os.environ | {
                              "GPTOSS_KERNELS": "torch"})
    assert done.stdout == "Linear\n"
    assert done.stderr.startswith("gptoss: matrices stay in sixteen bits")
    assert len(done.stderr.splitlines()) == 1


def test_layers_in_plain_torch():
    """Asked for by name they compute without a kernel, too."""
    code = ("import torch, gptoss.kernels.eight as k;"
            "from gptoss import GptOss;"
            f"m = GptOss.from_pretrained({str(POCKET)!r});"
            "t = torch.tensor([[1, 2, 3]]); a = m(t); k.eight_layers(m);"
            "b = m(t); print(type(m.lm_head).__name__,"
            "0 < (a - b).norm() < 0.1 * a.norm())")
    done = subprocess.run([sys.executable, "-c", code], text=True,
                          capture_output=True, env=os.environ | {
                              "GPTOSS_KERNELS": "torch"})
    assert done.stdout == "EightLinear tensor(True)\n", done.stderr
