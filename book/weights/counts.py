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
#     module: sizes
#     public: [active_parameters, cache_bytes, checkpoint_bytes,
#       flops_per_token, parameter_counts, total_parameters]
# ---

# %% [markdown]
# # Where do 21 billion parameters live?

# %% [markdown]
# ## Question
#
# gpt-oss-120b has 5.6 times as many parameters as gpt-oss-20b. Yet to write
# one token it reads only 1.35 times as many bytes: 5.0 GB of its 65, where
# the 20b reads 3.7 of its 14. Where are the parameters that the larger model
# has and does not use?
#
# We answer by counting, to the last parameter. Everything follows from some
# twenty numbers of [the configuration](config.ipynb).

# %% tags=["export"]
from gptoss.weights.config import GptOssConfig

# %%
import math
from dataclasses import replace

import matplotlib.pyplot as plt

from gptoss.weights.config import KINDS

small, big = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()

# %% [markdown]
# ## Picture
#
# Each model gets three bars: how many parameters it has, how many bytes they
# take on disk, and how many of those are read to write one token. Left: true
# lengths. Right: the same bars as shares. (The functions behind the figure
# are the ones that this chapter writes.)
#
# What to see: on the left, the third bar hardly grows from one model to the
# other, although the first is 5.6 times as long. On the right, why: nearly
# all parameters are *experts* (blue), but a token uses only four of them in
# each layer. Of what it reads they are about a third.

# %% tags=["hide-input", "picture"]
# Figure: six bars, three for each model: parameters, bytes on disk, bytes
# read for a token. Left in true length: 20.9, 13.8 and 3.7 against 116.8,
# 65.2 and 5.0. Right as shares: experts fill over nine tenths of the
# parameters, but a third of what a token reads.
from gptoss.weights import sizes

plt.style.use("../_static/book.mplstyle")
PARTS = ("experts", "attention", "embedding", "lm_head", "router, norms")


def bars(config):
    """Three bars of five parts, in 1e9 parameters or bytes."""
    n, L = sizes.parameter_counts(config), config.num_hidden_layers
    expert, rest = sizes.expert_bytes(config), n["router"] + n["norms"]
    plain = (n["attention"], n["embedding"], n["lm_head"], rest)
    disk = [L * config.num_local_experts * expert, *(2 * x for x in plain)]
    read = [L * config.num_experts_per_tok * expert, 2 * n["attention"],
            2 * config.hidden_size, 2 * n["lm_head"], 2 * rest]
    assert sum(disk) == sizes.checkpoint_bytes(config)
    assert sum(read) == sizes.bytes_read_per_token(config)
    return ([x / 1e9 for x in part]
            for part in ((n["experts"], *plain), disk, read))


fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9), sharey=True)
labels, at = [], 0.0
for size, config in (("20b", small), ("120b", big)):
    for unit, bar in zip(("parameters", "bytes on disk", "bytes a token"),
                         bars(config), strict=True):
        start, total = 0.0, sum(bar)
        for n, part in enumerate(bar):
            left.barh(at, part, left=start, color=f"C{n}", height=0.75)
            right.barh(at, 100 * part / total, left=100 * start / total,
                       color=f"C{n}", height=0.75)
            start += part
        left.text(total + 1.5, at, f"{total:.1f} " + (
            "billion" if unit == "parameters" else "GB"), va="center")
        labels.append((at, f"{size}: {unit}"))
        at += 1
    at += 0.5
for x, y, part, colour in ((40, 0, "experts", "white"),
                           (78.5, 1, "att.", "black"),
                           (87.3, 1, "emb.", "white"),
                           (95.8, 1, "head", "black"),
                           (17, 2, "experts", "white"),
                           (51, 2, "attention", "black"),
                           (84, 2, "lm_head", "black"),
                           (19, 5.5, "experts", "white"),
                           (57, 5.5, "attention", "black"),
                           (88, 5.5, "lm_head", "black")):
    right.text(x, y, part, ha="center", va="center", color=colour,
               fontsize=6 if y == 1 else 7)
left.set_yticks([y for y, _ in labels], [text for _, text in labels])
left.invert_yaxis()
left.set(xlim=(0, 175), xlabel="billion parameters, or GB",
         title="True length")
right.set(xlim=(0, 100), xlabel="share (%)", title="As shares")
for ax in (left, right):
    ax.grid(axis="y", visible=False)
plt.show()

# %%
times = [count(big) / count(small) for count in (
    sizes.total_parameters, sizes.checkpoint_bytes,
    sizes.bytes_read_per_token)]
print("120b / 20b: parameters {:.2f}, disk {:.2f}, read {:.2f}".format(
    *times))

