"""Chapter 13: kernels against plain torch and float64, how they are built,
what happens without a compiler, and the measurements of `measure`."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss.kernels as kernels
import gptoss.triton_kernels as triton_kernels
from gptoss.experts import packed_experts
from gptoss.generate import Sampler, generate
from gptoss.harmony import Tokenizer
from gptoss.model import GptOss, Linear
from gptoss.mxfp4 import PackedMXFP4, encode, mxfp4_linear

POCKET = Path(kernels.__file__).parent / "pocket"
OPS = torch.ops.gptoss
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GPTOSS_KERNELS", "auto")  # the other tests want plain torch
    COMPILED = kernels.load_kernels() == "C++ with AVX2"
if COMPILED:
    OPS.enable_kernels(False)
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "c++") is None, reason="no c++")
few = settings(deadline=None, max_examples=25)


@pytest.fixture(autouse=True)
def kernels_on():
    """Kernels for the tests of this file only."""
    if COMPILED:
        OPS.enable_kernels(True)
    yield
    if COMPILED:
        OPS.enable_kernels(False)


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    size = exact.double().norm().item()
    return (y.double() - exact.double()).norm().item() / (size or 1)


def three(run, *tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Results of the kernel, of plain torch, and of float64."""
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for x in tensors]
    with torch.inference_mode():
        fast = run(*tensors)
        with kernels.plain_torch():
            return fast, run(*tensors), run(*wide)


def check(run, *tensors, slack: float = 1.1) -> None:
    fast, slow, exact = three(run, *tensors)
    assert fast.dtype == slow.dtype and fast.shape == slow.shape
    # bf16's own rounding, 2**-9 at worst, plus what few numbers average out
    assert off(fast, exact) <= max(slack * off(slow, exact), 2e-3)


# ---- every operator, every shape

@few
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 11),
       st.booleans(), st.integers(0, 99))
def test_mxfp4_linear(tokens, rows, blocks, with_bias, seed):
    torch.manual_seed(seed)
    weight = encode(torch.randn(rows, 32 * blocks) * 2.0 ** (seed % 9 - 4))
    bias = torch.randn(rows).bfloat16() if with_bias else None
    check(mxfp4_linear, torch.randn(tokens, 32 * blocks).bfloat16(), *weight,
          bias)


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
    with kernels.plain_torch():
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
    packed = PackedMXFP4(*encode(torch.randn(2, 32, 32)))
    down = PackedMXFP4(*encode(torch.randn(2, 32, 32)[:, :, :]))
    for bad in (-1, 2):
        with pytest.raises(IndexError, match="expected 0 to 1"):
            OPS.packed_experts(
                torch.ones(1, 32).bfloat16(), torch.tensor([[bad]]),
                torch.ones(1, 1).bfloat16(), packed.blocks, packed.scales,
                torch.zeros(2, 32).bfloat16(), down.blocks[:, :, :1],
                down.scales[:, :, :1], torch.zeros(2, 32).bfloat16(), 7.0)


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
    with kernels.plain_torch():
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


# ---- the whole model

def test_the_shipped_model_chooses_the_same():
    model = GptOss.from_pretrained(POCKET)
    wide = GptOss.from_pretrained(POCKET, dtype=torch.float64)
    tokens = Tokenizer.from_pretrained(POCKET).encode(
        "Once upon a time there was a small fox named Mira. Mira lived in "
        "the forest. The best thing she had was a red kite.")
    with torch.inference_mode():
        exact = wide(torch.tensor([tokens]))
        fast = model(torch.tensor([tokens]))
        with kernels.plain_torch():
            slow = model(torch.tensor([tokens]))
    assert off(fast, exact) <= 1.02 * off(slow, exact)
    best, second = exact.topk(2).values.unbind(-1)
    clear = best - second > 0.25
    assert clear.float().mean() > 0.5
    for logits in (fast, slow):
        assert torch.equal(logits.argmax(-1)[clear], exact.argmax(-1)[clear])


