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
#     module: layers
#     public: [Block]
# ---

# %% [markdown]
# # What is one block?
#
# ## Question
#
# Weights, attention, experts and a cache are there, and names for what they
# compute. What is left to write before they are a block, the thing of which
# the 20b has 24?
#
# Little is left: four matrices around the attention, and two additions. All
# that block 7 of the 20b learns from blocks 0 to 6 about a token is one vector
# of 2,880 numbers, **5,760 bytes**; the block that reads them holds 477
# million bytes of weights. Everything between the parts happens in that
# vector. It is called the *residual stream*.

# %% tags=["export"]
from gptoss.model.ops import packed_experts

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

torch.manual_seed(0)
plt.style.use("../_static/book.mplstyle")

# %% [markdown]
# ## Picture
#
# Left, one token's way through the 20b. The long grey arrow is the residual
# stream; each half of a block reads it through a norm and adds to it. Right,
# what each step must read from memory for that one token, over all 24 layers
# and after 4,096 tokens of context. (The cell also opens the shipped model's
# [tokenizer](../text/tokenizer.ipynb) for the experiment below.)

# %% tags=["hide-input", "picture"]
# Figure: left, the blocks of the model from embedding to lm_head, attention
# and experts each added back to the stream, 24 times; right, the bytes that
# each reads for one token: lm_head, the four experts and q, k, v, o have
# nearly all.
from importlib.resources import files

from gptoss.text.tokenizer import Tokenizer

pocket = files("gptoss") / "pocket"
reader = Tokenizer.from_pretrained(pocket)
sentence = "Once upon a time there was a little"
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
    left.text(0.52, y, text, ha="center", va="center", fontsize=8, bbox={
        "boxstyle": "round,pad=0.35", "fc": "white", "ec": colour})
    right.barh(y, size / MB, color=colour, height=0.55)
    number = f"{size / MB:,.0f}" if size > 9 * MB else f"{size / MB:.2g}"
    right.text(size / MB + 25, y, number, va="center", fontsize=8)
for top, bottom, name in ((1, 4, "attention"), (5, 7, "experts"), (8, 9, "")):
    left.plot([0.52, 0.52], [top, bottom], color="0.55", zorder=0)
    left.text(0.98, (top + bottom) / 2, name, rotation=270, va="center",
              ha="center", fontsize=8, color="0.35")
arrow = {"arrowstyle": "-|>", "color": "0.55", "lw": 1.4}
for y, into in ((0, True), (1, False), (4, True), (5, False), (7, True),
                (8, False)):
    ends = ((0.04, y), (0.19, y)) if into else ((0.19, y), (0.04, y))
    left.annotate("", *ends, arrowprops=arrow)
    if into and y:
        left.text(0.01, y, "+", ha="right", va="center", fontsize=12)
left.annotate("", (0.04, 8.15), (0.04, -0.1), arrowprops=arrow)
left.text(0.93, 0.78, "24 times", ha="right", va="center", fontsize=8,
          color="0.35")
left.add_patch(plt.Rectangle((-0.08, 0.5), 1.14, 7, fill=False, ls=":",
                             ec="0.5"))
left.set(xlim=(-0.1, 1.1), ylim=(9.6, -0.6))
left.axis("off")
right.tick_params(left=False, labelleft=False)
right.set(xlim=(0, 1500), xlabel="MB read for one token")
right.spines.left.set_visible(False)
right.grid(axis="y", visible=False)
plt.show()
read = sum(size for _, size, _ in steps)
for name, size in (("q, k, v, o", sum(linear) * L),
                   ("4 experts a layer", L * K * expert),
                   ("lm_head", 2 * D * V)):
    print(f"{name:18} {size / 1e9:.2f} GB, {size / read:.0%}")

# %% [markdown]
# What to see: three shares are nearly equal, q, k, v and o together, the
# experts, and the head; the rest hardly shows. The experts hold nine tenths of
# the parameters, but 28 of 32 are not touched.
#
# ## The idea, in twenty lines
#
# A block has two halves. Each reads the stream through a norm and adds its
# answer to it. The last two lines of this cell are the whole block; above
# them stand its halves, of the parts that we have. `w` holds the weights of
# one layer, by their names.

