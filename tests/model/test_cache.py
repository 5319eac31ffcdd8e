"""The cache, held against a stack of attention layers without one."""
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.attention.masks import (
    positions_from_mask,
    receptive_field,
    visible,
)
from gptoss.attention.sinks import attention_concat
from gptoss.model.cache import Cache, FullCache, SlidingCache, plan_chunk
from gptoss.model.rows import CacheError, Rows, roll_back
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import cache_bytes

H, G, C, D, LONGEST = 4, 2, 8, 16, 1024
S, A = "sliding_attention", "full_attention"
STACKS = ((S, A, S, A), (S, S, A, S), (A, S, A, A, S), (S, S), (A, A))


def make_config(types, window, longest=LONGEST):
    return GptOssConfig(
        num_hidden_layers=len(types), num_local_experts=2,
        num_experts_per_tok=1, vocab_size=64, hidden_size=D,
        intermediate_size=32, head_dim=C, num_attention_heads=H,
        num_key_value_heads=G, sliding_window=window,
        layer_types=tuple(types), max_position_embeddings=longest,
        initial_context_length=longest // 32)


class Stack:
    """Attention layers with sinks, nothing else; float64 unless told."""

    def __init__(self, types=STACKS[0], window=16, dtype=torch.float64,
                 longest=LONGEST):
        g = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(
                dtype)
        self.config, self.dtype = make_config(types, window, longest), dtype
        self.embed, self.place = draw(64, D), draw(longest, D)
        self.layers = [
            (draw(D, (H + 2 * G) * C) / 2, draw(H * C, D) / 4, draw(H))
            for _ in types]

    def new_cache(self, batch=1, **options):
        return Cache(self.config, batch, dtype=self.dtype, **options)

    def __call__(self, tokens, cache=None, mask=None):
        """tokens (B, T) -> (B, T, D), rows of padding zero."""
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        positions = positions_from_mask(
            mask, None if cache is None else cache.lengths)
        plan = None if cache is None else cache.begin(positions)
        x = self.embed[tokens] + self.place[positions]
        B, T, _ = x.shape
        for i, (into, out, sinks) in enumerate(self.layers):
            normed = x / x.norm(dim=-1, keepdim=True) * D ** 0.5
            qkv = (normed @ into).view(B, T, H + 2 * G, C)
            q, k, v = qkv.split((H, G, G), 2)
            where = positions
            if plan is not None:
                k, v, where = plan.update(i, k, v)
            sliding = self.config.layer_types[i] == S
            seen = visible(positions, where,
                           self.config.sliding_window if sliding else None)
            x = x + attention_concat(q, k, v, sinks, seen,
                                     C ** -0.5).flatten(2) @ out
        if cache is not None:
            cache.commit(plan)
        return x * mask[..., None]


@functools.cache
def stack(types=STACKS[0], window=16):
    return Stack(types, window)


def draw_tokens(*shape, seed=1):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(
        seed))


def close(got, expected, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# ------------------------------------------------- one forward = many


@pytest.mark.parametrize("window", (16, 128))
def test_every_split_of_300_tokens(window):
    net, tokens = stack(window=window), draw_tokens(1, 300)
    whole = net(tokens)
    for split in range(301):
        cache = net.new_cache(max_tokens=300)
        cuts = sorted({0, split, min(split + 1, 300), 300})
        parts = [net(tokens[:, a:b], cache)
                 for a, b in zip(cuts, cuts[1:], strict=False)]
        close(torch.cat(parts, 1), whole)
        assert cache.length == 300


@pytest.mark.parametrize("split", (0, 1, 15, 16, 17, 127, 128, 129, 299))
@pytest.mark.parametrize("window", (16, 128))
def test_prefill_then_token_by_token(window, split):
    net, tokens = stack(window=window), draw_tokens(1, 300)
    cache = net.new_cache()
    parts = [net(tokens[:, :split], cache)] if split else []
    parts += [net(tokens[:, i:i + 1], cache) for i in range(split, 300)]
    close(torch.cat(parts, 1), net(tokens))


def test_fp32_and_bf16_within_their_own_rounding():
    tokens = draw_tokens(1, 200)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.5)):
        net = Stack(dtype=dtype)
        cache = net.new_cache(slack=3)
        parts = [net(tokens[:, a:a + 4], cache) for a in range(0, 200, 4)]
        close(torch.cat(parts, 1), net(tokens), atol=tolerance)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=8),
       st.sampled_from(STACKS), st.sampled_from((1, 2, 5, 16, 33)),
       st.integers(0, 9))
