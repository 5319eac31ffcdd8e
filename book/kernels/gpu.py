# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: triton_kernels
#     public: [use_triton]
# ---
# %% [markdown]
# # The same on a GPU
#
# ## Question
#
# **No GPU has run the kernels of this chapter.** They are checked in Triton's
# interpreter, which computes on the CPU, against float64, and Triton compiles
# them for two of NVIDIA's architectures; how fast they are nobody has seen, so
# nothing calls them unless asked. Read the chapter for its question: how do
# the ideas of the kernels look on a device with a hundred processors or more?
# Decoding one text, attention of the 20b has eight pieces of work. The
# difficulty is no longer to do less, but to find enough to do, and to start it
# without asking first what it is.

# %%
import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig

plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()
print(f"a row of the batch: {big.num_key_value_heads} key heads, each with "
      f"{big.num_attention_heads // big.num_key_value_heads} query heads")

# %% [markdown]
# ## Picture
#
# A GPU starts many *programs* at once, all of the same code, each with its
# number. How many must be said at the start, the *launch*. Six tokens choose
# two of five experts each. Sorted by expert, their twelve picks are cut into
# tiles of four, and a program computes one tile, with the weights of one
# expert.

# %% tags=["hide-input", "picture"]
# Figure: a row of twelve squares, each a pick with the number of its token,
# coloured by expert in five runs. Under it brackets: the tiles that are in
# use, each within one run, and beside them empty tiles, dashed.
import torch

from gptoss.kernels.triton_kernels import token_tiles as tiles_of

ids = torch.tensor([[0, 2], [2, 1], [2, 0], [2, 4], [2, 1], [0, 2]])
order, of, begin, end = (x.tolist() for x in tiles_of(ids, 5, 4))
colors = ["C4", "C1", "C2", "C3", "C5"]
fig, ax = plt.subplots(figsize=(7.4, 1.9))
for place, pick in enumerate(order):
    expert = ids.flatten()[pick].item()
    ax.add_patch(plt.Rectangle((place, 0), 0.94, 0.94,
                               color=colors[expert]))
    ax.text(place + 0.47, 0.47, f"token {pick // 2}", ha="center",
            va="center", fontsize=6.5)
empty = 0
for tile, (expert, first, last) in enumerate(zip(of, begin, end,
                                                 strict=True)):
    last = min(last, first + 4)
    if first == last:
        ax.add_patch(plt.Rectangle((12.6 + 1.7 * empty, -0.9), 1.5, 0.6,
                                   fill=False, ls="--"))
        ax.text(13.35 + 1.7 * empty, -0.6, "empty", ha="center", va="center",
                fontsize=7)
        empty += 1
    else:
        ax.plot([first + 0.05, first + 0.05, last - 0.11, last - 0.11],
                [-0.1, -0.3, -0.3, -0.1], color=colors[expert])
        ax.text((first + last) / 2, -0.65, f"tile {tile}:\nexpert {expert}",
                ha="center", va="center", fontsize=7)
ax.set(xlim=(-0.1, 12.8 + 1.7 * empty), ylim=(-1.1, 1.05))
ax.axis("off")
plt.show()
print(f"{len(of)} tiles launched, {empty} of them empty")

# %% [markdown]
# What to see: how many tiles there are depends on what was chosen; how many
# there can be does not, and so many are launched. Here one of them finds
# nothing to do.
#
# ## The naive version
#
# Ask the device which experts were chosen, then launch a program for each
# tile. On a GPU asking means waiting: the host must wait until all that was
# launched before has been computed, in every layer of every token. In numbers,
# with 10 µs for each such wait (assumed, not measured here):

# %%
for name, config in (("20b", big), ("120b", GptOssConfig.gpt_oss_120b())):
    L = config.num_hidden_layers
    print(f"{name:4} {L} waits a token: {L * 10e-6 * 1e3:.2f} ms, in which a "
          f"GPU of 3 TB/s reads {L * 10e-6 * 3e12 / 1e9:.2f} GB")