# %%
from gptoss.attention.masks import visible
from gptoss.attention.rope import (
    apply_rope,
    inverse_frequencies,
    rope_parameters,
    rope_tables,
)
from gptoss.attention.sinks import attention_concat
from gptoss.model.norm import rms_norm
from gptoss.moe.experts import experts_grouped
from gptoss.moe.routing import route
from gptoss.weights.config import GptOssConfig


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def attend(x, w, tables, where, window, size):
    """Every token looks at the earlier ones: (B, T, D) -> (B, T, D)."""
    q, k, v = (linear(x, w, f"self_attn.{name}_proj").unflatten(
        -1, (-1, size)) for name in "qkv")  # (B, T, heads, size)
    q, k = apply_rope(q, *tables), apply_rope(k, *tables)
    out = attention_concat(q, k, v, w["self_attn.sinks"], visible(
        where, where, window), size ** -0.5)
    return linear(out.flatten(2), w, "self_attn.o_proj")


def think(x, w, k):
    """Every token asks its k experts: (B, T, D) -> (B, T, D)."""
    rows = x.flatten(0, 1)
    weights, ids = route(linear(rows, w, "mlp.router"), k)
    parts = (w[f"mlp.experts.{name}"] for name in (
        "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"))
    return experts_grouped(rows, ids, weights, *parts).view_as(x)


def block(x, w, k, *more):
    h = x + attend(rms_norm(x, w["input_layernorm.weight"]), w, *more)
    return h + think(rms_norm(h, w["post_attention_layernorm.weight"]), w, k)

# %% [markdown]
# Does it work? We read the weights of the model that ships with the package
# ([reading](../weights/reading.ipynb)) and send a few tokens through its four
# blocks, noting how long the stream is for the last token, and how long what
# each half adds. (The length of a vector is the root of the sum of its
# squares.)

# %%
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.loading import load_tensors

with Checkpoint.open(pocket) as checkpoint:
    config = checkpoint.config
    loaded = dict(load_tensors(checkpoint, torch.float32, "cpu", False))


def weights_of(layer):
    start = f"layers.{layer}."
    return {name.removeprefix(start): tensor for name, tensor
            in loaded.items() if name.startswith(start)}


def context(where):
    """(tables, where, window, size) of each layer, for positions (B, T)."""
    tables = rope_tables(where, *rope_parameters(config))
    return [(tables, where, config.sliding_window if kind.startswith("slid")
             else None, config.head_dim) for kind in config.layer_types]

# %%
torch.set_grad_enabled(False)
ids = torch.tensor([reader.encode(sentence)])
x = loaded["embed_tokens.weight"][ids]
k, where = config.num_experts_per_tok, torch.arange(ids.shape[1])[None]
stream = [x]  # before every block, and after the last
for layer, more in enumerate(context(where)):
    w = weights_of(layer)
    half = attend(rms_norm(x, w["input_layernorm.weight"]), w, *more)
    x = block(x, w, k, *more)
    print(f"block {layer}: stream {stream[-1][0, -1].norm():.1f}, attention "
          f"adds {half[0, -1].norm():.1f}, experts add "
          f"{(x - stream[-1] - half)[0, -1].norm():.1f}")
    stream.append(x)
torch.set_grad_enabled(True)
logits = loaded["lm_head.weight"] @ rms_norm(x, loaded["norm.weight"])[0, -1]
print(sentence, "→", reader.decode([int(logits.argmax())]))

# %% [markdown]
# ### Where a Llama goes wrong
#
# Whoever has written a Llama meets a trap in the head size: there it is hidden
# size over heads. Here, that number cannot even be rotated:

