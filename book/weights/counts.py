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
# gpt-oss-20b has 20,914,757,184 parameters, its weights fill 13.76 GB, and
# it needs 3.71 GB of them to write one token. gpt-oss-120b has 5.6 times
# the parameters and fills 4.7 times the bytes, yet a token costs it only
# 1.35 times as much to read. Where do the parameters live that the second
# model has and does not use?
#
# All of it follows from about twenty numbers, those of
# [the configuration](config.ipynb). By the end each of the figures above is
# an `assert`.

# %% tags=["export"]
from gptoss.weights.config import GptOssConfig

# %%
from dataclasses import replace

from gptoss.weights.config import KINDS

small, big = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()

# %% tags=["hide-input"]
import math

import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")

# %% [markdown]
# ## Picture
#
# Each model gets three bars: its parameters, the bytes that they take on
# disk, and the bytes that a decoding step reads for one token. All are
# drawn as shares, with the total at the right.
#
# What to see: experts are 91 % and 98 % of the parameters, but 74 % and
# 93 % of the bytes, because they alone are stored in four bits. Of what a
# token reads they are only a third or so: 4 of 32, or of 128, are chosen
# per layer. The output matrix `lm_head`, 3 % of the 20b, is then almost
# another third.

# %% tags=["hide-input"]
# Figure: six bars of shares, three for each model: parameters, bytes on disk,
# bytes read for a token. Experts fill over nine tenths of the parameters and
# most of the disk, but a third of what a token of the 20b reads; attention and
# lm_head are the rest.
SHARES = {  # parameters, bytes on disk, bytes read for a token; in 1e9
    "20b": ((19.117, 0.637, 0.579, 0.579, 0.002),
            (10.166, 1.274, 1.158, 1.158, 0.005),
            (1.271, 1.274, 0.000, 1.158, 0.005)),
    "120b": ((114.702, 0.956, 0.579, 0.579, 0.013),
             (60.994, 1.912, 1.158, 1.158, 0.027),
             (1.906, 1.912, 0.000, 1.158, 0.027))}
PARTS = ("experts", "attention", "embedding", "lm_head", "router, norms")
UNITS = ("parameters", "bytes on disk", "bytes read a token")

fig, ax = plt.subplots(figsize=(7, 2.9))
labels, at = [], 0
for size, bars in SHARES.items():
    for unit, bar in zip(UNITS, bars, strict=True):
        left, total = 0.0, sum(bar)
        for n, part in enumerate(bar):
            ax.barh(at, 100 * part / total, left=left, color=f"C{n}",
                    height=0.75, label=PARTS[n] if at == 0 else None)
            left += 100 * part / total
        suffix = "" if unit == "parameters" else " GB"
        word = " billion" if unit == "parameters" else ""
        ax.text(101, at, f"{total:.2f}{suffix}{word}", va="center")
        labels.append((at, f"{size}: {unit}"))
        at += 1
    at += 0.5
ax.set_yticks([y for y, _ in labels], [text for _, text in labels])
ax.invert_yaxis()
ax.set(xlim=(0, 100), xlabel="share (%)")
ax.legend(loc="lower center", bbox_to_anchor=(0.42, 1.0), ncols=5)
plt.show()

# %% [markdown]
# ## The naive version
#
# **The formula everybody knows.** A transformer layer of width $D$ has
# $4D^2$ parameters in attention and $8D^2$ in its feed-forward part, so
# $12LD^2$ in all, and $2VD$ in the embedding and the output matrix. With
# the sizes of the two models ($L$ layers, $V$ words, $E$ experts):

# %%
D, V = 2880, 201_088
# layers, experts, parameters (counted below; published rounded), bytes
PUBLISHED = {"20b": (24, 32, 20_914_757_184, 13_761_264_768),
             "120b": (36, 128, 116_829_156_672, 65_248_815_744)}
for size, (L, _, parameters, _) in PUBLISHED.items():
    dense = 12 * L * D ** 2 + 2 * V * D
    print(f"{size:>4}: the formula {dense / 1e9:.2f} billion,",
          f"published {parameters / 1e9:.1f}: {parameters / dense:.1f} times")

