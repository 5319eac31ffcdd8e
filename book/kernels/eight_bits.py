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
#     module: eight
#     public: [EightLinear, EightWeight, hold_dense, pack_eight, unpack_eight]
# ---
# %% [markdown]
# # Eight bits, if you ask
#
# ## Question
#
# [Twelve bits](twelve_bits.ipynb) hold what sixteen held; there "nothing is
# lost" ends. In eight bits a dense matrix is read in half the time, and every
# number in it is a little wrong: by half a percent, three times what bf16 does
# to a number. Does the model notice? Of a hundred tokens ninety-eight do not.
# The other two lose one and a half nats each, for a reason that has little to
# do with how large the error is. This chapter measures the loss first and
# builds the format second. It is the one thing in this book that makes the
# model another one, so nobody gets it who does not ask.

# %%
import logging
import os

import matplotlib.pyplot as plt
import torch

from gptoss.kernels.build import load_kernels
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token, expert_size

os.environ["GPTOSS_KERNELS"] = "auto"  # this chapter asks for the kernels
logging.getLogger("gptoss").setLevel(logging.ERROR)  # and says nothing of it
plt.style.use("../_static/book.mplstyle")
load_kernels()

torch.manual_seed(0)
exact = 0.02 * torch.randn(512, 2880, dtype=torch.float64)


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """How far apart, as a share of the length of `right`."""
    right = right.double()
    return ((found.double() - right).norm() / right.norm()).item()


def rounded(x: torch.Tensor, size: int, more: float = 1.0) -> torch.Tensor:
    """Each `size` numbers of a row in 255 equal steps, up to `more` times the
    largest."""
    parts = x.double().unflatten(-1, (-1, size))
    step = more * parts.abs().amax(-1, keepdim=True) / 127
    return ((parts / step).nan_to_num().round() * step).flatten(-2)


print(f"bf16 is off by {off(exact.bfloat16(), exact):.2%}, "
      f"eight bits with a scale for 32 by {off(rounded(exact, 32), exact):.2%}"
      )

# %% [markdown]
# ## Picture
#
# 127 steps must reach the largest number that shares them, and are coarse for
# the others if it is large. The fewer numbers share a step, the finer it is,
# and the more bytes go into steps. Here is the error of a matrix of normal
# numbers, and of a `v_proj` of the shipped model, which has learnt.

# %% tags=["hide-input", "picture"]
# Figure: relative error over bits a number, logarithmic. Dots of normal
# numbers fall from 1.2 percent at 8 bits, one scale for the matrix, to 0.5
# with a scale for 32 numbers, at 8.5 bits. Crosses of a trained matrix lie
# on them. A line at 0.17 percent: bf16.
from pathlib import Path

import gptoss
from gptoss.weights.checkpoint import Checkpoint

POCKET = Path(gptoss.__file__).parent / "pocket"
with Checkpoint.open(POCKET) as file:
    head = file.read("lm_head.weight").clone()
    trained = file.read("model.layers.3.self_attn.v_proj.weight").clone()

fig, ax = plt.subplots(figsize=(6.4, 2.8))
for matrix, style, name in ((exact.bfloat16(), "C0o", "normal numbers"),
                            (trained, "C1x", "a trained v_proj")):
    sizes = (matrix.numel(), matrix.shape[1], 64, 32, 16)
    errors = [100 * off(rounded(matrix.view(-1, size), size).view_as(matrix),
                        matrix) for size in sizes]
    ax.plot([8 + 16 / size for size in sizes], errors, style, label=name)
ax.axhline(100 * off(exact.bfloat16(), exact), color="0.5", ls="--", lw=1)
ax.text(8.95, 0.185, "bf16", color="0.4", fontsize=8)
for bits, y, text in ((8.25, 0.65, "64"), (8.5, 0.6, "32"), (9, 0.53, "16")):
    ax.text(bits, y, text, color="0.4", fontsize=8, ha="center")
ax.set(yscale="log", xlabel="bits a number", ylabel="error, %",
       xlim=(7.9, 9.1), ylim=(0.12, 3))
ax.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()
print("trained, a scale for the matrix, a row, 64, 32, 16 numbers:",
      ", ".join(f"{error:.2f} %" for error in errors))