# %% [markdown]
# ## One layer: 19 tensors
#
# Before any formula we look at what is there. A language model of this kind
# is a stack of layers, all of the same make. A token enters as a vector of
# $D = 2880$ numbers, its row of a table called the *embedding*. Each layer
# reads the vector and adds something to it, in two steps:
#
# - **Attention** lets the token look at the tokens before it. From each
#   vector it makes a *query* (what am I looking for?), a *key* (what can be
#   found here?) and a *value* (what is handed over), each by a matrix, and a
#   fourth matrix, *o*, brings the result back to 2880 numbers. There are 64
#   queries for every token, called heads, of 64 numbers each; only 8 keys
#   and values, so 8 heads share one. Each head also has a *sink*, one number
#   ([sinks](../attention/sinks.ipynb)).
# - **Experts** are small networks of three matrices, *gate*, *up* and *down*.
#   The 20b has 32 of them in a layer. A *router*, a matrix with one row for
#   each expert, chooses the four that this token is sent through
#   ([routing](../moe/routing.ipynb)).
#
# Before each step the vector is rescaled by a *norm* with 2880 weights. After
# the last layer the matrix `lm_head` compares it with every token of the
# vocabulary. [One page](../one_page.ipynb) runs all of this.
#
# In the file of the 20b, a layer is 19 tensors. `blocks` and `scales` hold
# matrices in four bits: 32 numbers in 16 bytes of blocks and one byte of
# scale ([the format](mxfp4.ipynb)). All others are bf16, two bytes a number.

# %%
LAYER = [  # name, shape in the file, parameters that an element stands for
    ("input_layernorm.weight", (2880,), 1),
    ("self_attn.q_proj.weight", (4096, 2880), 1),
    ("self_attn.q_proj.bias", (4096,), 1),
    ("self_attn.k_proj.weight", (512, 2880), 1),
    ("self_attn.k_proj.bias", (512,), 1),
    ("self_attn.v_proj.weight", (512, 2880), 1),
    ("self_attn.v_proj.bias", (512,), 1),
    ("self_attn.o_proj.weight", (2880, 4096), 1),
    ("self_attn.o_proj.bias", (2880,), 1),
    ("self_attn.sinks", (64,), 1),
    ("post_attention_layernorm.weight", (2880,), 1),
    ("mlp.router.weight", (32, 2880), 1),
    ("mlp.router.bias", (32,), 1),
    ("mlp.experts.gate_up_proj_blocks", (32, 5760, 90, 16), 2),
    ("mlp.experts.gate_up_proj_scales", (32, 5760, 90), 0),
    ("mlp.experts.gate_up_proj_bias", (32, 5760), 1),
    ("mlp.experts.down_proj_blocks", (32, 2880, 90, 16), 2),
    ("mlp.experts.down_proj_scales", (32, 2880, 90), 0),
    ("mlp.experts.down_proj_bias", (32, 2880), 1)]

counted, stored = 0, 0
print(f"{'':33}{'shape':>20}{'parameters':>13}{'bytes':>13}")
for name, shape, stands_for in LAYER:
    elements = math.prod(shape)
    parameters = stands_for * elements
    taken = elements * (1 if name.endswith(("blocks", "scales")) else 2)
    counted, stored = counted + parameters, stored + taken
    text = " x ".join(map(str, shape))
    print(f"{name:33}{text:>20}{parameters:13,}{taken:13,}")
print(f"{'one layer':53}{counted:13,}{stored:13,}")

# %% [markdown]
# Two lines hold nearly everything: the blocks of gate and up, which lie in
# one tensor, and those of down. 24 such layers, one norm at the end, and the
# two tables of $V = 201{,}088$ tokens, embedding and `lm_head`, are the whole
# model:

# %%
V, D = 201_088, 2880
print(f"{24 * counted + D + 2 * V * D:,} parameters")
print(f"{24 * stored + 2 * (D + 2 * V * D):,} bytes")

# %% [markdown] tags=["given"]
# The second number is the `total_size` that the released index file of the
# 20b states, 13,761,264,768; the first is what the model card rounds to 20.91
# billion {cite}`gptoss2025`. So the table is complete. The rest of the
# chapter turns it into formulas that hold for any size.

# %% [markdown]
# ## Three estimates that fail
#
# **The formula everybody knows.** In an ordinary transformer a layer of width
# $D$ has $4D^2$ parameters in attention and $8D^2$ behind it, so
# $12LD^2$ in all $L$ layers, and $2VD$ in the two tables.

# %%
RELEASED = {  # layers, experts, parameters (counted below), bytes (index)
    "20b": (24, 32, 20_914_757_184, 13_761_264_768),
    "120b": (36, 128, 116_829_156_672, 65_248_815_744)}
for size, (L, _, parameters, _) in RELEASED.items():
    dense = 12 * L * D ** 2 + 2 * V * D
    print(f"{size:>4}: the formula says {dense / 1e9:.2f} billion,",
          f"there are {parameters / 1e9:.2f}: {parameters / dense:.1f} times")