def test_any_chunking(chunks, types, window, slack):
    net, tokens = stack(types, window), draw_tokens(1, sum(chunks))
    cache = net.new_cache(slack=slack)
    parts = [net(part, cache) for part in tokens.split(chunks, dim=1)]
    close(torch.cat(parts, 1), net(tokens))


# ------------------------------------------------- batches and padding


def feed(net, cache, rows, mask, done):
    """Feed the next tokens of each row at the true places of mask (B, T).

    rows: B lists of tokens; done: B counts, updated. Returns outputs of each
    row's real tokens.
    """
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    for b, row in enumerate(rows):
        n = int(mask[b].sum())
        tokens[b, mask[b]] = torch.tensor(row[done[b]:done[b] + n],
                                          dtype=torch.int64)
        done[b] += n
    out = net(tokens, cache, mask)
    return [out[b, mask[b]] for b in range(len(rows))]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_padding(data):
    """Left, right, middle, empty rows; every row as if it were alone."""
    batch = data.draw(st.integers(1, 4))
    window = data.draw(st.sampled_from((2, 5, 16)))
    slack = data.draw(st.sampled_from((0, 3)))
    net = stack(data.draw(st.sampled_from(STACKS)), window)
    rows = draw_tokens(batch, 200).tolist()
    cache, done = net.new_cache(batch, slack=slack), [0] * batch
    outputs = [[] for _ in rows]
    for _ in range(data.draw(st.integers(1, 6))):
        width = data.draw(st.sampled_from((1, 1, 2, 7, 30)))
        bits = data.draw(st.lists(st.booleans(), min_size=batch * width,
                                  max_size=batch * width))
        parts = feed(net, cache, rows, torch.tensor(bits).view(batch, width),
                     done)
        for row, part in zip(outputs, parts, strict=True):
            row.append(part)
    assert cache.lengths.tolist() == done
    for row, n, parts in zip(rows, done, outputs, strict=True):
        alone = net(torch.tensor([row[:n]], dtype=torch.int64))[0]
        close(torch.cat(parts), alone)


