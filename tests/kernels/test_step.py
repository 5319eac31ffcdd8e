"""The step of decode with fixed shapes, and the launches of the
Triton kernels under it. No GPU is needed: `cuda_graph` is replaced."""

import os
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import gptoss
from gptoss.kernels import step as step_module
from gptoss.kernels import triton_kernels
from gptoss.kernels.step import DecodeStep
from gptoss.model.cache import Cache, FullCache
from gptoss.model.rows import CacheError
from gptoss.model.transformer import GptOss, ModelError
from gptoss.text.generate import forward_step, generate
from gptoss.text.sampling import Sampler
from gptoss.weights.config import GptOssConfig
from gptoss.weights.encoding import encode

POCKET = Path(gptoss.__file__).parent / "pocket"
TINY = GptOssConfig(
    num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2,
    hidden_size=64, intermediate_size=32, vocab_size=50, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
    max_position_embeddings=512)
ASKS = (DataDependentOutputException, DynamicOutputShapeException)


def tiny(dtype: torch.dtype = torch.float64, packed: bool = True) -> GptOss:
    """A small model of random weights, sinks and biases included."""
    torch.manual_seed(1)
    model = GptOss(TINY, dtype, packed=packed).requires_grad_(False).eval()
    for name, x in model.named_parameters():
        x.copy_(torch.randn_like(x) * (1 if "sinks" in name else 0.3))
    for name, x in list(model.named_buffers()):
        if name.endswith("blocks"):
            scales = model.get_buffer(name.replace("blocks", "scales"))
            blocks, powers = encode(0.3 * torch.randn(*x.shape[:-2],
                                                      32 * x.shape[-2]))
            x.copy_(blocks)
            scales.copy_(powers)
    return model


def draw(model: GptOss, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape)


def pair(model: GptOss, batch: int = 1, room: int = 96, **options
         ) -> list[Cache]:
    return [model.new_cache(batch, room, **options) for _ in range(2)]


def whole_slots(patch: pytest.MonkeyPatch) -> None:
    """Let the ordinary path see all slots of full layers, as a step does."""
    update = FullCache.update

    def wide(self, k, v, plan):
        positions = update(self, k, v, plan)[2]
        more = self.k.shape[1] - positions.shape[1]
        return self.k, self.v, torch.nn.functional.pad(
            positions, (0, more), value=-1)
    patch.setattr(FullCache, "update", wide)


# ---- the same numbers

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [
    lambda dtype: GptOss.from_pretrained(POCKET, dtype=dtype), tiny,
    lambda dtype: tiny(dtype, packed=False)], ids=["pocket", "packed",
                                                   "dense"])
def test_bit_for_bit_with_whole_slots(model, dtype, monkeypatch):
    """Rows of 13 and 20 tokens, then 80 more: past either window."""
    model = model(dtype)
    whole_slots(monkeypatch)
    tokens, mask = draw(model, 2, 100), torch.ones(2, 20) > 0
    mask[0, :7] = False
    ours, theirs = pair(model, 2, 128)
    step = DecodeStep(model, ours)
    with torch.inference_mode():
        for cache in (ours, theirs):
            model(tokens[:, :20], cache, mask)
        for t in range(20, 100):
            token = tokens[:, t:t + 1]
            assert torch.equal(step(token), model(token, theirs))
    assert ours.lengths.tolist() == [93, 100]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)
    assert torch.equal(ours.rows.ring, theirs.rows.ring)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11),
                                              (torch.float32, 1e-3)])
def test_near_the_ordinary_path(dtype, bound):
    """A sum over all slots may be cut otherwise than over a part."""
    model = tiny(dtype)
    ours, theirs = pair(model)
    step = DecodeStep(model, ours)
    for token in draw(model, 90, 1, 1):
        assert (step(token) - model(token, theirs)).abs().max() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_text(dtype):
    model = GptOss.from_pretrained(POCKET, dtype=dtype)
    for sampler in (Sampler(0.0), Sampler(0.8, top_k=20)):
        plain, ours = (list(generate(
            model, [5, 6, 7], sampler=sampler, seed=3, max_new_tokens=100,
            decode=decode)) for decode in (forward_step, DecodeStep))
        assert plain == ours and len(ours) == 100