# %% [markdown]
# It is too small by factors of 6 and 25, because each of its assumptions is
# wrong here. The queries are 64 · 64 = 4096 numbers wide, not 2880. Keys and
# values have 8 heads, not 64. What follows attention has three matrices of
# width 2880, not two of $4D$. And a layer has 32 or 128 such parts.
#
# **Counting what the file holds.** Surely the file knows. But its elements
# are of three kinds: a bf16 element is one parameter, an element of `blocks`
# is two, an element of `scales` is none. Count every element once, as a tool
# does that only adds up shapes; or be careful, and count each byte of four
# bits twice:

# %%
for size, (L, E, parameters, _) in RELEASED.items():
    packed = L * E * 3 * D * D      # numbers that are stored in four bits
    blocks, scales = packed // 2, packed // 32
    elements = parameters - packed + blocks + scales
    careful = parameters + scales
    print(f"{size:>4}: elements {elements / 1e9:.1f} billion,",
          f"blocks counted twice {careful / 1e9:.1f},",
          f"true {parameters / 1e9:.1f}")

# %% [markdown]
# Both are wrong. The second takes every scale for a parameter, as Hugging
# Face's JavaScript library did until
# [#2323](https://github.com/huggingface/huggingface.js/pull/2323). One
# catalogue of models could only note that "both models have different total
# parameter number from hugging face to the release paper"
# ([ecologits#173](https://github.com/mlco2/ecologits/pull/173)).
#
# **Four bits a parameter.** So the file is half a byte for each?

# %%
for size, (*_, parameters, stored) in RELEASED.items():
    print(f"{size:>4}: half a byte each is {parameters / 2e9:.1f} GB,",
          f"the files have {stored / 1e9:.1f}:",
          f"{(stored - parameters / 2) / 1e9:.1f} GB are missing")

# %% [markdown]
# The scales are missing, and whatever is not an expert is stored in 16 bits.
#
# ## How many parameters?
#
# Now the formulas, with letters for the numbers of the table: $L$ layers,
# width $D$, $H$ query heads and $G$ key/value heads of size $C$, $E$ experts
# of inner width $F$ of which a token gets $K$, and $V$ tokens in the
# vocabulary. $P$ counts parameters.
#
# **Attention.** q has $HC = 4096$ rows of $D$ weights, k and v have
# $GC = 512$ rows each, and every row has a bias, so it costs $D + 1$. o has
# $D$ rows of $HC$ weights and a bias. With the sinks:
#
# $$
# P_{att} = \underbrace{(D + 1)(H + 2G)\,C}_{q,\,k,\,v}
#   + \underbrace{(HC + 1)\,D}_{o} + H
# $$ (sizes-attention)
#
# **Experts.** Gate and up have $F$ rows of $D$ weights each, down has $D$
# rows of $F$; each row has a bias. The router has a row for each expert:
#
# $$
# P_{exp} = 2F(D + 1) + D(F + 1), \qquad P_{router} = E\,(D + 1)
# $$ (sizes-expert)
#
# **All of it.** There are two norms in a layer and one at the end, and two
# tables without bias:
#
# $$
# P = L\,(P_{att} + P_{router} + E\,P_{exp} + 2D) + D + 2VD
# $$ (sizes-total)
#
# The same in code. The answer is a dictionary by component, because "where do
# they live" asks for parts: `embedding`, `attention`, `router`, `experts`,
# `norms`, `lm_head`, each over all layers.

# %% tags=["export"]
def parameter_counts(config: GptOssConfig) -> dict[str, int]:
    """Parameters by component; the values sum to `total_parameters`."""
    D, V, C = config.hidden_size, config.vocab_size, config.head_dim
    E, L = config.num_local_experts, config.num_hidden_layers
    H, G = config.num_attention_heads, config.num_key_value_heads
    attention = D * (H + 2 * G) * C + (H + 2 * G) * C   # q, k, v
    attention += H * C * D + D + H                      # o and the sinks
    return {"embedding": V * D, "attention": L * attention,
            "router": L * (D + 1) * E, "experts": L * E * expert_size(config),
            "norms": (2 * L + 1) * D, "lm_head": V * D}


def expert_size(config: GptOssConfig) -> int:
    """Parameters of one expert: gate and up, down, and their biases."""
    D, F = config.hidden_size, config.intermediate_size
    return 2 * F * D + 2 * F + D * F + D


def total_parameters(config: GptOssConfig) -> int:
    """All parameters, each counted as one number."""
    return sum(parameter_counts(config).values())

# %%
for size, config in (("20b", small), ("120b", big)):
    assert total_parameters(config) == RELEASED[size][2]
    print(f"{size}: {total_parameters(config):,}")
    for part, count in parameter_counts(config).items():
        share = 100 * count / total_parameters(config)
        print(f"  {part:10}{count:16,}{share:8.2f} %")

