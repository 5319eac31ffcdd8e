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
#     module: roofline
#     public: [read_speed]
# ---
# %% [markdown]
# # What is the speed limit?

# %% [markdown]
# ## Question
#
# How fast can a processor write tokens, and what sets the limit: computing, or
# fetching what to compute with? For one token the 20b multiplies with 3.6
# billion weights, 3.7 GB of memory. Two cores of a server get some 30 GB a
# second from memory. So the token takes at least 124 ms, whatever the program
# does, and the arithmetic needs less than a third of that time.

# %% tags=["export"]
import time

import torch

# %%
import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import (
    active_parameters,
    bytes_read_per_token,
    flops_per_token,
)

plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()
READ, OPERATE = 30e9, 2 * 32 * 3e9  # a second: two cores of 3 GHz, AVX2
token, work = bytes_read_per_token(big), flops_per_token(big, 0)
print(f"{active_parameters(big) / 1e9:.1f} billion weights, "
      f"{token / 1e9:.1f} GB, {work / 1e9:.1f} billion operations a token")
print(f"{1e3 * token / READ:.0f} ms of reading, {1e3 * work / OPERATE:.0f} ms "
      "of arithmetic")

# %% [markdown]
# An *operation* is one multiplication or one addition; a weight costs one of
# each. `OPERATE` is what two cores of 3 GHz can do at best: 32 operations in
# each cycle of each core (how one instruction does several at once is the
# subject of [the next chapter](building.ipynb)).

# %% [markdown]
# ## Picture
#
# Where do the bytes of one token go? Each bar is as long as the bytes that a
# token of the 20b reads from it. The upper axis is the same length in time, at
# 30 GB a second.

# %% tags=["hide-input"]
# Figure: one long horizontal bar in three parts of nearly equal length:
# attention 1.27 GB, four experts a layer 1.27 GB, lm_head 1.16 GB; the end is
# marked as the floor, 124 ms. Below it a bar a third as long: the time for
# the arithmetic.
D, L, V = big.hidden_size, big.num_hidden_layers, big.vocab_size
H, G, C = (big.num_attention_heads, big.num_key_value_heads, big.head_dim)
expert = 3 * big.intermediate_size * D * 17 / 32  # four bits and scales
parts = {"attention": L * 2 * (2 * D * H * C + 2 * D * G * C),
         "4 experts a layer": L * 4 * expert, "lm_head": 2 * V * D}
fig, ax = plt.subplots(figsize=(7.2, 2.3))
left = 0.0
for (name, size), color, kind in zip(
        parts.items(), ("C0", "C1", "C4"),
        ("bf16", "MXFP4", "bf16"), strict=True):
    ax.barh(1, size / 1e9, left=left, color=color, height=0.6,
            edgecolor="white")
    ax.text(left + size / 2e9, 1, f"{name}\n{size / 1e9:.2f} GB, {kind}",
            ha="center", va="center", fontsize=8,
            color="white" if color == "C0" else "black")
    left += size / 1e9
ax.barh(0, work / OPERATE * READ / 1e9, color="0.6", height=0.5)
ax.text(work / OPERATE * READ / 1e9 + 0.04, 0,
        f"arithmetic: {1e3 * work / OPERATE:.0f} ms", va="center", fontsize=8)
ax.axvline(left, color="k", lw=1, ls="--")
ax.text(left - 0.04, 0, f"floor: {1e3 * token / READ:.0f} ms", ha="right",
        va="center", fontsize=8)
ax.set(xlim=(0, 4), ylim=(-0.4, 1.45), yticks=[],
       xlabel="GB read for one token of the 20b")
ax.grid(False)
above = ax.secondary_xaxis("top", functions=(lambda x: 1e3 * x * 1e9 / READ,
                                             lambda x: x * READ / 1e12))
above.set_xlabel("milliseconds at 30 GB/s")
plt.show()
dense = (parts["attention"] + parts["lm_head"]) / sum(parts.values())
print(f"stored in bf16: {dense:.0%} of the bytes")

