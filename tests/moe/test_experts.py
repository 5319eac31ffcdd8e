"""The experts: four forms, one function, and the formulas of others."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GptOssConfig as HFConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from gptoss.model.ops import packed_experts
from gptoss.moe import experts as module
from gptoss.moe.experts import (
    ALPHA,
    by_expert,
    clamped_swiglu,
    experts_gather,
    experts_grouped,
    experts_loop,
    swiglu_backward,
)
from gptoss.moe.routing import route
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import PackedMXFP4


def draw_case(N, E, K, D, width, seed=0, dtype=torch.float32, std=1.0):
    """x, ids, weights, then the four expert tensors."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    ids = torch.rand(N, E, generator=g).topk(K).indices
    weights = draw(N, K).softmax(-1)
    floats = (draw(N, D), weights, std * draw(E, 2 * width, D) / D ** 0.5,
              draw(E, 2 * width), draw(E, D, width) / width ** 0.5,
              draw(E, D))
    x, weights, *experts = (t.to(dtype) for t in floats)
    return x, ids, weights, *experts


def pack(case):
    """The same case on packed weights, and on what they decode to."""
    x, ids, weights, gate_up, up_bias, down, down_bias = case
    packed = [PackedMXFP4(*encode(t)) for t in (gate_up, down)]
    dense = [p.decode(x.dtype) for p in packed]
    return ((x, ids, weights, packed[0], up_bias, packed[1], down_bias),
            (x, ids, weights, dense[0], up_bias, dense[1], down_bias))


def close(got, expected, atol=2e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# -------------------------------------------------------- activation


def test_swiglu_against_the_formula():
    """Every pair of 81 gates and 81 ups, straight from the definition."""
    grid = [i / 4 for i in range(-40, 41)]
    pairs = torch.tensor([[g, u] for g in grid for u in grid],
                         dtype=torch.float64)
    expected = []
    for g in grid:
        for u in grid:
            z, w = min(g, 7.0), max(-7.0, min(u, 7.0))
            expected.append((w + 1) * z / (1 + math.exp(-1.702 * z)))
    got = clamped_swiglu(pairs)
    assert got.shape == (81 * 81, 1)
    close(got[:, 0], torch.tensor(expected, dtype=torch.float64), 1e-12)


def test_clamps_are_not_symmetric():
    def at(gate, up, limit=7.0):
        return float(clamped_swiglu(torch.tensor([gate, up]), limit))
    assert at(100.0, 1.0) == at(7.0, 1.0) != at(6.9, 1.0)
    assert at(-8.0, 1.0) != at(-7.0, 1.0)  # the gate has no floor
    assert at(2.0, 100.0) == at(2.0, 7.0) != at(2.0, 6.9)
    assert at(2.0, -100.0) == at(2.0, -7.0) != at(2.0, -6.9)
    assert at(2.0, -1.0) == 0.0
    assert at(5.0, 5.0, limit=3.0) == at(3.0, 3.0)


def test_swiglu_gradient():
    g = torch.Generator().manual_seed(0)
    z = 6 * torch.randn(50, 12, generator=g, dtype=torch.float64)
    assert (z.abs() > 7).any()
    z.requires_grad_()
    grad = torch.randn(50, 6, generator=g, dtype=torch.float64)
    expected, = torch.autograd.grad(clamped_swiglu(z), z, grad)
    close(swiglu_backward(z.detach(), grad, 7.0), expected, 1e-12)
    assert ALPHA == 1.702


# ------------------------------------------------- four forms, one result


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 9), st.integers(1, 8), st.data())
def test_loop_gather_grouped(N, E, data):
    K = data.draw(st.integers(1, E))
    D, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    seed = data.draw(st.integers(0, 99))
    # std 4.0: both clamps are at work; outputs reach 80, where a step of
    # fp32 is 8e-6, so there the forms are compared in float64
    for dtype, std, atol in ((torch.float32, 1.0, 2e-5),
                             (torch.float64, 4.0, 1e-12)):
        case = draw_case(N, E, K, D, width, seed, dtype, std)
        slow = experts_loop(*case)
        assert slow.shape == (N, D)
        close(experts_gather(*case), slow, atol)
        close(experts_grouped(*case), slow, atol)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 6), st.data())
def test_packed(N, E, data):
    K = data.draw(st.integers(1, E))
    D, width = (32 * data.draw(st.integers(1, 3)) for _ in range(2))
    packed, dense = pack(draw_case(N, E, K, D, width,
                                   data.draw(st.integers(0, 99))))
    assert torch.equal(packed_experts(*packed), experts_grouped(*dense))
    close(packed_experts(*packed), experts_loop(*dense))


@pytest.mark.parametrize("N", (0, 1))
def test_no_token_and_one_token(N):
    packed, dense = pack(draw_case(N, 4, 2, 32, 32))
    for run, case in ((experts_loop, dense), (experts_gather, dense),
                      (experts_grouped, dense), (packed_experts, packed)):
        out = run(*case)
        assert out.shape == (N, 32) and out.dtype == torch.float32
        close(out, experts_loop(*dense))


