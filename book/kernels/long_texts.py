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
# ---
# %% [markdown]
# # What does a long text cost?
#
# ## Question
#
# A token at the end of 131,072 others looks back at them all. What does that
# cost beside the weights that every token reads, and how much of it can be
# left out? In the 20b half of the layers see 128 keys only; the other half
# read 3.2 GB of keys and values for that one token, nearly as much as all its
# weights.

# %%
import json

import matplotlib.pyplot as plt
import numpy as np

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

plt.style.use("../_static/book.mplstyle")
with open("../_static/attention_bench.json") as file:
    MEASURED = json.load(file)  # by bench/attention.py, where it says
big = GptOssConfig.gpt_oss_20b()
H, G, C = (big.num_attention_heads, big.num_key_value_heads, big.head_dim)
W, LAYERS = big.sliding_window, big.num_hidden_layers // 2  # of each kind
KEY = 2 * 2 * G * C  # bytes of a token's keys and values in one layer
weights = bytes_read_per_token(big)


def read_back(length: int) -> tuple[int, int]:
    """Bytes that a token reads in all full and in all sliding layers."""
    return LAYERS * KEY * length, LAYERS * KEY * min(length, W)


for length in (512, 8192, 32768, 131072):
    full, sliding = read_back(length)
    print(f"after {length:7,} tokens: full layers {full / 1e6:5,.0f} MB, "
          f"sliding {sliding / 1e6:.0f}, weights {weights / 1e6:,.0f}")

# %% [markdown]
# ## Picture
#
# What a token of the 20b reads, by the length of the text before it.

# %% tags=["hide-input"]
# Figure: bytes a token over the length of the text, both axes logarithmic.
# Weights are a level line at 3.7 GB. Full layers rise in proportion and nearly
# reach it at 131,072 tokens. Sliding layers rise with them to 128 tokens and
# stay at 3 MB, a thousandth.
fig, ax = plt.subplots(figsize=(7.0, 3.6))
length = 2 ** np.arange(5, 18)
ax.axhline(weights, color="C1")
ax.plot(length, LAYERS * KEY * length, color="C0")
ax.plot(length, LAYERS * KEY * np.minimum(length, W), color="C2")
ax.text(40, weights * 0.45, "weights", color="C1", fontsize=9)
ax.text(3000, 2e8, "12 full layers", color="C0", fontsize=9, ha="right")
ax.text(3000, 1.4e6, "12 sliding layers", color="C2", fontsize=9)
ax.set(xscale="log", yscale="log", xlabel="tokens before this one",
       ylabel="bytes read for one token", ylim=(5e5, 1e10))
ax.set_xticks([32, 128, 512, 2048, 8192, 32768, 131072],
              ["32", "128", "512", "2k", "8k", "32k", "128k"])
ax.minorticks_off()
plt.show()
print(f"at 131,072 tokens: {read_back(131072)[0] / weights:.0%} of the "
      f"weights; with 24 full layers it would be "
      f"{2 * read_back(131072)[0] / weights:.0%}")

# %% [markdown]
# What to see: up to some thousand tokens attention is a matter of a few per
# cent. From then on it grows and nothing else does. The sliding layers have
# left the race at 128 tokens; that half of the layers cost nothing is the
# first thing that makes a long text cheap, and it is the model's doing, not
# ours {cite}`longformer2020`.
#
# ## The naive version
#
# A mask is enough to be right: each query looks at each key, and what it may
# not see gets the weight 0. What does a prompt of 32,768 tokens cost so? We
# count scores, in thousands of millions for each head.

# %%
S = 32768
needed_full = S * (S + 1) // 2
needed_sliding = sum(min(t + 1, W) for t in range(S))
for name, needed in (("full", needed_full), ("sliding", needed_sliding)):
    print(f"{name:8} {S * S / 1e9:.2f} by a mask, {needed / 1e9:.3f} needed: "
          f"{S * S / needed:.0f} times as many")

# %% [markdown]
# In a sliding layer nearly all is wasted. To leave it out, somebody has to
# know that it is wasted, and to look at every key's position for every token
# would again be a look for each of those scores. So it must be enough to look
# at a few numbers for many keys.
#
# ## Derivation
#
# ### How many tiles does a window touch?
#
# [Attention](attending.ipynb) takes keys sixteen at a time, a *tile*, and
# knows of each tile the lowest and the highest position. That is all it looks
# at: a tile is needed if its highest is not before the window and its lowest
# not after the query. **A worked number:** position 1000 sees 873 to 1000.
# Tile 54 begins at 864, tile 62 at 992: nine tiles, 144 keys for 128. Whatever
# the position, it is so:

# %%
def touched(position: int, window: int, tile: int) -> int:
    """Tiles that hold what a query sees, keys in the order of the text."""
    return position // tile - max(0, position - window + 1) // tile + 1


print("position 1000:", touched(1000, W, 16), "tiles of 16")
for tile in (8, 16, 64):
    counts = [touched(t, W, tile) for t in range(1000, 1064)]
    print(f"tiles of {tile:2}: {np.mean(counts):5.2f}, "
          f"{np.mean(counts) * tile / W:.2f} times the keys needed")

# %% [markdown]
# **In general** a window of $W$ keys that begins anywhere lies in
# $(W - 1) / 16 + 1$ tiles on average. Small tiles waste less, but a register
# holds sixteen scores. A chunk of 64, which is what passes through the kernel
# at a time, would be too coarse a measure: so within a chunk each group of
# eight rows (the query heads of one token that share a key head) takes its own
# tiles.
#
# Looking costs something, too. A piece of work, 16 tokens of one key head,
# looks at $S/16$ pairs of numbers where it would look at $16 S$ positions
# with a mask: 256 times fewer.

# %%
pieces = S // 16
looks = pieces * S // 16
print(f"{looks / 1e6:.0f} million looks a key head for {S:,} tokens; a mask "
      f"has {S * S / 1e6:,.0f} million entries")

# %% [markdown]
# ### What can decode reach?
#
# Each key and value of 64 numbers in bf16 is $4C$ bytes, read once for the
# $H/G$ heads that share it, and costs each of them $4C$ operations: a product
# with the query, a product with the weight. So
#
# $$ \frac{\text{operations}}{\text{bytes}} = \frac{H}{G}\,
#    \frac{4C}{4C} = \frac{H}{G} = 8 . $$ (kernels-shared)
#
# Sharing keys is what makes long texts cheap to remember {cite}`gqa2023`. It
# also makes them dear to compute with: a core that reads 26 GB/s would have to
# do 208 billion operations a second. Can it? Sixteen numbers in a register, a
# multiplication and an addition in each, one such instruction a cycle, at 3.6
# GHz; with bf16 dot products twice that, for the scores alone:

# %%
READ, CYCLES = 26e9, 3.6e9  # one core of the Zen 4 at hand
fp32, bf16 = 2 * 16 * CYCLES, 2 * 32 * CYCLES  # operations a second
half = H // G * 2 * C  # operations of a key, and as many of its value
seconds = half / bf16 + half / fp32
print(f"fp32 {fp32 / 1e9:.0f}, bf16 {bf16 / 1e9:.0f} billion operations a "
      "second")
print(f"a key and its value: {1e9 * seconds:.1f} ns of arithmetic, "
      f"{1e9 * 4 * C / READ:.1f} ns of reading")
print(f"so at most {4 * C / seconds / 1e9:.1f} GB/s a core")

# %% [markdown]
# So decode over a long text is *not* limited by memory, as the weights are,
# while one core has memory for itself: arithmetic takes longer than reading.
# Two cores that share 30 to 45 GB/s are near the point where both take equally
# long. Then nothing may be wasted on either side, and that is what decided how
# the kernel is built:
#
# | what | what it avoids |
# |---|---|
# | powers of two, the factor in the scale | a multiplication a score |
# | shrink only where a higher score came | 512 multiplications a chunk |
# | no mask where a tile is seen whole | two comparisons a score |
# | sums kept by lanes until the end | eight additions a row and chunk |
# | values widened on their way | a copy of each value in fp32 |
# | the next chunk asked for during this one | waiting for memory |
#
# The largest single one is the last. A core that computes 300 cycles on one
# stream, then 300 on the other, looks at neither often enough for the
# processor to guess what comes next.
#
# ### What can a prompt reach?
#
# For the $n$-th token of a prompt a layer costs $4 H C$ operations for each
# key it sees: $n$, or $W$ at most. The weights cost the same for every token.
# When are both equal?

# %%
from gptoss.weights.sizes import flops_per_token

work = flops_per_token(big, 0)  # of the weights alone
a_key = 4 * H * C
for n in (512, 4096, 32768, 131072):
    mean = LAYERS * a_key * (n / 2 + min(n / 2, W))  # over the whole prompt
    print(f"{n:7,} tokens: attention {mean / 1e9:5.2f}, weights "
          f"{work / 1e9:.1f} billion operations a token, mean")

# %% [markdown]
# For a prompt of 32,768 tokens attention is nearly half of the arithmetic of
# the weights, all of it but a hundredth in the full layers. That part grows
# with the square of the text, and no skipping helps: those scores are needed.
#
# ## It holds
#
# That what is hidden is not even read can be shown: fill it with NaN. A mask
# would make NaN of everything, since 0 times NaN is NaN. (Without a compiler
# the cell says so, and plain torch, which reads everything, shows the NaN.)