# %% [markdown]
# What to see: a scale for every 32 numbers costs half a bit and halves the
# error, in a trained matrix as in normal numbers. Three times bf16's own
# rounding is left.
#
# ## The naive version
#
# One step for a matrix needs no table of steps. What if a single weight is
# large? Training does make such weights.

# %%
spoilt = exact.clone()
spoilt[3, 17] = 2.0  # one of 1.5 million, a hundred times the others
rest = spoilt < 1
for name, size in (("the matrix", spoilt.numel()), ("32 numbers", 32)):
    found = rounded(spoilt.view(-1, size), size).view_as(spoilt)
    print(f"a scale for {name}: the others are off by "
          f"{off(found[rest], spoilt[rest]):.1%}")

# %% [markdown]
# With one scale the large number leaves the others a dozen steps. With a scale
# for 32 it harms its 31 neighbours.
#
# ## Derivation
#
# A block's largest number is 0.05. Its step is $0.05 / 127 = 0.00039$. A
# weight of 0.0123 is 31.2 steps, and becomes 31: it is off by a fifth of a
# step. Such remainders are spread evenly between minus a half and a half,
# whose root mean square is $1 / \sqrt{12}$. So for a block with the largest
# number $a$ and the root mean square $\sigma$,
#
# $$ \frac{\text{error}}{\sigma}
#    = \frac{a}{\sigma} \cdot \frac{1}{127 \sqrt{12}} .
# $$ (eight-error)
#
# Of 32 normal numbers the largest is about $2.3 \, \sigma$, and the error half
# a percent. It does not depend on the size of the weights, and not on how
# many there are. And a product? Each of its terms is off by that much, in
# unrelated directions, so the sum is off by the same share as they are. Beside
# it stands what bf16 does to the result when it is stored:

# %%
a = exact.view(-1, 32).abs().amax(-1) / exact.view(-1, 32).square().mean(
    -1).sqrt()
predicted = a.square().mean().sqrt().item() / (127 * 12 ** 0.5)
x = torch.randn(64, 2880, dtype=torch.float64)
matrix = exact.bfloat16()
product = x @ matrix.double().T
print(f"a weight of 0.0123 is {0.0123 / (0.05 / 127):.1f} steps of "
      f"{0.05 / 127:.5f}")
print(f"predicted {predicted:.2%}, a weight is off by "
      f"{off(rounded(matrix, 32), matrix):.2%}")
print(f"a product is off by {off(x @ rounded(matrix, 32).T, product):.2%}, "
      f"stored in bf16 by {off(product.bfloat16(), product):.2%}")
assert abs(off(rounded(matrix, 32), matrix) / predicted - 1) < 0.1

# %% [markdown]
# ### Does the model notice?
#
# We round matrices of the shipped model, compute in float64 so that nothing
# else is rounded, and look at what it expects after each token of three small
# texts. The measure is $\sum_v p_v \log (p_v / q_v)$: how many nats the
# rounded model's probabilities $q$ lose on those of the model as stored. And
# since so much depends on chance here, we round twenty-four times, with steps
# that are up to 6 % longer.

# %%
from gptoss.model.layers import Linear, Router
from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer

tokenizer = Tokenizer.from_pretrained(POCKET)
texts = [torch.tensor([tokenizer.encode(text)]) for text in (
    "Once upon a time there was a small fox named Mira. Mira lived in the "
    "forest. The best thing she had was a red kite. One day the wind took "
    "the kite, and Mira was sad. Then a bear came along the path.",
    "Once upon a time, a little cat called Lily woke up early. It was warm in "
    "the old barn, where Lily lived. Her father gave Lily a blue box. One "
    "morning she went to the lake with the box. There she played all day.",
    "Tom was a young dog. He had a green ball, and he was proud of it. In the "
    "garden he met a bird. The bird wanted to play with the ball. Tom gave "
    "the ball to the bird, and they were friends.")]