# %%
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
# them back.
#
# ## Derivation
#
# ### What follows from two additions?
#
# Let $x_l$ be the residual stream before layer $l$, one vector of $D$
# numbers a token, with $x_0$ the token's row of the embedding. A block has
# two halves, attention $A_l$ and experts $M_l$:
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
# $2^{-8}|x|$ in bf16 that no later layer can repair. The 48 additions of the
# 20b, with errors of one size and random sign, would leave
# $\sqrt{48} \approx 7$ times the error of one, were both halves of every block
# exact (exercise 3). That is the floor of bf16, and [a walk through two
# implementations](beside.ipynb) shows how near to it both are.
#
# ### Which keys does a query head read?
#
# Grouped attention {cite}`gqa2023`: eight neighbouring query heads share a
# key/value head, so in the 20b query heads 0 to 7 read key head 0, 8 to 15
# read key head 1. In general $H$ query heads share $G$ key/value
# heads; query head $h$ of token $t$ reads key head $g(h)$:
#
# $$
# o_{t,h} = \sum_{s \text{ visible from } t} p_{t,h,s}\, v_{s,g(h)},
# \qquad g(h) = \Big\lfloor \frac{h}{H/G} \Big\rfloor ,
# $$ (model-grouped)
#
# with $p$ from [sinks](../attention/sinks.ipynb) and "visible" from
# [the sliding mask](../attention/masks.ipynb).
#
# ## Code
#
# ### Layers
#
# A layer holds parameters and calls an operator. The router is a linear layer
# with bias from D to E logits, and `route`.

# %% tags=["export"]
import torch
from torch import Tensor, nn

from gptoss.weights.config import GptOssConfig


class RMSNorm(nn.Module):
    """`rms_norm` with its weight (D,), at first all ones."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype,
                 device=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gptoss.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Linear(nn.Linear):
    """torch's linear layer, computed by the operator gptoss::linear."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gptoss.linear(x, self.weight, self.bias)


class Router(Linear):
    """A linear layer with bias from D to E logits, and `route`."""

    def __init__(self, config: GptOssConfig,
                 dtype: torch.dtype | None = None, device=None) -> None:
        super().__init__(config.hidden_size, config.num_local_experts,
                         bias=True, device=device, dtype=dtype)
        self.k = config.num_experts_per_tok

    def forward(  # type: ignore[override]  # a choice, not a tensor
            self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D) -> weights (N, K) in x.dtype, ids (N, K) int64."""
        return torch.ops.gptoss.route(super().forward(x), self.k)

# %% [markdown]
# At first the norm's weight is 1, and the length of a vector does not matter:

# %%
norm = RMSNorm(2880, 1e-5, torch.float32)
vector = torch.randn(2880)
print([[f"{y:.3f}" for y in norm(factor * vector)[:3].tolist()]
       for factor in (1, 100)])
layer, row = Linear(16, 3), torch.randn(2, 16)
assert torch.equal(layer(row), F.linear(row, layer.weight, layer.bias))

# %% [markdown]
# ### What do the experts hold?
#
# They hold, packed, what the released files hold, names and shapes
# included: four tensors of bytes and two biases. Dense, two tensors
# [E, out, in] take the place of the four, drawn from N(0, 0.02²); packed ones
# are zero until a file fills them. A packed row consists of blocks of 32, so a
# width that 32 does not divide is refused, with a ValueError that names the
# tensor.

# %% tags=["export"]
from gptoss.moe.experts import experts_grouped
from gptoss.weights.mxfp4 import BLOCK, PackedMXFP4


class Experts(nn.Module):
    """The E experts of one layer, packed (MXFP4) or dense (dtype)."""

    gate_up_proj: nn.Parameter  # (E, 2F, D), dense ones alone
    down_proj: nn.Parameter  # (E, D, F), dense ones alone
    gate_up_proj_bias: nn.Parameter  # (E, 2F)
    down_proj_bias: nn.Parameter  # (E, D)

    def __init__(self, config: GptOssConfig, packed: bool = True,
                 dtype: torch.dtype = torch.bfloat16, device=None) -> None:
        super().__init__()
        E, D = config.num_local_experts, config.hidden_size
        width = config.intermediate_size
        self.packed, self.limit = packed, config.swiglu_limit
        for name, rows, columns in (("gate_up_proj", 2 * width, D),
                                    ("down_proj", D, width)):
            make = self._make_packed if packed else self._make_dense
            make(name, E, rows, columns, dtype, device)
            bias = torch.zeros(E, rows, dtype=dtype, device=device)
            setattr(self, f"{name}_bias", nn.Parameter(bias))

    def _make_dense(self, name, E, rows, columns, dtype, device) -> None:
        weight = torch.empty(E, rows, columns, dtype=dtype, device=device)
        if not weight.is_meta:  # there is nothing to draw there
            nn.init.normal_(weight, std=0.02)
        setattr(self, name, nn.Parameter(weight))

    def _make_packed(self, name, E, rows, columns, dtype, device) -> None:
        if columns % BLOCK:
            raise ValueError(f"{name}: expected an input width divisible by "
                             f"{BLOCK} to pack it, found {columns}")
        shape = (E, rows, columns // BLOCK)
        for part, size in (("blocks", (*shape, BLOCK // 2)),
                           ("scales", shape)):
            self.register_buffer(f"{name}_{part}", torch.zeros(
                size, dtype=torch.uint8, device=device))

    def _packed(self, name: str) -> PackedMXFP4:
        return PackedMXFP4(getattr(self, f"{name}_blocks"),
                           getattr(self, f"{name}_scales"))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, D), ids and weights (N, K) -> (N, D)."""
        if self.packed:
            return packed_experts(
                x, ids, weights, self._packed("gate_up_proj"),
                self.gate_up_proj_bias, self._packed("down_proj"),
                self.down_proj_bias, self.limit)
        return experts_grouped(
            x, ids, weights, self.gate_up_proj, self.gate_up_proj_bias,
            self.down_proj, self.down_proj_bias, self.limit)

    def extra_repr(self) -> str:
        E, D = self.down_proj_bias.shape
        return (f"experts={E}, hidden={D}, "
                f"intermediate={self.gate_up_proj_bias.shape[1] // 2}, "
                f"packed={self.packed}")