# %% [markdown]
# It is too small by factors of 6 and 25. Each of its assumptions is wrong
# here: the query heads do not add up to $D$ (64 heads of 64 are 4096, not
# 2880), keys and values have 8 heads and not 64, the feed-forward part has
# three matrices of width 2880 and not two of $4D$, and a layer has 32 or
# 128 such parts.
#
# **Counting what the file holds.** Surely the file knows. Its tensors are
# typed BF16 (one number an element) and U8, and the U8 tensors are of two
# kinds: `blocks`, with two four-bit numbers in a byte, and `scales`, one
# byte for 32 numbers. Take one element for one parameter, or be careful
# and take two for each U8 element of `blocks`:

# %%
for size, (L, E, parameters, _) in PUBLISHED.items():
    packed = L * E * 3 * D * D      # numbers that are stored in four bits
    blocks, scales = packed // 2, packed // 32
    elements = parameters - packed + blocks + scales
    careful = parameters + scales
    print(f"{size:>4}: elements {elements / 1e9:.1f} billion,",
          f"blocks counted twice {careful / 1e9:.1f},",
          f"published {parameters / 1e9:.1f}")

# %% [markdown]
# Both are wrong. The first is what a tool reports that adds up shapes; the
# second takes every scale for a parameter, as Hugging Face's JavaScript
# library did until
# [#2323](https://github.com/huggingface/huggingface.js/pull/2323). One
# catalogue of models could only note that "both models have different total
# parameter number from hugging face to the release paper"
# ([ecologits#173](https://github.com/mlco2/ecologits/pull/173)).
#
# **Four bits a parameter.** The bytes, then: half a byte each.

# %%
for size, (*_, parameters, stored) in PUBLISHED.items():
    print(f"{size:>4}: half a byte each {parameters / 2e9:.1f} GB,",
          f"published {stored / 1e9:.1f} GB")