@pytest.mark.parametrize("side", ("left", "right", "middle"))
def test_unequal_prompts_then_decode(side):
    """Prompts of 5, 40 and 300 tokens padded to 300, then 20 steps."""
    net, lengths = stack(), (5, 40, 300)
    rows = draw_tokens(3, 320).tolist()
    mask = torch.zeros(3, 300, dtype=torch.bool)
    for b, n in enumerate(lengths):
        first = {"left": 300 - n, "right": 0, "middle": (300 - n) // 2}[side]
        mask[b, first:first + n] = True
    cache, done = net.new_cache(3), [0, 0, 0]
    outputs = [feed(net, cache, rows, mask, done)]
    one = torch.ones(3, 1, dtype=torch.bool)
    for step in range(20):
        one[1] = step < 7  # a row that stops early is padding from then on
        outputs.append(feed(net, cache, rows, one, done))
    assert done == [25, 47, 320] == cache.lengths.tolist()
    for b, row in enumerate(rows):
        alone = net(torch.tensor([row[:done[b]]]))[0]
        close(torch.cat([part[b] for part in outputs]), alone)


def test_padding_is_never_stored():
    net = stack()
    cache = net.new_cache(2)
    mask = torch.tensor([[False, True, True, False], [True] * 4])
    net(draw_tokens(2, 4), cache, mask)
    k = torch.full((2, 1, G, C), float("nan"), dtype=torch.float64)
    alone = torch.tensor([[2], [-1]])
    k[0] = 1.0  # row 1 is padding: its NaN must not reach the cache
    plan = cache.begin(alone)
    for i in range(4):
        keys, values, where = plan.update(i, k, k)
        assert not keys.isnan().any() and not values.isnan().any()
        held = [sorted(p for p in row if p >= 0) for row in where.tolist()]
        assert held == [[0, 1, 2], [0, 1, 2, 3]]


# ------------------------------------------------------------ rollback


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_editing(data):
    """Feed, take back, feed differently, in any order, in any batch.

    Every output is compared with a forward of the row's tokens from
    scratch, except those of replayed positions.
    """
    batch = data.draw(st.sampled_from((1, 1, 2, 3)))
    window = data.draw(st.sampled_from((1, 2, 4, 8)))
    slack = data.draw(st.sampled_from((0, 1, 6)))
    net = stack(data.draw(st.sampled_from(STACKS)), window)
    cache = net.new_cache(batch, slack=slack)
    rows = [[] for _ in range(batch)]
    exact = [0] * batch  # outputs count from here on
    for turn in range(data.draw(st.integers(2, 9))):
        if data.draw(st.booleans()):
            length = data.draw(st.integers(0, max(map(len, rows)) + 2))
            where = cache.rollback(length)
            rows = [row[:length] for row in rows]
            exact = [len(row) for row in rows]
            if batch == 1:
                assert where == int(cache.lengths[0])
        width = data.draw(st.integers(1, 30))
        bits = torch.rand(batch, width, generator=torch.Generator()
                          .manual_seed(turn)) < data.draw(
                              st.sampled_from((0.5, 1.0)))
        done = cache.lengths.tolist()
        first = list(done)
        new = draw_tokens(batch, width, seed=100 + turn).tolist()
        rows = [row + new[b] for b, row in enumerate(rows)]
        parts = feed(net, cache, rows, bits, done)
        for b in range(batch):
            # what was not fed is forgotten, unless a replay still owes it
            rows[b] = rows[b][:max(done[b], exact[b])]
            alone = net(torch.tensor([rows[b]], dtype=torch.int64))[0]
            skip = max(0, exact[b] - first[b])
            close(parts[b][skip:], alone[first[b] + skip:done[b]])


def test_slack_takes_back_slack_plus_one():
    """… without a replay; one more needs it, and needs all of it."""
    net, tokens = stack(window=16), draw_tokens(1, 400)
    for back in range(0, 9):
        cache = net.new_cache(slack=4)
        net(tokens[:, :300], cache)
        where = cache.rollback(300 - back)
        assert where == (300 - back if back <= 5 else 300 - back - 2 * 15)
        assert cache.length == where
        other = torch.cat([tokens[:, :300 - back], tokens[:, 350:]], 1)
        got = net(other[:, where:], cache)[:, 300 - back - where:]
        close(got, net(other)[:, 300 - back:])


def test_replay_is_exact_and_no_shorter_one_is():
    """r = length - n (W - 1); starting one token later is already wrong.

    Checked for the window 16 with two sliding layers, in fp32 against a
    fresh cache that was fed the same tokens in one go.
    """
    net = Stack(dtype=torch.float32, window=16)
    tokens, length = draw_tokens(1, 320), 250
    fresh = net.new_cache()
    net(tokens[:, :length], fresh)
    expected = net(tokens[:, length:], fresh)
    for late in (0, 1):
        cache = net.new_cache()
        net(tokens[:, :300], cache)
        assert cache.rollback(length) == length - 2 * 15
        if late:  # pretend the rule said one token less
            cache.rows = dataclasses.replace(
                cache.rows, lengths=cache.rows.lengths + 1)
        net(tokens[:, cache.length:length], cache)
        got = net(tokens[:, length:], cache)
        error = float((got - expected).abs().max())
        assert error < 1e-4 if late == 0 else error > 1e-3
    # what a full layer held was kept, not recomputed
    assert cache.length == 320


def test_replay_keeps_what_full_layers_hold():
    net, tokens = stack(window=4), draw_tokens(1, 100)
    cache = net.new_cache()
    net(tokens, cache)
    kept = [x.k[:, :60].clone() for x in cache.layers
            if isinstance(x, FullCache)]
    where = cache.rollback(60)
    assert where == 60 - 2 * 3
    for i in range(where, 60):
        net(tokens[:, i:i + 1], cache)
    full = [x.k[:, :60] for x in cache.layers if isinstance(x, FullCache)]
    assert all(map(torch.equal, kept, full))


def test_rollback_during_replay_and_to_the_ends():
    net, tokens = stack(window=8), draw_tokens(1, 100)
    cache = net.new_cache()
    net(tokens, cache)
    assert cache.rollback(100) == 100 == cache.rollback(10_000)
    assert cache.rollback(60) == 60 - 14
    net(tokens[:, 46:52], cache)
    assert cache.rollback(60) == 52  # the replay goes on
    assert cache.rollback(52) == 52 - 14  # not right at 52 yet
    net(tokens[:, 38:52], cache)
    close(net(tokens[:, 52:], cache), net(tokens)[:, 52:])
    assert cache.rollback(0) == 0 == cache.length
    close(net(tokens, cache), net(tokens))
    with pytest.raises(CacheError, match="rollback: expected >= 0"):
        cache.rollback(-1)


def test_rollback_leaves_short_rows_alone():
    net, rows = stack(window=8), draw_tokens(2, 90).tolist()
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, 20:] = False
    cache, done = net.new_cache(2), [0, 0]
    feed(net, cache, rows, mask, done)
    assert cache.rollback(50) == 50 - 14
    assert cache.lengths.tolist() == [20, 36]
    assert cache.rollback(18) == 18 - 14 == cache.rollback(18)
    assert cache.lengths.tolist() == [4, 4]
    cache, done = net.new_cache(2), [0, 0]
    feed(net, cache, rows, mask, done)
    cache.rollback(50)
    done = [20, 36]
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[0, :20] = False
    parts = feed(net, cache, rows, mask, done)
    close(parts[0], net(torch.tensor([rows[0][:24]]))[0, 20:])
    close(parts[1][14:], net(torch.tensor([rows[1][:60]]))[0, 50:])