@torch.inference_mode()
def reads(kind: type | None = None, more: float = 1.0
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, V) and experts (L, N, K) of a model in float64 whose layers
    of that kind are rounded."""
    model = GptOss.from_pretrained(POCKET, torch.float64, packed=False)
    ids: list[torch.Tensor] = []
    for layer in model.modules():
        if type(layer) is kind:
            layer.weight.copy_(rounded(layer.weight, 32, more))
        if isinstance(layer, Router):
            layer.register_forward_hook(
                lambda module, given, out: ids.append(out[1].sort().values))
    logits = torch.cat([model(text)[0] for text in texts])
    L = model.config.num_hidden_layers
    return logits, torch.stack([torch.cat(ids[i::L]) for i in range(L)])


def nats(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Lost on each token: (N,)."""
    p, q = right.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


stored, stored_ids = reads()
for name, kind in (("q, k, v, o and the head", Linear), ("routers", Router)):
    lost, moved = [], []
    for n in range(24):
        logits, ids = reads(kind, 1 + n / 400)
        lost.append(nats(logits, stored))
        moved.append((ids != stored_ids).any(-1).any(0))
    loss, other = torch.stack(lost), torch.stack(moved)
    print(f"{name}: {other.double().mean():.1%} of the tokens go to other "
          f"experts and lose {loss[other].mean():.1f} nats, all others "
          f"{loss[~other].mean():.4f}")
model = GptOss.from_pretrained(POCKET)
count = {kind: sum(layer.weight.numel() for layer in model.modules()
                   if type(layer) is kind) for kind in (Linear, Router)}
big = GptOssConfig.gpt_oss_20b()
routers = 2 * big.num_hidden_layers * big.num_local_experts * big.hidden_size
print(f"routers are one weight in {count[Linear] // count[Router]}; in the "
      f"20b one byte in {bytes_read_per_token(big) // routers} of a token")

# %% [markdown]
# Everything in the model answers a small error with a small error, but for the
# router. That answers with a choice. Where two experts have nearly the same
# logit, the other one is taken, and what comes out is another vector. So
# nearly all of the loss is in a few tokens, and none of them is wrong as such:
# it stood between two experts, and the roundings of bf16 alone would do.
#
# **So the router is left alone.** There is one weight of it for 128 others,
# and rounding it moves as many tokens as rounding all of these; and what it
# would save of a token's bytes in the 20b is nothing to speak of. And the
# embedding? A token reads one row of it; nothing is gained.

# %% [markdown] tags=["measured"]
# The kernels in bf16, beside float64 and with no weight rounded, move 4 of
# these 176 tokens on a Zen 4, and lose 0.009 nats in the mean. What eight bits
# do to the 20b can not be measured here; its weights are not at hand.

# %% [markdown]
# ## Code
#
# ### How is a matrix rounded?
#
# The scale is a bf16 number, so 32 weights take 34 bytes, as many as in
# llama.cpp's Q8_0. It is rounded *up* to the next bf16: then the largest
# weight is at most 127 steps, and no weight is off by more than half a step.
#
# Within 64 weights (two blocks) the bytes stand as the kernel wants them: the
# first half of one block, the first half of the other, then the second halves.

# %% tags=["export"]
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor


class EightWeight(NamedTuple):
    """A matrix (m, n) in whole steps, a step for each 32 of a row."""

    values: Tensor  # (m, n) int8, -127 ... 127; in the order of `_placed`
    scales: Tensor  # (m, n / 32) int16: the bits of bf16 numbers

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def _placed(values: Tensor) -> Tensor:
    """(m, n), each 64 in the other order; twice is as before."""
    return values.unflatten(1, (-1, 2, 2, 16)).transpose(2, 3).flatten(1)


def pack_by_steps(weight: Tensor) -> EightWeight:
    """`pack_eight` in plain torch, a page to read."""
    blocks = weight.float().unflatten(1, (-1, 32))
    finest = blocks.abs().amax(-1) / 127
    bits = finest.view(torch.int32) + 0xFFFF >> 16  # up to the next bf16
    step = (bits << 16).view(torch.float32)
    values = blocks / step.where(step > 0, 1.0)[..., None]
    return EightWeight(_placed(values.round().to(torch.int8).flatten(1)),
                       bits.to(torch.int16))


def unpack_eight(weight: EightWeight, dtype: torch.dtype = torch.float32
                 ) -> Tensor:
    """The matrix (m, n) that the products use; fp32 holds it exactly."""
    blocks = _placed(weight.values).unflatten(1, (-1, 32)).float()
    step = weight.scales.view(torch.bfloat16).float()
    return (blocks * step[..., None]).flatten(1).to(dtype)

