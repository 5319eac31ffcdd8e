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
#     module: config
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
# All of it follows from about twenty numbers in a file of two kilobytes,
# `config.json`. By the end each of the figures above is an `assert`.

# %% tags=["hide-input"]
import math

import matplotlib.pyplot as plt

plt.style.use("_static/book.mplstyle")

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
# bias, and each query head has one sink, a logit of its own (chapter 5):
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
# **Bytes.** The matrices of the experts are stored in MXFP4 (chapter 2): 32
# numbers in 16 bytes and one byte of scale, 17 bytes or 4.25 bits a number.
# All else is bf16, two bytes each, the experts' biases too. So an expert
# takes
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
# last $W = 128$ tokens (chapter 6), so a ring of $W$ places is enough for it
# (chapter 9). With $L_{full}$ layers of the other kind, $S$ tokens take
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
# ### A mistake has a name
#
# A wrong configuration does not crash a model, it computes another one. So
# nothing is guessed: an error says which key, what was expected and what
# was found.

# %% tags=["export:weights/errors"]
from typing import NoReturn, TypeGuard, TypeVar


class Error(ValueError):
    """What this package refuses: each of its errors is one of these."""


E = TypeVar("E", bound=Error)


def mismatch(error: type[E], what: object, expected: object,
             found: object) -> E:
    """An error of this class, worded; `found` is said as it is."""
    return error(f"{what}: expected {expected}, found {found}")


def refuse(error: type[Error], what: object, expected: object,
           found: object) -> NoReturn:
    """Raise `mismatch`; a value that was found is `shown`."""
    raise mismatch(error, what, expected, shown(found))


def expect(error: type[Error], good: bool, what: object, expected: object,
           found: object) -> None:
    """`refuse` unless it is good."""
    if not good:
        refuse(error, what, expected, found)


def shown(value: object) -> str:
    """repr(value), and no more of it than fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of 5,000 digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 200 else text[:200] + "..."


def is_count(value: object) -> TypeGuard[int]:
    """A whole number; True is none, although Python thinks it is 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """A whole number or a float, infinity and NaN among them."""
    return is_count(value) or isinstance(value, float)


def is_positive(value: object) -> TypeGuard[int | float]:
    """A finite number above 0."""
    return is_number(value) and 0 < value < float("inf")

# %%
print([is_count(v) for v in (24, 24.0, "24", True)])
print([is_positive(v) for v in (7, 7.0, 0.0, math.nan, math.inf, True)])

# %% [markdown]
# All errors of the package are this one's children, so that a program can
# catch what we refuse and nothing else: `except gptoss.Error`. It is a
# `ValueError`, because that is what people catch who do not know us. The
# configuration's own:

# %% tags=["export:weights/config"]
import itertools
import json
import re
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path




class ConfigError(Error):
    """A configuration that is not one of a gpt-oss model."""


demand = partial(expect, ConfigError)

# %% [markdown]
# ### One dataclass for both models
#
# Frozen, and complete: whoever holds a `GptOssConfig` holds a model that
# can be built. Files are read and written by functions that know this class;
# it looks for them only when it is asked, and can be used without them.

# %% tags=["export:weights/config"]
KINDS = ("sliding_attention", "full_attention")
ROPE_TYPES = ("yarn", "default")