def test_no_rings_no_replay():
    net, tokens = stack((A, A)), draw_tokens(1, 90)
    cache = net.new_cache()
    net(tokens, cache)
    assert cache.rollback(3) == 3
    close(net(tokens[:, 3:], cache), net(tokens)[:, 3:])


# --------------------------------------------- errors, memory, storage


def snapshot(cache):
    state = [x.clone() for layer in cache.layers for x in (layer.k, layer.v)]
    return state + [cache.lengths.clone(), cache._rows.ring.clone()]


@pytest.mark.parametrize("chunk", (1, 5, 40))
def test_too_small_writes_nothing(chunk):
    net, tokens = stack(), draw_tokens(1, 200)
    cache = net.new_cache(max_tokens=100)
    net(tokens[:, :100 - chunk + 1], cache)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="max_tokens is 100.* needs 101"):
        net(tokens[:, :chunk], cache)
    positions = torch.arange(101 - chunk, 101)[None]
    with pytest.raises(CacheError, match="max_tokens is 100"):
        cache.begin(positions)
    assert all(map(torch.equal, before, snapshot(cache)))
    if chunk > 1:  # and it can go on with less
        rest = net(tokens[:, 101 - chunk:100], cache)
        close(rest, net(tokens[:, :100])[:, 101 - chunk:])


def test_beyond_the_model():
    net = Stack(longest=64)
    cache = net.new_cache()
    net(draw_tokens(1, 64), cache)
    with pytest.raises(CacheError, match="max_position_embeddings is 64"):
        cache.begin(torch.tensor([[64]]))
    for bad in (0, 65):
        with pytest.raises(CacheError, match=f"1 to 64.*found {bad}"):
            net.new_cache(max_tokens=bad)
    with pytest.raises(CacheError, match="slack >= 0, found 1 and -1"):
        net.new_cache(slack=-1)


def test_wrong_positions_and_shapes():
    cache = stack().new_cache(2)
    for bad, text in (
            (torch.tensor([[0, 1], [0, 2]]), "row 1 to continue at 0"),
            (torch.tensor([[1], [0]]), "row 0 to continue at 0"),
            (torch.tensor([[0]]), r"expected \(2, T\) int64"),
            (torch.tensor([[0.0], [0.0]]), "int64, found")):
        with pytest.raises(CacheError, match=text):
            cache.begin(bad)
    good = torch.tensor([[0], [0]])
    k = torch.zeros(2, 1, G, C, dtype=torch.float64)
    plan = cache.begin(good)
    with pytest.raises(CacheError, match="layer 0: expected k and v"):
        plan.update(0, k.float(), k.float())
    with pytest.raises(CacheError, match="layer 0: expected k and v"):
        plan.update(0, k[:, :, :1], k)
    for i in range(4):
        with pytest.raises(CacheError, match=f"4 layers .* found {i}"):
            cache.commit(plan)
        plan.update(i, k, k)
    with pytest.raises(CacheError, match="plan of the forward under way"):
        cache.commit(plan_chunk(cache._rows, good, 0))
    cache.commit(plan)
    assert cache.lengths.tolist() == [1, 1]