def test_only_the_experts_hit_are_called_in_order_with_their_tokens():
    x = torch.arange(5.0)[:, None]
    ids = torch.tensor([[6, 1], [1, 3], [6, 3], [1, 6], [3, 1]])
    calls = []

    def apply(e, rows):
        calls.append((e, rows[:, 0].tolist()))
        return rows * 10 ** e
    weights = torch.ones(5, 2)
    y = by_expert(x, ids, weights, 8, apply)
    assert calls == [(1, [0, 1, 3, 4]), (3, [1, 2, 4]), (6, [0, 2, 3])]
    assert y[:, 0].tolist() == [0, 1010, 2 * 1001000, 3 * 1000010, 4 * 1010]


def test_swapping_the_choices_changes_nothing():
    x, ids, weights, *rest = draw_case(6, 5, 3, 16, 8)
    one = experts_grouped(x, ids, weights, *rest)
    assert torch.equal(one, experts_grouped(x, ids.flip(1), weights.flip(1),
                                            *rest))


def test_all_tokens_to_one_expert():
    x, _, weights, *rest = draw_case(7, 5, 1, 16, 8)
    ids = torch.full((7, 1), 3)
    close(experts_grouped(x, ids, weights, *rest),
          experts_loop(x, ids, weights, *rest))


# ------------------------------------------------------------ memory


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation allocates."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {a.untyped_storage().data_ptr() for a in args
                if isinstance(a, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if (isinstance(t, torch.Tensor)
                    and t.untyped_storage().data_ptr() not in held):
                self.size = max(self.size, t.numel())
        return out


def test_transposed_views_are_not_copied():
    """HF's dequantised files hold [E, in, out]: we look at them sideways."""
    case = draw_case(3, 16, 2, 32, 32)
    strided = list(case)
    for i in (3, 5):
        strided[i] = case[i].transpose(1, 2).contiguous().transpose(1, 2)
        assert not strided[i].is_contiguous()
    with Largest() as largest:
        close(experts_grouped(*strided), experts_loop(*case))
    assert largest.size <= 2 * 32 * 32  # at most one expert's gate_up
    with Largest() as largest:
        experts_gather(*case)
    assert largest.size >= 3 * 2 * 2 * 32 * 32  # the meter does measure


def test_packed_decodes_only_what_is_hit(monkeypatch):
    (x, ids, weights, up, up_bias, down, down_bias), dense = pack(
        draw_case(5, 64, 2, 32, 32))
    hit = sorted(ids.unique().tolist())
    assert len(hit) < 12
    decoded = []

    def counting(blocks, scales, dtype):
        decoded.append((blocks.data_ptr(), tuple(blocks.shape)))
        return module_decode(blocks, scales, dtype)
    module_decode = module.decode
    monkeypatch.setattr(module, "decode", counting)
    for p in (up, down):  # scale 255 means NaN: whoever decodes it shows it
        poison = torch.full_like(p.scales, 255)
        poison[hit] = p.scales[hit]
        p.scales = poison
    got = packed_experts(x, ids, weights, up, up_bias, down, down_bias)
    assert torch.equal(got, experts_grouped(*dense))
    assert decoded == [part for e in hit for part in (
        (up.blocks[e].data_ptr(), (64, 1, 16)),
        (down.blocks[e].data_ptr(), (32, 1, 16)))]
    up.scales[hit[0]] = 255
    bad = packed_experts(x, ids, weights, up, up_bias, down, down_bias)
    assert torch.equal(bad.isnan().any(1), (ids == hit[0]).any(1))


# -------------------------------------------------------- the operator


def test_opcheck_and_meta():
    packed, _ = pack(draw_case(4, 3, 2, 32, 64))
    x, ids, weights, up, up_bias, down, down_bias = packed
    for t in (x, weights, up_bias, down_bias):
        t.requires_grad_()
    args = (x, ids, weights, up.blocks, up.scales, up_bias, down.blocks,
            down.scales, down_bias, 7.0)
    torch.library.opcheck(torch.ops.gptoss.packed_experts, args)
    meta = [t.detach().to("meta") if isinstance(t, torch.Tensor) else t
            for t in args]
    out = torch.ops.gptoss.packed_experts(*meta)
    assert out.device.type == "meta" and out.shape == (4, 32)
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(torch.ops.gptoss.packed_experts_backward,
                          (plain[0], *plain))


# ------------------------------------------------------------ gradients


def test_gradcheck_grouped():
    case = draw_case(4, 3, 2, 5, 3, dtype=torch.float64)
    x, ids, weights, *rest = case
    leaves = [t.requires_grad_() for t in (x, weights, *rest)]
    assert torch.autograd.gradcheck(
        lambda x, w, *rest: experts_grouped(x, ids, w, *rest), leaves)
    # an expert without tokens learns nothing, and is not None
    ids = torch.zeros(4, 1, dtype=torch.int64)
    experts_grouped(x, ids, weights[:, :1], *rest).sum().backward()
    assert rest[0].grad[0].abs().sum() > 0 == rest[0].grad[1:].abs().sum()


@pytest.mark.parametrize("N", (1, 9))
def test_gradients_through_packed_weights(N):
    packed, dense = pack(draw_case(N, 4, 2, 32, 64, dtype=torch.float64,
                                   std=4.0))
    results = []
    for run, case in ((packed_experts, packed), (experts_grouped, dense)):
        leaves = [case[i].clone().requires_grad_() for i in (0, 2, 4, 6)]
        args = list(case)
        args[0], args[2], args[4], args[6] = leaves
        out = run(*args)
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-9)