@dataclass(frozen=True)
class GptOssConfig:
    """Sizes and constants of a gpt-oss model; the defaults are the 120b's.

    Names are those of Hugging Face's config.json. layer_types None means
    alternating, a sliding layer first. ConfigError names a wrong key.
    """

    num_hidden_layers: int = 36
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int = 128
    layer_types: tuple[str, ...] | None = None
    max_position_embeddings: int = 131072
    initial_context_length: int = 4096
    rope_theta: float = 150000.0
    rope_type: str = "yarn"
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = False
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    eos_token_id: int = 200002
    pad_token_id: int = 199999
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        kinds = fill_kinds(self.layer_types, self.num_hidden_layers)
        object.__setattr__(self, "layer_types", kinds)
        check_sizes(self)
        check_choices(self)

    @classmethod
    def gpt_oss_20b(cls) -> "GptOssConfig":
        """gpt-oss-20b: 24 layers of 32 experts."""
        return cls(num_hidden_layers=24, num_local_experts=32)

    @classmethod
    def gpt_oss_120b(cls) -> "GptOssConfig":
        """gpt-oss-120b: 36 layers of 128 experts."""
        return cls(num_hidden_layers=36, num_local_experts=128)

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.json"
                  ) -> "GptOssConfig":
        """From the keys of either spelling; `source` names the file."""
        from gptoss.weights.config_file import config_from_dict

        return config_from_dict(values, source)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GptOssConfig":
        """From a folder with a config.json, or from such a file."""
        from gptoss.weights.config_file import read_config

        return read_config(Path(path))

    def to_hf_dict(self) -> dict:
        """What Hugging Face's config.json holds."""
        from gptoss.weights.config_file import hf_dict

        return hf_dict(self)

    def to_original_dict(self) -> dict:
        """What OpenAI's original/config.json holds."""
        from gptoss.weights.config_file import original_dict

        return original_dict(self)

# %%
from dataclasses import asdict, fields, replace

from gptoss.weights.config import ConfigError, GptOssConfig, demand

print(len(fields(GptOssConfig)), "fields; the sizes of the 120b:")
print([f.default for f in fields(GptOssConfig)][:10])

# %% [markdown]
# ### What is refused
#
# Every number has bounds. Not for taste: Python's integers have no end and
# JSON's floats go to $10^{308}$, but what is computed with them does not.
# $150000^{-2i/C}$ overflows for a large enough $\theta$, a ring of $10^9$
# places is more memory than there is, and 65,504, the largest number of
# float16, is the largest limit that an activation of that type can be held
# to. The bounds lie far beyond any model, and a file outside of them is
# damaged: it is refused here, by name, rather than somewhere in the middle.

# %% tags=["export:weights/config"]
COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts_per_tok",
          "vocab_size", "hidden_size", "intermediate_size", "head_dim",
          "num_attention_heads", "num_key_value_heads", "sliding_window",
          "max_position_embeddings", "initial_context_length")
POSITIVE = ("rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow",
            "rms_norm_eps", "swiglu_limit")
LEAST = {"rope_beta_fast": 1e-6, "rope_beta_slow": 1e-6,
         "rms_norm_eps": 1e-30, "swiglu_limit": 1e-3}
MOST = dict.fromkeys(COUNTS, 2 ** 24) | {
    "num_hidden_layers": 10_000, "sliding_window": 2 ** 20,
    "max_position_embeddings": 2 ** 30, "initial_context_length": 2 ** 30,
    "rope_theta": 1e15, "rope_factor": 1e6, "rope_beta_fast": 1e6,
    "rope_beta_slow": 1e6, "rms_norm_eps": 1.0, "swiglu_limit": 65504.0,
    "eos_token_id": 2 ** 31 - 1, "pad_token_id": 2 ** 31 - 1}


def check_number(key: str, value: object, name: str | None = None) -> None:
    """ConfigError unless it is a number within the bounds of field `key`;
    the message calls it `name`."""
    name, whole = name or key, key in COUNTS
    good = is_count(value) if whole else is_positive(value)
    kind = "a whole number" if whole else "a number"
    demand(good and value > 0, name, f"{kind} above 0", value)
    least, most = LEAST.get(key, 0), MOST[key]
    demand(value >= least, name, f"at least {least:g}", value)
    demand(value <= most, name, f"at most {most:,}", value)

# %%
for key, value in (("hidden_size", 2880.0), ("rope_theta", 10 ** 30),
                   ("swiglu_limit", 1e308)):
    try:
        check_number(key, value)
    except ConfigError as error:
        print(error)

# %% [markdown]
# Then the list of layer kinds, which a file may leave out.