# %% [markdown]
# Too small by 3.3 and 6.8 GB: the scales are missing, and whatever is not
# an expert is stored in 16 bits.
#
# ## Derivation
#
# The sizes: $L$ layers, width $D$, $H$ query heads and $G$ key/value heads
# of size $C$, $E$ experts of inner width $F$ of which a token gets $K$, and
# $V$ words. $P$ counts parameters, $b$ bytes.
#
# **Attention.** The query matrix is $D \times HC$, keys and values are
# $D \times GC$ each, the output matrix is $HC \times D$. All four have a
# bias, and each query head has one sink, a logit of its own (see
# [sinks](../attention/sinks.ipynb)):
#
# $$
# P_{att} = \underbrace{(D + 1)(H + 2G)\,C}_{q,\,k,\,v}
#   + \underbrace{(HC + 1)\,D}_{o} + H
# $$ (config-attention)
#
# **Experts.** Each has a gate and an up projection, $D \times F$ both, and
# a down projection $F \times D$, with biases; the router is a linear layer
# with one output an expert:
#
# $$
# P_{exp} = 2F(D + 1) + D(F + 1), \qquad P_{router} = E\,(D + 1)
# $$ (config-expert)
#
# **All of it.** Each layer has two norms of $D$ weights and there is one
# more at the end; embedding and output matrix are two different matrices
# ($V \times D$ each, no bias):
#
# $$
# P = L\,(P_{att} + P_{router} + E\,P_{exp} + 2D) + D + 2VD
# $$ (config-total)
#
# **Active.** A token is multiplied with $K$ experts a layer and with
# everything else but the embedding, of which it *looks up* one row:
#
# $$
# P_{act} = L\,(P_{att} + P_{router} + K\,P_{exp} + 2D) + D + VD
# $$ (config-active)
#
# $E$ is left in the router alone. That is the answer to the question: the
# 120b is the 20b with half as many layers again and four times as many
# experts a layer, most of which wait.
#
# **Bytes.** The matrices of the experts are stored in [MXFP4](mxfp4.ipynb):
# 32 numbers in 16 bytes and one byte of scale, 17 bytes or 4.25 bits a
# number. All else is bf16, two bytes each, the experts' biases too. So an
# expert takes
#
# $$
# b_{exp} = 17 \cdot \frac{3DF}{32} + 2\,(2F + D)
# $$ (config-bytes)
#
# bytes, and the model, and what one token at batch size 1 reads of it,
#
# $$
# b = L E\,b_{exp} + 2\,(P - L E\,P_{exp}), \qquad
# b_{read} = L K\,b_{exp} + 2\,(P_{act} - L K\,P_{exp} + D).
# $$ (config-read)
#
# The last $D$ is the token's row of the embedding.
#
# **Cache.** A layer keeps a key and a value, $2GC$ numbers, for every
# token: $4GC = 2048$ bytes in bf16. Every second layer slides: it sees the
# last $W = 128$ tokens (see [the sliding mask](../attention/masks.ipynb)),
# so a ring of $W$ places is enough for it (see
# [the cache](../model/cache.ipynb)). With $L_{full}$ layers of the other
# kind, $S$ tokens take
#
# $$
# b_{cache}(S) = 4GC\,\big(L_{full}\,S + (L - L_{full})\,W\big).
# $$ (config-cache)
#
# **Arithmetic.** A number in a matrix costs one multiplication and one
# addition; a key that is seen costs $C$ of each in every query head for
# its score, and its value as many again:
#
# $$
# f(S) = 2\,M + 4HC \sum_{\ell=1}^{L} S_\ell, \qquad
# S_\ell = \begin{cases} \min(S, W) & \text{sliding} \\ S &
#   \text{full} \end{cases}
# $$ (config-flops)
#
# where $M$ is $P_{act}$ without biases, norms and sinks.
#
# ## Code
#
# ### Counting
#
# Equations {eq}`config-attention` to {eq}`config-total`.

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
    assert total_parameters(config) == PUBLISHED[size][2]
    print(f"{size}: {total_parameters(config):,}")
    for part, count in parameter_counts(config).items():
        share = 100 * count / total_parameters(config)
        print(f"  {part:10}{count:16,}{share:8.2f} %")

# %% [markdown]
# The model card publishes 20.91 and 116.83 billion; to the last parameter the
# totals are what `transformers` builds ("Against the others"). Equation
# {eq}`config-active`:

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
    print(f"{size}: {active:,} active,",
          f"{100 * active / total_parameters(config):.1f} %")

# %% [markdown]
# The naive formula gave 3.55 and 4.74 billion, not far from these, by
# accident. A layer's four experts have $12 D^2$ weights together, where the
# formula has $8 D^2$, and attention has $3.2 D^2$ instead of $4 D^2$; but the
# formula also counts the embedding, $VD$, which is 70 layers' worth of $D^2$.
#
# ### Bytes
#
# Equation {eq}`config-bytes`. A row that is no multiple of 32 long would
# be padded; the released ones are not.

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
    assert checkpoint_bytes(config) == PUBLISHED[size][3]
    print(f"{size}: {checkpoint_bytes(config):,} bytes,",
          f"in bf16 {bf16_bytes(config) / 1e9:.1f} GB")

# %% [markdown]
# These are the `total_size` of the released index files. A decoding step
# reads less, {eq}`config-read`:

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
read = [bytes_read_per_token(config) for config in (small, big)]
print([f"{n / 1e9:.2f} GB" for n in read], f"ratio {read[1] / read[0]:.2f}")
times = [count(big) / count(small) for count in (
    total_parameters, checkpoint_bytes, bytes_read_per_token)]
assert [round(x, 2) for x in times] == [5.59, 4.74, 1.35]

# %% [markdown]
# ### The cache
#
# Equation {eq}`config-cache`; both kinds are built in
# [the cache](../model/cache.ipynb).

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
# ### Arithmetic
#
# Equation {eq}`config-flops`.

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
          f"token {S:,} {far / 1e9:.1f}")

