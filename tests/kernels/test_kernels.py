"""Kernels against plain torch and float64, how they are built, what happens
without a compiler, and the measurements of `measure`."""

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.kernels import bench, build, compact, triton_kernels
from gptoss.model.layers import Linear
from gptoss.model.ops import mxfp4_linear, packed_experts
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.stories import story_stream
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import PackedMXFP4, decode

POCKET = Path(build.__file__).parents[1] / "pocket"
OPS = torch.ops.gptoss
LOADED = build.load_kernels()
COMPILED = not LOADED.startswith("torch")
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "c++") is None, reason="no c++")
few = settings(deadline=None, max_examples=25)
GREEDY = Sampler(temperature=0.0)


@pytest.fixture(autouse=True)
def kernels_on():
    """Whatever a test switched off is on again after it."""
    yield
    if COMPILED:
        OPS.enable_kernels(True)


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    size = exact.double().norm().item()
    return (y.double() - exact.double()).norm().item() / (size or 1)


def three(run, *tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Results of the kernel, of plain torch, and of float64."""
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for x in tensors]
    with torch.inference_mode():
        fast = run(*tensors)
        with build.plain_torch():
            return fast, run(*tensors), run(*wide)


def check(run, *tensors, slack: float = 1.1) -> None:
    fast, slow, exact = three(run, *tensors)
    assert fast.dtype == slow.dtype and fast.shape == slow.shape
    # bf16's own rounding, 2**-8 at worst and half as much in a norm
    assert off(fast, exact) <= max(slack * off(slow, exact), 2e-3)


def test_kernels_are_what_is_tested_here():
    info = Path("/proc/cpuinfo")
    able = info.exists() and {"avx2", "fma"} <= set(info.read_text().split())
    if able and shutil.which(os.environ.get("CXX") or "c++"):
        assert LOADED.startswith("C++ with AVX")


# ---- every operator, every shape

@few
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 50),
       st.booleans(), st.integers(0, 99))
def test_mxfp4_linear(tokens, rows, blocks, with_bias, seed):
    torch.manual_seed(seed)
    weight = encode(torch.randn(rows, 32 * blocks) * 2.0 ** (seed % 9 - 4))
    bias = torch.randn(rows).bfloat16() if with_bias else None
    check(mxfp4_linear, torch.randn(tokens, 32 * blocks).bfloat16(), *weight,
          bias)


@pytest.mark.parametrize("blocks", range(1, 34))
def test_every_scale_meets_its_own_block(blocks):
    """No two blocks of a row count alike, whatever a register leaves over."""
    torch.manual_seed(blocks)
    packed = torch.randint(256, (5, blocks, 16), dtype=torch.uint8)
    scales = torch.stack([127 + torch.randperm(40)[:blocks] % 12
                          for _ in range(5)]).to(torch.uint8)
    check(mxfp4_linear, torch.randn(1, 32 * blocks).bfloat16(), packed, scales,
          None, slack=1.001)


@few
@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 3),
       st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_packed_experts(tokens, experts, columns, width, K, seed):
    torch.manual_seed(seed)
    K, D, F = min(K, experts), 32 * columns, 32 * width
    gate_up = PackedMXFP4(*encode(0.2 * torch.randn(experts, 2 * F, D)))
    down = PackedMXFP4(*encode(0.2 * torch.randn(experts, D, F)))
    ids = torch.rand(tokens, experts).topk(K).indices

    def run(x, weights, up_bias, down_bias):
        return packed_experts(x, ids, weights, gate_up, up_bias, down,
                              down_bias)

    x, weights, up_bias, down_bias = (
        torch.randn(*shape).bfloat16() for shape in
        ((tokens, D), (tokens, K), (experts, 2 * F), (experts, D)))
    fast, slow, exact = three(run, x, weights, up_bias, down_bias)
    assert off(fast, exact) <= max(off(slow, exact), 2.5e-3)


@few
@given(st.integers(1, 14), st.integers(1, 90), st.integers(1, 20),
       st.booleans(), st.integers(0, 99))
def test_linear(tokens, rows, columns, with_bias, seed):
    torch.manual_seed(seed)
    n = 16 * columns  # also those that the kernel leaves to torch
    bias = torch.randn(rows).bfloat16() if with_bias else None
    check(OPS.linear, torch.randn(2, tokens, n).bfloat16(),
          torch.randn(rows, n).bfloat16(), bias)


@few
@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 90),
       st.sampled_from([(1, 1), (4, 2), (8, 1), (3, 3)]),
       st.sampled_from([16, 32, 64, 24]), st.sampled_from([0, 1, 7, 64]),
       st.integers(0, 99))
def test_sink_attention(batch, queries, before, heads, size, window, seed):
    torch.manual_seed(seed)
    H, G = heads
    S = before + queries
    positions = torch.arange(S).expand(batch, S).clone()
    asked = positions[:, before:].clone()
    hidden = torch.rand(batch, S) < 0.2
    positions[hidden] = -1
    asked[torch.rand(batch, queries) < 0.2] = -1
    order = torch.randperm(S)  # a ring leaves keys in any order
    k, v = (torch.randn(batch, S, G, size).bfloat16() for _ in range(2))
    q = torch.randn(batch, queries, H, size).bfloat16()

    def run(q, k, v, sinks):
        return OPS.sink_attention(q, k, v, sinks, asked, positions[:, order],
                                  window, size ** -0.5)

    check(run, q, k[:, order], v[:, order], torch.randn(H).bfloat16())


def test_attention_reads_views_and_survives_empty_rows():
    store = torch.randn(1, 100, 2, 32).bfloat16()
    k, v = store[:, :70], store.flip(1)[:, :70]
    q = torch.randn(1, 2, 8, 32).bfloat16()
    seen = torch.arange(70)[None]
    out = OPS.sink_attention(q, k, v, torch.full((8,), -torch.inf).bfloat16(),
                             torch.tensor([[-1, 69]]), seen, 0, 0.2)
    assert (out[0, 0] == 0).all() and torch.isfinite(out).all()
    with build.plain_torch():
        slow = OPS.sink_attention(
            q, k, v, torch.full((8,), -torch.inf).bfloat16(),
            torch.tensor([[-1, 69]]), seen, 0, 0.2)
    assert off(out, slow) < 5e-3


@few
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_norm_and_rope(tokens, half, seed):
    torch.manual_seed(seed)
    check(lambda x, w: OPS.rms_norm(x, w, 1e-5),
          10 * torch.randn(2, tokens, half).bfloat16(),
          torch.randn(half).bfloat16())
    cos, sin = torch.randn(2, 1, tokens, half).bfloat16()
    x = torch.randn(2, tokens, 3, 2 * half).bfloat16()
    check(OPS.rope, x, cos, sin)


# ---- special numbers

def test_nan_scales_infinities_and_the_lowest_scale():
    blocks, scales = encode(torch.randn(6, 64))
    scales[1, 0], scales[2], blocks[3] = 255, 0, 0
    x = torch.ones(2, 64).bfloat16()
    x[1, 5] = torch.inf
    fast, slow, _ = three(mxfp4_linear, x, blocks, scales)
    assert fast[0].isnan().tolist() == [False, True] + 4 * [False]
    assert not torch.isfinite(fast[1]).any()
    assert fast[0, 3] == 0
    keep = [0, 2, 4, 5]
    assert off(fast[0, keep], slow[0, keep].double()) < 5e-3
    if COMPILED:
        assert fast[0, 2] != 0  # 2**-127 is not nothing


def test_a_row_of_zeros_and_an_outlier():
    blocks, scales = encode(torch.randn(4, 32))
    assert (mxfp4_linear(torch.zeros(1, 32).bfloat16(), blocks, scales)
            == 0).all()
    x = torch.randn(1, 32).bfloat16()
    x[0, 3] = 3e4
    check(mxfp4_linear, x, blocks, scales)


@pytest.mark.skipif(not COMPILED, reason="torch checks for itself")
def test_an_expert_that_is_none_is_refused():
    packed = PackedMXFP4(*encode(torch.randn(2, 64, 32)))
    down = PackedMXFP4(*encode(torch.randn(2, 32, 32)[:, :, :]))
    for bad in (-1, 2):
        with pytest.raises(IndexError, match="expected 0 to 1"):
            OPS.packed_experts(
                torch.ones(1, 32).bfloat16(), torch.tensor([[bad]]),
                torch.ones(1, 1).bfloat16(), packed.blocks, packed.scales,
                torch.zeros(2, 64).bfloat16(), down.blocks[:, :, :1],
                down.scales[:, :, :1], torch.zeros(2, 32).bfloat16(), 7.0)


def test_results_are_rounded_as_torch_rounds():
    """Sums of two numbers: ties, large against small, NaN and infinities."""
    torch.manual_seed(0)
    x = torch.zeros(20_000, 32).bfloat16()
    x[:, :2] = torch.randn(20_000, 2) * 2.0 ** torch.randint(
        -12, 12, (20_000, 2))
    x[:4, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
    x[3, 1] = 3e38  # their sum is more than a float holds
    fast, slow, _ = three(OPS.linear, x, torch.ones(1, 32).bfloat16(), None)
    exact = (x[:, :1].float() + x[:, 1:2].float()).bfloat16()
    for y in (fast, slow):
        torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("experts", "k"), [(32, 4), (128, 4), (5, 5), (9, 1)])
def test_route(experts, k):
    torch.manual_seed(0)
    logits = (3 * torch.randn(3000, experts)).bfloat16()
    logits[:1000] = logits[:1000].round()  # many are equal
    logits[0], logits[1, 3], logits[2, 2] = torch.nan, torch.nan, torch.inf
    logits[3], logits[4] = 0, -torch.inf
    weights, ids = OPS.route(logits, k)
    with build.plain_torch():
        expected, expected_ids = OPS.route(logits, k)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-2, atol=0,
                               equal_nan=True)
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        OPS.route(logits, experts + 1)


# ---- what is not bf16, and what learns

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64,
                                   torch.float16])
def test_other_types_are_torchs(dtype):
    x, w = torch.randn(3, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    fast, slow, _ = three(OPS.linear, x, w, None)
    assert torch.equal(fast, slow)
    packed = encode(torch.randn(5, 64))
    fast, slow, _ = three(mxfp4_linear, x, *packed)
    assert torch.equal(fast, slow)


def test_gradients_are_those_of_torch():
    torch.manual_seed(0)
    layer = Linear(64, 8).bfloat16()
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    fast = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    with build.plain_torch():
        slow = torch.autograd.grad(layer(x).square().sum(),
                                   (x, layer.weight))
    assert all(map(torch.equal, fast, slow))
    packed = encode(torch.randn(5, 64))
    mxfp4_linear(x, *packed).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_model_trains():
    model = GptOss.from_pretrained(POCKET, packed=False).requires_grad_()
    tokens = torch.arange(12)[None]
    loss = model(tokens).float().logsumexp(-1).mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all()
               for p in model.parameters())


def test_what_bf16_holds_is_not_rounded_again():
    """Activations from 1/64 of a block's largest on are kept exactly: with
    a weight of one, what comes out is what went in."""
    torch.manual_seed(0)
    blocks, scales = encode(torch.eye(64))
    x = torch.randn(200, 64).bfloat16() * 2.0 ** torch.randint(
        -60, 60, (200, 1)).bfloat16()
    top = x.view(200, 2, 32).abs().amax(-1).repeat_interleave(32, 1)
    kept = mxfp4_linear(x, blocks, scales) == x
    assert kept[x.abs() >= top / 64].all()
    assert kept.float().mean() > 0.95


def test_many_products_are_rounded_as_float64_would():
    """A packed product is one rounding to bf16 away from the exact one."""
    torch.manual_seed(0)
    weight = encode(0.02 * torch.randn(64, 2880))
    x = torch.randn(64, 2880).bfloat16()
    fast, slow, exact = three(mxfp4_linear, x, *weight)
    assert off(exact, x.double() @ decode(*weight, torch.float64).T) < 1e-14
    assert off(fast, exact) < 1.001 * off(slow, exact)
    assert (fast != exact.bfloat16()).float().mean() < 0.01


# ---- the whole model

@pytest.fixture(scope="module")
def model():
    return GptOss.from_pretrained(POCKET)


@pytest.fixture(scope="module")
def wide():
    return GptOss.from_pretrained(POCKET, dtype=torch.float64)


@pytest.fixture(scope="module")
def stories():
    """Twelve stories that the shipped model never saw, as token ids."""
    tokenizer = Tokenizer.from_pretrained(POCKET)
    return [tokenizer.encode(text)
            for text in islice(story_stream(0, hold_out=True), 12)]


@torch.inference_mode()
def test_experts_are_nearer_on_the_inputs_of_each_layer(model, wide, stories):
    inputs = []
    hooks = [layer.mlp.experts.register_forward_pre_hook(
        lambda module, given: inputs.append(given)) for layer in wide.layers]
    wide(torch.tensor(stories[:1]))
    for hook in hooks:
        hook.remove()
    assert len(inputs) == len(wide.layers)
    for here, there, (x, ids, weights) in zip(model.layers, wide.layers,
                                              inputs, strict=True):
        x, weights = x.bfloat16(), weights.bfloat16()
        exact = there.mlp.experts(x.double(), ids, weights.double())
        fast = off(here.mlp.experts(x, ids, weights), exact)
        with build.plain_torch():
            slow = off(here.mlp.experts(x, ids, weights), exact)
        # 0.47 to 0.65 of it; bf16's own rounding is nearly all that is left
        assert fast <= (0.8 * slow if COMPILED else slow)
        assert fast < 1.01 * off(exact.bfloat16(), exact) or not COMPILED


@torch.inference_mode()
def test_the_shipped_model_is_nearer_and_chooses_the_same(model, wide,
                                                          stories):
    """Logits at some 2,500 positions. Means would be ruled by the few where
    a router takes another expert, on either path: so medians."""
    distance, agree, count = {"fast": [], "slow": []}, 0, 0
    for story in stories:
        tokens = torch.tensor([story])
        exact, fast = wide(tokens)[0], model(tokens)[0]
        with build.plain_torch():
            slow = model(tokens)[0]
        for name, logits in (("fast", fast), ("slow", slow)):
            distance[name].append((logits.double() - exact).norm(dim=-1)
                                  / exact.norm(dim=-1))
        best, second = exact.topk(2).values.unbind(-1)
        clear = best - second > 0.25
        assert clear.float().mean() > 0.5
        for logits in (fast, slow):
            assert torch.equal(logits.argmax(-1)[clear],
                               exact.argmax(-1)[clear])
        agree += (fast.argmax(-1) == slow.argmax(-1)).sum().item()
        count += len(story)
    fast, slow = (torch.cat(distance[name]).median().item()
                  for name in ("fast", "slow"))
    assert fast < slow if COMPILED else fast == slow
    assert agree > 0.97 * count  # of 2,482 positions, 9 differed


def greedy(model, prompt, count):
    return list(generate(model, prompt, max_new_tokens=count, sampler=GREEDY))


def test_greedy_texts_part_only_where_float64_sees_a_tie(model, wide,
                                                         stories):
    for story in stories[:5]:
        fast = greedy(model, story[:8], 40)
        with build.plain_torch():
            slow = greedy(model, story[:8], 40)
        if fast != slow:
            at = next(i for i in range(40) if fast[i] != slow[i])
            with torch.inference_mode():
                exact = wide(torch.tensor([story[:8] + fast[:at]]))[0, -1]
            assert (exact[fast[at]] - exact[slow[at]]).abs() < 0.25
            assert {fast[at], slow[at]} <= set(exact.topk(4).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_give_the_same_bits_and_tokens(dtype, stories):
    model = GptOss.from_pretrained(POCKET, dtype=dtype)
    with torch.inference_mode():
        fast, text = model(torch.tensor(stories[:1])), greedy(
            model, stories[0][:8], 24)
        with build.plain_torch():
            assert torch.equal(model(torch.tensor(stories[:1])), fast)
            assert greedy(model, stories[0][:8], 24) == text


def test_cache_and_no_cache_agree(model):
    prompt = list(range(5, 95))  # longer than the window of 64
    with torch.inference_mode():
        whole = model(torch.tensor([prompt]))[0, -1].float()
        cache = model.new_cache()
        model(torch.tensor([prompt[:40]]), cache=cache)
        for token in prompt[40:]:
            last = model(torch.tensor([[token]]), cache=cache)[0, -1].float()
    assert off(last, whole) < 0.03


def test_generation_does_not_depend_on_threads(model):
    threads, texts = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            texts.append(greedy(model, [5, 6, 7], 30))
    finally:
        torch.set_num_threads(threads)
    assert texts[0] == texts[1] == texts[2]


# ---- sixteen bits in twelve

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
def test_a_compact_model_writes_what_the_model_writes(model, stories):
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
    for model in (GptOss.from_pretrained(POCKET).requires_grad_(),
                  GptOss.from_pretrained(POCKET, dtype=torch.float32)):
        compact.make_compact(model)
        assert not any(isinstance(m, compact.CompactLinear)
                       for m in model.modules())


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
    model = GptOss.from_pretrained(POCKET)
    wild = torch.randint(-2 ** 15, 2 ** 15, model.lm_head.weight.shape)
    model.lm_head.weight = torch.nn.Parameter(
        wild.to(torch.int16).view(torch.bfloat16), requires_grad=False)
    compact.make_compact(model)
    assert type(model.lm_head) is Linear


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


# ---- building and choosing

CHILD = """
import logging, sys, torch
from gptoss.kernels import build
from gptoss.kernels.compact import CompactLinear, pack
from gptoss.model.layers import Linear
from gptoss.weights.mxfp4 import decode
from gptoss.weights.encoding import encode
from gptoss.model.ops import mxfp4_linear
torch.manual_seed(0)
y = mxfp4_linear(torch.randn(3, 96).bfloat16(), *encode(torch.randn(20, 96)))
print(build.kernel_path())
print(y.float().sum().item())
worst = 0.0
for tokens in (1, 2, 5, 23):
    for rows, columns in ((50, 32), (33, 96), (16, 160), (64, 2880)):
        weight = encode(torch.randn(rows, columns))
        x = torch.randn(tokens, columns).bfloat16()
        exact = x.double() @ decode(*weight, torch.float64).T
        y = mxfp4_linear(x, *weight).double()
        worst = max(worst, ((y - exact).norm() / exact.norm()).item())
for rows, columns in ((50, 64), (3, 4096), (131, 2880)):
    if "AVX" in build.kernel_path():
        layer = Linear(columns, rows, dtype=torch.bfloat16)
        x = torch.randn(2, columns).bfloat16()
        exact = (x.double() @ layer.weight.double().T + layer.bias.double())
        for made in (layer, CompactLinear(layer, pack(layer.weight.detach()))):
            with torch.no_grad():
                y = made(x).double()
            worst = max(worst, ((y - exact).norm() / exact.norm()).item())
print(worst)
"""


@functools.cache  # the same words from the same process
def child(**changes: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", CHILD], text=True,
                          capture_output=True, timeout=280,
                          env=os.environ | {"OMP_NUM_THREADS": "1",
                                             "GPTOSS_KERNELS": "auto"}
                          | changes)


def test_torch_can_be_chosen_and_is_silent():
    done = child(GPTOSS_KERNELS="torch")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("torch (GPTOSS_KERNELS=torch)")


@pytest.mark.parametrize(("changes", "words"), [
    ({"CXX": "no-such-compiler"}, "no-such-compiler"),
    ({"CXX": "false"}, "compiler failed"),
    ({"GPTOSS_KERNELS": "quick"}, "quick")])
def test_without_kernels_one_line_says_so(changes, words, tmp_path):
    done = child(XDG_CACHE_HOME=str(tmp_path), **changes)
    assert done.returncode == 0
    *first, told = done.stderr.splitlines()
    assert told.startswith("gptoss: no kernels") and words in told
    assert all("compiling" in line for line in first)
    assert len(first) == (changes.get("CXX") == "false")
    assert done.stdout.startswith("torch (")
    plain = child(GPTOSS_KERNELS="torch")
    assert done.stdout.splitlines()[1] == plain.stdout.splitlines()[1]


@needs_compiler
@pytest.mark.parametrize("variant, names", [
    ("auto", ("C++ with AVX", "portable C++")),
    ("avx2", ("C++ with AVX2\n", "portable C++")),
    ("portable", ("portable C++",))])
def test_each_variant_is_one_rounding_from_exact(variant, names):
    """Compiled once more where another processor would run it."""
    done = child(GPTOSS_KERNELS=variant)
    assert done.stdout.startswith(names), done.stderr
    assert 1e-4 < float(done.stdout.splitlines()[2]) < 3e-3


COMPILER = """
import os, pathlib, shutil, sys, time
folder = pathlib.Path({folder!r})
with open(folder / "log", "a") as log:
    print("run", file=log, flush=True)
until, parent = time.monotonic() + {seconds}, os.getppid()
while time.monotonic() < until and os.getppid() == parent:
    if len(list(folder.glob("here-*"))) >= {wait_for}:
        break
    time.sleep(0.02)
time.sleep(0.3)
shutil.copy({library!r}, sys.argv[sys.argv.index("-o") + 1])
"""
READY = "import os, pathlib; pathlib.Path(os.environ['READY']).touch()\n"


def compiler(folder: Path, wait_for: int = 0, seconds: float = 60) -> str:
    """$CXX: copies the library that is there, once `wait_for` processes are
    waiting for it or the seconds are over, and notes each call."""
    script = folder / "compiler.py"
    script.write_text(COMPILER.format(
        folder=str(folder), library=str(build.build()), wait_for=wait_for,
        seconds=seconds))
    return shlex.join([sys.executable, "-S", str(script)])


def starting(folder: Path, cxx: str, number: int) -> subprocess.Popen:
    """A process that is about to build, as a rank of torchrun would."""
    code = CHILD.replace("torch.manual_seed", READY + "torch.manual_seed", 1)
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {
            "OMP_NUM_THREADS": "1", "GPTOSS_KERNELS": "auto", "CXX": cxx,
            "XDG_CACHE_HOME": str(folder / "cache"),
            "READY": str(folder / f"here-{number}")})


@needs_compiler
def test_of_several_first_builds_one_compiles(tmp_path):
    cxx = compiler(tmp_path, wait_for=3)
    ranks = [starting(tmp_path, cxx, n) for n in range(3)]
    told = [rank.communicate(timeout=280) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], told
    assert (tmp_path / "log").read_text().count("run") == 1
    assert len({out for out, _ in told}) == 1 and "C++" in told[0][0]
    assert sorted("compiling" in err for _, err in told) == [False, False,
                                                             True]
    assert sorted(x.suffix for x in (tmp_path / "cache" / "gptoss").iterdir()
                  ) == [".sha256", ".so"]


@needs_compiler
def test_a_build_that_is_killed_holds_nobody_up(tmp_path):
    cxx = compiler(tmp_path, wait_for=2)  # the first waits for the second
    first = starting(tmp_path, cxx, 0)
    while not (tmp_path / "log").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    second = starting(tmp_path, cxx, 1)
    out, err = second.communicate(timeout=280)
    assert second.returncode == 0 and "C++" in out, err
    assert (tmp_path / "log").read_text().count("run") == 2


@needs_compiler
@pytest.mark.parametrize("lock", ["missing", "refused"])
def test_a_system_without_locks(lock, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    class Refusing:
        LOCK_EX = 2

        def flock(self, *_):
            raise OSError("no locks available")

    monkeypatch.setattr(build, "fcntl",
                        Refusing() if lock == "refused" else None)
    made = build.build()
    assert made.exists() and made == build.build()
    assert (tmp_path / "log").read_text() == "run\n"


@needs_compiler
def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.KernelError, match="compiler failed"):
        build.build()
    assert list((tmp_path / "gptoss").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "gptoss").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.KernelError, match="cannot compile"):
        build.build()


def test_the_library_is_named_by_what_it_depends_on(monkeypatch, tmp_path):
    names = set(map(build.library_path, build.VARIANTS))
    monkeypatch.setenv("CXX", "some-other-compiler")
    names.add(build.library_path())
    monkeypatch.setattr(build, "OPTIONS", ("-O1",))
    names.add(build.library_path())
    assert len(names) == 5


# ---- who gets the kernels

FRONT = """
import sys, gptoss
assert not {"torch", "gptoss.kernels"} & set(sys.modules)
from gptoss import %s
assert "gptoss.kernels" not in sys.modules  # nothing before it is needed
from gptoss.chat.chat import load
model, _ = load(sys.argv[1])
from gptoss.kernels import build
import torch
assert build._path  # loaded with the model, before threads share it
model(torch.tensor([[1, 2, 3]]))
assert "torch._dynamo" not in sys.modules  # 1 to 2 seconds of importing
print(build._path)
"""


@pytest.mark.parametrize("name", ["GptOss", "Chat"])
def test_whoever_reads_a_model_gets_the_kernels(name):
    """Importing alone loads nothing; tests/test_operators.py has the other
    routes."""
    done = subprocess.run(
        [sys.executable, "-c", FRONT % name, str(POCKET)], text=True,
        capture_output=True, timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GPTOSS_KERNELS": "auto"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == LOADED + "\n"


def test_kernel_path_says_what_will_happen(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_path", "")
    monkeypatch.setenv("GPTOSS_KERNELS", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # something that exists
    assert build.kernel_path() == "C++, to be compiled when first used"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.kernel_path().startswith("torch (no compiler 'no-such")


# ---- measuring

def test_measure():
    found = bench.measure(POCKET, prompt_tokens=20, new_tokens=8, repeats=2)
    assert found["kernels"] == build.kernel_path()
    assert found["prompt_tokens"] == 20 and found["load_seconds"] > 0
    for part in ("prefill", "decode"):
        middle = found[f"{part}_tokens_per_second"]
        around = found[f"{part}_tokens_per_second_spread"]
        assert 0 < around["low"] <= middle <= around["high"]
    assert 0 < found["time_to_first_token"]
    assert 0 < found["read_bandwidth_share"] < 1
    assert found["peak_rss_bytes"] > 10 ** 7


def test_measure_refuses_what_the_context_cannot_hold():
    with pytest.raises(build.KernelError, match="2048.* 2000 .* 49"):
        bench.measure(POCKET, prompt_tokens=2000, new_tokens=49)


def test_summarise():
    runs = [[0.5, 0.6, 0.8], [0.25, 0.45, 0.55], [1.0, 1.2, 1.4]]
    found = bench.summarise(runs, 100, 1000, 50000.0)
    assert found["time_to_first_token"] == 0.5
    assert found["prefill_tokens_per_second"] == 200
    assert found["prefill_tokens_per_second_spread"] == {"low": 100,
                                                         "high": 400}
    assert abs(found["decode_tokens_per_second"] - 5) < 1e-9
    assert abs(found["read_bandwidth_share"] - 0.1) < 1e-9
    many = bench.rates("x", [1.0] * 18 + [2.0, 4.0])
    assert many == {"x": 1.0, "x_spread": {"low": 1.0, "high": 1.0}}


# ---- Triton, in its interpreter: bf16 is not among what that can multiply

TRITON = """
import sys, torch
from gptoss.kernels import triton_kernels as t
from gptoss.moe.experts import packed_by_decoding
from gptoss.weights.encoding import encode
from gptoss.model.ops import attention_in_tiles

dtype, bound = getattr(torch, sys.argv[1]), float(sys.argv[2])
torch.manual_seed(0)

def check(run, exact, *arguments):
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for x in arguments]
    right = exact(*wide)
    error = ((run(*arguments) - right).norm() / right.norm()).item()
    assert error < bound, error