# %%
tiny = GptOssConfig(
    num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=32, hidden_size=64, intermediate_size=32, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2)
for name, tensor in Experts(tiny).state_dict().items():
    print(f"{name:22}{str(tensor.dtype):15}{tuple(tensor.shape)}")
rows, router = torch.randn(5, 64), Router(tiny)
weights, ids = router(rows)
assert Experts(tiny, dtype=torch.float32)(rows, ids, weights).shape == (5, 64)

# %% [markdown]
# ### What does attention add to the operator?
#
# Four linear layers with biases, and one sink a head. A layer knows its window
# (0: none) and its number, by which the cache keeps its keys. What it gets is
# the plan of a forward ([the cache](cache.ipynb)): it gives its keys and
# values, and sees what the plan returns.

# %% tags=["export"]
from gptoss.model.cache import CacheView


class Attention(nn.Module):
    """Grouped-query attention with RoPE, sinks and, perhaps, a window."""

    def __init__(self, config: GptOssConfig, layer: int,
                 dtype: torch.dtype, device=None) -> None:
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, C
        kinds = config.layer_types or ()
        sliding = kinds[layer] == "sliding_attention"
        self.window = config.sliding_window if sliding else 0
        like = {"dtype": dtype, "device": device}
        self.q_proj = Linear(D, H * C, **like)
        self.k_proj = Linear(D, G * C, **like)
        self.v_proj = Linear(D, G * C, **like)
        self.o_proj = Linear(H * C, D, **like)
        self.sinks = nn.Parameter(torch.zeros(H, **like))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                positions: Tensor, plan: CacheView | None = None) -> Tensor:
        """x (B, T, D), tables (B, T, C/2), positions (B, T) -> (B, T, D)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = torch.ops.gptoss.rope(self.q_proj(x).view(heads), cos, sin)
        k = torch.ops.gptoss.rope(self.k_proj(x).view(heads), cos, sin)
        v, k_pos = self.v_proj(x).view(heads), positions
        if plan is not None:
            k, v, k_pos = plan.update(self.layer, k, v)
        out = torch.ops.gptoss.sink_attention(
            q, k, v, self.sinks, positions, k_pos, self.window,
            self.head_dim ** -0.5)
        return self.o_proj(out.flatten(2))

    def extra_repr(self) -> str:
        return (f"layer={self.layer}, heads={len(self.sinks)}, "
                f"head_dim={self.head_dim}, window={self.window or None}")

# %% [markdown]
# A small model for the rest of the chapter: hidden 64, but 4 heads of 32 are
# 128.

# %%
from gptoss.attention.rope import rope_parameters, rope_tables

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
# ### How do the halves make a block?

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

    def extra_repr(self) -> str:
        return f"experts_per_token={self.router.k}"


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
                positions: Tensor, plan: CacheView | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); the rest as in `Attention.forward`."""
        h = x + self.self_attn(self.input_layernorm(x), cos, sin, positions,
                               plan)
        return h + self.mlp(self.post_attention_layernorm(h))