# %%
eight = pack_by_steps(matrix)
back = unpack_eight(eight)
step = eight.scales.view(torch.bfloat16).float().repeat_interleave(32, 1)
worst = ((back - matrix.float()).abs() / step).max().item()
print(f"{8 * eight.nbytes / matrix.numel()} bits a number; off by "
      f"{off(back, matrix):.2%}, at worst by {worst:.2f} steps")
print("first block:", eight.values[0, :5].tolist(), "... in steps of "
      f"{step[0, 0].item():.5f}")
assert worst <= 0.5

# %% [markdown]
# ### Who gets it, and what is saved?
#
# `EightLinear` computes with the eight bits, whatever the number of tokens. It
# still *has* the matrix that was loaded, as its `weight`. A checkpoint that is
# saved gets these numbers and not the rounded ones; `requires_grad_()` makes
# it the matrix that is read; and `hold_dense(model, 16)` takes everything
# back. Of a model that was loaded from a file this costs no memory: the matrix
# lies mapped in the file, nobody reads it, and the system takes its pages back
# when it needs some.

# %% tags=["export"]
from torch import nn

from gptoss.kernels.compact import CompactLinear, make_compact
from gptoss.model.layers import Linear
from gptoss.model.ops import Operator, define_operator, has_kernel
from gptoss.model.transformer import GptOss


def linear_from_eight(x: Tensor, values: Tensor, scales: Tensor,
                      bias: Tensor | None) -> Tensor:
    """The product in plain torch: unpacked, to the type of x."""
    return F.linear(x, unpack_eight(EightWeight(values, scales), x.dtype),
                    bias)


define_operator("eight_linear", Operator(
    "(Tensor x, Tensor values, Tensor scales, Tensor? bias) -> Tensor",
    linear_from_eight, lambda x, values, scales, bias:
        x.new_empty((*x.shape[:-1], values.shape[0]))))
define_operator("pack_eight", Operator(
    "(Tensor weight) -> (Tensor, Tensor)", pack_by_steps))


class EightLinear(Linear):
    """A frozen `Linear` that computes with its weight in eight bits.

    The weight itself is kept for whoever saves or trains the model: one that
    learns is read itself.
    """

    values: Tensor  # the two parts of an EightWeight
    scales: Tensor

    def __init__(self, linear: Linear, rounded: EightWeight) -> None:
        super().__init__(linear.in_features, linear.out_features,
                         linear.bias is not None, device="meta",
                         dtype=linear.weight.dtype)
        self.weight, self.bias = linear.weight, linear.bias
        for name, tensor in rounded._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(x)
        return torch.ops.gptoss.eight_linear(x, self.values, self.scales,
                                             self.bias)

    @property
    def saved(self) -> int:
        """How many bytes fewer a token reads."""
        return self.weight.nbytes - EightWeight(self.values,
                                                self.scales).nbytes

# %% [markdown]
# ### What is refused?
#
# `pack_eight` takes bf16 matrices whose number of columns is a multiple of 64,
# and only finite ones: a step of infinity has nothing to count. It raises a
# ValueError for others, and `eight_layers` leaves them as they are, together
# with the router and with what learns or lies on another device.

# %% tags=["export"]
def eight_fits(weight: Tensor) -> bool:
    """Is it a bf16 matrix with whole groups of 64 in a row?"""
    return (weight.dtype == torch.bfloat16 and weight.ndim == 2
            and weight.shape[1] % 64 == 0 and weight.numel() > 0)


def _finite(weight: Tensor) -> bool:
    """Without a copy of the matrix."""
    return bool(torch.stack(weight.aminmax()).isfinite().all())


def _can_be(layer: nn.Module) -> TypeGuard[Linear]:
    return (type(layer) is Linear and eight_fits(layer.weight)
            and layer.weight.device.type == "cpu"
            and layer.weight.is_contiguous()
            and not layer.weight.requires_grad and _finite(layer.weight))


