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
#     module: walk
#     public: [points, trace_ours]
# ---

# %% [markdown]
# # How do you look into a black box?

# %% [markdown]
# ## Question
#
# A fast kernel keeps no attention weights: it may never hold more than a few
# of them at a time. How can one look at them all the same, in a kernel that
# nobody may change?
#
# By asking it. With cleverly chosen values its output *is* the weights,
# rounded once, and it does not even notice. In this way 411 intermediate
# results of the 20b can be recorded for a prompt of 144 tokens, in less memory
# than one of its layers takes decoded.

# %% tags=["export"]
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.attention.rope import apply_rope, rope_parameters, rope_tables
from gptoss.model.layers import Block, Experts, RMSNorm
from gptoss.model.norm import rms_norm
from gptoss.model.transformer import GptOss
from gptoss.parity.contracts import CONTRACTS, Contract, computing, held
from gptoss.weights.config import GptOssConfig
from gptoss.weights.encoding import encode

# %%
import math
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor

import matplotlib.pyplot as plt

from gptoss.moe.experts import clamped_swiglu
from gptoss.parity.contracts import (
    attention_fp32,
    expert_weights,
    experts_fp32,
)
from gptoss.weights.write import random_tensors, write_checkpoint

plt.style.use("../_static/book.mplstyle")

# %% [markdown]
# ## Picture
#
# One layer. A *walk* sends a prompt through a model and records what stands
# after each box; the record is its *trace*. What to see: twelve of the boxes
# are results that somebody holds and that can be kept as they come by; two,
# the attention weights and the hidden vectors of the experts, are held by
# nobody and must be asked for.

# %% tags=["hide-input"]
# Figure: fourteen boxes in two rows joined by arrows, norm to block;
# "weights" and "hidden" stand out: no module returns them.
ROWS = [["norm", "q", "q turned", "weights", "heads", "attention", "middle"],
        ["norm 2", "router", "chosen", "shares", "hidden", "experts",
         "block"]]
fig, ax = plt.subplots(figsize=(7.6, 2.9))
for y, row in enumerate(ROWS):
    for x, name in enumerate(row):
        asked = name in ("weights", "hidden")
        ax.text(x, -1.5 * y, name, ha="center", va="center", fontsize=9,
                bbox={"boxstyle": "round,pad=0.45",
                      "fc": "#fff1dd" if asked else "white",
                      "ec": "C1" if asked else "0.6", "lw": 1.2})
        if x:
            ax.annotate("", (x - 0.36, -1.5 * y), (x - 0.64, -1.5 * y),
                        arrowprops={"arrowstyle": "-|>", "color": "0.6"})
ax.annotate("", (0, -1.22), (6, -0.28), arrowprops={
    "arrowstyle": "-|>", "color": "0.6"})
ax.text(3, 0.42, "asked for: values that are 1 at one key", ha="center",
        color="#a85f00", fontsize=9)
ax.text(4, -1.98, "asked for: a second matrix that copies", ha="center",
        color="#a85f00", fontsize=9)
ax.set(xlim=(-0.6, 6.6), ylim=(-2.15, 0.6))
ax.axis("off")
plt.show()

# %% [markdown]
# `q turned` is q after RoPE; `heads` is what the attention `weights` make of
# the values, `attention` what `o_proj` makes of that; `middle` is the
# residual stream between the two halves of a block; `shares` are the weights
# of the `chosen` experts, `hidden` what stands between an expert's two
# matrices. k, v and k's rotation are recorded like q and its own; embedding,
# last norm and logits stand outside the layers.

# %% [markdown]
# ## Which results are recorded?
#
# Seventeen a layer, the *points*, and three outside of all. A trace is a
# dictionary: (layer, point) to a tensor with T, the tokens, first. The layer
# is `None` outside of all.

# %% tags=["export"]
# In a layer, in the order of computation; T comes first in every tensor.
LAYER_POINTS = (
    "norm", "q", "k", "v", "q turned", "k turned", "weights", "heads",
    "attention", "middle", "norm 2", "router", "chosen", "shares", "hidden",
    "experts", "block")
Key = tuple[int | None, str]  # layer (None: outside of all), point
Trace = dict[Key, Tensor]