# %% [markdown]
# The last two lines are {eq}`model-block`, as in the twenty lines above. The
# two must say the same with the trained weights:

# %%
with torch.no_grad():
    for number, more in enumerate(context(where)):
        ours = Block(config, number, torch.float32, packed=False)
        ours.load_state_dict(weights_of(number))
        gap = (ours(stream[number], *more[0], where)
               - stream[number + 1]).abs().max()
        assert gap < 1e-4
print("four blocks, the same as the twenty lines, within 1e-4 of values up to",
      f"{stream[-1].abs().max():.0f}")

# %% [markdown]
# If both halves write zeros, a block is the identity, which is what makes deep
# stacks trainable:

# %%
tiny_block = Block(TINY, 0, torch.float32, packed=False).requires_grad_(False)
x = torch.randn(1, 10, 64)
print(f"adds up to {(tiny_block(x, *tables, pos) - x).abs().max():.1f}")
for part in (tiny_block.self_attn.o_proj, tiny_block.mlp.experts):
    for name, tensor in part.named_parameters():
        if "gate_up" not in name:
            tensor.zero_()
print(f"adds up to {(tiny_block(x, *tables, pos) - x).abs().max():.1f}")

# %% [markdown] tags=["measured"]
# ### What is there before a file is read?
#
# A model that will be loaded is first built on the meta device, where a
# tensor has a shape and no numbers. `nn.Embedding` draws numbers even there,
# and for that torch imports its compiler, which takes a hundred times as long
# as loading the shipped model (1.2 s against 0.01 s, on a core of a server).
# So a weight on the meta device is passed over, here and in `initialise`
# below.