for N in (1, 3, 40):
    E, K, D, F = 4, 2, 96, 64
    ids = torch.rand(N, E).topk(K).indices
    check(t.experts_by_triton, packed_by_decoding,
          torch.randn(N, D).to(dtype), ids, torch.rand(N, K).to(dtype),
          *encode(0.2 * torch.randn(E, 2 * F, D)),
          torch.randn(E, 2 * F).to(dtype),
          *encode(0.2 * torch.randn(E, D, F)), torch.randn(E, D).to(dtype),
          7.0)
for T, S, window in ((1, 70, 0), (1, 70, 9), (20, 40, 0), (20, 40, 7)):
    k_pos = torch.arange(S).expand(2, S).clone()
    q_pos = k_pos[:, S - T:].clone()
    k_pos[:, 3:5] = -1
    q_pos[0, 0] = S - 1 if T == 1 else -1
    q, k, v = (torch.randn(2, n, heads, 32).to(dtype)
               for n, heads in ((T, 8), (S, 2), (S, 2)))
    check(t.attention_by_triton, attention_in_tiles, q, k, v,
          torch.randn(8).to(dtype), q_pos, k_pos, window, 0.2)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", "1e-6"),
                                              ("float16", "1e-3")])
def test_triton_kernels_in_the_interpreter(dtype, bound):
    done = subprocess.run(
        [sys.executable, "-c", TRITON, dtype, bound], text=True,
        capture_output=True, timeout=280,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_token_tiles():
    ids = torch.tensor([[2, 0], [2, 1], [2, 0]])
    order, expert, begin, end = triton_kernels.token_tiles(ids, 4, 2)
    seen = []
    for e, first, last in zip(expert.tolist(), begin.tolist(), end.tolist(),
                              strict=True):
        picks = order[first:min(first + 2, last)].tolist()
        assert all(ids.flatten()[pick] == e for pick in picks)
        seen += picks
    assert sorted(seen) == list(range(6))


def test_triton_is_not_needed():
    if find_spec("triton") is None:
        with pytest.raises(RuntimeError, match="triton"):
            triton_kernels.use_triton()