# %% [markdown]
# What to see: three parts of nearly one size. The experts, which hold nine
# tenths of the model's weights, are only a third of what a token reads: it
# visits 4 of 32 in each layer, and they are packed in four bits. Two thirds of
# the bytes are not packed at all. So a fast product for four bits alone would
# leave most of a token's time where it was; both kinds of matrix need one.

# %% [markdown]
# ## The naive version
#
# The plain operator of [MXFP4](../weights/mxfp4.ipynb) decodes a weight to
# bf16, then multiplies. Follow one number of a matrix too large for any cache
# (the few megabytes of fast memory in the processor). Its packed half byte
# comes in from memory; two bytes of bf16 go out, since the decoded matrix has
# to be somewhere; and they come in again for the product.

# %%
packed, decoded = 17 / 32, 2  # bytes a number: in the file, and as bf16
traffic = packed + decoded + decoded
print(f"{packed:.2f} bytes in the file, {traffic:.2f} moved: "
      f"{traffic / packed:.1f} times as many")
moved = sum(parts.values()) + parts["4 experts a layer"] * (
    traffic / packed - 1)
print(f"{moved / 1e9:.1f} GB a token instead of {token / 1e9:.1f}: "
      f"{1e3 * moved / READ:.0f} ms at 30 GB/s")

# %% [markdown]
# The token now takes more than three times the floor, before anything is
# computed. The remedy is in the same count: what is decoded must never go
# back to memory. A kernel decodes a few weights where the processor computes,
# multiplies them at once, and forgets them.

# %% [markdown]
# ## Derivation
#
# **A number first.** A packed weight is 17/32 of a byte and costs 2
# operations: 3.8 operations for each byte that arrives. The two cores could do
# 192 billion operations while 30 billion bytes arrive, which is 6.4 for each
# byte. The arithmetic waits for memory.

# %%
print(f"a packed weight: {2 / packed:.1f} operations a byte; one in bf16: "
      f"{2 / decoded:.1f}")
print(f"the two cores: {OPERATE / 1e9:.0f} GFLOP/s over {READ / 1e9:.0f} GB/s"
      f" = {OPERATE / READ:.1f} operations a byte")

# %% [markdown]
# **In general.** A computation does $x$ operations for each byte that it
# reads. If memory delivers $\beta$ bytes a second and the processor can do
# $\pi$ operations a second, it does at most
#
# $$ \min(\pi, \; \beta x) \quad \text{operations a second.} $$ (roofline-roof)
#
# Drawn over $x$ this is a *roof* {cite}`roofline2009`: it rises with $x$, then
# it is flat. Decoding meets each weight once and stands on the slope. A prompt
# of 512 tokens brings many to every weight: 512 tokens with 4 of 32 experts
# each are 64 an expert, so a weight that was read once is used 64 times.

# %% tags=["hide-input"]
# Figure: a roof that rises with the operations for each byte up to 6.4 and is
# flat beyond, at 192 GFLOP/s. Decoding lies on the slope: experts in bf16
# lowest, a whole token of the 20b next, experts in four bits highest. Both
# prefills of 512 tokens lie on the flat.
fig, ax = plt.subplots(figsize=(6.4, 3.0))
knee = OPERATE / READ  # operations a byte
ax.plot([0.5, knee, 600], [0.5 * READ / 1e9, *[OPERATE / 1e9] * 2], "k")
ax.text(1.9, 75, "memory: 30 GB/s", rotation=33, ha="center", fontsize=8)
ax.text(600, 215, "arithmetic: 192 GFLOP/s", ha="right", fontsize=8)
rows = {"decode": 1,  # tokens that meet an expert's weights in one pass
        "prefill of 512": 512 * big.num_experts_per_tok
        / big.num_local_experts}
whole = work / token
points = [("decode, experts in bf16", 2 / decoded, "C0s"),
          ("decode, a whole token", whole, "C2^"),
          ("decode, experts in four bits", 2 / packed, "C1o")]
