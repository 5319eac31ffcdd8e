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
#     module: model
# ---

# %% [markdown]
# # Twenty-four times the same block

# %% [markdown]
# ## Question
#
# Nine chapters have built the parts. What is left to write before they are a
# language model, and how do we know that the whole is right when only the
# parts were tested?
#
# Little is left: one normalisation, two additions, and a loop. All that
# block 7 of the 20b learns from blocks 0 to 6 about a token is one vector of
# 2,880 numbers, **5,760 bytes**; the block that reads them holds 476 million
# bytes of weights. Everything between the parts happens in that vector, so
# this chapter walks along it, ours beside Hugging Face's, point by point.

# %%
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network

import matplotlib.pyplot as plt

plt.style.use("_static/book.mplstyle")

# %% [markdown]
# ## Picture
#
# Left, one token's way through the 20b. Grey arrows are the residual stream;
# each half of a block reads it through a norm and adds to it. Right, what
# each step must read from memory for that one token, over all 24 layers,
# after 4,096 tokens of context: the experts and the head are nearly all of
# it, though 28 of 32 experts are not touched.

# %% tags=["hide-input"]
MB, L, D, V = 1e6, 24, 2880, 201088
H, G, C, F_, E, K = 64, 8, 64, 2880, 32, 4
linear = 2 * D * (H + 2 * G) * C, 2 * D * H * C
expert = (2 * F_ * D + D * F_) * 17 / 32 + 2 * (2 * F_ + D)
held = L // 2 * (4096 + 128) * 2 * G * C * 2
steps = [  # text, bytes read for one token, colour
    ("embed_tokens: one row of 201,088", 2 * D, "C4"),
    ("norm", L * 2 * D, "C4"),
    ("q, k, v: 64 + 8 + 8 heads of 64", L * linear[0], "C0"),
    ("RoPE, cache, sinks", held, "C2"),
    ("o: 4,096 to 2,880", L * linear[1], "C0"),
    ("norm", L * 2 * D, "C4"),
    ("router: 4 of 32", L * 2 * D * E, "C3"),
    ("4 experts, packed", L * K * expert, "C1"),
    ("norm", 2 * D, "C4"),
    ("lm_head: 201,088 logits", 2 * D * V, "C5"),
]
fig, (left, right) = plt.subplots(
    1, 2, figsize=(7, 4.4), sharey=True, width_ratios=(1.35, 1))
for y, (text, size, colour) in enumerate(steps):
    left.text(0.5, y, text, ha="center", va="center", fontsize=8, bbox={
        "boxstyle": "round,pad=0.35", "fc": "white", "ec": colour})
    right.barh(y, size / MB, color=colour, height=0.55)
    right.text(size / MB * 1.25, y, f"{size / MB:.3g}", va="center",
               fontsize=8)
arrow = {"arrowstyle": "-|>", "color": "0.55", "lw": 1.4}
for top, bottom, name in ((1, 4, "attention"), (5, 7, "experts")):
    for start, end in (((0.04, top), (0.2, top)),
                       ((0.2, bottom), (0.04, bottom))):
        left.annotate("", end, start, arrowprops=arrow)
    left.text(0.01, bottom, "+", ha="right", va="center", fontsize=12)
    left.text(0.97, (top + bottom) / 2, name, rotation=270, va="center",
              fontsize=8, color="0.35")
left.annotate("", (0.04, 9), (0.04, 0), arrowprops=arrow)
left.text(0.93, 7.55, "24 times", ha="right", va="center", fontsize=8,
          color="0.35")
left.add_patch(plt.Rectangle((-0.06, 0.5), 1.12, 7.3, fill=False,
                             ls=":", ec="0.5"))
left.set(xlim=(-0.1, 1.1), ylim=(9.6, -0.6))
left.axis("off")
right.tick_params(left=False, labelleft=False)
right.set(xscale="log", xlim=(3e-3, 3e4), xlabel="MB read for one token")
right.spines.left.set_visible(False)
right.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# ## The naive version
#
# Whoever has written a Llama writes the rest from memory, and meets three
# traps. **The head size**: everywhere else it is hidden size over heads.

# %%
import torch

from gptoss.rope import apply_rope, inverse_frequencies, rope_tables

naive_head = 2880 // 64
q = torch.randn(1, 3, 64, naive_head)
try:
    cos, sin = rope_tables(torch.arange(3)[None],
                           inverse_frequencies(naive_head, 150000.0))
    apply_rope(q, cos, sin)