def points(config: GptOssConfig) -> list[Key]:
    """Every point of a model, in the order of computation."""
    layers = [(n, point) for n in range(config.num_hidden_layers)
              for point in LAYER_POINTS]
    return [(None, "embedding"), *layers, (None, "last norm"),
            (None, "logits")]

# %%
TINY = GptOssConfig(
    num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=96, hidden_size=64, intermediate_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, swiglu_limit=2.0,
    eos_token_id=2, pad_token_id=0)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "tiny"
write_checkpoint(path, TINY, random_tensors(TINY))


def prompt(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (1, 144), generator=g)


keys = points(TINY)
print(len(keys), "points:", keys[0], keys[1], "…", keys[-1])

# %% [markdown]
# ## The naive version
#
# A hook on every module sees what modules return. How many of the seventeen
# does one get that way?

# %%
import re

model = GptOss.from_pretrained(path, torch.float32)
seen = []
for name, module in model.layers[0].named_modules():
    module.register_forward_hook(
        lambda module, inputs, out, name=name: seen.append(
            (name or "the block", type(out).__name__)))
with torch.inference_mode():
    model(prompt(0))
print(len(seen), "results:", *(re.sub(r".*\.", "", name) for name, _ in seen))

# %% [markdown]
# Queries before the rotation, but not after it; what the heads give together
# only as `o_proj`'s input; no weights of attention, and nothing from inside an
# expert. Those live in operators: `sink_attention` and `experts` take tensors
# and give tensors, and a fast kernel never holds in memory what is between.
#
# ## How is a black box asked?
#
# **Attention.** One head, three keys. Its output is $p_1 v_1 + p_2 v_2 +
# p_3 v_3$ with the weights $p$ that we want. The weights depend on queries and
# keys, not on the values, and the values are ours to choose. So choose
# $v_1 = 1$, $v_2 = v_3 = 0$: what comes out *is* $p_1$. A value has C
# channels, and each is summed by itself; so channel 1 can ask for key 1 and
# channel 2 for key 2, at the same time:

# %%
q = torch.tensor([[[[1.0, 0.5]]]])  # (1, T, H, C): one query, one head
k = torch.tensor([[[[0.3, 0.1]], [[1.0, 0.2]], [[0.2, 0.9]]]])
ask = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]]])
at = torch.tensor([[2]])
weights = attention_fp32(q, k, ask, torch.tensor([0.0]), at, 0, 1.0).flatten()
scores = torch.tensor([0.35, 1.1, 0.65, 0.0])  # by hand; the last, the sink
print("asked for:", [round(p, 4) for p in weights.tolist()])
print("softmax:  ", [round(p, 4) for p in scores.softmax(0).tolist()])

# %% [markdown]
# Two channels, two keys; with C channels, C keys a call. S keys take
# $\lceil S/C \rceil$ calls:

# %% tags=["export"]
def probe(attend: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Attention weights (T, H, S) of a black box attend(v) -> (1, T, H, C).

    Values that are 1 at one key and 0 elsewhere come out as that key's
    weight; C keys are asked for at a time. v (1, S, G, C).
    """
    S, C = v.shape[1], v.shape[3]
    out = []
    for start in range(0, S, C):
        one, keys = torch.zeros_like(v), torch.arange(min(C, S - start))
        one[0, start + keys, :, keys] = 1
        out.append(attend(one)[0, ..., :len(keys)])
    return torch.cat(out, -1)


@contextmanager
def swapped_in(module: nn.Module, tensors: Mapping[str, Tensor]
               ) -> Iterator[None]:
    """Other tensors under the module's names inside the with."""
    held = {name: getattr(module, name) for name in tensors}
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False)
                if isinstance(held[name], nn.Parameter) else tensor)
    try:
        yield
    finally:
        for name, tensor in held.items():
            setattr(module, name, tensor)

# %%
torch.manual_seed(0)
q, k, v = (torch.randn(1, 20, heads, 32) for heads in (4, 2, 2))
rest = torch.randn(4), torch.arange(20)[None], 6, 32 ** -0.5


def attend(values: Tensor) -> Tensor:
    return attention_fp32(q, k, values, *rest)