# %% tags=["export:weights/config"]
def fill_kinds(kinds: object, layers: object) -> tuple[str, ...]:
    """The kinds of all layers, alternating if None; ConfigError if none."""
    demand(is_count(layers) and layers > 0, "num_hidden_layers",
            "a whole number above 0", layers)
    # a damaged file must not make a list of a billion entries
    most = MOST["num_hidden_layers"]
    demand(layers <= most, "num_hidden_layers", f"at most {most:,}", layers)
    if kinds is None:
        kinds = [KINDS[n % 2] for n in range(layers)]
    demand(isinstance(kinds, list | tuple), "layer_types", "a list", kinds)
    demand(len(kinds) == layers, "layer_types", f"{layers} entries",
            len(kinds))
    for n, kind in enumerate(kinds):
        demand(kind in KINDS, f"layer_types[{n}]", " or ".join(KINDS), kind)
    return tuple(kinds)

# %%
print(fill_kinds(None, 3))

# %% [markdown]
# Then the numbers, one by one and against each other.

# %% tags=["export:weights/config"]
def check_sizes(config: GptOssConfig) -> None:
    """ConfigError naming the first size that makes no model."""
    for key in (*COUNTS, *POSITIVE):
        check_number(key, getattr(config, key))
    E, K = config.num_local_experts, config.num_experts_per_tok
    H, G = config.num_attention_heads, config.num_key_value_heads
    demand(K <= E, "num_experts_per_tok",
            f"at most num_local_experts = {E}", K)
    demand(H % G == 0, "num_attention_heads",
            f"a multiple of num_key_value_heads = {G}", H)
    demand(config.head_dim % 2 == 0, "head_dim", "an even number",
            config.head_dim)

# %% [markdown]
# And the choices between kinds. `tie_word_embeddings` may be true although
# no released gpt-oss shares the two matrices: a fine-tune may, and chapter 3
# reads its one matrix twice.

# %% tags=["export:weights/config"]
def check_choices(config: GptOssConfig) -> None:
    """ConfigError naming the first choice that gpt-oss does not have."""
    slow = config.rope_beta_slow
    demand(config.rope_type in ROPE_TYPES, "rope_type",
            " or ".join(ROPE_TYPES), config.rope_type)
    demand(config.rope_factor >= 1, "rope_factor", "at least 1",
            config.rope_factor)
    demand(config.rope_theta > 1, "rope_theta", "a number above 1",
            config.rope_theta)
    demand(config.rope_beta_fast >= slow, "rope_beta_fast",
            f"at least rope_beta_slow = {slow}", config.rope_beta_fast)
    for key in ("rope_truncate", "tie_word_embeddings"):
        value = getattr(config, key)
        demand(isinstance(value, bool), key, "true or false", value)
    for key in ("eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        demand(is_count(value) and 0 <= value <= MOST[key], key,
                "a token id", value)