# %% [markdown]
# And a step that waits cannot be recorded as a CUDA graph
# ([step](step.ipynb)). So nothing here may ask.
#
# ## Code
#
# ### How does a nibble become a float?
#
# The kernels are written in Triton, a language inside Python: a function under
# `triton.jit` is compiled for the GPU, and its variables are whole blocks of
# numbers. There is no table in a register here; a nibble becomes a float by
# its bits. Codes above 1 have an exponent, code 1 is the only subnormal.
#
# | code | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
# |---|---|---|---|---|---|---|---|---|
# | value | 0 | 0.5 | 1 | 1.5 | 2 | 3 | 4 | 6 |
# | `code >> 1`, the exponent | 0 | 0 | 1 | 1 | 2 | 2 | 3 | 3 |
# | `code & 1`, the half | 0 | 1 | 0 | 1 | 0 | 1 | 0 | 1 |

# %% tags=["export"]
import torch
from torch import Tensor
from types import SimpleNamespace

try:
    import triton  # type: ignore[import-not-found]  # may be missing
    import triton.language as tl  # type: ignore[import-not-found]
except ImportError:  # no GPU software: everything else works without
    triton, tl = None, SimpleNamespace(constexpr=None)


def _jit(function):
    return triton.jit(function) if triton else function


@_jit
def decode_fp4(code, scale):
    """Nibbles and scale bytes (int32) -> fp32 values, by their bits."""
    size = code & 7
    bits = tl.where(size > 1, ((size >> 1) + 126 << 23) | (size & 1) << 22,
                    (size & 1) * 0x3F000000)
    value = (bits | (code & 8) << 28).to(tl.float32, bitcast=True)
    power = tl.maximum(scale << 23, 1 << 22).to(tl.float32, bitcast=True)
    return value * (power + 0.0 * power)

# %% [markdown]
# ### What does one program compute?
#
# 32 rows of an expert for one tile of picks: `M` by `N` sums, as a loop over
# `STEP` bytes of the rows at a time. A GPU has units that multiply small
# matrices, *tensor cores*, reached by `tl.dot`. The tile's weights are exact
# in bf16 (three bits and a power of two), so these may multiply them; numbers
# in fp32 are multiplied as such ("ieee"), not shortened. Low and high nibbles
# meet even and odd activations in two products, and nothing has to be
# interleaved.