found = probe(attend, v)
out = torch.einsum("ths,shc->thc", found, v[0].repeat_interleave(2, 1))
assert (out - attend(v)[0]).abs().max() < 1e-6
print(f"{tuple(found.shape)} weights; of a row's sum the sink took between "
      f"{1 - found.sum(-1).max():.0%} and {1 - found.sum(-1).min():.0%}")

# %% [markdown]
# **Experts.** An expert is two matrices with a product in between: $y = A_2 h
# + b$ with $h$ the hidden vector that we want. Here too the last step is
# linear. With a second matrix that copies, the identity, and no bias, what
# comes out *is* $h$. If F is larger than D, the matrix copies D entries at a
# time. The module's own tensors are put aside while it is asked, and come back
# whatever happens.

# %% tags=["export"]
def copying(bias: Tensor, width: int, start: int) -> Tensor:
    """A down matrix (D, F) that copies entries start, start + 1, ... of
    the hidden vector. bias (E, D) says D and the dtype."""
    rows = torch.eye(width, dtype=bias.dtype)[start:start + bias.shape[1]]
    return F.pad(rows, (0, 0, 0, bias.shape[1] - len(rows)))


def probe_experts(call: Callable, module: nn.Module, x: Tensor, ids: Tensor,
                  width: int, down: Callable[[Tensor], dict[str, Tensor]]
                  ) -> Tensor:
    """Hidden vectors (T, K, F) of a black box call(x, ids, weights).

    With a down matrix that copies and no bias, an expert's output is what
    stands between its two matrices. down(matrix (D, F)) names the tensors
    to put into module.
    """
    bias, out = held(module, "down_proj_bias"), []
    one = torch.ones_like(ids[:, :1], dtype=x.dtype)
    for start in range(0, width, bias.shape[1]):
        tensors = down(copying(bias, width, start))
        tensors["down_proj_bias"] = torch.zeros_like(bias)
        with swapped_in(module, tensors):
            part = [call(x, ids[:, k:k + 1], one)
                    for k in range(ids.shape[1])]
        out.append(torch.stack(part, 1)[..., :width - start])
    return torch.cat(out, -1)


def our_down(module: Experts) -> Callable[[Tensor], dict[str, Tensor]]:
    """`probe_experts`' down for our module, packed or dense."""
    def put(matrix: Tensor) -> dict[str, Tensor]:
        E = len(held(module, "down_proj_bias"))
        if not module.packed:
            return {"down_proj": matrix.expand(E, -1, -1)}
        return {f"down_proj_{part}": t.expand(E, *t.shape).contiguous()
                for part, t in zip(("blocks", "scales"), encode(matrix),
                                   strict=True)}
    return put

# %%
module = GptOss.from_pretrained(path, torch.float32).layers[0].mlp.experts
ids = torch.stack([torch.randperm(8)[:2] for _ in range(20)])
x = torch.randn(20, 64)
hidden = probe_experts(partial(experts_fp32, module), module, x, ids, 64,
                       our_down(module))
up, down = expert_weights(module, ids[3, 1].item(), torch.float32)
wanted = clamped_swiglu(up @ x[3] + module.gate_up_proj_bias[ids[3, 1]], 2.0)
assert (hidden[3, 1] - wanted).abs().max() < 1e-5
print(tuple(hidden.shape), "; token 3, its second expert: asked for "
      f"{hidden[3, 1, 0].item():.3f}, by hand {wanted[0].item():.3f}")

# %% [markdown]
# Packed experts get a packed identity: 0 and 1 are exact in four bits.

# %% [markdown]
# ## Walking ours
#
# Our model needs no hooks: a walk calls its modules one after the other and
# keeps what they return. Under the [contracts](rounding.ipynb) `fp32` and
# `kernels` these are the modules as they are; the other two compute with
# torch's own functions.
#
# The kernels have two ways to multiply: with a few tokens, as in decoding, and
# with many, as in reading a prompt. Both are walked over if a walk takes its
# tokens in parts, most of them at once and the last ones one by one. No row of
# any operation depends on another but in attention, where keys and values are
# there as if from a cache.