# %%
def refusal(make):
    """The message of the ConfigError that make() ends in."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    raise AssertionError("not refused")


small, big = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
a, b = asdict(small), asdict(big)
print("they differ in", [key for key in a if a[key] != b[key]])
for change in ({"hidden_size": "2880"}, {"num_experts_per_tok": 129},
               {"swiglu_limit": math.nan}, {"rope_type": "longrope"}):
    print(refusal(lambda change=change: GptOssConfig(**change)))

# %% [markdown]
# ### Three spellings of the same numbers
#
# There are three, for one model. Hugging Face's `config.json` of 2025 has
# `rope_theta` and an object `rope_scaling`; since transformers 5 both are
# one object, `rope_parameters`; and OpenAI's own `original/config.json`
# has names of its own. Two of those are false friends: `rope_ntk_alpha` is
# YaRN's $\beta_{slow}$ and `rope_ntk_beta` its $\beta_{fast}$ (chapter 4).
# The differences are tables:

# %% tags=["export:weights/config_file"]
SAME = (*COUNTS, "layer_types", "rms_norm_eps", "swiglu_limit",
        "eos_token_id", "pad_token_id", "tie_word_embeddings")
# our field -> key in rope_scaling / rope_parameters of Hugging Face
ROPE_KEYS = {"rope_type": "rope_type", "rope_factor": "factor",
             "rope_beta_fast": "beta_fast", "rope_beta_slow": "beta_slow",
             "rope_truncate": "truncate", "rope_theta": "rope_theta",
             "initial_context_length": "original_max_position_embeddings"}
# our field -> key of OpenAI's original/config.json
ORIGINAL_KEYS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit", "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "initial_context_length",
    "rope_theta": "rope_theta", "rope_factor": "rope_scaling_factor",
    "rope_beta_slow": "rope_ntk_alpha", "rope_beta_fast": "rope_ntk_beta"}

# %%
renamed = {ours: theirs for ours, theirs in ORIGINAL_KEYS.items()
           if ours != theirs}
print(renamed)

# %% [markdown]
# ### Reading OpenAI's spelling
#
# It says nothing of `max_position_embeddings`: that is the trained length
# times the factor.

# %% tags=["export:weights/config_file"]
def _from_original(values: dict) -> dict:
    """Our fields from those of original/config.json."""
    fields = {}
    for field, key in ORIGINAL_KEYS.items():
        demand(values.get(key) is not None, key, "a value", None)
        fields[field] = values[key]
    trained, factor = fields["initial_context_length"], fields["rope_factor"]
    for field in ("initial_context_length", "rope_factor"):
        check_number(field, fields[field], ORIGINAL_KEYS[field])
    fields["max_position_embeddings"] = int(trained * factor)
    fields["rope_type"] = "default" if factor == 1 else "yarn"
    return fields

# %%
ORIGINAL = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4,
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128,
    "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32}
print(GptOssConfig(**_from_original(ORIGINAL)) == small)

# %% [markdown]
# ### Reading Hugging Face's, rope first
#
# Three things are left out in files that people have. Without any rope
# object `transformers` takes the one that gpt-oss was released with, and
# $\theta$ is 150,000 unless a file says otherwise; our own defaults are the
# same, so nothing is guessed that the program that wrote the file would not
# have computed with. Where `truncate` is left out *of a rope object*,
# though, its default is *true*, the opposite of what gpt-oss was trained
# with (chapter 4 shows what that costs): such a file is read as
# `transformers` reads it. The third, the trained length, is refused, because
# the default of `transformers` has changed between its versions.
#
# `transformers` obeys some keys that gpt-oss does not have, such as
# `attention_factor`: a file with one is refused rather than read as if the
# key were not there. So is one with two rope objects that disagree, as an
# edit of only one of them leaves behind.

# %% tags=["export:weights/config_file"]
ROPE_SPELLINGS = ("rope_parameters", "rope_scaling")
# keys of yarn that would change the model, and the value that would not
ROPE_FIXED = {"attention_factor": None, "mscale": None,
              "mscale_all_dim": None, "partial_rotary_factor": 1.0}


def _rope_object(values: dict, spelling: str) -> dict:
    """Our fields from one rope object and what lies beside it."""
    rope = values[spelling]
    demand(isinstance(rope, dict), spelling, "an object", rope)
    rope = {"rope_type": rope.get("type"),
            "rope_theta": values.get("rope_theta")} | rope
    kind = rope["rope_type"]
    demand(kind in ROPE_TYPES, "rope_type", " or ".join(ROPE_TYPES), kind)
    if kind == "yarn":
        for key in ("factor", "original_max_position_embeddings"):
            demand(rope.get(key) is not None, key, "a value", None)
        rope = {"truncate": True} | rope  # transformers' default
    for key, value in ROPE_FIXED.items():
        demand(rope.get(key) in (None, value), key, repr(value),
                rope.get(key))
    return {field: rope[key] for field, key in ROPE_KEYS.items()
            if rope.get(key) is not None
            and (kind == "yarn" or field in ("rope_type", "rope_theta"))}

# %%
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 4096}
print(_rope_object({"rope_scaling": YARN}, "rope_scaling"))

# %% tags=["export:weights/config_file"]
def _rope_fields(values: dict) -> dict:
    """Our fields from rope_parameters, from rope_scaling and rope_theta, or
    from what there is of them."""
    read = {spelling: _rope_object(values, spelling)
            for spelling in ROPE_SPELLINGS
            if values.get(spelling) is not None}
    if not read:  # the defaults are the released ones
        theta = values.get("rope_theta")
        return {} if theta is None else {"rope_theta": theta}
    first, *others = read.values()
    for key in itertools.chain(*read.values()):
        default = getattr(GptOssConfig, key)
        for other in others:
            demand(first.get(key, default) == other.get(key, default),
                    ROPE_SPELLINGS[0], f"{ROPE_KEYS[key]} as in "
                    f"{ROPE_SPELLINGS[1]}, {shown(other.get(key))}",
                    first.get(key))
    return first

# %%
old = _rope_fields({"rope_scaling": YARN, "rope_theta": 150000})
new = _rope_fields({"rope_parameters": YARN | {"rope_theta": 150000}})
print("same:", old == new, "| truncate left out:", old["rope_truncate"])
print("no object:", _rope_fields({"rope_theta": 10000}))
edited = YARN | {"rope_theta": 150000, "factor": 8.0}
print(refusal(lambda: _rope_fields({"rope_scaling": YARN,
                                    "rope_parameters": edited})))
print(refusal(lambda: _rope_fields({"rope_scaling": {"type": "linear"}})))

# %% [markdown]
# ### The other keys
#
# Keys that decide nothing are ignored: `use_cache`, `initializer_range`, or
# `hidden_act`, which says "silu" although the experts use another function.
# A test below finds all of them.

# %% tags=["export:weights/config_file"]
OPTIONAL = ("layer_types", "initial_context_length", "rms_norm_eps",
            "swiglu_limit", "eos_token_id", "pad_token_id",
            "tie_word_embeddings")
FIXED = {"model_type": "gpt_oss", "attention_bias": True,
         "swiglu_alpha": 1.702}


def _from_hf(values: dict) -> dict:
    """Our fields from those of Hugging Face's config.json."""
    values = {"model_type": None} | values
    for key, value in FIXED.items():
        found = values.get(key, value)
        demand(found == value, key, repr(value), found)
    if values.get("num_experts_per_tok") is None:
        values["num_experts_per_tok"] = values.get("experts_per_token")
    fields = {key: values[key] for key in SAME
              if values.get(key) is not None}
    for key in SAME:
        demand(key in fields or key in OPTIONAL, key, "a value", None)
    stop = fields.get("eos_token_id")
    if isinstance(stop, list):  # stop_ids (chapter 12) reads them all
        del fields["eos_token_id"]
        fields |= {"eos_token_id": stop[0]} if stop else {}
    return fields | _rope_fields(values)