# %% tags=["export"]
@_jit
def packed_rows(x, w, s, y, order, tile_expert, tile_begin, tile_end, rows,
                blocks, K: tl.constexpr, M: tl.constexpr,
                N: tl.constexpr, STEP: tl.constexpr):
    """y[pick] = rows of the pick's expert times x[pick // K], a tile."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    tile = tl.program_id(1)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    begin, end = tl.load(tile_begin + tile), tl.load(tile_end + tile)
    if begin == end:  # one of the tiles that are there for the worst case
        return
    place = begin + tl.arange(0, N)
    real = place < end
    pick = tl.load(order + place, real, 0)
    width = blocks * 16
    line = expert * rows + row
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)
        inside = (row < rows)[:, None] & (column < width)[None]
        code = tl.load(w + line[:, None] * width + column[None], inside,
                       0).to(tl.int32)
        scale = tl.load(s + line[:, None] * blocks + column[None] // 16,
                        inside, 0).to(tl.int32)
        at = (pick // K)[None] * width * 2 + column[:, None] * 2
        seen = real[None] & (column < width)[:, None]
        even = tl.load(x + at, seen, 0.0)
        odd = tl.load(x + at + 1, seen, 0.0)
        total = tl.dot(decode_fp4(code & 15, scale).to(even.dtype), even,
                       total, input_precision="ieee")
        total = tl.dot(decode_fp4(code >> 4, scale).to(odd.dtype), odd,
                       total, input_precision="ieee")
    tl.store(y + pick[None] * rows + row[:, None], total,
             (row < rows)[:, None] & real[None])

# %% [markdown]
# ### How many tiles?
#
# Every tile belongs to one expert. Which tiles there are depends on what the
# router chose; how many there can be does not, and only that may be known
# before the launch without asking the device and waiting. With $n$ picks in
# tiles of $M$, an expert with $c \ge 1$ of them has
# $\lceil c/M \rceil = 1 + \lfloor (c-1)/M \rfloor$ tiles. If $h$ experts are
# hit, that makes at most $h + \lfloor (n-h)/M \rfloor$, since the sum of
# floors is at most the floor of the sum. One more $h$ adds 1 and takes away
# at most 1, so the worst case is the largest $h$:
#
# $$ \text{tiles} \le m + \lfloor (n - m) / M \rfloor,
#    \qquad m = \min(E, n). $$ (kernels-tiles)
#
# It is reached, by $m - 1$ experts with one pick and one with the rest. A
# program whose tile is empty returns at once. In decoding with one row, $n$
# is 4, $m$ too, and no tile is empty.

# %% tags=["export"]
def token_tiles(ids: Tensor, experts: int, size: int) -> tuple[Tensor, ...]:
    """Slots sorted by expert, cut into tiles of one expert each.

    ids (N, K) -> order (N K,), and for each of as many tiles as there can
    be its expert, and where its picks begin and the expert's end in order;
    int32. An empty tile begins where it ends. No shape depends on ids.
    """
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(experts).scatter_add_(
        0, flat, torch.ones_like(flat))
    tiles = (counts + size - 1) // size
    most = min(experts, len(flat))
    number = torch.arange(most + (len(flat) - most) // size,
                          device=ids.device)
    after = tiles.cumsum(0)  # the first tile that is not this expert's
    expert = torch.searchsorted(after, number, right=True)
    expert = expert.clamp(max=experts - 1)  # beyond the last: empty
    end = counts.cumsum(0)[expert]
    begin = (end - counts[expert]
             + (number - (after - tiles)[expert]) * size).minimum(end)
    return tuple(t.int() for t in (order, expert, begin, end))

# %%
order, *tiles = token_tiles(torch.tensor([[2, 0], [2, 1], [2, 0]]), 4, 2)
print(order.tolist(), *(tile.tolist() for tile in tiles), sep="\n")
assert tiles[0].tolist()[:4] == [0, 1, 2, 2]  # three picks chose expert 2
assert (tiles[1] == tiles[2]).tolist() == 4 * [False] + [True]

# %% [markdown]
# The operator, as the model asks for it: two such products, the activation
# between them in plain torch.

# %% tags=["export"]
from gptoss.moe.experts import clamped_swiglu


def packed_linear_tiles(x: Tensor, ids: Tensor, blocks: Tensor,
                        scales: Tensor, shared: int = 1) -> Tensor:
    """(picks, rows) fp32: row pick // shared of x times the pick's expert.

    x (…, n); ids (picks,); blocks (E, rows, n/32, 16). Few picks make
    narrow tiles (decode), many wide ones (prefill).
    """
    E, rows, width = scales.shape
    wide = 64 if ids.numel() >= 16 * E else 16
    order, *tiles = token_tiles(ids, E, wide)
    y = torch.empty(ids.numel(), rows, dtype=torch.float32, device=x.device)
    packed_rows[(triton.cdiv(rows, 32), len(tiles[0]))](
        x, blocks, scales, y, order, *tiles, rows, width, K=shared, M=32,
        N=wide, STEP=64)
    return y


def experts_by_triton(x, ids, weights, gate_up_blocks, gate_up_scales,
                      gate_up_bias, down_blocks, down_scales, down_bias,
                      limit):
    """gptoss::packed_experts on a GPU; between the layers in x.dtype."""
    flat, K = ids.flatten(), ids.shape[1]
    up = packed_linear_tiles(x.contiguous(), flat, gate_up_blocks,
                             gate_up_scales, K)
    hidden = clamped_swiglu(up + gate_up_bias[flat].float(), limit)
    out = packed_linear_tiles(hidden.to(x.dtype), flat, down_blocks,
                              down_scales)
    out = (out + down_bias[flat].float()).view(*ids.shape, -1)
    return (out * weights.float()[..., None]).sum(1).to(x.dtype)

# %% [markdown]
# ### How is attention cut into enough pieces?
#
# One key head and sixteen rows of its queries are a program. In decoding that
# is 8 programs for one text. So the keys are divided, too, among P programs
# {cite}`flashdecoding2023`: part p takes the tiles of keys p, p + P, p + 2P, …
# (in turns, so that the filled slots of a cache are shared evenly). It leaves
# the mean of its values, weighted, and the *log-sum-exp* of its scores, $\ell
# = \log \sum e^{s}$. Two scores 1 and 2 with values 10 and 20, for example,
# act like one key with score 2.313 and value 17.3:

# %%
import math

ell = math.log(math.exp(1) + math.exp(2))
mean = (math.exp(1) * 10 + math.exp(2) * 20) / (math.exp(1) + math.exp(2))
print(f"score {ell:.3f}, value {mean:.1f}")

# %% [markdown]
# In general
#
# $$ \frac{\sum_j e^{s_j} v_j}{e^{\text{sink}} + \sum_j e^{s_j}}
#    = \frac{\sum_p e^{\ell_p} o_p}{e^{\text{sink}} + \sum_p e^{\ell_p}},
#    \qquad \ell_p = \log \sum_{j \in p} e^{s_j},
#    \quad o_p = \sum_{j \in p} e^{s_j - \ell_p} v_j . $$ (kernels-parts)
#
# So the softmax with a [sink](../attention/sinks.ipynb), over the parts, puts
# them together and counts the sink once. Within a part the running maximum of
# [attending](attending.ipynb) walks over the keys. Of a key that no row sees
# neither k nor v is loaded, and of a tile of such keys nothing but positions.

# %% tags=["export"]
@_jit
def attend_tile(q, k, v, q_pos, k_pos, y, lse, T, S, H, G, window, scale,
                kb, ks, kg, C: tl.constexpr, J: tl.constexpr,
                N: tl.constexpr, KEYS: tl.constexpr):
    """N rows (tokens times J query heads of a key head), a part of keys."""
    g, b = tl.program_id(1) % G, (tl.program_id(1) // G).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    row = tl.program_id(0) * N + tl.arange(0, N)
    token, head = row // J, g * J + row % J
    real = token < T
    at = (b * T + token) * H + head
    query = tl.load(q + at[:, None] * C + tl.arange(0, C)[None],
                    real[:, None], 0.0)
    position = tl.load(q_pos + b * T + token, real, -1)
    top = tl.full((N,), -3.0e38, tl.float32)
    total = tl.zeros((N,), tl.float32)
    out = tl.zeros((N, C), tl.float32)
    for start in range(part * KEYS, S, parts * KEYS):
        key = start + tl.arange(0, KEYS)
        there = tl.load(k_pos + b * S + key, key < S, -1)
        seen = (there[None] >= 0) & (there[None] <= position[:, None])
        seen = seen & ((window == 0)
                       | (there[None] > position[:, None] - window))
        wanted = tl.max(seen.to(tl.int32), 0)
        if tl.max(wanted, 0) > 0:
            from_ = b * kb + key[:, None] * ks + g * kg
            from_ += tl.arange(0, C)[None]
            keys = tl.load(k + from_, wanted[:, None] > 0, 0.0)
            values = tl.load(v + from_, wanted[:, None] > 0, 0.0)
            scores = tl.dot(query, tl.trans(keys),
                            input_precision="ieee") * scale
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrink = tl.exp(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            out = tl.dot(weights.to(values.dtype), values,
                         out * shrink[:, None], input_precision="ieee")
            top = higher
    some = tl.where(total > 0, total, 1.0)
    at = at * parts + part
    tl.store(y + at[:, None] * C + tl.arange(0, C)[None],
             out / some[:, None], real[:, None])
    tl.store(lse + at, tl.where(total > 0, top + tl.log(some),
                                float("-inf")), real)

# %% tags=["export"]
from gptoss.attention.sinks import softmax_with_sink

PROGRAMS = 256  # of attention that a GPU should have to do at a time


def attention_by_triton(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                        q_pos: Tensor, k_pos: Tensor, window: int,
                        scale: float) -> Tensor:
    """gptoss::sink_attention on a GPU; k and v with equal strides."""
    B, T, H, C = q.shape
    S, G = k.shape[1:3]
    tiles, keys = triton.cdiv(T * (H // G), 16), 32
    parts = min(triton.cdiv(S, keys),
                max(1, PROGRAMS // (tiles * B * G)))
    y = q.new_empty(B, T, H, parts, C, dtype=torch.float32)
    lse = q.new_empty(B, T, H, parts, dtype=torch.float32)
    attend_tile[(tiles, B * G, parts)](
        q.contiguous(), k, v, q_pos.expand(B, T).contiguous(),
        k_pos.expand(B, S).contiguous(), y, lse, T, S, H, G, window, scale,
        *k.stride()[:3], C=C, J=H // G, N=16, KEYS=keys)
    shares = softmax_with_sink(lse.transpose(1, 2), sinks).transpose(1, 2)
    return (shares[..., None] * y).sum(3).to(q.dtype)


def use_triton() -> None:
    """Register these kernels for CUDA: to generate with, not to train.

    RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError("use_triton: expected the package triton")
    torch.library.impl("gptoss::packed_experts", "CUDA", experts_by_triton)
    torch.library.impl("gptoss::sink_attention", "CUDA", attention_by_triton)