except ValueError as error:
    print(f"head size {naive_head}: {error}")

# %% [markdown]
# Here 64 heads of **64** make 4,096 numbers from 2,880, and `o_proj` brings
# them back. **The norm**: Llama's code rounds the normalised vector to bf16
# and then multiplies by the weight, which rounds a second time. It runs, the
# values look right, and a third of them are not the nearest bf16.


# %%
def naive_norm(x: torch.Tensor, weight: torch.Tensor,
               eps: float = 1e-5) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


torch.manual_seed(0)
x = torch.randn(1000, 2880).bfloat16()
weight = (1 + 0.3 * torch.randn(2880)).bfloat16()
exact = x.double()
exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
exact = (exact * weight.double()).bfloat16()
wrong = (naive_norm(x, weight) != exact).float().mean().item()
print(f"not the nearest bf16: {wrong:.0%}")

# %% [markdown]
# **The scores**: one matrix of queries by keys for every head. At the length
# that the model is made for, one layer's would take, in fp32,

# %%
length = 131_072
print(f"{64 * length * length * 4 / 1e12:.1f} TB")

# %% [markdown]
# ## Derivation
#
# Let $x_l$ be the residual stream before layer $l$, one vector of $D$
# numbers a token, with $x_0$ the token's row of the embedding.
#
# **The norm** divides by the root mean square and multiplies by a learned
# weight $w$ {cite}`rmsnorm2019`. Nothing is subtracted and there is no bias:
#
# $$
# N(x) = \mathrm{round}\Big(\frac{x}{\sqrt{\frac1D\sum_i x_i^2 +
# \varepsilon}} \odot w\Big), \qquad \varepsilon = 10^{-5},
# $$ (model-norm)
#
# with everything inside the bracket in fp32 and one rounding to the dtype of
# $x$. But for $\varepsilon$, $N(ax) = N(x)$ for every $a > 0$: a block reads
# the direction of the stream, never its length.
#
# **A block** has two halves, attention $A_l$ and experts $M_l$:
#
# $$
# h_l = x_l + A_l(N(x_l)), \qquad x_{l+1} = h_l + M_l(N(h_l)).
# $$ (model-block)
#
# Unrolled, the last stream is a plain sum, and the logits a linear map of
# its direction:
#
# $$
# x_L = x_0 + \sum_{l=0}^{L-1} \big(A_l + M_l\big), \qquad
# \text{logits} = W_{\text{head}}\, N(x_L).
# $$ (model-sum)
#
# Two things follow. A gradient reaches every part through the identity of
# {eq}`model-block`, undamped. And rounding adds up: each of the $2L$
# additions rounds to the grid of $x$ as it is by then, an error of up to
# $2^{-9}|x|$ in bf16 that no later layer can repair. After 48 additions
# errors of random sign have grown by $\sqrt{48} \approx 7$, whatever was
# done inside the halves. That is the floor of bf16, and the walk below
# shows both implementations a little above it.
#
# **Grouped attention** {cite}`gqa2023`. $H$ query heads share $G$ key/value
# heads; query head $h$ of token $t$ reads key head $g(h)$:
#
# $$
# o_{t,h} = \sum_{s \text{ visible from } t} p_{t,h,s}\, v_{s,g(h)},
# \qquad g(h) = \Big\lfloor \frac{h}{H/G} \Big\rfloor ,
# $$ (model-grouped)
#
# with $p$ from chapter 5 (sinks) and "visible" from chapter 6 (window).
# Row $t$ of the scores depends on no other row. So $n$ rows can be computed,
# used and dropped before the next $n$, and the memory for scores is
#
# $$
# B \cdot H \cdot n \cdot S \le M
# \quad\Rightarrow\quad n = \max\Big(1, \Big\lfloor \frac{M}{B H S}
# \Big\rfloor\Big)
# $$ (model-tile)
#
# entries instead of $B H T S$: with $M = 2^{23}$, 32 MB in fp32, whatever
# the length. Chapter 13 also keeps the row maxima in registers; the result
# is the same sum.
#
# **Positions.** A token's position is the number of real tokens before it in
# its row, those in the cache included; padding has position -1, sees nothing
# and is seen by nobody. Then the same equations serve a prompt, one more
# token, and a batch of unequal prompts.
#
# **Loading.** Let the checkpoint hold tensors of $b_i$ bytes, and let the
# model want $c_i$. Build first and copy then, and the peak is the model as
# first drawn plus all that was read. Build on the meta device (shapes, no
# bytes) and hand over one tensor at a time, and it is
#
# $$
# \text{peak} \le \sum_i c_i + \max_{i:\ \text{converted}} b_i ,
# $$ (model-load)
#
# where a tensor that is not converted is a view of the memory-mapped file:
# its $c_i$ are pages which the system may drop and read again.