def pack_eight(weight: Tensor) -> EightWeight:
    """A bf16 matrix (m, n), 64 dividing n, in eight bits and a half.

    A weight is off by half a step at most, a step being the largest of 32
    over 127, rounded up to bf16. ValueError for another type or shape, NaN
    or infinity.
    """
    if not eight_fits(weight):
        raise ValueError("weight: expected bfloat16 (m, n), 64 dividing n, "
                         f"found {weight.dtype} of {tuple(weight.shape)}")
    if not _finite(weight):
        raise ValueError("weight: expected finite numbers, found NaN or "
                         "infinity")
    return EightWeight(*torch.ops.gptoss.pack_eight(weight.contiguous()))


def eight_layers(model: GptOss) -> None:
    """Replace every frozen bf16 `Linear` on the CPU, in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if _can_be(layer):
                setattr(parent, name,
                        EightLinear(layer, pack_eight(layer.weight)))

# %% [markdown]
# ### One table
#
# Sixteen, twelve, eight: one function, whatever the model holds now.

# %% tags=["export"]
import logging

from gptoss.model.answers import find_answer

_log = logging.getLogger("gptoss")


def as_stored(model: GptOss) -> GptOss:
    """The model, its dense matrices in bf16 again, in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, CompactLinear | EightLinear):
                plain = Linear(layer.in_features, layer.out_features,
                               layer.bias is not None, device="meta",
                               dtype=layer.weight.dtype)
                plain.weight, plain.bias = layer.weight, layer.bias
                setattr(parent, name, plain.train(layer.training))
    return model


def make_eight(model: GptOss) -> GptOss:
    """The model, its dense matrices in eight bits, in place; other numbers.

    Without kernels it stays as it is, and one line on the logger "gptoss"
    says so.
    """
    path = find_answer("kernels")()
    if has_kernel("eight_linear"):
        eight_layers(model)
    else:
        _log.warning("gptoss: matrices stay in sixteen bits: no kernel for "
                     "eight here (%s)", path)
    return model


FORMS = {16: as_stored, 12: make_compact, 8: make_eight}


def hold_dense(model: GptOss, bits: int) -> GptOss:
    """The model, its dense matrices in 16, 12 or 8 bits, in place.

    16: as stored; 12: a copy, nothing lost (`make_compact`); 8: rounded, each
    off by half a percent (`EightLinear`). Another form is taken back first.
    Routers and the embedding stay. ValueError for another number.
    """
    if bits not in FORMS:
        raise ValueError(f"bits: expected {', '.join(map(str, FORMS))}, "
                         f"found {bits}")
    return FORMS[bits](as_stored(model))

# %%
from gptoss.kernels.compact import saved_bytes

for bits in FORMS:
    hold_dense(model, bits)
    kinds = [type(layer).__name__ for layer in model.modules()
             if isinstance(layer, Linear)]
    count = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    print(f"{bits:2}: {count}, {saved_bytes(model):,} bytes fewer a token")

# %% [markdown]
# ## It holds
#
# **The rounding** in C++ makes the very same two tensors as the page of torch,
# and no weight is off by more than half a step:

# %%
tiny = (1e-39 * torch.randn(8, 64)).bfloat16()
mixed = (torch.randn(40, 128) * 10.0 ** torch.randint(-30, 30, (40, 128))
         ).bfloat16()
for name, weight in (("normal", matrix), ("the shipped head", head),
                     ("zero", 0 * tiny), ("tiny", tiny), ("mixed", mixed)):
    by_kernel = pack_eight(weight)
    assert all(map(torch.equal, by_kernel, pack_by_steps(weight)))
    step = by_kernel.scales.view(torch.bfloat16).float()
    wrong = (unpack_eight(by_kernel) - weight.float()).abs()
    assert (wrong <= 0.5 * step.repeat_interleave(32, 1)).all()
    print(f"{name:16} at most {wrong.max().item():.1g} off")

# %% [markdown]
# **The model**, by the kernels: a text token by token, in bf16 and in eight
# bits. Nine of ten tokens lose less than a hundredth of a nat.

# %%
def one_by_one(bits: int) -> torch.Tensor:
    """The logits (T, V), each from a forward of one token."""
    cache = hold_dense(model, bits).new_cache()
    with torch.inference_mode():
        return torch.cat([model(token.view(1, 1), cache=cache)[0]
                          for token in texts[1][0]]).double()


lost = nats(one_by_one(8), one_by_one(16))
assert lost.quantile(0.9) < 0.01
print(f"nine in ten of {len(lost)} tokens lose less than 0.01 nats")