# %% [markdown]
# ## How many of them does a token use?
#
# A token is multiplied with $K$ of the $E$ experts in each layer and with
# everything else except the embedding, of which it only looks up one row:
#
# $$
# P_{act} = L\,(P_{att} + P_{router} + K\,P_{exp} + 2D) + D + VD
# $$ (sizes-active)
#
# $E$ is left in the router alone. That is the answer to our question: the
# 120b is the 20b with half as many layers again and four times as many
# experts in each, and most of them wait.

# %% tags=["export"]
def active_parameters(config: GptOssConfig) -> int:
    """Parameters that one token multiplies with: K experts of E, and
    without the embedding, which is looked up."""
    counts = parameter_counts(config)
    chosen = (config.num_hidden_layers * config.num_experts_per_tok
              * expert_size(config))
    rest = sum(counts[part] for part in ("attention", "router", "norms",
                                         "lm_head"))
    return rest + chosen

# %%
for size, config in (("20b", small), ("120b", big)):
    active = active_parameters(config)
    print(f"{size}: {active:,} active, {active / 1e9:.2f} billion,",
          f"{100 * active / total_parameters(config):.1f} % of all")

# %% [markdown]
# The naive formula gave 3.55 and 4.74 billion, not far from these, but by
# accident. A layer's four experts have $12 D^2$ weights together, where the
# formula has $8 D^2$; in exchange it counts the embedding, which no token
# multiplies with.
#
# ## How many bytes?
#
# Take one expert of the 20b. Its three matrices are $3DF$ weights in blocks
# of 32, and each block takes 17 bytes, 4.25 bits a weight. Its biases are
# $2F + D$ numbers in bf16:

# %%
F = 2880
print(f"{3 * D * F:,} weights in {3 * D * F // 32:,} blocks:",
      f"{3 * D * F // 32 * 17:,} bytes")
print(f"{2 * F + D:,} biases: {2 * (2 * F + D):,} bytes")

# %% [markdown]
# In general, with $b$ for bytes, an expert takes
#
# $$
# b_{exp} = 17 \cdot \frac{3DF}{32} + 2\,(2F + D)
# $$ (sizes-bytes)
#
# and all that is no expert takes two bytes a parameter. So the model, and
# what one token reads of it when it is the only one in its batch, are
#
# $$
# b = L E\,b_{exp} + 2\,(P - L E\,P_{exp}), \qquad
# b_{read} = L K\,b_{exp} + 2\,(P_{act} - L K\,P_{exp} + D).
# $$ (sizes-read)
#
# The last $D$ is the token's row of the embedding. In code a row whose
# length is no multiple of 32 is counted as padded to the next one; the
# released models have none.