# %% tags=["export"]
def plain_torch_layer(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer or a norm in plain torch, whatever kernels are loaded:
    equal bits need the reference's own operations."""
    if isinstance(module, RMSNorm):
        return rms_norm(x, module.weight, module.eps)
    return F.linear(x, held(module, "weight"), held(module, "bias"))


def own_layer(module: nn.Module, x: Tensor) -> Tensor:
    """The module as it is, its operators and kernels included."""
    return module(x)


def dense_shares(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """(T, K) ids and weights -> (T, E), 0 where an expert is not chosen."""
    out = torch.zeros(len(ids), experts, dtype=weights.dtype)
    return out.scatter(1, ids, weights)

# %% tags=["export"]
Parts = Sequence[int]  # how many tokens at a time


def in_parts(call: Callable, parts: Parts, dim: int = 0) -> Callable:
    """call(*tensors), its tensors split along dim, its results joined."""
    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        split = zip(*(t.split(list(parts), dim) for t in tensors),
                    strict=True)
        out = [call(*part) for part in split]
        if isinstance(out[0], tuple):
            return tuple(torch.cat(each, dim)
                         for each in zip(*out, strict=True))
        return torch.cat(out, dim)
    return run

# %%
seen = []
whole = in_parts(lambda x: seen.append(len(x)) or 2 * x, [3, 1, 1])
print(whole(torch.arange(5)).tolist(), "from parts of", seen)

# %% [markdown]
# A layer in two halves, in the order of computation:

# %% tags=["export"]
def trace_attention(block: Block, x: Tensor, tables: tuple[Tensor, Tensor],
                    positions: Tensor, use: Contract, parts: Parts
                    ) -> tuple[Tensor, ...]:
    """x (1, T, D) -> norm, q, k, v, q and k turned, weights, heads and
    attention, the first points of a layer of ours."""
    a = block.self_attn
    layer = plain_torch_layer if use.inner else own_layer

    def call(module: nn.Module, value: Tensor) -> Tensor:
        return in_parts(partial(layer, module), parts, 1)(value)
    turn = in_parts(apply_rope if use.inner else torch.ops.gptoss.rope,
                    parts, 1)
    norm = call(block.input_layernorm, x)
    q, k, v = (call(project, norm).unflatten(-1, (-1, a.head_dim))
               for project in (a.q_proj, a.k_proj, a.v_proj))
    q_turned, k_turned = (turn(t, *tables) for t in (q, k))

    def attend(values: Tensor) -> Tensor:
        return in_parts(lambda queries, at: use.attention(
            queries, k_turned, values, a.sinks, at, a.window,
            a.head_dim ** -0.5), parts, 1)(q_turned, positions)
    heads = attend(v)
    return (norm[0], q[0], k[0], v[0], q_turned[0], k_turned[0],
            probe(attend, v), heads[0], call(a.o_proj, heads.flatten(2))[0])

# %% tags=["export"]
def trace_block(block: Block, x: Tensor, tables: tuple[Tensor, Tensor],
                positions: Tensor, use: Contract, parts: Parts
                ) -> dict[str, Tensor]:
    """x (1, T, D) -> every point of one layer of ours."""
    first = trace_attention(block, x, tables, positions, use, parts)
    router, m = block.mlp.router, block.mlp.experts
    middle = x[0] + first[-1]
    norm_2 = in_parts(partial(
        plain_torch_layer if use.inner else own_layer,
        block.post_attention_layernorm), parts)(middle)
    product = F.linear if use.inner else torch.ops.gptoss.linear
    logits = in_parts(lambda rows: product(rows, router.weight, router.bias),
                      parts)(norm_2)
    weights, ids = in_parts(partial(use.choose, router), parts)(norm_2)
    call, ordered = in_parts(partial(use.experts, m), parts), ids.sort(-1)[0]
    experts = call(norm_2, ids, weights)
    hidden = probe_experts(call, m, norm_2, ordered,
                           held(m, "gate_up_proj_bias").shape[1] // 2,
                           our_down(m))
    return dict(zip(LAYER_POINTS, (
        *first, middle, norm_2, logits, ordered,
        dense_shares(ids, weights, logits.shape[1]), hidden, experts,
        middle + experts), strict=True))

# %% [markdown]
# And the whole model. `rope` may be another function of the configuration than
# the right one, so that a fault can be planted there.

# %% tags=["export"]
@torch.inference_mode()
def trace_ours(model: GptOss, tokens: Tensor, contract: str = "fp32",
               rope: Callable = rope_parameters, parts: Parts | None = None
               ) -> Trace:
    """Every point of our model for tokens (1, T), under a contract.

    parts: how many tokens at a time, T in sum; None: all at once.
    ParityError: a contract that cannot be kept here (`computing`).
    """
    x, parts = model.embed_tokens(tokens), parts or [tokens.shape[1]]
    with computing(contract, x.dtype):
        return _trace(model, x, CONTRACTS[contract], rope, parts)


def _trace(model: GptOss, x: Tensor, use: Contract, rope: Callable,
           parts: Parts) -> Trace:
    positions = torch.arange(x.shape[1])[None]
    inv_freq, factor = rope(model.config)
    wide = torch.promote_types(x.dtype, torch.float32)
    tables = rope_tables(positions, inv_freq.to(wide), factor, x.dtype)
    out: Trace = {(None, "embedding"): x[0]}
    for n in range(model.config.num_hidden_layers):
        block = cast(Block, model.layers[n])
        seen = trace_block(block, x, tables, positions, use, parts)
        out |= {(n, point): value for point, value in seen.items()}
        x = seen["block"][None]
    last = x[0]
    for point, module in (("last norm", model.norm),
                          ("logits", model.lm_head)):
        last = in_parts(partial(
            plain_torch_layer if use.inner else own_layer, module),
            parts)(last)
        out[None, point] = last
    return out

# %% [markdown]
# ## What is refused
#
# A contract that cannot be kept on this machine, as
# [its chapter](rounding.ipynb) says, by a `ParityError`; parts that do not sum
# to T, by torch's own words.

# %%
try:
    trace_ours(model, prompt(0), parts=[140])
except RuntimeError as error:
    print(str(error).partition(",")[0])

# %% [markdown]
# ## It holds
#
# A walk changes nothing: its logits are the model's, bit for bit. And taken
# in parts, 140 tokens at once and four one by one, it sees the same keys.

# %%
model = GptOss.from_pretrained(path)
tokens = prompt(0)
trace = trace_ours(model, tokens)
assert list(trace) == points(TINY)
with torch.inference_mode():
    same = (trace[None, "logits"] == model(tokens)[0]).double().mean().item()
print(f"{same:.0%} of {trace[None, 'logits'].numel():,} logits are equal")
assert same == 1
parted = trace_ours(model, tokens, parts=[140, 1, 1, 1, 1])
off = (parted[0, "weights"] - trace[0, "weights"]).abs().max()
assert ((parted[0, "weights"] == 0) == (trace[0, "weights"] == 0)).all()
assert off < 0.01
print(f"in parts: the same {(trace[0, 'weights'] > 0).sum():,} weights are "
      "not 0, and none is off by more than 0.01")

# %% [markdown]
# ## In the 20b and the 120b

# %%
for name, config in (("20b", GptOssConfig.gpt_oss_20b()),
                     ("120b", GptOssConfig.gpt_oss_120b())):
    T, D, S = 144, config.hidden_size, 144
    H, C = config.num_attention_heads, config.head_dim
    G, E, K = (config.num_key_value_heads, config.num_local_experts,
               config.num_experts_per_tok)
    layer = (6 * D + 3 * H * C + 3 * G * C + H * S + 2 * E
             + K * config.intermediate_size)
    numbers = T * (config.num_hidden_layers * layer
                   + 2 * D + config.vocab_size)
    print(f"{name}: {len(points(config))} points, a trace of {T} tokens in "
          f"bf16 takes {2 * numbers / 1e6:,.0f} MB")

# %% [markdown]
# So a trace is small. What takes memory are the models: how somebody else's
# is walked layer by layer, [the next chapter](others.ipynb) shows.

# %% [markdown]
# ## Cost
#
# The probes are what a walk costs beyond a forward. Attention weights take
# $\lceil S/C \rceil$ more attentions; hidden vectors take $K \lceil F/D
# \rceil$ calls that send every token to one expert; the router is multiplied
# once more:
#
# $$
# \text{FLOPs} = \text{forward} + L\Big[\lceil S/C \rceil\, 4HC\,T^2
# + K \lceil F/D \rceil\, 6\,T D F + 2\,T D E\Big] .
# $$ (parity-cost)

# %%
from torch.utils.flop_counter import FlopCounterMode

dense = GptOss.from_pretrained(path, torch.float32, packed=False)
tokens, flops = prompt(0), []
for run in (dense, lambda tokens: trace_ours(dense, tokens)):
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run(tokens)
    flops.append(counter.get_total_flops())
c, T = TINY, tokens.shape[1]
D, width, H, C = (c.hidden_size, c.intermediate_size, c.num_attention_heads,
                  c.head_dim)
more = c.num_hidden_layers * (
    math.ceil(T / C) * 4 * H * C * T * T
    + c.num_experts_per_tok * math.ceil(width / D) * 6 * T * D * width
    + 2 * T * D * c.num_local_experts)
assert flops[1] == flops[0] + more
print(f"{flops[0]:,} + {more:,} FLOPs")

# %% [markdown]
# ## Takeaways
#
# 1. Attention is linear in its values and an expert in its hidden vector:
#    what a kernel never stores can be asked for with inputs that select.
# 2. A walk calls the modules that the model calls, in parts if need be, so
#    that the way of decoding is walked over too.
# 3. A trace is a dictionary from (layer, point) to a tensor. All that follows
#    works on traces and asks no model.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# What a row of attention weights lacks to 1 is the sink's. How much do the
# sinks of the tiny model take, on average over the last hundred tokens, in a
# full layer and in a sliding one? All of its sinks are drawn alike: why does
# the sliding layer leave them more?

# %% tags=["hide-cell"]
model.layers[0].self_attn.window = 4  # layer 0 slides, layer 1 does not
trace = trace_ours(model, tokens)
taken = [1 - trace[n, "weights"][-100:].float().sum(-1).mean().item()
         for n in (0, 1)]
print(f"sliding {taken[0]:.0%}, full {taken[1]:.0%}")
assert taken[0] > taken[1]  # four keys compete with it, not a hundred

# %% [markdown]
# ### Exercise 2
#
# Ask a black box that is *not* linear in its values: an attention that clips
# its output to 0.05 and -0.05. What does the probe say, and how could you
# notice, without looking inside?

# %% tags=["hide-cell"]
def clip(factor: float) -> Tensor:
    return probe(lambda values: attend(factor * values).clamp(-0.05, 0.05)
                 / factor, torch.zeros(1, 20, 2, 32))


clipped, doubled = clip(1.0), clip(2.0)
print(f"largest weight {clipped.max():.3f} instead of {found.max():.3f}; with "
      f"twice the values {doubled.max():.3f}: a linear box would say the same")

# %% [markdown]
# ### Exercise 3
#
# Which of the trained model's layers looks furthest back? Walk over 80 tokens
# of the shipped model and print, for each layer, how far away on average the
# keys are, weighted by attention.

# %% tags=["hide-cell"]
from importlib.resources import files

from gptoss.text.tokenizer import Tokenizer

pocket = GptOss.from_pretrained(files("gptoss") / "pocket", torch.float32)
text = ("Once upon a time there was a little fox named Mira. Mira lived in "
        "the cave. For her birthday Mira got a white lamp. One morning she "
        "went to the park with the lamp.")
ids = torch.tensor([Tokenizer.from_pretrained(
    files("gptoss") / "pocket").encode(text)])
trace = trace_ours(pocket, ids)
away = (torch.arange(ids.shape[1])[:, None]
        - torch.arange(ids.shape[1]))[:, None].clamp(min=0)
for n in range(len(pocket.layers)):
    p = trace[n, "weights"].float()
    print(f"layer {n}, {pocket.config.layer_types[n].split('_')[0]}: "
          f"{((p * away).sum() / p.sum()).item():.0f} tokens away, the sinks "
          f"take {1 - p.sum(-1).mean().item():.0%}")
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - {cite}`gptoss2025`: the model whose operations are the points.
# - Forward hooks and `TorchFunctionMode`, the usual ways into a model that is
#   not one's own: PyTorch, `torch/nn/modules/module.py`,
#   `torch/overrides.py`.