# %% tags=["export"]
class Embedding(nn.Embedding):
    """torch's embedding; on the meta device there is nothing to draw."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

# %%
print(tuple(Embedding(8, 4, device="meta").weight.shape))

# %% [markdown]
# For training, every matrix is drawn from a normal distribution of standard
# deviation 0.02 (the `initializer_range` in the released config); the experts
# have drawn theirs. On the meta device this costs nothing.

# %% tags=["export"]
def initialise(model: nn.Module) -> None:
    """Linear and embedding weights normal(0, 0.02), biases 0, in place."""
    for module in model.modules():
        if (isinstance(module, nn.Linear | nn.Embedding)
                and not module.weight.is_meta):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

# %% [markdown]
# ### The sentence again
#
# [The page](../one_page.ipynb) has a block of its own. We fill one of ours
# with the weights of that layer, and put it in its place. With a window it is
# one that slides, like layer 0, without one like layer 1.

# %%
from gptoss import one_page


def our_block(x, w, cos, sin, window, settings):
    ours = Block(config, 0 if window else 1, torch.float32, "meta")
    ours.load_state_dict(w, assign=True)
    order = torch.arange(len(x))[None]
    return ours.requires_grad_(False)(x[None], cos[None], sin[None], order)[0]


retold = one_page.sentence(12, block=our_block)
assert retold == one_page.sentence(12)
print(retold.removeprefix(one_page.SENTENCE).strip())

# %% [markdown]
# ## Takeaways
#
# - Everything between the parts is one vector a token, to which $2L$ halves
#   add.
# - A head is 64 numbers wide, not hidden size over heads.
# - A layer holds parameters and calls names; it knows nothing of files,
#   devices or other processes.
#
# ## Exercises
#
# ### Exercise 1
#
# How many bytes of the 20b's block 7 does one token
# read, for every byte that it passes on to block 8?

# %% tags=["hide-cell"]
big = GptOssConfig.gpt_oss_20b()
held = Block(big, 7, torch.bfloat16, "meta").state_dict()
read = sum(t.nbytes * (4 / 32 if ".experts." in n else 1)
           for n, t in held.items())
passed = 2 * big.hidden_size
print(f"{read / 1e6:.1f} MB for {passed} bytes: {read / passed:,.0f}")
print(f"the block holds {sum(t.nbytes for t in held.values()):,} bytes")

# %% [markdown]
# ### Exercise 2
#
# Multiply the stream by 10 before block 1 of the shipped model. What do the
# two halves add then, and what becomes of their share of the stream?

# %% tags=["hide-cell"]
w, more = weights_of(1), context(where)[1]
with torch.no_grad():
    for factor in (1, 10):
        x = factor * stream[1]
        half = attend(rms_norm(x, w["input_layernorm.weight"]), w, *more)
        rest = block(x, w, k, *more) - x - half
        lengths = [f"{y[0, -1].norm():.1f}" for y in (x, half, rest)]
        print(f"times {factor:2}: stream {lengths[0]}, attention adds "
              f"{lengths[1]}, experts {lengths[2]}")
print("attention reads the direction alone; the experts read a stream in "
      "which the attention's answer is a tenth of what it was")

# %% [markdown]
# ### Exercise 3
#
# Add 48 random vectors to a stream, exactly and in bf16, and compare the error
# with that of one addition. Is it $\sqrt{48} \approx 7$?

# %% tags=["hide-cell"]
parts = torch.randn(48, 100_000)
start = 50 * torch.randn(100_000).bfloat16()
rounded, errors = start.clone(), []
for n, part in enumerate(parts.bfloat16()):
    rounded = rounded + part
    exact = start.double() + parts[:n + 1].bfloat16().double().sum(0)
    errors.append((rounded.double() - exact).square().mean().sqrt())
print(f"{(errors[-1] / errors[0]).item():.1f} times")

# %% [markdown]
# ### Exercise 4
#
# Another reading of "eight heads share one" deals them out in turns: query
# head h reads key head h mod G. Run block 0 of the shipped model with it. How
# far is the attention's answer from the right one?

# %% tags=["hide-cell"]
w, more = weights_of(0), context(where)[0]
G, H = config.num_key_value_heads, config.num_attention_heads
dealt = torch.arange(H).view(H // G, G).T.flatten()  # heads that share
size, wrong = config.head_dim, dict(w)
for name, side in (("q_proj.weight", 0), ("q_proj.bias", 0), ("sinks", 0),
                   ("o_proj.weight", 1)):
    tensor = w[f"self_attn.{name}"]
    each = 1 if name == "sinks" else size
    rows = (dealt[:, None] * each + torch.arange(each)).flatten()
    wrong[f"self_attn.{name}"] = tensor.index_select(side, rows)
normed = rms_norm(stream[0], w["input_layernorm.weight"])
right, other = (attend(normed, x, *more) for x in (w, wrong))
print(f"off by {(other - right).norm() / right.norm():.0%} of its length, and "
      "nothing complains")

# %% [markdown]
# ## Sources
#
# - {cite}`gptoss2025`: the model card, architecture and sizes.
# - {cite}`rmsnorm2019` (RMSNorm), {cite}`gqa2023` (grouped queries),
#   {cite}`attention2017` (the block and its residual stream).
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `Transformer`,
#   `AttentionBlock`, `MLPBlock`, `RMSNorm`.
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`:
#   `GptOssModel`, `GptOssDecoderLayer`, `GptOssRMSNorm`.