# %% tags=["export"]
def expert_bytes(config: GptOssConfig) -> int:
    """One expert in the file: 17 bytes per 32 weights, bf16 biases."""
    D, F = config.hidden_size, config.intermediate_size
    blocks = 2 * F * -(-D // 32) + D * -(-F // 32)
    return 17 * blocks + 2 * (2 * F + D)


def checkpoint_bytes(config: GptOssConfig) -> int:
    """Bytes of all tensors in the released layout: experts in MXFP4."""
    experts = config.num_hidden_layers * config.num_local_experts
    counts = parameter_counts(config)
    dense = total_parameters(config) - counts["experts"]
    return experts * expert_bytes(config) + 2 * dense


def bf16_bytes(config: GptOssConfig) -> int:
    """Bytes of all tensors if every parameter took two."""
    return 2 * total_parameters(config)

# %%
for size, config in (("20b", small), ("120b", big)):
    assert checkpoint_bytes(config) == RELEASED[size][3]
    print(f"{size}: {checkpoint_bytes(config):,} bytes,",
          f"in bf16 it would be {bf16_bytes(config) / 1e9:.1f} GB")

# %% tags=["export"]
def bytes_read_per_token(config: GptOssConfig) -> int:
    """Bytes of weights that decoding one token reads, K experts a layer.

    One row of the embedding counts; the cache does not (`cache_bytes`).
    """
    counts = parameter_counts(config)
    dense = sum(counts[part] for part in ("attention", "router", "norms",
                                          "lm_head"))
    experts = config.num_hidden_layers * config.num_experts_per_tok
    return (2 * (dense + config.hidden_size)
            + experts * expert_bytes(config))

# %%
for size, config in (("20b", small), ("120b", big)):
    read = bytes_read_per_token(config)
    print(f"{size}: {read:,} bytes read for a token,",
          f"{100 * read / checkpoint_bytes(config):.0f} % of the file")

# %% [markdown]
# ## What does the text itself take?
#
# While it reads, a model keeps the key and the value of every token, so that
# it need not compute them again: the [cache](../model/cache.ipynb). In one
# layer that is $2GC = 2 \cdot 8 \cdot 64$ numbers a token, in bf16 2048
# bytes. Every second layer *slides*: it sees only the last $W = 128$ tokens
# ([masks](../attention/masks.ipynb)), so $W$ places are enough for it,
# however long the text is; they are used in turn, as in a ring. With
# $L_{full}$ layers of the other kind, $S$ keys and their values take
#
# $$
# b_{cache}(S) = 4GC\,\big(L_{full}\,S + (L - L_{full})\,W\big).
# $$ (sizes-cache)
#
# The functions below have the two bytes of bf16 as an argument,
# `dtype_bytes`, and take a `batch_size`: the cache grows with both. The
# rings are counted at full length from the start, as they are allocated.

# %% tags=["export"]
def layer_cache_bytes(config: GptOssConfig, dtype_bytes: int = 2) -> int:
    """Bytes of one token's key and value in one layer: 2 G C numbers."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype_bytes


def cache_bytes_per_token(config: GptOssConfig, dtype_bytes: int = 2) -> int:
    """Bytes that a token adds to each layer's keys and values, times the
    full layers only: a sliding layer's ring does not grow."""
    full = config.layer_types.count("full_attention")
    return full * layer_cache_bytes(config, dtype_bytes)


def cache_bytes(config: GptOssConfig, tokens: int, batch_size: int = 1,
                dtype_bytes: int = 2) -> int:
    """Bytes of a cache with room for `tokens`, its rings included."""
    sliding = config.layer_types.count("sliding_attention")
    rings = sliding * config.sliding_window * layer_cache_bytes(
        config, dtype_bytes)
    return batch_size * (rings + tokens * cache_bytes_per_token(
        config, dtype_bytes))

# %%
S = 131_072
every = small.num_hidden_layers * S * layer_cache_bytes(small)
print(f"a token in one layer: {layer_cache_bytes(small):,} bytes")
print(f"{S:,} tokens, every layer full: {every / 1e9:.2f} GB")
print(f"{S:,} tokens, rings where it slides:",
      f"{cache_bytes(small, S) / 1e9:.2f} GB")

# %% [markdown]
# ## How much arithmetic?
#
# A weight of a matrix costs a token one multiplication and one addition. A
# key that it sees costs each query head $C$ of both for the product of query
# and key, and its value as many again. So with $S$ keys in the context
#
# $$
# f(S) = 2\,M + 4HC \sum_{\ell=1}^{L} S_\ell, \qquad
# S_\ell = \begin{cases} \min(S, W) & \text{sliding} \\ S &
#   \text{full} \end{cases}
# $$ (sizes-flops)
#
# operations, where $M$ is the number of active weights that lie in matrices:
# $P_{act}$ without biases, norms and sinks.

# %% tags=["export"]
def flops_per_token(config: GptOssConfig, context: int) -> int:
    """Multiplications and additions of one token that sees `context` keys.

    Two for each active weight of a matrix (biases, norms and sinks left
    out) and 4 H C for each visible key of each layer.
    """
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    layer = D * C * (2 * H + 2 * G) + D * config.num_local_experts
    layer += config.num_experts_per_tok * 3 * D * F
    seen = sum(min(context, config.sliding_window)
               if kind == "sliding_attention" else context
               for kind in config.layer_types)
    return (2 * (config.num_hidden_layers * layer + D * config.vocab_size)
            + 4 * H * C * seen)

# %%
for size, config in (("20b", small), ("120b", big)):
    near, far = (flops_per_token(config, s) for s in (1, S))
    print(f"{size}: first token {near / 1e9:.2f} GFLOP,",
          f"token {S:,}: {far / 1e9:.1f} GFLOP")

# %% [markdown]
# ## It holds
#
# **Counts by enumeration.** Here is the table of the 19 tensors again, with
# letters for numbers. For 300 random configurations the sum over all layers
# must be what the formulas say, component by component and in bytes.

# %%
import random


def shapes(c):
    """component -> shapes of bf16 tensors, shapes of four-bit matrices"""
    D, F, E = c.hidden_size, c.intermediate_size, c.num_local_experts
    H, G, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    q, kv, L = H * C, G * C, c.num_hidden_layers
    ends = [(c.vocab_size, D)]
    attention = [(q, D), (kv, D), (kv, D), (D, q), (q,), (kv,), (kv,), (D,),
                 (H,)]
    return {"embedding": (ends, []), "attention": (L * attention, []),
            "router": (L * [(E, D), (E,)], []),
            "experts": (L * [(E, 2 * F), (E, D)],
                        L * [(E, 2 * F, D), (E, D, F)]),
            "norms": ((2 * L + 1) * [(D,)], []), "lm_head": (ends, [])}


def size_of(list_of_shapes):
    return sum(map(math.prod, list_of_shapes))


def random_config(rng):
    G, E, L = rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 5)
    return GptOssConfig(
        num_hidden_layers=L, num_local_experts=E,
        num_experts_per_tok=rng.randint(1, E), num_key_value_heads=G,
        num_attention_heads=G * rng.randint(1, 4),
        head_dim=2 * rng.randint(1, 9), vocab_size=rng.randint(1, 99),
        hidden_size=32 * rng.randint(1, 9),
        intermediate_size=32 * rng.randint(1, 9),
        layer_types=rng.choices(KINDS, k=L))