# %%
import torch

import gptoss.model.ops  # noqa: F401  declares the operators
from gptoss.kernels.build import load_upto, plain_torch
from gptoss.model.ops import has_kernel

load_upto("attention")

torch.manual_seed(0)
T, S = 40, 2000
q = torch.randn(1, T, 16, C).bfloat16()
k, v = torch.randn(2, 1, S, 2, C).bfloat16()
sinks = torch.randn(16).bfloat16()
q_pos, k_pos = torch.arange(S - T, S)[None], torch.arange(S)[None]
first = S - T - W + 1  # the oldest key that any of these queries sees
hidden = k_pos[0] < first // 16 * 16


@torch.inference_mode()
def attend(k, v) -> torch.Tensor:
    return torch.ops.gptoss.sink_attention(q, k, v, sinks, q_pos, k_pos, W,
                                           C ** -0.5)


right = attend(k, v)
holes = [x.clone() for x in (k, v)]
for x in holes:
    x[:, hidden] = torch.nan
found = attend(*holes)
with plain_torch():
    masked = attend(*holes)
if not has_kernel("sink_attention"):
    found = right
print(f"{int(hidden.sum()):,} of {S:,} keys are NaN: kernel "
      f"{int(found.isnan().sum())} NaN of {found.numel():,}, a mask "
      f"{int(masked.isnan().sum()):,}")
assert torch.equal(found, right)

# %% [markdown]
# And that ranges and tiles change nothing but the rounding: one query over
# 20,000 keys, in any order, which the kernel cuts into twenty ranges, beside
# float64.

# %%
S = 20_000
mixed = torch.randperm(S)
k, v = torch.randn(2, 1, S, 2, C).bfloat16()
with torch.inference_mode():
    for window in (0, W):
        given = [sinks, torch.tensor([[S - 1]]), mixed[None], window,
                 C ** -0.5]
        y = torch.ops.gptoss.sink_attention(q[:, :1], k, v, *given)
        with plain_torch():
            exact = torch.ops.gptoss.sink_attention(
                q[:, :1].double(), k.double(), v.double(), sinks.double(),
                *given[1:])
        off = ((y - exact).norm() / exact.norm()).item()
        print(f"window {window:3}: off by {off:.0e}; bf16's own rounding "
              f"{((exact.bfloat16() - exact).norm() / exact.norm()):.0e}")
        assert off < 3e-3

# %% [markdown]
# ## Cost
#
# `bench/attention.py` measures one layer's attention in the shapes of the 20b,
# beside the floor (its bytes at memory's speed) and beside the nearest of
# torch's own operations, `scaled_dot_product_attention`, which knows no sinks.
# This is what it saved:

# %% tags=["hide-input"]
cases = MEASURED["cases"]
print(MEASURED["words"])
print(f"{MEASURED['kernels']}, {MEASURED['threads']} thread, memory "
      f"{MEASURED['read_bytes_per_second'] / 1e9:.0f} GB/s")
print("rows x tokens over keys: time, over the floor; torch's over ours")
for case in cases:
    if case["part"] == "decode":
        beside = (f"; torch {case['torch_over_ours']:4.1f} times"
                  if "torch_over_ours" in case else "")
        print(f"{case['layer']:7} {case['rows']} x {case['tokens']} over "
              f"{case['keys']:7,} keys: {1e3 * case['seconds']:7.2f} ms, "
              f"{case['times_the_floor']:5.1f} floors{beside}")

# %% tags=["hide-input"]
# Figure: attention's time for a token of a prompt, in one layer, over the
# length of the text before it, both axes logarithmic: full layers rise in
# proportion to it, sliding ones stay level, with a ring and without a cache.
fig, ax = plt.subplots(figsize=(7.0, 3.4))
for layer, color, mark in (("full", "C0", "o"), ("sliding", "C2", "s"),
                           ("sliding, no cache", "C1", "x")):
    found = [case for case in cases
             if case["part"] == "prefill" and case["layer"] == layer]
    ax.plot([case["length"] for case in found],
            [1e6 * case["seconds_per_token"] for case in found],
            f"-{mark}", color=color, label=layer, ms=5)
ax.set(xscale="log", yscale="log", xlabel="tokens, the last 512 are read",
       ylabel="µs a token and layer")