# ------------------------------------------------------ against others


def hf_experts(case, dtype=None):
    """transformers' GptOssExperts (eager) on the tensors of a case."""
    x, ids, weights, gate_up, up_bias, down, down_bias = (
        t if dtype is None or not t.is_floating_point() else t.to(dtype)
        for t in case)
    hf = GptOssExperts(HFConfig(
        hidden_size=x.shape[1], intermediate_size=down.shape[2],
        num_local_experts=len(down), experts_implementation="eager"))
    hf.load_state_dict({
        "gate_up_proj": gate_up.transpose(1, 2), "down_proj":
        down.transpose(1, 2), "gate_up_proj_bias": up_bias,
        "down_proj_bias": down_bias}, assign=True)
    with torch.no_grad():
        return hf(x, ids, weights)


def openai_experts(x, ids, weights, mlp1, bias1, mlp2, bias2):
    """The formula of gpt_oss/torch/model.py, MLPBlock, in our words."""
    t = torch.einsum("beck,bk->bec", mlp1[ids], x) + bias1[ids]
    glu, linear = t[..., ::2].clamp(max=7.0), t[..., 1::2].clamp(-7.0, 7.0)
    t = glu * torch.sigmoid(1.702 * glu) * (linear + 1)
    t = torch.einsum("beck,bek->bec", mlp2[ids], t) + bias2[ids]
    return torch.einsum("bec,be->bc", t, weights)


@pytest.mark.parametrize("seed", range(10))
def test_against_transformers_and_openai(seed):
    case = draw_case(11, 6, 1 + seed % 4, 24 + seed, 16, seed, std=4.0)
    ours = experts_grouped(*case)
    close(ours, hf_experts(case))
    close(ours, openai_experts(*case))


def test_bf16_no_worse_than_transformers():
    """Error against float64, median of 20 cases of the same bf16 inputs."""
    ours, hf, openai = [], [], []
    for seed in range(20):
        case = draw_case(16, 8, 4, 64, 64, seed, dtype=torch.bfloat16)
        exact = experts_loop(*(t.double() if t.is_floating_point() else t
                               for t in case))

        def error(y, exact=exact):
            return float((y.double() - exact).square().mean().sqrt())
        ours.append(error(experts_grouped(*case)))
        hf.append(error(hf_experts(case)))
        openai.append(error(openai_experts(*case)))
    median = [float(torch.tensor(t).median()) for t in (ours, hf, openai)]
    assert median[0] <= median[1] and median[0] <= median[2]


def test_chunked_gate_up_is_another_function():
    """The known bug: first half gate, second half up."""
    z = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    gate, up = z.chunk(2, dim=-1)
    wrong = (up.clamp(-7, 7) + 1) * F.silu(gate.clamp(max=7))
    assert (clamped_swiglu(z) - wrong).abs().max() > 0.5
    # and the interleaving is undone by reordering the rows
    order = torch.arange(16).view(8, 2).T.flatten()
    close(clamped_swiglu(z[:, order.argsort()]),
          clamped_swiglu(torch.stack(z.chunk(2, -1), -1).flatten(-2)))


def test_against_openais_mlp_block():
    """The module of the package gpt-oss 0.0.9 itself, norm to residual."""
    openai = pytest.importorskip("gpt_oss.torch.model",
                                 reason="no gpt-oss 0.0.9")
    for seed in range(5):
        x, _, _, *experts = draw_case(9, 6, 3, 24, 16, seed, std=4.0)
        block = openai.MLPBlock(openai.ModelConfig(
            num_experts=6, experts_per_token=3, hidden_size=24,
            intermediate_size=16))
        names = ("mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias")
        gate = torch.randn(6, 24), torch.randn(6)
        block.load_state_dict(
            dict(zip(names, experts, strict=True)) | {
                "norm.scale": torch.ones(24), "gate.weight": gate[0],
                "gate.bias": gate[1]}, assign=True)
        t = block.norm(x)
        weights, ids = route(F.linear(t, *gate), 3)
        with torch.no_grad():
            close(experts_grouped(t, ids, weights, *experts), block(x) - x,
                  5e-5)