def test_cache_and_no_cache_agree():
    model = GptOss.from_pretrained(POCKET)
    prompt = list(range(5, 95))  # longer than the window of 64
    with torch.inference_mode():
        whole = model(torch.tensor([prompt]))[0, -1].float()
        cache = model.new_cache()
        model(torch.tensor([prompt[:40]]), cache=cache)
        for token in prompt[40:]:
            last = model(torch.tensor([[token]]), cache=cache)[0, -1].float()
    assert off(last, whole) < 0.03


def test_generation_does_not_depend_on_threads():
    model = GptOss.from_pretrained(POCKET)
    threads, texts = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            texts.append(list(generate(model, [5, 6, 7], max_new_tokens=30,
                                       sampler=Sampler(temperature=0.0))))
    finally:
        torch.set_num_threads(threads)
    assert texts[0] == texts[1] == texts[2]


# ---- building and choosing

CHILD = """
import logging, sys, torch
from gptoss import kernels
from gptoss.mxfp4 import encode, mxfp4_linear
torch.manual_seed(0)
y = mxfp4_linear(torch.randn(3, 96).bfloat16(), *encode(torch.randn(20, 96)))
print(kernels.kernel_path())
print(y.float().sum().item())
"""


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
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("gptoss: no kernels") and (
        words in done.stderr)
    assert done.stdout.startswith("torch (")
    plain = child(GPTOSS_KERNELS="torch")
    assert done.stdout.splitlines()[1] == plain.stdout.splitlines()[1]


@needs_compiler
def test_the_portable_loop_computes_the_same():
    """Compiled once more, without vector instructions."""
    done = child(GPTOSS_KERNELS="portable")
    assert done.stdout.startswith("portable C++"), done.stderr
    fast, slow = (float(child(GPTOSS_KERNELS=choice).stdout.splitlines()[1])
                  for choice in ("auto", "torch"))
    portable = float(done.stdout.splitlines()[1])
    assert abs(portable - fast) <= 0.02 * abs(slow) + 0.2


@needs_compiler
def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(kernels.KernelError, match="compiler failed"):
        kernels.build()
    assert list((tmp_path / "gptoss").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "gptoss").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(kernels.KernelError, match="cannot compile"):
        kernels.build()


def test_the_library_is_named_by_what_it_depends_on(monkeypatch, tmp_path):
    names = {kernels.library_path(), kernels.library_path(portable=True)}
    monkeypatch.setenv("CXX", "some-other-compiler")
    names.add(kernels.library_path())
    monkeypatch.setattr(kernels, "OPTIONS", ("-O1",))
    names.add(kernels.library_path())
    assert len(names) == 4


# ---- measuring

def test_measure():
    found = kernels.measure(POCKET, prompt_tokens=20, new_tokens=8)
    assert found["kernels"] == kernels.kernel_path()
    assert found["prompt_tokens"] == 20 and found["load_seconds"] > 0
    decode = found["decode_tokens_per_second"]
    assert 0 < decode["low"] <= decode["median"] <= decode["high"]
    assert found["prefill_tokens_per_second"] == (
        20 / found["time_to_first_token"])
    assert 0 < found["read_bandwidth_share"] < 1
    assert found["peak_rss_bytes"] > 10 ** 7


def test_spread():
    found = kernels.spread([1.0] * 18 + [2.0, 4.0])
    assert found == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert kernels.spread([0.5, 1.0, 2.0]) == {
        "median": 1.0, "low": 0.5, "high": 2.0}


# ---- Triton, in its interpreter: bf16 is not among what that can multiply

TRITON = """
import sys, torch
from gptoss import triton_kernels as t
from gptoss.experts import packed_by_decoding
from gptoss.model import attention_in_tiles
from gptoss.mxfp4 import encode

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
        slots = order[first:min(first + 2, last)].tolist()
        assert all(ids.flatten()[slot] == e for slot in slots)
        seen += slots
    assert sorted(seen) == list(range(6))


def test_triton_is_not_needed():
    if find_spec("triton") is None:
        with pytest.raises(RuntimeError, match="triton"):
            triton_kernels.use_triton()