rng = random.Random(0)
for _ in range(300):
    c = random_config(rng)
    table = shapes(c)
    assert parameter_counts(c) == {
        part: size_of(plain) + size_of(packed)
        for part, (plain, packed) in table.items()}
    stored = sum(2 * size_of(plain) + size_of(packed) * 17 // 32
                 for plain, packed in table.values())
    assert checkpoint_bytes(c) == stored
print("300 random models; the last:", f"{total_parameters(c):,} parameters,",
      f"{sum(size_of(a) + size_of(b) for a, b in table.values()):,} by hand")

# %% [markdown]
# ## Against the others
#
# **Hugging Face.** `GptOssForCausalLM` built on the meta device, where a
# tensor has a shape and no memory, and its parameters counted by name:

# %%
import torch
from transformers import GptOssConfig as HFConfig
from transformers import GptOssForCausalLM

WORDS = {"embed_tokens": "embedding", "self_attn": "attention",
         ".router.": "router", ".experts.": "experts", "norm": "norms",
         "lm_head": "lm_head"}


def hf_counts(config):
    values = config.to_hf_dict()
    del values["quantization_config"]  # its float twin
    with torch.device("meta"):
        model = GptOssForCausalLM(HFConfig(**values))
    counts = dict.fromkeys(parameter_counts(config), 0)
    for name, weight in model.named_parameters():
        word = next(word for word in WORDS if word in name)
        counts[WORDS[word]] += weight.numel()
    return counts


for size, config in (("20b", small), ("120b", big)):
    theirs = hf_counts(config)
    assert theirs == parameter_counts(config)
    print(f"{size}: they have {sum(theirs.values()):,},",
          f"we {total_parameters(config):,}")

# %% [markdown]
# **OpenAI.** Table 1 of the model card {cite}`gptoss2025` gives, in billions,
# experts with routers, attention, the two tables, active and all parameters,
# and the size in GiB. Ours, rounded as there:

# %%
CARD = {"20b": ("19.12", "0.64", "1.16", "3.61", "20.91", "12.8"),
        "120b": ("114.71", "0.96", "1.16", "5.13", "116.83", "60.8")}
for size, config in (("20b", small), ("120b", big)):
    n = parameter_counts(config)
    ours = (n["experts"] + n["router"], n["attention"],
            n["embedding"] + n["lm_head"], active_parameters(config),
            total_parameters(config))
    ours = (*(f"{x / 1e9:.2f}" for x in ours),
            f"{checkpoint_bytes(config) / 2 ** 30:.1f}")
    assert ours == CARD[size]
    print(f"{size:>4}:", *ours[:5], "billion,", ours[5], "GiB")

# %% [markdown] tags=["given"]
# **NeMo.** A training program of NVIDIA counts the operations of a training
# step. It took the size of a head to be $D / H = 45$ until
# [Automodel#3091](https://github.com/NVIDIA-NeMo/Automodel/pull/3091),
# because the field `head_dim` had another name there and a quotient was the
# fallback. The report gives 87.641 TFLOP for a step of the 20b with 4096
# tokens before the repair, and 93.848227282944 after it.

# %% [markdown]
# A step is forward and backward, three times the forward count; token $n$
# sees $n$ keys; and that program leaves routers out. We refuse an odd head
# size, but {eq}`sizes-flops` is linear in $C$, so two even sizes give the
# value at 45. If both counts are right, these are the two numbers of the
# report:

# %%
def step_flops(config):
    forward = sum(flops_per_token(config, n) for n in range(1, 4097))
    router = 4096 * config.num_hidden_layers * 2 * (
        config.hidden_size * config.num_local_experts)
    return 3 * (forward - router)


right = step_flops(small)
a_number = (right - step_flops(replace(small, head_dim=32))) // 32
wrong = right - (64 - 45) * a_number
print(f"heads of 64: {right:,}\nheads of 45: {wrong:,}")
assert right == 93_848_227_282_944 and round(wrong / 1e9) == 87_641

# %% [markdown] tags=["given"]
# **Memory estimators.** For the 120b `hf-mem` reports 65,248,815,744 bytes
# of weights, our $b$. For the cache of one token it reported 36,864 bytes
# ([hf-mem#60](https://github.com/alvarobartt/hf-mem/issues/60)), and vLLM in
# the same report 73,728.

# %% [markdown]
# The first of these counts the full layers only. That is what a token adds to
# a long text, our `cache_bytes_per_token`. The second counts every layer, as
# if none slid. While the first 128 tokens come in, and fill places in the
# rings too, both kinds of layers do grow:

# %%
print(f"full layers {cache_bytes_per_token(big):,} bytes a token, all",
      f"layers {big.num_hidden_layers * layer_cache_bytes(big):,}")