for name, x, look in points:
    ax.plot(x, x * READ / 1e9, look, ms=7)
    ax.annotate(name, (x, x * READ / 1e9), (9, -5), fontsize=8,
                textcoords="offset points")
for name, size, look in (("in bf16", decoded, "C0s"),
                         ("in four bits", packed, "C1o")):
    x = 2 * rows["prefill of 512"] / size
    ax.plot(x, OPERATE / 1e9, look, ms=7)
    ax.annotate("prefill of 512,\n" + name, (x, OPERATE / 1e9), (0, -28),
                fontsize=8, ha="center", textcoords="offset points")
ax.set(xscale="log", yscale="log", xlim=(0.5, 700), ylim=(12, 300),
       xlabel="operations for each byte read", ylabel="GFLOP/s, at best")
ax.set_xticks([1, 10, 100], ["1", "10", "100"])
ax.set_yticks([20, 50, 100, 200], ["20", "50", "100", "200"])
ax.minorticks_off()
plt.show()
print(f"prefill of 512: {rows['prefill of 512']:.0f} tokens an expert")
print(f"decode in four bits: {decoded / packed:.1f} times what bf16 allows")

# %% [markdown]
# What to see: on the slope fewer bytes a weight are more speed, and four bits
# do 3.8 times as much as bf16. On the flat they gain nothing: there the
# product itself has to be fast. Decode and prefill want different loops, and
# get them in [packed](packed.ipynb) and [many rows](many_rows.ipynb).
#
# **The floor.** If a token reads $b$ bytes, then
#
# $$ t_{\text{token}} \ge b / \beta . $$ (kernels-floor)
#
# The share $b / (\beta\, t_{\text{token}})$ tells how much of the possible a
# program reaches. A program at a share of four fifths could become a quarter
# faster, by whatever trick; more comes only from reading less.

# %%
for gigabytes in (10, 30, 300):
    floor = token / (1e9 * gigabytes)
    print(f"{gigabytes:3} GB/s: a token of the 20b takes at least "
          f"{1e3 * floor:3.0f} ms, so at most {1 / floor:4.1f} a second")

# %% [markdown]
# ## Code
#
# ### How fast is this machine's memory?
#
# We measure $\beta$. A data sheet tells it for all cores at once and for
# perfect access. So we time the simplest program that has to read everything:
# a sum. It runs over 1 GiB of fp32, more than any cache holds, on as many
# threads as the model will use; addition is so cheap that the numbers are
# added as fast as they arrive. Of five runs the fastest counts, because
# whatever else happens on a machine can only make a run slower.