ax.set_xticks([512, 2048, 8192, 32768], ["512", "2k", "8k", "32k"])
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()
for case in cases:
    if case["part"] == "prefill":
        beside = (f"; torch {case['torch_over_ours']:4.1f} times"
                  if "torch_over_ours" in case else "")
        print(f"{case['layer']:17} {case['length']:6,}: "
              f"{1e6 * case['seconds_per_token']:5,.0f} µs a token, "
              f"{case['flops_per_second'] / 1e9:4.0f} GFLOP/s{beside}")

# %% [markdown] tags=["measured"]
# *What it says.* A sliding layer costs a token about the same after 32,768
# others as after 512, also where it is given all keys; what differs is noise.
# A full layer costs in proportion to the text, at a rate that does not fall.
# In decode one core is two to four times as slow as memory would allow it: by
# a half for the arithmetic of above, the rest for waiting, since an empty
# cache gave 7 GB/s where keys that lay in it gave 11. A few tokens at once, as
# in a draft that is checked, cost less than so many steps, but not much: as
# {eq}`kernels-shared` says, arithmetic is the limit, and it is not shared.
#
# *What is uncertain.* Time is the processor's own, of one thread, because
# others computed on the same machine, and memory's speed was theirs as well.
# Two threads alone on two cores were not measured.
#
# *The whole model*, a 20b of random weights on two cores of a Xeon whose
# memory was slow then (`bench/lengths.py`): a step after 128, 8,192, 32,768
# and 131,000 tokens took 322, 301, 355 and 575 ms; in another run 254 ms after
# 128 and 328 after 32,768. So at the end of its context the 20b writes about
# half as fast as at the beginning.

# %% [markdown]
# ## In the 20b and the 120b
#
# Both have the same heads and every second layer full; the 120b has 36 layers
# instead of 24. When does a token read as many keys as weights?

# %%
for name, config in (("20b", big), ("120b", GptOssConfig.gpt_oss_120b())):
    layers = config.num_hidden_layers // 2
    size = bytes_read_per_token(config)
    print(f"{name:4}: at {size / (layers * KEY):7,.0f} tokens; its context "
          f"ends at {config.max_position_embeddings:,}, the cache then "
          f"has {layers * KEY * 131072 / 1e9:.1f} GB")

# %% [markdown]
# ## Takeaways
#
# - A token reads 2 KiB for each token before it and full layer: 3.2 GB at the
#   end of the context of the 20b.
# - Sliding layers cost the same at any length, if whatever the window hides is
#   not even looked at: nine tiles of sixteen keys a token.
# - Eight heads that share a key make eight operations a byte, and a core is
#   limited by arithmetic before memory is.
# - The full layers of a prompt cost in proportion to its square, and nothing
#   but a faster product helps.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Suppose every head had a key head of its own, H = G = 64. What would a token
# read at 8,192 tokens, and would decode be limited by memory or by arithmetic?

# %% tags=["hide-cell"]
alone = LAYERS * 2 * 2 * H * C * 8192
busy = 2 * C / bf16 + 2 * C / fp32
print(f"{alone / 1e9:.1f} GB instead of {read_back(8192)[0] / 1e9:.1f}; a key "
      f"takes {1e9 * busy:.1f} ns of arithmetic and {1e9 * 4 * C / READ:.1f} "
      "of reading: by memory")

# %% [markdown]
# ### Exercise 2
#
# How many tiles of sixteen does a group need if the ring of 128 slots is full
# and its oldest key lies in slot 37? And with a ring of 160 slots?

# %% tags=["hide-cell"]
def in_ring(size: int, now: int) -> int:
    slots = np.arange(size)
    held = now - (now - slots) % size  # the position in each slot
    seen = (held > now - W).reshape(-1, 16).any(1).nonzero()[0]
    return int(seen[-1] - seen[0] + 1)


print("128 slots:", in_ring(128, 1060), "tiles; 160 slots, oldest key "
      "anywhere:", sorted({in_ring(160, now) for now in range(800, 960)}))

# %% [markdown]
# ### Exercise 3
#
# Of a prompt of 32,768 tokens, which share of the arithmetic of a full layer
# lies in the last quarter of the tokens? What follows for two threads that
# share a prompt by halves?

# %% tags=["hide-cell"]
n = 32768
for name, start in (("last quarter", 3 * n // 4), ("second half", n // 2)):
    part = sum(range(start + 1, n + 1)) / (n * (n + 1) // 2)
    print(f"{name}: {part:.0%}")
print("by halves one thread works three times as long as the other: so the "
      "kernel hands out 16 tokens at a time, the longest first")

# %% [markdown]
# ## Sources
#
# - Heads that share keys: {cite}`gqa2023`; windows: {cite}`longformer2020`.
# - Chunks with a running maximum: {cite}`flash2022`; ranges of keys for few
#   queries: {cite}`flashdecoding2023`. Limits: {cite}`roofline2009`.