@pytest.mark.parametrize("end", (
    lambda cache, plan: cache.commit(plan),
    lambda cache, plan: cache.rollback(0), lambda cache, plan: cache.reset(),
    lambda cache, plan: cache.begin(plan.positions)),
    ids=("commit", "rollback", "reset", "begin"))
def test_a_plan_serves_one_forward(end):
    """After its end it would write where other tokens stand by now."""
    k = torch.zeros(1, 1, G, C, dtype=torch.float64)
    cache = stack().new_cache()
    plan = cache.begin(torch.tensor([[0]]))
    if end.__code__.co_names[0] == "commit":
        for i in range(4):
            plan.update(i, k, k)
    end(cache, plan)
    length = cache.length
    with pytest.raises(CacheError, match="layer 0: .*begin"):
        plan.update(0, k, k)
    with pytest.raises(CacheError, match="commit: expected the plan"):
        cache.commit(plan)
    assert cache.length == length


def test_begin_asks_once(monkeypatch):
    """All that the host must know comes in one transfer."""
    net, asked = stack(), []
    cache = net.new_cache(2)
    net(draw_tokens(2, 20), cache)
    for name in ("tolist", "item", "__bool__", "__int__", "nonzero", "cpu"):
        usual = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, name=name, usual=usual,
            **more: asked.append(name) or usual(self, *args, **more))
    plan = cache.begin(torch.tensor([[20, 21], [20, -1]]))
    assert asked == ["tolist"]
    k = torch.ones(2, 2, G, C, dtype=torch.float64)
    for i in range(4):
        plan.update(i, k, k)
    cache.commit(plan)
    assert asked == ["tolist"]
    assert cache.lengths.tolist() == [22, 21]


def test_repr_says_the_sizes():
    cache = stack().new_cache(3, max_tokens=100, slack=2)
    assert repr(cache) == (
        "Cache(batch_size=3, 2 SlidingCache of 18 slots float64, 2 FullCache "
        f"of 100 slots float64, {cache.nbytes:,} bytes)")
    assert "131072 slots bfloat16" in repr(Cache(
        GptOssConfig.gpt_oss_20b(), max_tokens=131_072, device="meta"))


def test_a_forward_that_fails():
    """Its half-written rings are noticed, and rollback() mends them."""
    net, tokens = stack(window=8), draw_tokens(1, 100)
    cache = net.new_cache()
    net(tokens[:, :60], cache)
    k = torch.ones(1, 30, G, C, dtype=torch.float64)
    plan = cache.begin(torch.arange(60, 90)[None])
    plan.update(0, k, k)
    with pytest.raises(CacheError, match="layer 0: updated twice"):
        plan.update(0, k, k)
    with pytest.raises(CacheError, match="did not reach commit"):
        net(tokens[:, 60:61], cache)
    assert cache.rollback(60) == 60 - 14
    close(net(tokens[:, 46:], cache)[:, 14:], net(tokens)[:, 60:])
    # rows of two lengths: the least of the two is where to feed again
    two, mask = net.new_cache(2), torch.ones(2, 60, dtype=torch.bool)
    mask[0, 20:] = False
    net(tokens[:, :60].expand(2, -1), two, mask)
    k = torch.ones(2, 1, G, C, dtype=torch.float64)
    two.begin(torch.tensor([[20], [60]])).update(0, k, k)
    assert two.rollback(100) == 20 - 14
    assert two.lengths.tolist() == [20 - 14, 60 - 14]
    # an announced forward that wrote nothing costs nothing
    cache.begin(torch.tensor([[100]]))
    assert cache.rollback(100) == 100
    cache.begin(torch.tensor([[100]]))
    more = draw_tokens(1, 1, seed=3)
    close(net(more, cache), net(torch.cat([tokens, more], 1))[:, 100:])