# %% [markdown]
# ## It holds
#
# **Counts by enumeration.** Here is every tensor of a layer, written down
# once as a shape. For 300 random configurations the sum of their sizes
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
print("300 configurations: parameters and bytes")

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
    assert hf_counts(config) == parameter_counts(config)
    print(f"{size}: equal in all {len(WORDS)} components")

# %% [markdown]
# **OpenAI.** Table 1 of the model card {cite}`gptoss2025` counts experts
# and routers together, and rounds. Ours, rounded:

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

# %% [markdown]
# **NeMo.** Its count of training FLOPs took the head size to be
# $D / H = 45$ until
# [Automodel#3091](https://github.com/NVIDIA-NeMo/Automodel/pull/3091): the
# field `head_dim` had another name there, and a quotient was the fallback.
# Its report gives 87.641 TFLOP for a training step of the 20b with 4096
# tokens before, and 93.848227282944 after. A step is forward and backward,
# three times the forward count; token $n$ sees $n$ keys; and routers are
# left out. We refuse an odd head size, but {eq}`config-flops` is linear in
# $C$, so two even ones give the value at 45:

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

# %% [markdown]
# Both of its numbers are ours, in all the digits that it gives.
#
# **Memory estimators.** For the 120b `hf-mem` reports 65,248,815,744 bytes
# of weights, which is $b$. For the cache of one token it reported 36,864
# bytes ([hf-mem#60](https://github.com/alvarobartt/hf-mem/issues/60)): the
# full layers only, which is `cache_bytes_per_token` and right for a long
# context. Each of the first 128 tokens takes a place in the rings as well,
# and twice that. vLLM, in the same report, takes 73,728 bytes for *every*
# token, as if no layer slid.

# %%
print(cache_bytes_per_token(big),
      big.num_hidden_layers * layer_cache_bytes(big))

# %% [markdown]
# ## In the 20b and the 120b
#
# The chapter as one table. The last line is what a stored parameter takes
# on average.

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
# And the figure at the start was not drawn by hand:

# %%
for size, config in (("20b", small), ("120b", big)):
    n, L = parameter_counts(config), config.num_hidden_layers
    experts = L * expert_bytes(config)
    rest = {part: 2 * n[part] for part in n if part != "experts"}
    drawn = (
        (n["experts"], n["attention"], n["embedding"], n["lm_head"],
         n["router"] + n["norms"]),
        (experts * config.num_local_experts, rest["attention"],
         rest["embedding"], rest["lm_head"],
         rest["router"] + rest["norms"]),
        (experts * config.num_experts_per_tok, rest["attention"],
         2 * config.hidden_size, rest["lm_head"],
         rest["router"] + rest["norms"]))
    assert sum(drawn[0]) == total_parameters(config)
    assert sum(drawn[1]) == checkpoint_bytes(config)
    assert sum(drawn[2]) == bytes_read_per_token(config)
    for bar, shown in zip(drawn, SHARES[size], strict=True):
        assert tuple(round(x / 1e9, 3) for x in bar) == shown
print("six bars, thirty numbers")

# %% [markdown]
# ## Cost
#
# Is {eq}`config-flops` what a computer does? `FlopCounterMode` counts the
# matrix products that torch executes. Here it watches one decoding step of
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
# So a token of the 20b costs 7.2 GFLOP and 3.7 GB at the start of a
# context: two operations for each byte that is read. A processor that
# computes a hundred operations in the time it reads a byte is idle most of
# the time; [the speed limit](../kernels/roofline.ipynb) starts from that.
# Late in a context both grow, arithmetic sooner:

# %%
for size, config in (("20b", small), ("120b", big)):
    H, C = config.num_attention_heads, config.head_dim
    full = config.layer_types.count("full_attention")
    start = flops_per_token(config, 0)
    even = start // (4 * H * C * full)
    cached = bytes_read_per_token(config) // cache_bytes_per_token(config)
    print(f"{size}: attention = weights at {even:,} tokens in FLOP,",
          f"at {cached:,} in bytes")
    ratio = 4 * H * C * full / cache_bytes_per_token(config)
    assert ratio == H // config.num_key_value_heads == 8