# %% [markdown]
# ## Code
#
# ### RMSNorm

# %% tags=["export"]
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gptoss.cache import Cache
from gptoss.checkpoint import Checkpoint, CheckpointError, resolve
from gptoss.config import GptOssConfig
from gptoss.experts import Experts
from gptoss.masks import positions_from_mask, visible
from gptoss.mxfp4 import SCALE_NAN, decode
from gptoss.rope import apply_rope, rope_parameters, rope_tables
from gptoss.routing import Router
from gptoss.sinks import attention_concat


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last dimension: (…, D) -> (…, D).

    Computed in fp32 (float64 for float64) and rounded ONCE, at the end, to
    x.dtype: the weight is multiplied before the rounding. The order is that
    of transformers' GptOssRMSNorm.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * wide).to(x.dtype)


# %% [markdown]
# Against the exact value of the cell above it misses the nearest bf16 only
# where fp32 itself lands on the other side of a midpoint.

# %%
wrong = (rms_norm(x, weight) != exact).float().mean().item()
assert wrong < 1e-3
print("nearest bf16 in more than 999 of 1000:", wrong < 1e-3)


# %% tags=["export"]
class RMSNorm(nn.Module):
    """`rms_norm` with its weight (D,), at first all ones."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype,
                 device=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


# %% [markdown]
# At first the weight is 1, and the length of a vector does not matter:

# %%
norm = RMSNorm(2880, 1e-5, torch.float32)
vector = torch.randn(2880)
print(torch.allclose(norm(100 * vector), norm(vector), atol=1e-4))

# %% [markdown]
# ### Attention as an operator
#
# {eq}`model-tile` in code: `visible` and `attention_concat` on a slice of
# the queries at a time.

# %% tags=["export"]
SCORES_AT_ONCE = 2 ** 23  # entries of (B, H, T, S) that exist at a time


def attention_in_tiles(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                       q_pos: Tensor, k_pos: Tensor, window: int,
                       scale: float) -> Tensor:
    """`attention_concat` over the visible keys, some queries at a time.

    q (B, T, H, C); k, v (B, S, G, C); sinks (H,); q_pos (B, T) and
    k_pos (B, S) int64, -1 for padding; window 0 means none. Returns
    (B, T, H, C). A query's row of scores depends on no other query, so the
    tiles change the memory, not the result.
    """
    B, T, H, _ = q.shape
    rows = max(1, SCORES_AT_ONCE // max(1, B * H * k.shape[1]))
    tiles = [
        attention_concat(
            q[:, t:t + rows], k, v, sinks,
            visible(q_pos[:, t:t + rows], k_pos, window or None), scale)
        for t in range(0, T, rows)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)


# %% [markdown]
# Seven queries at a time or all 50 at once: the same numbers.

# %%
q, k, v = (torch.randn(1, 50, heads, 16, dtype=torch.float64)
           for heads in (4, 2, 2))
sinks, pos = torch.randn(4, dtype=torch.float64), torch.arange(50)[None]
whole = attention_in_tiles(q, k, v, sinks, pos, pos, 8, 0.25)
usual, SCORES_AT_ONCE = SCORES_AT_ONCE, 7 * 4 * 50
tiled = attention_in_tiles(q, k, v, sinks, pos, pos, 8, 0.25)
SCORES_AT_ONCE = usual
assert torch.allclose(whole, tiled, rtol=0, atol=1e-14)
print(tuple(tiled.shape))


# %% [markdown]
# The model does not call this function but the operator
# `gptoss::sink_attention`, of which it is the plain implementation. Chapter
# 13 registers faster ones for the same name; nothing here has to know.
# `CompositeImplicitAutograd` says that the operator is made of torch's own
# operations, whose gradients torch knows.

# %% tags=["export"]
def _define_attention() -> None:
    """Declare gptoss::sink_attention once, whoever asks first."""
    if hasattr(torch.ops.gptoss, "sink_attention"):
        return
    torch.library.define(
        "gptoss::sink_attention",
        "(Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor q_pos,"
        " Tensor k_pos, int window, float scale) -> Tensor")
    torch.library.impl("gptoss::sink_attention", "CompositeImplicitAutograd",
                       attention_in_tiles)


_define_attention()

# %%
sinks.requires_grad_()
out = torch.ops.gptoss.sink_attention(q, k, v, sinks, pos, pos, 8, 0.25)
out.square().sum().backward()
print(torch.equal(out.detach(), whole), tuple(sinks.grad.shape))


# %% [markdown]
# ### The attention layer
#
# Four linear layers with biases, and one sink a head. A layer knows its
# window (0: none) and its number, by which the cache keeps its keys.

# %% tags=["export"]
class Attention(nn.Module):
    """Grouped-query attention with RoPE, sinks and, perhaps, a window."""

    def __init__(self, config: GptOssConfig, layer: int,
                 dtype: torch.dtype, device=None) -> None:
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, C
        sliding = config.layer_types[layer] == "sliding_attention"
        self.window = config.sliding_window if sliding else 0
        like = {"dtype": dtype, "device": device}
        self.q_proj = nn.Linear(D, H * C, **like)
        self.k_proj = nn.Linear(D, G * C, **like)
        self.v_proj = nn.Linear(D, G * C, **like)
        self.o_proj = nn.Linear(H * C, D, **like)
        self.sinks = nn.Parameter(torch.zeros(H, **like))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                positions: Tensor, cache: Cache | None = None) -> Tensor:
        """x (B, T, D), tables (B, T, C/2), positions (B, T) -> (B, T, D)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope(self.q_proj(x).view(heads), cos, sin)
        k = apply_rope(self.k_proj(x).view(heads), cos, sin)
        v, k_pos = self.v_proj(x).view(heads), positions
        if cache is not None:
            k, v, k_pos = cache.update(self.layer, k, v, positions)
        out = torch.ops.gptoss.sink_attention(
            q, k, v, self.sinks, positions, k_pos, self.window,
            self.head_dim ** -0.5)
        return self.o_proj(out.flatten(2))