# %%
print(refusal(lambda: _from_hf({"model_type": "llama"})))
print(refusal(lambda: _from_hf({"model_type": "gpt_oss"})))

# %% [markdown]
# ### From a dictionary, from a file
#
# Which spelling it is can be seen from the keys, and messages use the words
# of the file.

# %% tags=["export:weights/config_file"]
def config_from_dict(values: dict, source: str) -> GptOssConfig:
    """From HF keys (either rope spelling) or those of original/config.json.

    Keys that decide nothing here are ignored; a missing one, one of another
    model, or a value that makes no model is a ConfigError naming both the
    source and the key.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a JSON object, found "
                          f"{type(values).__name__}")
    original = "num_experts" in values and "model_type" not in values
    try:
        fields = _from_original(values) if original else _from_hf(values)
        return GptOssConfig(**fields)
    except ConfigError as error:
        keys = ORIGINAL_KEYS if original else ROPE_KEYS
        said, comma, found = str(error).rpartition(", found ")
        said = re.sub(r"\w+", lambda word: _spelt(word[0], keys), said)
        raise ConfigError(f"{source}: {said}{comma}{found}") from None


def _spelt(word: str, keys: dict[str, str]) -> str:
    """A field's name as the file spells it; other words as they are. What
    Hugging Face calls original_max_position_embeddings may as well stand
    above the rope object, under our name."""
    return word if word == "initial_context_length" else keys.get(word, word)

# %%
print(GptOssConfig.from_dict(ORIGINAL) == small)
print(refusal(lambda: GptOssConfig.from_dict(
    ORIGINAL | {"num_experts": 2}, "original/config.json")))

# %% [markdown]
# A file comes from somebody else. If `config.json` is a pipe, reading it
# waits for ever; if it is a link to `/dev/zero`, it never ends. A regular
# file of at most 16 MB is read, thousands of times what is needed.

# %% tags=["export:weights/config_file"]
MOST_JSON = 2 ** 24  # bytes


def read_json(file: Path, most: int = MOST_JSON) -> object:
    """What a JSON file says; ConfigError, in a line, if it says nothing: no
    such file, no regular one, one of more than `most` bytes, no JSON."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{file}: expected a file, found a folder, a "
                              "pipe or a device")
        with open(file, "rb") as f:
            raw = f.read(most + 1)
        if len(raw) > most:
            raise ConfigError(f"{file}: expected at most {most:,} bytes of "
                              "JSON, found more")
        return json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{file}: not readable as JSON (too deeply nested)"
                          ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from None