# %% tags=["export"]
def read_speed(size: int = 2 ** 30, repeats: int = 5) -> float:
    """Bytes a second that all threads together read from memory, best of."""
    numbers = torch.ones(size // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best

# %% [markdown] tags=["measured"]
# Here is the machine on which this page was made, one thread. (Yours is shown
# when you run the cell; a small array, which stays in a cache, would seem
# several times faster and says nothing about memory.)

# %% tags=["nbval-ignore-output"]
speed = read_speed()
print(f"{speed / 1e9:.0f} GB/s with {torch.get_num_threads()} thread(s): a "
      f"token of the 20b takes at least {1e3 * token / speed:.0f} ms")

# %% [markdown]
# `python -m gptoss bench` measures $\beta$ in the same way, in the same
# process as the model, and prints the share of {eq}`kernels-floor` beside the
# tokens a second. Speeds elsewhere in this part were measured in November 2026
# on two cores of an AMD EPYC: Zen 3 where AVX2 is meant, Zen 4 where AVX-512
# is. What each step brought is told in [measured](measured.ipynb).

# %% [markdown]
# ## It holds
#
# The bars of the picture count three kinds of matrices by hand. `sizes` counts
# every tensor that a token touches, also norms, biases and routers. The two
# counts should differ by those and by nothing else.

# %%
by_hand = sum(parts.values())
print(f"{by_hand / 1e9:.3f} GB by hand, {token / 1e9:.3f} by the table: "
      f"{(token - by_hand) / 1e6:.0f} MB in small tensors")
assert 0 <= token / by_hand - 1 < 2e-3
assert 3 < (token / READ) / (work / OPERATE) < 4
assert 1e8 < speed < 1e13 and 1e8 < read_speed(2 ** 22, 2) < 1e13

# %% [markdown]
# ## In the 20b and the 120b
#
# The chapters of this part put kernels in C++ under the
# [operators](../model/operators.ipynb) that the model asks for. Nothing in the
# model changes. A reader without a compiler keeps the torch path, and one line
# in the log says so. The larger model has another floor, not another limit:

# %%
for name, config in (("20b", big), ("120b", GptOssConfig.gpt_oss_120b())):
    floor = bytes_read_per_token(config) / READ
    print(f"{name:4} reads {bytes_read_per_token(config) / 1e9:.2f} GB a "
          f"token: at 30 GB/s at least {1e3 * floor:.0f} ms")

# %% [markdown]
# The 120b has four times the experts and still chooses 4 of them; it reads
# more only because it has 36 layers instead of 24.

# %% [markdown]
# ## Takeaways
#
# - Decoding is reading: bytes a token over bytes a second is the floor, and no
#   program is faster.
# - A weight is used once a token, so fewer bytes a weight are more speed. A
#   prompt brings many tokens to a weight and is limited by arithmetic.
# - Two thirds of what a token of the 20b reads are not packed: a kernel for
#   four bits alone would leave most of its time where it was.
# - Decoding a weight to memory first moves 8.5 times its bytes.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# How many tokens must meet a weight in one pass before arithmetic is the
# limit, with the two cores above, for weights in four bits and in bf16? Use
# {eq}`roofline-roof`.

# %% tags=["hide-cell"]
for kind, size in (("four bits", packed), ("bf16", decoded)):
    print(f"{kind}: from {OPERATE / READ * size / 2:.1f} tokens on")
assert OPERATE / READ * packed / 2 < 2 < 6 < OPERATE / READ

# %% [markdown]
# ### Exercise 2
#
# If the dense matrices were stored in twelve bits a number instead of sixteen,
# how much lower would the floor of the 20b be? And if the experts were stored
# in two bits instead of four (with the same scale for each 32)?

# %% tags=["hide-cell"]
in_bf16 = parts["attention"] + parts["lm_head"]
half = parts["4 experts a layer"] * 8 / 17  # two of 4.25 bits a weight
for words, less in (("dense in twelve bits", in_bf16 / 4),
                    ("experts in two bits", half)):
    print(f"{words}: {less / token:.0%} lower")
assert 0.16 < in_bf16 / 4 / token < 0.17

# %% [markdown]
# ### Exercise 3
#
# The cache is read, too. A full layer reads a key and a value of every earlier
# token, a sliding layer the last 128: G heads of C numbers in bf16 each. From
# which length of text on does a token of the 20b read as many bytes of cache
# as of weights? (Half of the 24 layers are full.)

# %% tags=["hide-cell"]
pair = 2 * G * C * 2  # bytes: a key and a value of one token in one layer
full = L // 2
sliding = (L - full) * 128 * pair
length = (token - sliding) / (full * pair)
print(f"{pair} bytes a token and layer; as many as the weights at "
      f"{length:,.0f} tokens, {length / 131072:.1f} times the longest context")
at_end = sliding + full * pair * 131072
print(f"at 131,072 tokens the cache is {at_end / 1e9:.1f} GB, "
      f"{at_end / (at_end + token):.0%} of what a token reads")

# %% [markdown]
# ## Sources
#
# - Roofline: {cite}`roofline2009`. MXFP4: {cite}`ocpmx2023`.
# - llama.cpp, `tools/llama-bench`: the same two numbers, prompt and decode.