# %% [markdown]
# A small model for the rest of the chapter: hidden 64, but 4 heads of 32 are
# 128.

# %%
TINY = GptOssConfig(
    num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=96, hidden_size=64, intermediate_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
    eos_token_id=2, pad_token_id=0)
torch.manual_seed(0)
attention = Attention(TINY, 0, torch.float32)
pos = torch.arange(10)[None]
tables = rope_tables(pos, *rope_parameters(TINY))
out = attention(torch.randn(1, 10, 64), *tables, pos)
print(tuple(out.shape), "window", attention.window,
      tuple(attention.q_proj.weight.shape))


# %% [markdown]
# ### The block

# %% tags=["export"]
class MLP(nn.Module):
    """The router and the experts it chooses from."""

    def __init__(self, config: GptOssConfig, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        self.router = Router(config, dtype=dtype, device=device)
        self.experts = Experts(config, packed, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each token on its own."""
        tokens = x.flatten(0, 1)
        weights, ids = self.router(tokens)
        return self.experts(tokens, ids, weights).view_as(x)


class Block(nn.Module):
    """One layer: attention and experts, each added to the stream."""

    def __init__(self, config: GptOssConfig, layer: int, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps, dtype, device)
        self.self_attn = Attention(config, layer, dtype, device)
        self.post_attention_layernorm = RMSNorm(D, eps, dtype, device)
        self.mlp = MLP(config, dtype, device, packed)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                positions: Tensor, cache: Cache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); the rest as in `Attention.forward`."""
        h = x + self.self_attn(self.input_layernorm(x), cos, sin, positions,
                               cache)
        return h + self.mlp(self.post_attention_layernorm(h))


# %% [markdown]
# The last two lines are {eq}`model-block`. If both halves write zeros, a
# block is the identity, which is what makes deep stacks trainable:

# %%
block = Block(TINY, 0, torch.float32, packed=False).requires_grad_(False)
x = torch.randn(1, 10, 64)
print(tuple(block(x, *tables, pos).shape))
for silent in (block.self_attn.o_proj.weight, block.self_attn.o_proj.bias,
               block.mlp.experts.down_proj, block.mlp.experts.down_proj_bias):
    silent.zero_()
print(torch.equal(block(x, *tables, pos), x))


# %% [markdown]
# ### The stack
#
# The inverse frequencies are the same for every layer. They are no buffer of
# the model, because `model.to(torch.bfloat16)` would round them, and a
# rounded frequency turns the 100,000th token by some random angle (chapter
# 4). One computation on the CPU serves every device.

# %% tags=["export"]
@lru_cache(maxsize=64)
def _frequencies(config: GptOssConfig, device: torch.device,
                 dtype: torch.dtype) -> tuple[Tensor, float]:
    """`rope_parameters` for activations of dtype: fp32, or float64."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        inv_freq, concentration = rope_parameters(config, "cpu")
        wide = torch.promote_types(dtype, torch.float32)
        return inv_freq.to(device, wide), concentration


class Stack(nn.Module):
    """Embedding, L blocks, norm and head: arithmetic, and no checks."""

    def __init__(self, config: GptOssConfig, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        like = {"dtype": dtype, "device": device}
        self.embed_tokens = nn.Embedding(V, D, **like)
        self.layers = nn.ModuleList(
            Block(config, n, dtype, device, packed)
            for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps, dtype, device)
        self.lm_head = nn.Linear(D, V, bias=False, **like)

    def run(self, tokens: Tensor, positions: Tensor,
            cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """tokens, positions (B, T), -1 = padding -> logits (B, T, V)."""
        x = self.embed_tokens(tokens)
        cos, sin = rope_tables(
            positions, *_frequencies(self.config, x.device, x.dtype),
            x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, positions, cache)
        return self.lm_head(self.norm(x[:, -logits_to_keep:]))


# %%
stack = Stack(TINY, torch.float32, packed=False).requires_grad_(False)
print(tuple(stack.run(torch.tensor([[5, 6, 7]]), pos[:, :3]).shape),
      tuple(stack.run(torch.tensor([[5, 6, 7]]), pos[:, :3],
                      logits_to_keep=1).shape))


# %% [markdown]
# For training, every matrix is drawn from a normal distribution of standard
# deviation 0.02 (the `initializer_range` in the released config); the experts
# draw theirs in chapter 8. On the meta device this costs nothing.

# %% tags=["export"]
def initialise(model: nn.Module) -> None:
    """Linear and embedding weights normal(0, 0.02), biases 0, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


# %%
torch.manual_seed(0)
initialise(stack)
print(f"{stack.lm_head.weight.std().item():.2f}",
      stack.layers[3].mlp.router.bias.abs().max().item())


# %% [markdown]
# ### Checks and positions
#
# What can be wrong with tokens is found before anything runs: on a GPU an id
# out of range would otherwise end the process with a device assert.

# %% tags=["export"]
class ModelError(ValueError):
    """Tokens or a mask that the model cannot take."""


def check_tokens(tokens: Tensor, attention_mask: Tensor | None,
                 config: GptOssConfig) -> None:
    """Raise ModelError unless tokens (B, T) and the mask can be run."""
    shape, most = tuple(tokens.shape), config.max_position_embeddings
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ModelError("tokens: expected integers of shape (B, T), found "
                         f"{tokens.dtype} of shape {shape}")
    if tokens.numel() == 0:
        raise ModelError("tokens: expected at least one, found an empty "
                         f"prompt of shape {shape}")
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise ModelError(f"attention_mask: expected shape {shape} as tokens "
                         f"has, found {tuple(attention_mask.shape)}")
    if tokens.shape[1] > most:
        raise ModelError(f"tokens: expected at most {most} "
                         f"(max_position_embeddings), found {shape[1]}")
    for token in torch.stack(tokens.aminmax()).tolist():
        if not 0 <= token < config.vocab_size:
            raise ModelError(f"token id: expected 0 to "
                             f"{config.vocab_size - 1}, found {token}")


# %%
for bad in ([[5, 96]], [[]], [5, 6]):
    try:
        check_tokens(torch.tensor(bad, dtype=torch.int64), None, TINY)
    except ModelError as error:
        print(error)


# %% tags=["export"]
def token_positions(tokens: Tensor, attention_mask: Tensor | None = None,
                    cache: Cache | None = None) -> Tensor:
    """Positions (B, T) int64 of tokens after those in the cache."""
    start = None if cache is None else cache.lengths.to(tokens.device)
    if attention_mask is not None:
        return positions_from_mask(attention_mask, start)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    if start is None:
        return steps.expand(tokens.shape)
    return start[:, None] + steps


# %% [markdown]
# A row padded on the left, one in the middle, one not at all:

# %%
mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]])
print(token_positions(torch.zeros(3, 4), mask).tolist())