# %% [markdown]
# ## In the 20b and the 120b
#
# The chapter as one table. The last line is what a parameter takes on disk on
# average.

# %%
ROWS = (("parameters", total_parameters), ("active", active_parameters),
        ("bytes on disk", checkpoint_bytes), ("bytes in bf16", bf16_bytes),
        ("bytes read a token", bytes_read_per_token),
        ("cache bytes a token", cache_bytes_per_token),
        ("cache bytes at 131,072", lambda c: cache_bytes(c, S)),
        ("FLOP, first token", lambda c: flops_per_token(c, 1)),
        ("FLOP at 131,072", lambda c: flops_per_token(c, S)))
for name, count in ROWS:
    print(f"{name:24}{count(small):18,}{count(big):18,}")
bits = [8 * checkpoint_bytes(c) / total_parameters(c) for c in (small, big)]
print(f"{'bits a parameter':24}{bits[0]:18.2f}{bits[1]:18.2f}")

# %% [markdown]
# ## Cost
#
# Is {eq}`sizes-flops` what a computer does? torch's `FlopCounterMode` counts
# the matrix products that are executed. Here it watches one decoding step of
# a small random model in `transformers`, over caches of several lengths,
# with a window of 4 tokens so that sliding shows:

# %%
from torch.utils.flop_counter import FlopCounterMode

tiny = GptOssConfig(
    num_hidden_layers=4, num_local_experts=6, num_experts_per_tok=2,
    vocab_size=50, hidden_size=32, intermediate_size=96, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    eos_token_id=1, pad_token_id=0)
values = tiny.to_hf_dict()
del values["quantization_config"]
torch.manual_seed(0)
model = GptOssForCausalLM._from_config(
    HFConfig(**values, experts_implementation="eager"),
    attn_implementation="eager").eval()
for context in (2, 4, 5, 11):
    ids = torch.randint(50, (1, context))
    with torch.no_grad():
        past = model(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=past, use_cache=True)
    counted = counter.get_total_flops()
    print(f"context {context:2}: torch {counted:,},",
          f"ours {flops_per_token(tiny, context):,}")
    assert counted == flops_per_token(tiny, context)

# %% [markdown]
# So a token of the 20b costs 7.21 GFLOP and 3.71 GB at the start of a text:
# two operations for each byte that is read. A processor that computes a
# hundred operations in the time in which it reads a byte is idle most of the
# time; [the speed limit](../kernels/roofline.ipynb) starts from that. Late in
# a text both grow, arithmetic sooner:

# %%
for size, config in (("20b", small), ("120b", big)):
    H, C = config.num_attention_heads, config.head_dim
    full = config.layer_types.count("full_attention")
    even = flops_per_token(config, 0) // (4 * H * C * full)
    cached = bytes_read_per_token(config) // cache_bytes_per_token(config)
    each = 4 * H * C * full // cache_bytes_per_token(config)
    print(f"{size}: attention takes as much as the weights at {even:,} tokens",
          f"in FLOP, {cached:,} in bytes; {each} FLOP a byte of cache")

# %% [markdown]
# The second number is beyond 131,072 for both models: for a single text the
# weights are always the larger read. And each byte of the cache gives
# $H/G = 8$ operations, since 8 query heads share a key.
#
# What to see: arithmetic (left) leaves its floor at some thousand tokens,
# and attention is most of it at the end. The bytes (right) do not quite
# double.

# %% tags=["hide-input"]
# Figure: arithmetic and bytes of a token over the length of its context, for
# both models. All four curves are flat up to some thousand tokens and rise
# steeply towards 128k.
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.7))
some = [2 ** (n / 4) for n in range(4 * 6, 4 * 17 + 1)]
for size, config, style in (("20b", small, "-"), ("120b", big, "--")):
    flops = [flops_per_token(config, int(s)) / 1e9 for s in some]
    moved = [(bytes_read_per_token(config) + cache_bytes(config, int(s)))
             / 1e9 for s in some]
    for ax, line in ((left, flops), (right, moved)):
        ax.plot(some, line, style)
        ax.text(64, line[0] * (0.95 if size == "20b" else 1.05), size,
                va="top" if size == "20b" else "bottom")
for ax in (left, right):
    ax.set_xscale("log", base=2)
    ax.set_xticks([2 ** n for n in (7, 9, 11, 13, 15, 17)],
                  ["128", "512", "2k", "8k", "32k", "128k"])
    ax.set_xlabel("tokens in context")
left.set(ylabel="GFLOP a token", ylim=(0, 52), title="Arithmetic")
right.set(ylabel="GB a token", ylim=(0, 10.5),
          title="Weights and cache read")
plt.show()