# %% [markdown]
# **The file.** What is saved is what was loaded:

# %%
hold_dense(model, 8)
with Checkpoint.open(POCKET) as file:
    same = sum(torch.equal(tensor, file.read(name)) for name, tensor
               in model.state_dict().items())
print(f"{same} of {len(model.state_dict())} tensors as in the checkpoint")
assert same == len(model.state_dict())

# %% [markdown]
# ## In the 20b and the 120b

# %%
for name, config in (("20b", GptOssConfig.gpt_oss_20b()),
                     ("120b", GptOssConfig.gpt_oss_120b())):
    token = bytes_read_per_token(config)
    picks = config.num_hidden_layers * config.num_experts_per_tok
    bf16 = token - picks * 17 / 32 * expert_size(config)
    print(f"{name:4} {token / 1e9:.2f} GB a token; in twelve bits "
          f"{(token - 0.25 * bf16) / 1e9:.2f}, in eight "
          f"{(token - 15 / 32 * bf16) / 1e9:.2f}: "
          f"{15 / 32 * bf16 / token:.0%} fewer")

# %% [markdown]
# ## Takeaways
#
# - Eight bits and a scale for 32 weights are half of bf16's bytes, and an
#   error of half a percent in every weight and every product: three times
#   what bf16's own rounding is.
# - The block is what makes it so: a scale for a matrix or a row follows the
#   largest number in it, and all others pay.
# - A small error costs a token next to nothing, unless it stands between two
#   experts. So the router is not rounded.
# - Twelve bits lose nothing. Eight do, so one asks: `--dense 8`.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# The step of a block is its largest number over 127. A finer step cuts the
# largest number off and serves the other 31 better. Try steps that are a
# little finer and take the best for each block. What is gained?

# %% tags=["hide-cell"]
blocks = matrix.double().view(-1, 32)
top = blocks.abs().amax(-1, keepdim=True) / 127
tried = []
for share in (0.985, 0.99, 0.995, 1.0):
    found = (blocks / (share * top)).round().clamp(-127, 127) * share * top
    tried.append((found - blocks).square().sum(-1))
best = torch.stack(tried).amin(0).sum().sqrt() / blocks.norm()
plain_error = tried[-1].sum().sqrt() / blocks.norm()
print(f"off by {plain_error:.3%}, with the best of four steps {best:.3%}")
assert best < plain_error

# %% [markdown]
# ### Exercise 2
#
# The MX formats {cite}`ocpmx2023` have eight bits, too, with a power of two as
# the scale of 32 numbers: one byte fewer a block, and steps times whole
# numbers are then exact in bf16, so that few and many tokens would read the
# same matrix. What does it cost?

# %% tags=["hide-cell"]
power = top.log2().ceil().exp2()
mx = (blocks / power).round() * power
assert torch.equal(mx.bfloat16().double(), mx)
print(f"off by {off(mx, blocks):.2%} instead of "
      f"{off(unpack_eight(eight), matrix):.2%}, in {8 + 8 / 32} bits instead "
      f"of {8 + 16 / 32}")
assert off(mx, blocks) > 1.2 * off(unpack_eight(eight), matrix)

# %% [markdown]
# ### Exercise 3
#
# A scale for 64 weights instead of 32: how many bytes of a token of the 20b
# does it save, and by how much is a weight further off?

# %% tags=["hide-cell"]
config = GptOssConfig.gpt_oss_20b()
token = bytes_read_per_token(config)
picks = config.num_hidden_layers * config.num_experts_per_tok
numbers = (token - picks * 17 / 32 * expert_size(config)) / 2
print(f"{numbers * (1 / 16 - 1 / 32) / 1e6:.0f} MB of "
      f"{(token - 15 / 16 * numbers) / 1e9:.2f} GB; off by "
      f"{off(rounded(matrix, 64), matrix):.2%} instead of "
      f"{off(rounded(matrix, 32), matrix):.2%}")

# %% [markdown]
# ## Sources
#
# - Eight bits with a scale for 32, fp16 there, as Q8_0: ggml-org/llama.cpp,
#   `ggml/src/ggml-quants.c`.
# - Eight bits with a power of two for 32: {cite}`ocpmx2023`.
