"""Activations of experts in eight bits: what is rounded, who computes it, and
who asked for it."""

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

from gptoss.kernels import coarse
from gptoss.model.layers import Experts
from gptoss.model.ops import has_kernel
from gptoss.model.transformer import GptOss
from gptoss.moe.experts import packed_by_decoding
from gptoss.weights.encoding import encode

needs_coarse = pytest.mark.skipif(not has_kernel("packed_experts_eight"),
                                  reason="no kernel for eight bits")


@few
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99),
       st.sampled_from([0.0, 1e-40, 1e-30, 1.0, 1e30]))
def test_a_number_is_off_by_half_a_step_at_most(rows, blocks, seed, size):
    torch.manual_seed(seed)
    x = size * torch.randn(rows, 32 * blocks)
    parts = x.double().unflatten(-1, (-1, 32))
    step = parts.abs().amax(-1, keepdim=True) / 127
    wrong = (coarse.in_steps(x).double().view_as(parts) - parts).abs()
    assert (wrong <= 0.5001 * step + (step <= 1e-37) * parts.abs()).all()
    again = coarse.in_steps(coarse.in_steps(x))
    assert off(again, coarse.in_steps(x)) < 1e-6 or not x.any()


def drawn(E: int, K: int, tokens: int, D: int, F: int) -> list:
    """The operator's arguments; no activation stands between two steps."""
    x = torch.randint(-126, 127, (tokens, D))
    x[:, ::32] = 127 * torch.randn(tokens, D // 32).sign()
    x = x / 2.0 ** torch.randint(6, 9, (tokens, D // 32)).repeat_interleave(
        32, 1)
    ids = torch.rand(tokens, E).topk(K).indices
    return [t.bfloat16() if t.is_floating_point() else t for t in (
        x, ids, torch.rand(tokens, K),
        *encode(0.05 * torch.randn(E, 2 * F, D)), torch.randn(E, 2 * F),
        *encode(0.05 * torch.randn(E, D, F)), torch.randn(E, D))] + [7.0]


@needs_coarse
@few
@given(st.integers(1, 4), st.integers(1, 2), st.sampled_from(
    [1, 2, 4, 5, 6, 11, 23]), st.integers(1, 20), st.integers(1, 19),
    st.integers(0, 99))
@torch.inference_mode()
def test_the_kernel_is_its_twin_or_nearer_to_the_truth(E, K, tokens, D, F,
                                                       seed):
    """With AMX nothing but what stands between the layers is rounded."""
    torch.manual_seed(seed)
    call = drawn(E, min(E, K), tokens, 32 * D, 32 * F)
    wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t
            for t in call]
    y = OPS.packed_experts_eight(*call)
    formula = (packed_by_decoding if "AMX" in OPS.kernels_name()
               else coarse.coarse_by_decoding)
    assert off(y, formula(*wide)) < 4e-3


@needs_coarse
@torch.inference_mode()
def test_a_token_does_not_depend_on_its_neighbours():
    """By rows or in any place of a tile: the same sums, to rounding."""
    torch.manual_seed(0)
    x, ids, shares, *rest = drawn(1, 1, 23, 544, 96)
    whole = OPS.packed_experts_eight(x, ids, shares, *rest)
    for n in (1, 4, 5, 9, 22):
        some = OPS.packed_experts_eight(x[-n:], ids[-n:], shares[-n:], *rest)
        assert off(some, whole[-n:].double()) < 4e-3


@needs_coarse
@torch.inference_mode()
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [2, 9])
def test_what_is_no_number_stays_with_its_token(tokens, odd):
    x, *rest = drawn(1, 1, tokens, 64, 32)
    x[1, 40] = odd
    y = OPS.packed_experts_eight(x, *rest)
    finite = y.isfinite().all(-1).tolist()
    assert finite == [n != 1 for n in range(tokens)]


def kinds(holder: GptOss) -> set[type]:
    return {type(layer) for layer in holder.modules()
            if isinstance(layer, Experts)}


@needs_coarse
def test_who_asks_gets_it_and_can_take_it_back(tmp_path):
    other = GptOss.from_pretrained(POCKET)
    state = {name: x.data_ptr() for name, x in other.state_dict().items()}
    for bits in (8, 8, 16, 8):
        assert coarse.hold_activations(other, bits) is other
        assert kinds(other) == {coarse.BY_BITS[bits]}
    assert {name: x.data_ptr() for name, x
            in other.state_dict().items()} == state
    other.save_pretrained(tmp_path / "saved")
    assert kinds(GptOss.from_pretrained(tmp_path / "saved")) == {Experts}
    dense = GptOss.from_pretrained(POCKET, torch.float32, packed=False)
    assert kinds(coarse.hold_activations(dense, 8)) == {Experts}
    for wrong in (12, 0, "8"):
        with pytest.raises(ValueError, match="bits: expected 16, 8"):
            coarse.hold_activations(other, wrong)


@needs_coarse
def test_the_model_is_near_and_another_one(model, stories):  # noqa: F811
    rounded = coarse.hold_activations(GptOss.from_pretrained(POCKET), 8)
    lost, same = [], 0
    with torch.inference_mode():
        for story in stories[:6]:
            story = torch.tensor([story[:60]])
            p, q = (each(story)[0].double().log_softmax(-1)
                    for each in (model, rounded))
            lost.append((p.exp() * (p - q)).sum(-1))
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
    lost = torch.cat(lost)
    assert 0 < lost.quantile(0.9) < 0.02 and same > 0.95 * len(lost)


@needs_coarse
def test_it_writes_and_is_recorded(caplog):
    rounded = coarse.hold_activations(GptOss.from_pretrained(POCKET), 8)
    text = greedy(rounded, [1, 2, 3], 12)
    assert len(text) == 12 and "not recorded" not in caplog.text
    assert greedy(rounded, [1, 2, 3], 12) == text


@needs_coarse
def test_what_learns_is_not_rounded():
    stored, rounded = (GptOss.from_pretrained(POCKET).requires_grad_()
                       for _ in range(2))
    coarse.hold_activations(rounded, 8)
    tokens = torch.tensor([[1, 2, 3, 4]])
    found = []
    for each in (stored, rounded):
        each(tokens).float().logsumexp(-1).sum().backward()
        found.append(each.layers[0].mlp.experts.down_proj_bias.grad)
    assert torch.equal(*found) and found[0].any()


def test_without_a_kernel_the_model_stays_and_one_line_says_so():
    code = ("import gptoss.kernels.coarse as k;"
            "from gptoss import GptOss;"
            f"m = GptOss.from_pretrained({str(POCKET)!r});"
            "k.hold_activations(m, 8);"
            "print(type(m.layers[0].mlp.experts).__name__)")
    done = subprocess.run([sys.executable, "-c", code], text=True,
                          capture_output=True, env=os.environ | {
                              "GPTOSS_KERNELS": "torch"})
    assert done.stdout == "Experts\n", done.stderr
    assert done.stderr.startswith("gptoss: activations stay in sixteen bits")
    assert len(done.stderr.splitlines()) == 1