def read_config(path: Path) -> GptOssConfig:
    """GptOssConfig of a folder with config.json, or of such a file."""
    file = path / "config.json" if path.is_dir() else path
    return config_from_dict(read_json(file), str(file))

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(ORIGINAL))
    print(GptOssConfig.from_pretrained(folder) == small)
    for text in ("{", "[" * 10 ** 6, " " * (MOST_JSON + 1)):
        file.write_text(text)
        said = refusal(lambda: GptOssConfig.from_pretrained(folder))
        print(said.replace(folder, "...")[:74])

# %% [markdown]
# ### Writing both spellings
#
# What we write is the released file, key by key: a test holds it. Keys
# that only other programs read are written as OpenAI wrote them.

# %% tags=["export:weights/config_file"]
NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router",
                 "model.embed_tokens", "lm_head")


def hf_dict(config: GptOssConfig) -> dict:
    """What the config.json of a released model holds, key by key."""
    values = {key: getattr(config, key) for key in SAME}
    values["layer_types"] = list(config.layer_types)
    rope = {key: getattr(config, field) for field, key in ROPE_KEYS.items()}
    if config.rope_type == "default":
        rope = {key: rope[key] for key in ("rope_type", "rope_theta")}
    theta = rope.pop("rope_theta")
    return dict(sorted((values | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "attention_bias": True, "attention_dropout": 0.0,
        "experts_per_token": config.num_experts_per_tok,
        "hidden_act": "silu", "initializer_range": 0.02,
        "output_router_logits": False, "router_aux_loss_coef": 0.9,
        "use_cache": True, "rope_theta": theta, "rope_scaling": rope,
        "quantization_config": {
            "modules_to_not_convert": list(NOT_CONVERTED),
            "quant_method": "mxfp4"},
    }).items()))

# %%
print(len(small.to_hf_dict()), "keys;",
      GptOssConfig.from_dict(small.to_hf_dict()) == small)

# %% [markdown]
# OpenAI's spelling can say less, and a model that it cannot describe must
# not be written in it.

# %% tags=["export:weights/config_file"]
def original_dict(config: GptOssConfig) -> dict:
    """What original/config.json of a released model holds.

    That file has no key for max_position_embeddings, layer_types, rope_type
    or truncate: a model that differs there is a ConfigError, not a loss.
    """
    values = {key: getattr(config, field)
              for field, key in ORIGINAL_KEYS.items()}
    again = config_from_dict(values, "original/config.json")
    for field in ("layer_types", "max_position_embeddings", "rope_type",
                  "rope_truncate", "rms_norm_eps"):
        ours, theirs = getattr(config, field), getattr(again, field)
        demand(ours == theirs, field, f"{theirs!r}, which is all that "
                "original/config.json can say", ours)
    return values

