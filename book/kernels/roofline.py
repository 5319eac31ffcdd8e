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
# How fast can a processor turn four-bit weights into tokens, and what is the
# limit made of? A token of the 20b reads 3.7 GB of weights and does 7.2
# billion operations with them. At 30 GB/s, about what two cores of a server
# get from memory, the bytes take 124 ms. In that time the same two cores, with
# 32 operations a cycle each, could do three times the arithmetic. So decoding
# costs what reading costs, and the plain implementation of
# [MXFP4](../weights/mxfp4.ipynb) reads and writes too much: what it has
# decoded goes back to memory.
#
# The chapters of this part put kernels in C++ that read each packed byte once
# under the [operators](../model/operators.ipynb) that the model asks for.
# Nothing in the model changes, and a reader without a compiler keeps the torch
# path, with one line that says so.
#
# Speeds are one machine's and no cell can compute them for all. Those in this
# part were measured in November 2026 on two cores of an AMD EPYC, Zen 3 where
# AVX2 is meant and Zen 4 where AVX-512 is; what each step brought is told in
# [the chapter on measurements](measured.ipynb).

# %% tags=["export"]
import time

import torch

# %%
import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token, flops_per_token

plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()
READ, OPERATE = 30e9, 2 * 32 * 3e9  # a second: two cores of 3 GHz, AVX2
reading = bytes_read_per_token(big) / READ
arithmetic = flops_per_token(big, 0) / OPERATE
print(f"{bytes_read_per_token(big) / 1e9:.2f} GB and "
      f"{flops_per_token(big, 0) / 1e9:.1f} GFLOP a token: "
      f"{1e3 * reading:.0f} ms of reading, {1e3 * arithmetic:.0f} of work")
assert 3 < reading / arithmetic < 4

# %% [markdown]
# ## Picture
#
# A roofline {cite}`roofline2009` says how fast a computation can be that does
# so many operations with each byte that it reads: as fast as memory delivers,
# until arithmetic is the limit. Left, the roof of the two cores above and
# where the model meets it; right, what a token reads.

# %% tags=["hide-input"]
# Figure: left, a roof that rises with the operations for each byte up to
# 6.4 and is flat beyond. Decoding lies on the slope, experts in bf16 lowest,
# a whole token next, experts in four bits highest; both prefills lie on the
# flat. Right, bytes a token: attention, experts and lm_head, a third each.
D, L, V = big.hidden_size, big.num_hidden_layers, big.vocab_size
H, G, C = (big.num_attention_heads, big.num_key_value_heads, big.head_dim)
expert = 3 * big.intermediate_size * D * 17 / 32
parts = {"attention": L * 2 * (2 * D * H * C + 2 * D * G * C),
         "4 experts a layer": L * 4 * expert, "lm_head": 2 * V * D}
fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.3),
                                  width_ratios=(3, 2))
knee = OPERATE / READ  # operations a byte
left.plot([0.5, knee, 600], [0.5 * READ / 1e9, *[OPERATE / 1e9] * 2], "k")
left.text(0.55, 70, "memory:\n30 GB/s", fontsize=8)
left.text(600, 215, "arithmetic: 192 GFLOP/s", ha="right", fontsize=8)
rows = {"decode": 1,  # tokens that meet an expert's weights in one pass
        "prefill of 512": 512 * big.num_experts_per_tok
        / big.num_local_experts}
for kind, size, look in (("experts in four bits", 17 / 32, "C1o"),
                         ("experts in bf16", 2, "C0s")):
    ratio = {name: 2 * n / size for name, n in rows.items()}
    reached = {name: min(OPERATE, x * READ) for name, x in ratio.items()}
    left.plot(list(ratio.values()), [y / 1e9 for y in reached.values()],
              look, ms=7, label=kind)
    left.annotate("decode", (ratio["decode"], reached["decode"] / 1e9),
                  (8, -4), textcoords="offset points", fontsize=8)
left.text(120, 150, "prefill of 512", ha="center", fontsize=8)
whole = flops_per_token(big, 0) / bytes_read_per_token(big)
left.plot(whole, whole * READ / 1e9, "C2^", ms=7, label="a token of the 20b")
left.set(xscale="log", yscale="log", xlim=(0.5, 700), ylim=(12, 300),
         xlabel="operations for each byte read", ylabel="GFLOP/s, at best")
left.set_xticks([1, 10, 100], ["1", "10", "100"])
left.set_yticks([20, 50, 100, 200], ["20", "50", "100", "200"])
left.minorticks_off()
left.legend(loc="lower right")
right.barh(list(parts), [size / 1e9 for size in parts.values()],
           color=["C0", "C1", "C5"])
for y, size in enumerate(parts.values()):
    right.text(size / 1e9 + 0.03, y, f"{size / 1e9:.2f}", va="center",
               fontsize=8)
right.set(xlabel="GB read for a token of the 20b", xlim=(0, 1.6))
right.invert_yaxis()
plt.show()