# %% [markdown]
# ### The front door

# %% tags=["export"]
class GptOss(Stack):
    """gpt-oss: token ids in, logits out.

    With packed=True the experts hold MXFP4 (zeros until loaded); with
    packed=False they are dense and, like the rest, drawn at random with
    biases and sinks 0 and norms 1: ready to train.
    """

    def __init__(self, config: GptOssConfig,
                 dtype: torch.dtype = torch.bfloat16, device=None,
                 packed: bool = True) -> None:
        super().__init__(config, dtype, device, packed)
        initialise(self)

    def forward(self, tokens: Tensor, cache: Cache | None = None,
                attention_mask: Tensor | None = None,
                logits_to_keep: int = 0) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) in the model's dtype.

        cache: the tokens continue what it holds, and enter it.
        attention_mask (B, T): false = padding, anywhere; its logits mean
        nothing. logits_to_keep: only the last so many columns (0: all).
        ModelError: ids out of range, no tokens, wrong rank, too many.
        CacheError: no room; the cache is then unchanged.
        """
        check_tokens(tokens, attention_mask, self.config)
        positions = token_positions(tokens, attention_mask, cache)
        if cache is None:
            return self.run(tokens, positions, None, logits_to_keep)
        cache.check(positions)
        logits = self.run(tokens, positions, cache, logits_to_keep)
        cache.advance(positions)
        return logits

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None,
                  slack: int = 0) -> Cache:
        """A `Cache` of this model's configuration, dtype and device."""
        weight = self.embed_tokens.weight
        return Cache(self.config, batch_size, max_tokens, slack=slack,
                     dtype=weight.dtype, device=weight.device)

    @classmethod
    def from_pretrained(cls, path: str | Path,
                        dtype: torch.dtype = torch.bfloat16, device="cpu",
                        packed: bool = True, revision: str | None = None
                        ) -> "GptOss":
        """The model in a folder or a hub repository, in any layout.

        dtype: of everything but packed experts. packed: keep MXFP4 experts
        packed (a bf16 checkpoint has none and loads dense); False decodes
        them to dtype. Parameters are frozen; call requires_grad_() to train.
        Tensors on the CPU whose dtype agrees stay memory-mapped. Raises
        CheckpointError or ConfigError naming the file and the tensor.
        """
        with Checkpoint.open(resolve(path, revision)) as checkpoint:
            packed = packed and checkpoint.layout != "bf16"
            model = cls(checkpoint.config, dtype, "meta", packed)
            model.requires_grad_(False)
            tensors = dict(load_tensors(checkpoint, dtype, device, packed))
        model.load_state_dict(tensors, assign=True)
        return model.eval()