# %%
print(small.to_original_dict() == ORIGINAL)
longer = replace(small, max_position_embeddings=262_144)
print(refusal(longer.to_original_dict))

# %% [markdown]
# ### Counting
#
# Equations {eq}`config-attention` to {eq}`config-total`.

# %% tags=["export:weights/sizes"]
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

# %% tags=["export:weights/sizes"]
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

# %% tags=["export:weights/sizes"]
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

# %% tags=["export:weights/sizes"]
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
# Equation {eq}`config-cache`. Chapter 9 builds both caches.

# %% tags=["export:weights/sizes"]
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

# %% tags=["export:weights/sizes"]
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
# **Every spelling comes back.** Through JSON, as a file would:

# %%
def through_json(values):
    return GptOssConfig.from_dict(json.loads(json.dumps(values)))


for _ in range(300):
    c = replace(random_config(rng), rope_theta=rng.uniform(1e3, 1e6),
                rope_factor=rng.uniform(1, 64),
                rope_truncate=rng.random() < 0.5)
    old = c.to_hf_dict()
    new = {key: value for key, value in old.items()
           if key not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = old["rope_scaling"] | {
        "rope_theta": old["rope_theta"]}
    assert through_json(old) == through_json(new) == c
    plain = replace(c, layer_types=None, rope_truncate=False,
                    max_position_embeddings=int(4096 * c.rope_factor))
    assert through_json(plain.to_original_dict()) == plain
print("300 configurations, three spellings")

# %% [markdown]
# **No value passes unseen.** Put something that is no number into each key
# of the released file in turn: the answer is an error that names the key,
# or the key decides nothing and the model is the same.

# %%
harmless = []
for key in small.to_hf_dict():
    try:
        config = GptOssConfig.from_dict(small.to_hf_dict() | {key: "?"})
    except ConfigError as error:
        assert f": {key}" in str(error)
    else:
        assert config == small
        harmless.append(key)
print("decide nothing:", *harmless, sep="\n  ")

# %% [markdown]
# Two of these are read when something better is missing:
# `experts_per_token` is an older name of `num_experts_per_tok`, and
# `initial_context_length` yields to the rope object, as in `transformers`.
#
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
# **Gaps.** `transformers` fills them. Four files, with the rope type, factor
# and trained length that it reads in them, and what we say:

# %%
def theirs(values):
    rope = HFConfig(**values).rope_parameters
    keys = ("rope_type", "factor", "original_max_position_embeddings")
    return [rope.get(key) for key in keys]


whole = small.to_hf_dict()
cases = {
    "as released": whole,
    "no rope object": {k: v for k, v in whole.items()
                       if k != "rope_scaling"},
    "no trained length": whole | {"rope_scaling": {
        "rope_type": "yarn", "factor": 32.0}},
    "tied": whole | {"tie_word_embeddings": True}}
for name, values in cases.items():
    try:
        GptOssConfig.from_dict(values)
        ours = "read"
    except ConfigError as error:
        ours = str(error).removeprefix("config.json: ").partition(":")[0]
        ours = f"refused for {ours}"
    print(f"{name}: {theirs(values)}; ours: {ours}")

# %% [markdown]
# In the third case `transformers` takes the longest context for the trained
# length, which moves the frequencies of chapter 4: refused. In the last it
# goes on with one matrix for both ends, and so do we (chapter 3).
#
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
# the time; chapter 13 starts from that. Late in a context both grow,
# arithmetic sooner:

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
#   64 wide, not 2880/64 = 45, and a gap in a configuration is an error.
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
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `ModelConfig` (the names of
#   `original/config.json`).
# - huggingface/transformers 5.23,
#   `models/gpt_oss/configuration_gpt_oss.py`: `GptOssConfig`;
#   `modeling_rope_utils.py`: defaults of YaRN.
# - `config.json`, `original/config.json` and
#   `model.safetensors.index.json` of openai/gpt-oss-20b and -120b.