# %% [markdown]
# What to see on the left: decoding stands on the slope. A weight is used once,
# two operations, so that fewer bytes a weight are more speed: four bits do
# 3.8 times as much as bf16. A prefill of 512 tokens brings 64 to an expert,
# stands on the flat part in either format, and gains nothing from few bits.
# A token of the 20b lies between the two formats of decoding, because, on the
# right, two thirds of what it reads are not packed at all: attention and the
# head are stored in bf16. A fast kernel for four bits alone would leave most
# of a token's time where it was, so both kinds of matrix get one.

# %%
dense = (parts["attention"] + parts["lm_head"]) / sum(parts.values())
assert rows["prefill of 512"] == 64 and 3.7 < 2 / (17 / 32) < 3.8
print(f"stored in bf16: {dense:.0%} of the bytes of a token")

# %% [markdown]
# ## The naive version
#
# The plain operator decodes the weight to bf16 and multiplies. Count the bytes
# that pass between processor and memory for one number of a matrix that no
# cache holds: the packed half byte in, two bytes out, two bytes in again.

# %%
packed, decoded = 17 / 32, 2
traffic = packed + 2 * decoded
print(f"{packed:.2f} bytes in the file, {traffic:.2f} moved: "
      f"{traffic / packed:.1f} times as many")

# %% [markdown]
# So a fast kernel decodes in registers, which are part of the processor, and
# multiplies at once: what is decoded never goes back to memory.

# %% [markdown]
# ## Derivation
#
# If a token reads $b$ bytes and memory delivers $\beta$ bytes a second, then
# whatever the processor does,
#
# $$ t_{\text{token}} \ge b / \beta . $$ (kernels-floor)
#
# The share $b / (\beta\, t_{\text{token}})$ says how much of the possible a
# program reaches. With a share of 80 % there is a quarter to be won, by
# whatever trick; more can come only from reading less.

# %%
for gigabytes in (10, 30, 300):
    floor = bytes_read_per_token(big) / (1e9 * gigabytes)
    print(f"{gigabytes:3} GB/s: a token of the 20b takes at least "
          f"{1e3 * floor:3.0f} ms, {1 / floor:4.1f} tokens a second at best")

# %% [markdown]
# ## Code
#
# ### Measuring
#
# $\beta$ is measured, not looked up: what a data sheet promises is for all
# cores and perfect access. A sum over 1 GiB, more than any cache holds, is
# computed by torch as fast as the numbers arrive, on as many threads as the
# model will use. `python -m gptoss bench` prints the share of
# {eq}`kernels-floor` with a $\beta$ measured in the same process.

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

# %% [markdown]
# ## It holds
#
# The bars of the picture count three kinds of matrices by hand. `sizes` counts
# every tensor that a token touches, norms, biases and routers too; the
# difference is what the bars leave out. And the speed measured here, whatever
# it is, lies between that of a disk and that of a cache.

# %%
by_hand, by_table = sum(parts.values()), bytes_read_per_token(big)
print(f"{by_hand / 1e9:.3f} GB by hand, {by_table / 1e9:.3f} by the table: "
      f"{(by_table - by_hand) / 1e6:.0f} MB in small tensors")
assert 0 <= by_table / by_hand - 1 < 2e-3
assert 1e8 < read_speed(2 ** 26) < 1e13

# %% [markdown]
# ## Takeaways
#
# - Decoding is reading: bytes a token over bytes a second is the floor.
# - A weight is used once a token, so fewer bytes a weight are more speed; a
#   prompt brings many tokens to a weight, and is limited by arithmetic.
# - Two thirds of what a token of the 20b reads are not packed at all: a kernel
#   for four bits alone would leave most of its time where it was.
# - Decoding a weight to memory first moves 8.5 times the bytes.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# How many tokens must meet a weight in one pass before arithmetic is the
# limit, with the two cores above, for weights in four bits and in bf16?

# %% tags=["hide-cell"]
for kind, size in (("four bits", 17 / 32), ("bf16", 2)):
    print(f"{kind}: from {OPERATE / READ * size / 2:.1f} tokens on")
assert OPERATE / READ * 17 / 64 < 2 < 6 < OPERATE / READ

# %% [markdown]
# ### Exercise 2
#
# If the dense matrices were stored in twelve bits a number instead of sixteen,
# how much lower would the floor of the 20b be? And if the experts were stored
# in two bits instead of four?

# %% tags=["hide-cell"]
dense = parts["attention"] + parts["lm_head"]
half = parts["4 experts a layer"] * 8 / 17  # two of 4.25 bits a weight
for words, less in (("dense in twelve bits", dense / 4),
                    ("experts in two bits", half)):
    print(f"{words}: {less / by_table:.0%} lower")
assert 0.16 < dense / 4 / by_table < 0.17

# %% [markdown]
# ## Sources
#
# - Roofline: {cite}`roofline2009`. MXFP4: {cite}`ocpmx2023`.
# - llama.cpp, `tools/llama-bench`: the same two numbers, prompt and decode.