# %% [markdown]
# A model drawn at random knows nothing: its loss is that of a guess among 96
# tokens. It learns, since everything in it is differentiable, the sinks and
# the router included:

# %%
torch.manual_seed(0)
model = GptOss(TINY, torch.float32, packed=False)
tokens = torch.randint(0, 96, (4, 16))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(40):
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1),
                                       tokens[:, 1:].flatten())
    optimiser.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimiser.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.1f}, after 40 steps below 0.5: {losses[-1] < 0.5}")


# %% [markdown]
# ### Loading
#
# The names in a checkpoint are those of the attributes, but for the prefix
# `model.`; that is the whole of the mapping. Packed experts are handed over
# as they lie in the file. Dense ones are decoded, one tensor at a time; a
# bf16 checkpoint holds them transposed, so a transposed view will do.

# %% tags=["export"]
def load_tensors(checkpoint: Checkpoint, dtype: torch.dtype, device,
                 packed: bool) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors under this model's names, one at a time.

    Where dtype and device agree with the file, a tensor is a view of the
    mapped file and costs no memory; otherwise one at a time is converted.
    """
    for name in checkpoint.names():
        target, tensor = name.removeprefix("model."), checkpoint.read(name)
        if name.endswith("_scales"):
            check_scales(name, tensor)
            if not packed:
                continue
        elif name.endswith("_blocks") and not packed:
            target = target.removesuffix("_blocks")
            scales = checkpoint.read(name.removesuffix("blocks") + "scales")
            tensor = decode(tensor.to(device), scales.to(device), dtype)
        elif target.endswith(("gate_up_proj", "down_proj")):
            tensor = tensor.transpose(1, 2)  # HF: (E, in, out)
        wanted = tensor.dtype if tensor.dtype == torch.uint8 else dtype
        yield target, tensor.to(device, wanted)


def check_scales(name: str, scales: Tensor) -> None:
    """Raise CheckpointError if a scale byte is 255, which means NaN."""
    bad = int((scales == SCALE_NAN).sum())
    if bad:
        raise CheckpointError(f"{name}: expected scale bytes 0 to 254, found "
                              f"{bad} of {SCALE_NAN} (NaN)")