# %% [markdown]
# ## Takeaways
#
# - Experts are 91 % (20b) and 98 % (120b) of the parameters. A token uses 4
#   of 32 or of 128 in a layer, so 17 % and 4.4 % of the model.
# - Expert matrices take 4.25 bits a weight, everything else 16: on average
#   5.26 and 4.47 bits, not 4.
# - At the start of a text a token reads two thirds of its bytes from parts
#   that are no experts: attention and `lm_head`, in 16 bits.
# - Sizes come from the file, never from quotients of others: a head is 64
#   wide, not 2880/64 = 45.
#
# ## Exercises
#
# ### Exercise 1
#
# If gpt-oss shared its embedding with `lm_head`, as smaller models do, how
# much smaller would the 20b's file be, and how many active parameters
# would it have?

# %% tags=["hide-cell"]
saved = 2 * parameter_counts(small)["embedding"]
print(f"{saved / 1e9:.2f} GB, {100 * saved / checkpoint_bytes(small):.1f} %")
print(f"active as before, {active_parameters(small):,}: the one matrix is",
      "still multiplied with, and the embedding never counted")

# %% [markdown]
# ### Exercise 2
#
# The two models take 5.26 and 4.47 bits a parameter. How many would the
# 120b take with 512 experts a layer, and what is the limit for ever more?
# (It is not 4.25.)

# %% tags=["hide-cell"]
for E in (32, 128, 512, 10 ** 7):
    c = replace(big, num_local_experts=E)
    print(f"{E:>13,} experts:",
          f"{8 * checkpoint_bytes(c) / total_parameters(c):.3f} bits")
# biases of the experts and the router's rows stay in 16 bits
D = big.hidden_size
limit = 8 * (expert_bytes(big) + 2 * (D + 1)) / (expert_size(big) + D + 1)
print(f"{'the limit':>22}: {limit:.3f} bits")

# %% [markdown]
# ### Exercise 3
#
# How many conversations of 131,072 tokens fit beside the 120b's weights in
# 80 GB? And how many if the sliding layers kept everything?

# %% tags=["hide-cell"]
free = 80 * 10 ** 9 - checkpoint_bytes(big)
rings = free // cache_bytes(big, S)
everything = free // (big.num_hidden_layers * S * layer_cache_bytes(big))
print(f"with rings {rings}, with everything {everything}",
      "(activations not counted)")

# %% [markdown]
# ### Exercise 4
#
# With $B$ texts in a batch a layer reads each expert that anybody chose,
# once. If choices were uniform and independent, how many of $E$ would that
# be, and how many bytes a token does a step read at $B = 1, 8, 64$? Which
# model gains more from a batch?

# %% tags=["hide-cell"]
def bytes_per_token(config, B):
    E, K = config.num_local_experts, config.num_experts_per_tok
    hit = E * (1 - (1 - K / E) ** B)  # an expert is missed by B tokens
    dense = bytes_read_per_token(config) - (
        config.num_hidden_layers * K * expert_bytes(config))
    experts = config.num_hidden_layers * hit * expert_bytes(config)
    return (dense + experts) / B


for size, config in (("20b", small), ("120b", big)):
    each = [bytes_per_token(config, B) / 1e9 for B in (1, 8, 64)]
    print(f"{size}:", ", ".join(f"{x:.3g} GB" for x in each),
          f"({each[0] / each[2]:.2g} times less)")
print("the 20b gains more: its 32 experts are all read, and shared by many;",
      "the 120b still reads most of its 128 for few tokens each", sep="\n")

# %% [markdown]
# ### Exercise 5
#
# Suppose that attention, router, embedding and `lm_head` were in MXFP4,
# too (norms, biases and sinks not). What would the 20b's file take, and a
# token read? Why does the second shrink more?

# %% tags=["hide-cell"]
c, D = small, small.hidden_size
H, G, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
L, E, V = c.num_hidden_layers, c.num_local_experts, c.vocab_size
in_layers = L * (2 * D * C * (H + G) + D * E)
off = 2 - 17 / 32  # bytes saved a weight
file = checkpoint_bytes(c) - off * (in_layers + 2 * V * D)
token = bytes_read_per_token(c) - off * (in_layers + V * D + D)
print(f"file {file / 1e9:.1f} GB ({file / checkpoint_bytes(c):.0%}),",
      f"token {token / 1e9:.2f} GB ({token / bytes_read_per_token(c):.0%})")
print("16-bit weights are a quarter of the file, two thirds of what is read")

# %% [markdown]
# ## Sources
#
# - The model card, table 1 and section 2: {cite}`gptoss2025`. Mixtures of
#   experts: {cite}`moe2017`, {cite}`switch2021`; grouped queries:
#   {cite}`gqa2023`; the number format: {cite}`ocpmx2023`.
# - openai/gpt-oss, `gpt_oss/torch/model.py`; huggingface/transformers 5.23,
#   `models/gpt_oss/modeling_gpt_oss.py`.
# - `config.json` and `model.safetensors.index.json` of openai/gpt-oss-20b
#   and -120b.