@pytest.mark.parametrize("slack", (0, 5))
def test_bytes(slack):
    net = stack(window=16)
    cache = net.new_cache(3, max_tokens=200, slack=slack)
    assert cache.nbytes == 2 * G * C * 8 * 3 * 2 * ((16 + slack) + 200)
    net(draw_tokens(3, 200), cache)
    assert cache.nbytes == 2 * G * C * 8 * 3 * 2 * ((16 + slack) + 200)


@pytest.mark.parametrize("config, replay", (
    (GptOssConfig.gpt_oss_20b(), 1524), (GptOssConfig.gpt_oss_120b(), 2286)))
def test_published_sizes_on_meta(config, replay):
    for tokens in (128, 4096, 131_072):
        cache = Cache(config, 2, max_tokens=tokens, device="meta")
        assert cache.nbytes == cache_bytes(config, tokens, batch_size=2)
    assert cache.replay == replay
    assert replay == receptive_field(config.layer_types, 128)[-1].sliding - 1


def test_growth_by_doubling():
    net, cache = stack(), stack().new_cache()
    sizes = []
    for part in draw_tokens(1, LONGEST).split(100, dim=1):
        net(part, cache)
        sizes.append({x.k.shape[1] for x in cache.layers
                      if isinstance(x, FullCache)})
    assert sizes == [{256}] * 2 + [{512}] * 3 + [{1024}] * 6
    assert all(x.k.shape[1] == 16 for x in cache.layers
               if isinstance(x, SlidingCache))
    one = net.new_cache()
    net(draw_tokens(1, 700), one)  # more than double: exactly what it needs
    assert one.layers[1].k.shape[1] == 700
    capped = Stack(longest=300).new_cache()
    Stack(longest=300)(draw_tokens(1, 260), capped)
    assert capped.layers[1].k.shape[1] == 300


def test_decode_returns_views():
    net = stack()
    cache = net.new_cache(max_tokens=50)
    net(draw_tokens(1, 49), cache)
    k = torch.ones(1, 1, G, C, dtype=torch.float64)
    plan = cache.begin(torch.tensor([[49]]))
    for i, layer in enumerate(cache.layers):
        before = layer.k.data_ptr(), layer.v.data_ptr()
        keys, values, where = plan.update(i, k, k)
        assert (keys.data_ptr(), values.data_ptr()) == before
        assert keys.shape[1] == (50 if isinstance(layer, FullCache) else 16)
        assert int(where.max()) == 49


def test_short_chunks_are_views_too():
    net = stack()
    cache = net.new_cache(max_tokens=50, slack=3)
    net(draw_tokens(1, 40), cache)
    k = torch.ones(1, 4, G, C, dtype=torch.float64)
    keys, _, _ = cache.begin(torch.arange(40, 44)[None]).update(
        0, k, k)
    assert keys.data_ptr() == cache.layers[0].k.data_ptr()


def test_inference_mode_and_gradients():
    """A cache grown under inference_mode works outside; nothing has grad."""
    net, tokens = stack(), draw_tokens(1, 310)
    cache = net.new_cache()
    with torch.inference_mode():
        net(tokens[:, :300], cache)
    close(net(tokens[:, 300:], cache), net(tokens)[:, 300:])
    k = torch.ones(1, 1, G, C, dtype=torch.float64, requires_grad=True)
    keys, _, _ = cache.begin(torch.tensor([[310]])).update(0, k, k)
    assert not keys.requires_grad


def test_reset():
    net, tokens = stack(), draw_tokens(1, 50)
    cache = net.new_cache()
    net(draw_tokens(1, 80, seed=9), cache)
    cache.reset()
    assert cache.length == 0
    close(net(tokens, cache), net(tokens))


def test_roll_back_is_pure():
    rows = Rows.empty(2, 8)
    ring = rows.ring.clone()
    new, again = roll_back(rows, 0, 8, 14)
    assert not again.any() and torch.equal(ring, new.ring)
    assert torch.equal(rows.ring, ring)