# %% [markdown]
# ## It holds
#
# What a GPU is not needed for. **The nibbles**: the bits that `decode_fp4`
# puts together, written in torch, for all codes and scale bytes, beside the
# [decoder](../weights/mxfp4.ipynb) of the book.

# %%
from gptoss.weights.mxfp4 import decode


def by_bits(code: Tensor, scale: Tensor) -> Tensor:
    """`decode_fp4` in torch: int32 -> fp32."""
    size = code & 7
    bits = torch.where(size > 1, ((size >> 1) + 126 << 23) | (size & 1) << 22,
                       (size & 1) * 0x3F000000)
    value = (bits | (code & 8) << 28).view(torch.float32)
    power = (scale << 23).clamp_min(1 << 22).view(torch.float32)
    return value * (power + 0.0 * power)


code = torch.arange(16, dtype=torch.int32)
print(*by_bits(code, torch.tensor(127, dtype=torch.int32)).tolist())
scale = torch.arange(256, dtype=torch.int32)[:, None]
block = torch.arange(16, dtype=torch.uint8) * 0x11  # both nibbles
expected = decode(block.expand(256, 1, 16), scale.to(torch.uint8),
                  torch.float32)[:, ::2]
found = by_bits(code, scale)
assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
print(found.isnan().sum().item(), "of 4096 are NaN, all of the last scale")

