"""Kernels against plain torch and float64: every operator, special numbers,
and the whole model."""

import os
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.kernels import build
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


@pytest.mark.parametrize("tokens", range(1, 15))
def test_each_number_of_few_tokens_by_dense_rows(tokens):
    """Last slabs that are full or not, rows that fill strips or do not."""
    torch.manual_seed(tokens)
    for columns in (32, 480, 512, 992, 2880):
        for rows in (3, 4, 130):
            check(OPS.linear, torch.randn(tokens, columns).bfloat16(),
                  torch.randn(rows, columns).bfloat16(),
                  torch.randn(rows).bfloat16())


@pytest.mark.skipif(LOADED != "C++ with AVX-512 and bf16",
                    reason="squares, or other orders of sums")
def test_a_token_of_twelve_has_the_bits_that_it_has_alone():
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 2880).bfloat16() for n in (12, 150))
    with torch.inference_mode():
        whole = OPS.linear(x, weight, None)
        for tokens in range(1, 12):
            assert torch.equal(OPS.linear(x[:tokens], weight, None),
                               whole[:tokens]), tokens


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


def in_float64(q, k, v, sinks, q_pos, k_pos, window, scale):
    """All scores at once, of one batch row and head after another."""
    B, T, H, C = q.shape
    share = H // k.shape[2]
    y = torch.zeros(B, T, H, C, dtype=torch.float64)
    for b in range(B):
        seen = (k_pos[b] >= 0) & (k_pos[b] <= q_pos[b, :, None])
        if window:
            seen &= k_pos[b] > q_pos[b, :, None] - window
        for h in range(H):
            keys, values = (x[b, :, h // share].double() for x in (k, v))
            score = scale * (q[b, :, h].double() @ keys.T)
            score = score.masked_fill(~seen, -torch.inf)
            column = sinks[h].double().expand(T, 1)
            y[b, :, h] = torch.cat([score, column], 1).softmax(1)[:, :-1] \
                @ values
    return y


# B, T, S, H, G, C, window: decode of a long text, in one range and in many;
# drafts; batches; prefill of several tiles of tokens; groups of other than
# eight rows; a window that begins anywhere; every head that the kernel takes
LONG = [
    (1, 1, 512, 8, 1, 64, 0), (1, 1, 513, 8, 1, 64, 0),
    (1, 1, 17_000, 8, 2, 64, 0), (1, 1, 33_000, 3, 1, 32, 0),
    (2, 1, 5000, 8, 2, 64, 128), (8, 1, 1100, 8, 2, 16, 0),
    (1, 2, 3000, 8, 1, 64, 0), (4, 3, 2000, 16, 2, 64, 40),
    (1, 8, 4100, 8, 1, 128, 0), (1, 16, 1000, 8, 1, 64, 0),
    (1, 17, 1000, 8, 1, 64, 0), (1, 20, 900, 5, 5, 48, 0),
    (2, 20, 900, 14, 2, 80, 100), (1, 300, 900, 8, 1, 64, 128),
    (1, 300, 300, 8, 1, 64, 0), (2, 70, 400, 6, 2, 256, 0),
    (1, 130, 700, 4, 4, 240, 65), (3, 33, 130, 1, 1, 16, 1),
]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_attention_over_long_texts(shape, mixed):
    """As text leaves it, and as a ring may: mixed, with empty slots, rows of
    different lengths and padding among the queries."""
    B, T, S, H, G, C, window = shape
    torch.manual_seed(S + T)
    k, v = (torch.randn(B, G, S, C).bfloat16().transpose(1, 2)
            for _ in range(2))
    q, sinks = torch.randn(B, T, H, C).bfloat16(), torch.randn(H).bfloat16()
    k_pos = torch.arange(S).expand(B, S).clone()
    q_pos = torch.arange(S - T, S).expand(B, T).clone()
    if mixed:
        for b in range(B):
            k_pos[b] = k_pos[b, torch.randperm(S)]
            k_pos[b, torch.rand(S) < 0.1] = -1
            q_pos[b] -= 3 * b  # the last keys of this row are to come
        q_pos[torch.rand(B, T) < 0.1] = -1
    given = (q, k, v, sinks, q_pos, k_pos, window, C ** -0.5)
    exact = in_float64(*given)
    with torch.inference_mode():
        fast = OPS.sink_attention(*given)
        with build.plain_torch():
            slow = OPS.sink_attention(*given)
    assert off(fast, exact) <= max(1.02 * off(slow, exact), 1e-12)
    assert not fast[q_pos < 0].any()


def test_attention_sees_a_key_wherever_it_lies():
    """One key that outweighs all others, in each slot of two chunks and more:
    a tile that is left out by mistake is seen."""
    S, C = 150, 32
    q = torch.ones(1, 1, 8, C).bfloat16()
    v = torch.arange(S).remainder(64).bfloat16()[None, :, None, None].expand(
        1, S, 1, C).contiguous()
    sinks = torch.full((8,), -torch.inf).bfloat16()
    for slot in range(S):
        k = torch.zeros(1, S, 1, C).bfloat16()
        k[0, slot] = 8
        for window in (0, 1, 20):
            for k_pos in (torch.arange(S), (torch.arange(S) + 77) % S):
                at = k_pos[slot].view(1, 1)
                y = OPS.sink_attention(q, k, v, sinks, at, k_pos[None],
                                       window, 1.0)
                assert (y == slot % 64).all()


def test_attention_with_scores_beyond_any_exponent():
    """Sinks and scores far from zero: no NaN where plain torch has none."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 700, 1, 64).bfloat16()
    seen, at = torch.arange(700)[None], torch.tensor([[699]])
    for size, sink in ((100, 0), (1, 3e38), (1, -3e38), (1e4, -torch.inf),
                       (1, torch.inf), (0, 90)):
        q = size * torch.randn(1, 1, 8, 64)
        given = (q.bfloat16(), k, v, torch.full((8,), sink).bfloat16(), at,
                 seen, 0, 0.125)
        fast = OPS.sink_attention(*given)
        with build.plain_torch():
            slow = OPS.sink_attention(*given)
        torch.testing.assert_close(fast, slow, rtol=2 ** -7, atol=1e-5,
                                   equal_nan=True)


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


@pytest.mark.skipif(not COMPILED, reason="torch decodes to bf16 first")
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 10, 13])
@pytest.mark.parametrize("start, stop", [(2, 253), (0, 256)])
@pytest.mark.parametrize("sign", [0, 8])
def test_every_scale_is_as_decoded(tokens, start, stop, sign):
    """Those that bf16 has room for, and all, which go another way; eight
    codes of one sign under each, so that no sum hides an infinity."""
    codes = torch.arange(8, dtype=torch.uint8).repeat(2) | 16 * 2 | 17 * sign
    blocks = codes.expand(stop - start, 3, 16).contiguous()
    scales = torch.full((stop - start, 3), 2, dtype=torch.uint8)
    scales[:, 1] = torch.arange(start, stop)
    for size in (2.0 ** -60, 2.0 ** 60):
        x = size * torch.rand(tokens, 96).bfloat16()
        found = mxfp4_linear(x, blocks, scales).double()
        exact = x.double() @ decode(blocks, scales, torch.float64).T
        assert found[:, 255 - start:].isnan().all()
        fits = (2.0 ** -106 < exact.abs()) & (exact.abs() < 2.0 ** 126)
        assert fits.sum() > 150 * tokens
        assert ((found - exact).abs() < 2.0 ** -7 * exact.abs())[fits].all()


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