# %% [markdown]
# The second number lies beyond 131,072 for both: at batch size 1 the
# weights are always the larger read. The cell also asserts that each byte of
# the cache gives $H/G = 8$ FLOP, since 8 query heads share a key.
#
# What to see: arithmetic (left) leaves its floor at some thousand tokens,
# and attention dominates it at the end; the bytes (right) do not quite double.

# %% tags=["hide-input"]
# Figure: arithmetic and bytes of a token over the length of its context, for
# both models. All four curves are flat up to some thousand tokens and rise
# steeply towards 128k.
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9))
some = [2 ** (n / 4) for n in range(4 * 6, 4 * 17 + 1)]
for size, config, style in (("20b", small, "-"), ("120b", big, "--")):
    flops = [flops_per_token(config, int(s)) / 1e9 for s in some]
    moved = [(bytes_read_per_token(config) + cache_bytes(config, int(s)))
             / 1e9 for s in some]
    left.plot(some, flops, style, label=size)
    right.plot(some, moved, style, label=size)
for ax in (left, right):
    ax.set_xscale("log", base=2)
    ax.set_xticks([2 ** n for n in (7, 9, 11, 13, 15, 17)],
                  ["128", "512", "2k", "8k", "32k", "128k"])
    ax.set_xlabel("tokens in context")
left.set(ylabel="GFLOP a token", ylim=(0, 52), title="Arithmetic")
right.set(ylabel="GB a token", ylim=(0, 10.5),
          title="Weights and cache read")
left.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Takeaways
#
# - Experts are 91 % (20b) and 98 % (120b) of the parameters; a token uses
#   4 of 32 or of 128 in a layer, so 17 % and 4.4 % of the model.
# - A file's size is 4.25 bits a weight for experts and 16 for the rest:
#   5.26 and 4.47 bits on average, not 4.
# - Sizes come from the file, never from quotients of others: the head is
#   64 wide, not 2880/64 = 45.
#
# ## Exercises
#
# ### Exercise 1
#
# If gpt-oss shared its embedding with `lm_head`, as smaller models do, how
# much smaller would the 20b's file be, and how many active parameters
# would it have?

# %% tags=["hide-cell"]
saved = 2 * small.vocab_size * small.hidden_size
print(f"{saved / 1e9:.2f} GB, {100 * saved / checkpoint_bytes(small):.1f} %")
print("active: the same; the shared matrix is the one that is multiplied")
assert saved == 2 * parameter_counts(small)["embedding"]

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
          f"{8 * checkpoint_bytes(c) / total_parameters(c):.3f}")
# biases of the experts and the router's rows stay in 16 bits
D = big.hidden_size
limit = 8 * (expert_bytes(big) + 2 * (D + 1)) / (expert_size(big) + D + 1)
assert abs(limit - 8 * checkpoint_bytes(c) / total_parameters(c)) < 1e-3

# %% [markdown]
# ### Exercise 3
#
# How many conversations of 131,072 tokens fit beside the 120b's weights in
# 80 GB? And how many if the sliding layers kept everything?

# %% tags=["hide-cell"]
free = 80 * 10 ** 9 - checkpoint_bytes(big)
rings = free // cache_bytes(big, S)
everything = free // (big.num_hidden_layers * S * layer_cache_bytes(big))
print(f"rings {rings}, everything {everything} (activations not counted)")
assert (rings, everything) == (3, 1)

# %% [markdown]
# ### Exercise 4
#
# With $B$ sequences in a batch a layer reads each expert that anybody
# chose, once. If choices were uniform and independent, how many of $E$
# would that be, and how many bytes a token does a step read at
# $B = 1, 8, 64$? Which model gains more from a batch?

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
assert bytes_per_token(small, 1) == bytes_read_per_token(small)

# %% [markdown]
# The 20b: with 64 sequences all its 32 experts are read, and shared. The
# 120b still reads most of its 128 experts for few tokens each.
#
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
# 16-bit weights are a quarter of the file, two thirds of what is read
assert token / bytes_read_per_token(c) < file / checkpoint_bytes(c)

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