# %% [markdown]
# **The tiles** hold every pick once, under its own expert, and are never more
# than {eq}`kernels-tiles` allows; the worst case is reached.

# %%
def used(ids: Tensor, experts: int, size: int) -> int:
    """Tiles with picks; an AssertionError if they are not as promised."""
    order, of, begin, end = (x.tolist() for x in token_tiles(ids, experts,
                                                             size))
    seen = []
    for expert, first, last in zip(of, begin, end, strict=True):
        mine = order[first:min(last, first + size)]
        assert all(ids.flatten()[pick] == expert for pick in mine)
        seen += mine
    assert sorted(seen) == list(range(ids.numel()))
    return sum(first < last for first, last in zip(begin, end, strict=True))


torch.manual_seed(0)
for tokens in (1, 8, 64, 512):
    ids = torch.rand(tokens, 32).topk(4).indices
    n, m = ids.numel(), min(32, ids.numel())
    print(f"{tokens:3} tokens: {used(ids, 32, 16):3} tiles in use, at most "
          f"{m + (n - m) // 16}")
worst = torch.tensor([[0], [1], [2], *[[3]] * 17])
assert used(worst, 4, 16) == 4 + 16 // 16

# %% [markdown]
# **The parts** {eq}`kernels-parts`, in float64: keys taken in turns by three
# programs, put together by the softmax with a sink, beside the sum over all.