def test_generate_goes_on_with_the_cache_of_a_step():
    model = tiny()
    ours, theirs = pair(model)
    for prompt in ([1, 2, 3], [4], [5, 6]):
        texts = [list(generate(model, prompt, cache=cache, decode=decode,
                               sampler=Sampler(0.0), max_new_tokens=12))
                 for cache, decode in ((ours, DecodeStep),
                                       (theirs, forward_step))]
        assert texts[0] == texts[1]
    assert ours.length == theirs.length == 39
    left = 96 - 39  # until the cache is full: the last token needs no room
    text = list(generate(model, [1], cache=ours, decode=DecodeStep,
                         max_new_tokens=999))
    assert len(text) == left and ours.length == 96


def test_a_step_feeds_its_own_choice():
    model = tiny()
    ours, theirs = pair(model, 3)
    step, token = DecodeStep(model, ours), draw(model, 3, 1)
    logits = step(token)
    for _ in range(30):
        token = model(token, theirs).argmax(-1)
        assert torch.equal(logits.argmax(-1), token)
        logits = step()


# ---- what a graph wants

class Recorder:
    """Stands in for `cuda_graph`: warms up, then replays by running."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run, undo):
        self.captured += 1
        for _ in range(3):
            run()
            undo()

        def replay() -> None:
            self.replayed += 1
            run()
        return replay


def test_recorded_once_and_replayed():
    """Even where the warm-up would not have room for three tokens."""
    model, recorder = tiny(), Recorder()
    ours, theirs = pair(model, 2, room=21)
    step = DecodeStep(model, ours, recorder)
    tokens = draw(model, 2, 21)
    for cache in (ours, theirs):
        model(tokens[:, :20], cache)
    assert (step(tokens[:, 20:]) - model(tokens[:, 20:], theirs)
            ).abs().max() < 1e-11
    assert ours.lengths.tolist() == [21, 21]
    assert torch.equal(ours.rows.ring, theirs.rows.ring)
    for cache in (ours, theirs):
        cache.reset()
    for t in range(20):
        a, b = step(tokens[:, t:t + 1]), model(tokens[:, t:t + 1], theirs)
        assert (a - b).abs().max() < 1e-11
    assert (recorder.captured, recorder.replayed) == (1, 21)


def test_cuda_graph_warms_up_aside_and_undoes(monkeypatch):
    """The calls in their order, on a stand-in for torch.cuda."""
    log = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Inside:
        def __init__(self, what):
            self.what = getattr(what, "name", "graph")

        def __enter__(self):
            log.append(f"in {self.what}")

        def __exit__(self, *_):
            log.append(f"out {self.what}")

    cuda = SimpleNamespace(
        current_stream=lambda: Stream("current"), Stream=Stream,
        stream=Inside, graph=Inside,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    monkeypatch.setattr(step_module.torch, "cuda", cuda)
    step_module.cuda_graph(lambda: log.append("run"),
                           lambda: log.append("undo"))()
    assert log == ["side waits for current", "in side",
                   *3 * ["run", "undo"], "out side",
                   "current waits for side", "in graph", "run", "out graph",
                   "replay"]


def test_nothing_moves():
    model = tiny()
    ours = model.new_cache(2, 96, slack=3)
    step = DecodeStep(model, ours)

    def places():
        tensors = [step.tokens, step.lengths, step.ring, step.logits,
                   ours.rows.lengths, ours.rows.ring,
                   *(x for layer in ours.layers for x in (layer.k, layer.v))]
        return [(x.data_ptr(), x.shape, x.stride()) for x in tensors]

    step(draw(model, 2, 1))
    before = places()
    for t in range(60):
        step(None if t % 2 else draw(model, 2, 1))
        assert places() == before
    ours.rollback(59)
    step(draw(model, 2, 1))
    assert places() == before


def shapes_of_a_step(step: DecodeStep) -> list:
    """Operators of a step and the shapes of what they return."""
    seen = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            seen.append((operator, getattr(out, "shape", None)))
            return out
    with Shapes():
        step._run()
    return seen


def test_every_step_does_the_same(monkeypatch):
    """The experts aside, which plain torch splits by size; as one they are
    what `use_triton` makes of them."""
    model = tiny()
    for layer in model.layers:
        monkeypatch.setattr(layer.mlp.experts, "forward",
                            lambda x, ids, weights: x * weights[:, :1])
    step = DecodeStep(model, model.new_cache(1, 96))
    step(draw(model, 1, 1))
    first = shapes_of_a_step(step)
    for _ in range(40):
        step()
    assert shapes_of_a_step(step) == first and len(first) > 100


def test_no_step_asks_for_a_number(monkeypatch):
    """A fake tensor has a shape and no content: asking fails."""
    model = tiny()
    ours, theirs = pair(model, 2)
    step = DecodeStep(model, ours)
    step(draw(model, 2, 1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert step().shape == (2, 1, 50)
        token = torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(ASKS):  # what the ordinary path does
            model(token, theirs)
        with pytest.raises(ASKS):
            theirs.begin(token)
        run = DecodeStep._run

        def asking(self):
            run(self)
            return int(self.lengths.max())
        monkeypatch.setattr(DecodeStep, "_run", asking)
        step._launch = step._run
        with pytest.raises(ASKS):
            step()


def test_what_launches_the_kernels_asks_nothing(monkeypatch):
    """`experts_by_triton` and `attention_by_triton` on fake tensors, with
    kernels that do nothing; plain torch's experts do ask."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None
    monkeypatch.setattr(triton_kernels, "triton", SimpleNamespace(
        cdiv=lambda a, b: -(-a // b)))
    for name in ("packed_rows", "attend_tile"):
        monkeypatch.setattr(triton_kernels, name, Kernel())
    E, K, N, D, F = 4, 2, 3, 64, 32
    with FakeTensorMode():
        experts = (torch.randn(N, D), torch.randint(E, (N, K)),
                   torch.rand(N, K),
                   *(torch.zeros(shape, dtype=torch.uint8) for shape in (
                       (E, 2 * F, D // 32, 16), (E, 2 * F, D // 32))),
                   torch.randn(E, 2 * F),
                   *(torch.zeros(shape, dtype=torch.uint8) for shape in (
                       (E, D, F // 32, 16), (E, D, F // 32))),
                   torch.randn(E, D), 7.0)
        assert triton_kernels.experts_by_triton(*experts).shape == (N, D)
        from gptoss.moe.experts import packed_by_decoding
        with pytest.raises(ASKS):
            packed_by_decoding(*experts)
        q, k = torch.randn(2, 1, 8, 16), torch.randn(2, 4096, 2, 16)
        y = triton_kernels.attention_by_triton(
            q, k, k, torch.randn(8), torch.zeros(2, 1, dtype=torch.int64),
            torch.zeros(2, 4096, dtype=torch.int64), 0, 0.25)
    assert y.shape == q.shape
    assert grids == [(2, 4), (2, 4), (1, 4, 64)]


# ---- the cache between steps

few = settings(deadline=None, max_examples=40)
MODEL = tiny()


@few
@given(st.data(), st.sampled_from([0, 3]))
def test_any_mixture_is_as_if_there_were_no_step(data, slack):
    torch.manual_seed(0)
    ours, theirs = pair(MODEL, 2, room=64, slack=slack)
    steps = [DecodeStep(MODEL, ours, capture) for capture in (None,
                                                              Recorder())]
    history = [[], []]
    for _ in range(data.draw(st.integers(5, 40))):
        what = data.draw(st.sampled_from("sssscr"))
        if what == "r" and ours.length:
            length = max(0, ours.length - data.draw(st.integers(1, 12)))
            starts = [cache.rollback(length) for cache in (ours, theirs)]
            assert starts[0] == starts[1]
            history = [row[:length] for row in history]
            assert torch.equal(ours.lengths, theirs.lengths)
            behind = [len(row) - n for row, n in zip(
                history, ours.lengths.tolist(), strict=True)]
            if not max(behind):
                continue
            with pytest.raises(CacheError, match="to replay"):
                steps[0](torch.zeros(2, 1, dtype=torch.int64))
            wide = max(behind)
            mask = torch.tensor([[t >= wide - n for t in range(wide)]
                                 for n in behind])
            tokens = torch.tensor([[*[0] * (wide - n), *row[len(row) - n:]]
                                   for row, n in zip(history, behind,
                                                     strict=True)])
        elif what == "c":  # a chunk with padding in it
            tokens = draw(MODEL, 2, data.draw(st.integers(1, 12)))
            mask = torch.rand(tokens.shape) < 0.7
            for row, new, real in zip(history, tokens, mask, strict=True):
                row += new[real].tolist()
        else:
            tokens, mask = draw(MODEL, 2, 1), torch.ones(2, 1) > 0
            for row, new in zip(history, tokens, strict=True):
                row += new.tolist()
        if max(map(len, history)) > 64:
            return
        expected = MODEL(tokens, theirs, mask)
        got = (steps[data.draw(st.integers(0, 1))](tokens) if what == "s"
               else MODEL(tokens, ours, mask))
        assert torch.allclose(got[mask], expected[mask], atol=1e-10)
        assert torch.equal(ours.lengths, theirs.lengths)
        assert torch.equal(ours.rows.ring, theirs.rows.ring)


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("capture", [None, Recorder], ids=["plain", "graph"])
def test_a_step_that_fails_loses_nothing(layer, capture, monkeypatch):
    """But one of the slack + 1 tokens that go back without a replay."""
    ours, theirs = pair(MODEL, slack=3)
    tokens = draw(MODEL, 1, 30)
    for cache in (ours, theirs):
        MODEL(tokens[:, :20], cache)
    step = DecodeStep(MODEL, ours, capture and capture())
    with monkeypatch.context() as patch:
        def fail(*_):
            raise MemoryError("no room")
        patch.setattr(MODEL.layers[layer].mlp, "forward", fail)
        with pytest.raises(MemoryError):
            step(tokens[:, 20:21])
    for back in range(7):
        for run in (MODEL, None):
            caches = deepcopy([ours, theirs])
            starts = [cache.rollback(20 - back) for cache in caches]
            assert (starts[0] == 20 - back) == (back <= 3)
            assert (starts[1] == 20 - back) == (back <= 4)
            for cache, start in zip(caches, starts, strict=True):
                if start < 20 - back:
                    MODEL(tokens[:, start:20 - back], cache)
            run = run or DecodeStep(MODEL, caches[0])
            got, again = (run(tokens[:, t:t + 1], *[caches[0]] * (
                run is MODEL)) for t in (20 - back, 21 - back))
            want = MODEL(tokens[:, 20 - back:22 - back], caches[1])
            if run is MODEL:
                got = torch.cat([got, again], 1)
                assert torch.allclose(got, want, atol=1e-11)
            assert torch.allclose(again[:, -1], want[:, -1], atol=1e-11)
    assert torch.allclose(step(tokens[:, 20:21]),
                          MODEL(tokens[:, 20:21], theirs), atol=1e-11)


def test_warming_up_is_undone():
    ours = MODEL.new_cache(2, 96, slack=1)
    MODEL(draw(MODEL, 2, 20), ours)

    def capture(run, undo):
        state = (step.tokens, step.lengths, step.ring)
        before = [x.clone() for x in state]
        run()
        assert not any(map(torch.equal, state, before))
        undo()
        assert all(map(torch.equal, state, before))
        return run
    step = DecodeStep(MODEL, ours, capture)
    step(torch.full((2, 1), 49))
    assert ours.lengths.tolist() == [21, 21]


def test_interrupted_after_all_was_done():
    """The host has not counted the token; it looks again."""
    ours = MODEL.new_cache(1, 22)
    MODEL(draw(MODEL, 1, 19), ours)
    step, token = DecodeStep(MODEL, ours), draw(MODEL, 1, 1)
    step(token)

    def interrupted() -> None:
        step._run()
        raise KeyboardInterrupt
    step._launch = interrupted
    with pytest.raises(KeyboardInterrupt):
        step(token)
    step._launch = step._run
    assert ours.length == 21
    step(token)
    with pytest.raises(CacheError, match="max_tokens is 22"):
        step(token)


def test_where_a_replay_began_is_not_forgotten():
    """What the rings hold before position 22 is not right."""
    ours, theirs = pair(MODEL, slack=3)
    tokens = draw(MODEL, 1, 30)
    for cache, run in ((ours, DecodeStep(MODEL, ours)), (theirs, None)):
        MODEL(tokens, cache)
        assert cache.rollback(22) == 8
        MODEL(tokens[:, 8:22], cache)
        (run or (lambda token: MODEL(token, theirs)))(tokens[:, 22:23])
        assert cache.rollback(20) == 6


# ---- refusing

def test_errors(monkeypatch):
    model = tiny()
    for other in (GptOss(TINY, torch.float32).new_cache(1, 96),
                  Cache(TINY, 1, 96, torch.float64, "meta")):
        with pytest.raises(CacheError, match=r"new_cache\(\)"):
            DecodeStep(model, other)
    cache = model.new_cache(1, 4)
    step, token = DecodeStep(model, cache), draw(model, 1, 1)
    with pytest.raises(ModelError, match="found None"):
        step()
    for wrong in (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 1),
                  torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[50]]),
                  torch.tensor([[-1]])):
        with pytest.raises(ModelError, match="token"):
            step(wrong)
        assert cache.length == 0
    for _ in range(4):
        step(token)
    before = [x.clone() for layer in cache.layers for x in (layer.k,
                                                            layer.v)]
    for again in (token, None):
        with pytest.raises(CacheError, match="max_tokens is 4.* 5 tokens"):
            step(again)
    after = [x for layer in cache.layers for x in (layer.k, layer.v)]
    assert all(map(torch.equal, before, after)) and cache.length == 4
    cache.rollback(3)
    with pytest.raises(ModelError, match="found None"):
        step()  # the choice before is not the cache's any more
    monkeypatch.setattr(model.layers[2].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(token, cache)
    with pytest.raises(CacheError, match="rollback"):
        step(token)


def test_can_record():
    """On CUDA plain torch would ask without `use_triton`; dense experts
    always. On the CPU nothing is recorded without kernels."""
    code = """
import sys, torch
from gptoss.kernels import step
from gptoss.weights.config import GptOssConfig
from gptoss.model.transformer import GptOss
torch.library.impl("gptoss::packed_experts", "CUDA", lambda *a: a[0])
config = GptOssConfig.gpt_oss_20b()
print([step.can_record(GptOss(config, device="meta", packed=packed))
       for packed in (True, False)])
print(step.can_record(GptOss.from_pretrained(sys.argv[1])))
"""
    done = subprocess.run([sys.executable, "-c", code, str(POCKET)],
                          text=True, capture_output=True, timeout=280,
                          env=os.environ | {"GPTOSS_KERNELS": "torch"})
    assert done.stdout == "[True, False]\nFalse\n", done.stderr


# ---- tiles of tokens: as many as there can be

def tiles_by_counting(ids, experts, size):
    """The former definition: only the tiles that there are."""
    counts = torch.bincount(ids.flatten(), minlength=experts)
    tiles = (counts + size - 1) // size
    expert = torch.repeat_interleave(tiles)
    ends, before = counts.cumsum(0), tiles.cumsum(0) - tiles
    number = torch.arange(len(expert)) - before[expert]
    begin = (ends - counts)[expert] + number * size
    return expert, begin, ends[expert]


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_token_tiles_exhaustively(experts, size):
    """Every choice of up to six picks; the bound is reached, not passed."""
    for picks in range(1, 7):
        most = 0
        for ids in product(range(experts), repeat=picks):
            ids = torch.tensor(ids)
            order, *ours = triton_kernels.token_tiles(ids, experts, size)
            right = tiles_by_counting(ids, experts, size)
            there = len(right[0])
            assert torch.equal(order.long(), ids.argsort(stable=True))
            for a, b in zip(ours, right, strict=True):
                assert a.dtype == torch.int32
                assert torch.equal(a[:there].long(), b)
            expert, begin, end = ours
            assert (begin[there:] == end[there:]).all()
            assert (expert < experts).all() and (end <= picks).all()
            most = max(most, there)
        assert most == len(ours[0])


# ---- Triton, in its interpreter

TRITON = """
import sys, torch
import torch.nn.functional as F
from gptoss.kernels import triton_kernels as t
from gptoss.model.transformer import GptOss
from gptoss.model.ops import attention_in_tiles
from gptoss.kernels.step import DecodeStep
sys.path.insert(0, sys.argv[1])
from test_step import tiny

torch.manual_seed(0)
# attention: keys in 1 to 7 parts, of a cache filled to `filled`, no more read
for window in (0, 9):
    for filled, programs in ((1, 256), (5, 8), (33, 256), (70, 12), (200, 1),
                             (200, 28)):
        t.PROGRAMS = programs
        B, S, H, G, C = 2, 200, 8, 2, 16
        q = torch.randn(B, 1, H, C)
        k, v = torch.randn(2, B, S, G, C).unbind()
        slots = torch.arange(S)
        q_pos = torch.tensor([[filled - 1], [max(0, filled - 4)]])
        k_pos = slots.where(slots <= q_pos, -1)
        for sinks in (torch.randn(H), torch.full((H,), float("-inf"))):
            right = attention_in_tiles(
                *(x.double() for x in (q, k, v, sinks)), q_pos, k_pos,
                window, 0.25)
            seen = (k_pos >= 0) & ((window == 0) | (k_pos > q_pos - window))
            holes = [x.masked_fill(~seen[..., None, None], float("nan"))
                     for x in (k, v)]
            y = t.attention_by_triton(q, *holes, sinks, q_pos, k_pos, window,
                                      0.25)
            assert (y - right).abs().max() < 1e-6, (window, filled, programs)
nothing = t.attention_by_triton(q, *holes, sinks, q_pos,
                                torch.full_like(k_pos, -1), 0, 0.25)
assert (nothing == 0).all()

# the whole step on both kernels, against plain torch in float64
exact, model = tiny(), tiny(torch.float32)
for x, y in zip(model.state_dict().values(), exact.state_dict().values()):
    y.copy_(x)
tokens = torch.randint(50, (2, 24))
cache = exact.new_cache(2, 40)
right = torch.cat([exact(x, cache) for x in tokens.split(1, 1)], 1)
torch.library.impl("gptoss::packed_experts", "CPU", t.experts_by_triton)
torch.library.impl("gptoss::sink_attention", "CPU", t.attention_by_triton)
cache = model.new_cache(2, 40)
# not recorded: that is for the C++ kernels, which are not loaded here
step = DecodeStep(model, cache, lambda run, undo: run)
model(tokens[:, :5], cache)
for n in range(5, 24):
    error = (step(tokens[:, n:n + 1])[:, 0] - right[:, n]).norm()
    assert error < 1e-4 * right[:, n].norm(), (n, error)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
def test_a_step_on_triton_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", TRITON, str(Path(__file__).parent)],
        text=True, capture_output=True, timeout=580,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                          "GPTOSS_KERNELS": "torch"})
    assert done.returncode == 0, done.stderr[-2000:]


COMPILE = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gptoss.kernels import triton_kernels as t

def made(kernel, sizes, integers, **types):
    kinds = types | dict.fromkeys(integers.split(), "i32")
    names = kernel.arg_names
    return compile(ASTSource(
        fn=kernel, signature={n: kinds.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): size for n, size in sizes.items()}),
        target=GPUTarget("cuda", int(sys.argv[1]), 32)).asm["cubin"]

for x in ("*bf16", "*fp32"):
    assert made(t.attend_tile, dict(C=64, J=8, N=16, KEYS=32),
                "T S H G window kb ks kg", q=x, k=x, v=x, q_pos="*i64",
                k_pos="*i64", y="*fp32", lse="*fp32", scale="fp32")
    for N in (16, 64):
        assert made(t.packed_rows, dict(K=4, M=32, N=N, STEP=64),
                    "rows blocks", x=x, w="*u8", s="*u8", y="*fp32",
                    order="*i32", tile_expert="*i32", tile_begin="*i32",
                    tile_end="*i32")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_triton_compiles_the_kernels(architecture, tmp_path):
    """To machine code of NVIDIA's 8.0 and 9.0; that needs no GPU."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, architecture], text=True,
        capture_output=True, timeout=280,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