# %%
scores, values = torch.randn(20).double(), torch.randn(20, 4).double()
sink = torch.tensor([0.5]).double()
whole = softmax_with_sink(scores[None, None], sink)[0, 0] @ values
logs = torch.stack([scores[p::3].logsumexp(0) for p in range(3)])
means = torch.stack([scores[p::3].softmax(0) @ values[p::3]
                     for p in range(3)])
joined = softmax_with_sink(logs[None, None], sink)[0, 0] @ means
print("whole:", *(f"{x:.4f}" for x in whole.tolist()))
print("parts:", *(f"{x:.4f}" for x in joined.tolist()))
torch.testing.assert_close(joined, whole)

# %% [markdown]
# **The kernels themselves** are run by `tests/kernels/test_triton_kernels.py`
# and `test_step.py` where Triton is installed: in its interpreter against
# float64, and compiled for the architectures 8.0 and 9.0.

# %% [markdown]
# ## In the 20b and the 120b
#
# Both have eight key heads. How many programs does attention start in decoding
# one text, and how much of the cache does each of them read?

# %%
for filled in (128, 1024, 8192, 131072):
    parts = min(-(-filled // 32), max(1, PROGRAMS // big.num_key_value_heads))
    print(f"{filled:6} keys: {big.num_key_value_heads} heads in {parts:2} "
          f"parts, {8 * parts:3} programs of {-(-filled // parts):4} keys")
assert parts * big.num_key_value_heads == PROGRAMS

# %% [markdown]
# ## Takeaways
#
# - What is written below an operator can be written again for another device:
#   the model does not know which one answers.
# - Ask for what can be known before the launch, the most tiles there can be,
#   and let the empty ones return at once: nobody waits for the device.
# - A part of the keys acts like one key, its score the log-sum-exp of the part
#   and its value the mean: so attention is cut to fill a GPU.
# - What no GPU has run is not switched on by itself.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# With tiles of 16 picks, how many of the places in tiles are empty for 1, 64
# and 4096 tokens of the 20b, if the router chooses evenly? Why are many tokens
# given tiles of 64?

# %% tags=["hide-cell"]
for tokens in (1, 64, 4096):
    ids = torch.rand(tokens, 32).topk(4).indices
    for size in (16, 64):
        tiles = used(ids, 32, size)
        print(f"{tokens:4} tokens, tiles of {size}: {tiles:4}, "
              f"{1 - ids.numel() / (tiles * size):.0%} of the places empty")
print("an expert's weights are decoded once a tile: 64 need a quarter of it")

# %% [markdown]
# ### Exercise 2
#
# A part that holds no key a row may see has $\ell_p = -\infty$, and its mean
# is stored as 0. Why may it not be NaN, though its share is 0?

# %% tags=["hide-cell"]
share = softmax_with_sink(torch.tensor([[[1.0, float("-inf")]]]),
                          torch.tensor([0.0]))[0, 0]
print("shares:", [round(x, 2) for x in share.tolist()],
      " 0 times NaN:", (share * torch.tensor([2.0, float("nan")]))[1].item())
assert share[1] == 0

# %% [markdown]
# ### Exercise 3
#
# Prove the bound {eq}`kernels-tiles` by trying: for all ways in which 6 picks
# can fall on 3 experts, count the tiles of 2. What is the most, and which
# choice reaches it?

# %% tags=["hide-cell"]
from itertools import product

counts = {}
for choice in product(range(3), repeat=6):
    tiles = sum(-(-choice.count(e) // 2) for e in range(3))
    counts.setdefault(tiles, choice)
most = max(counts)
print(f"at most {most} tiles, as by the formula: {3 + (6 - 3) // 2}; reached "
      f"by {counts[most]}")
assert most == 3 + (6 - 3) // 2

# %% [markdown]
# ## Sources
#
# - Keys divided among programs: {cite}`flashdecoding2023`; a running maximum:
#   {cite}`flash2022`; sinks: {cite}`sinks2023`; MXFP4: {cite}`ocpmx2023`.
# - openai/gpt-oss, `gpt_oss/triton/`: kernels for GPUs that have been run.
# - Triton: https://triton-lang.org/main/python-api/triton.language.html.
