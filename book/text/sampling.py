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
#     module: sampling
#     public: [GenerateError, Sampler, SamplingOptions]
# ---

# %% [markdown]
# # How does one of 201,088 logits become the next token?
#
# ## Question
#
# [The model](../model/transformer.ipynb) returns 201,088 numbers, a *logit*
# for every token: the larger, the likelier. How does one of them become the
# next word? Rounded to bf16, so many random logits take only about 3,000
# different values. So "the 50 largest" are mostly not 50, and the rule that
# most code uses keeps more.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: five bar charts of the eight likeliest next tokens and of all others.
# At temperature 1.3 the bars are flatter and the others gain. Top-k 4 leaves
# four bars, top-p 0.8 all eight and a quarter of the others, min-p 0.1 seven.
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.text.tokenizer import Tokenizer
from gptoss.model.transformer import GptOss

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
tokenizer = Tokenizer.from_pretrained(POCKET)
opening = "Once upon a time there was a little fox named Mira."
lost = (" For her birthday she got a white lamp. One morning she went to the "
        "park with the lamp. But on the way from the cave she lost the lamp. ")
with torch.no_grad():
    logits = model(torch.tensor([tokenizer.encode(opening + lost)]))[0, -1]

order = logits.sort(descending=True, stable=True).indices
hot = (logits / 1.3).softmax(-1)[order]
KEPT = {"temperature 1.3": torch.ones_like(hot),
        "and top-k 4": torch.arange(len(hot)) < 4,
        "or top-p 0.8": hot.cumsum(0) - hot < 0.8,
        "or min-p 0.1": hot >= 0.1 * hot[0]}
panels = {"as it is": logits.softmax(-1)[order]} | {
    title: kept * hot / (kept * hot).sum() for title, kept in KEPT.items()}
words = [repr(tokenizer.decode([n]))[1:-1] for n in order[:8].tolist()]
fig, axes = plt.subplots(1, 5, figsize=(7.4, 2.6), sharey=True)
for ax, (title, probs) in zip(axes, panels.items(), strict=True):
    bars = [*probs[:8].tolist(), probs[8:].sum().item()]
    ax.barh(range(9), bars, color=["C0"] * 8 + ["C1"])
    if title in KEPT:
        ax.plot([*hot[:8].tolist(), hot[8:].sum().item()], range(9), "|",
                color="k", ms=9, mew=1)
    ax.set_title(title, fontsize=8)
    ax.set_yticks(range(9), [*words, "all others"], fontsize=7.5)
    ax.set(ylim=(8.6, -0.6), xlim=(0, 0.4), xticks=[0, 0.2, 0.4])
    ax.grid(axis="y", visible=False)
    ax.tick_params(length=0)
axes[2].set_xlabel("probability")
plt.show()
for title, probs in panels.items():
    print(f"{title:16} {int((probs > 0).sum()):5,} tokens can be drawn, "
          f"{probs[8:].sum():3.0%} of probability is the others'")

# %% [markdown]
# **What to see.** How the shipped model may begin the sentence after "…she
# lost the lamp.": its eight likeliest tokens, and all others together
# (orange). A higher *temperature* makes the bars more equal, and the many
# unlikely tokens gain most. The other three cut that tail, and what is left
# grows to a sum of 1 again (the black marks are the bars before the cut).
# *Top-k* keeps a number of tokens, here four, and cuts good ones too. *Top-p*
# keeps the likeliest that together reach a share of the probability, here
# 80 %, and so a part of the tail. *Min-p* keeps what has a share of the
# likeliest token's probability, here 10 %. Our sampler has the first three, as
# OpenAI's and transformers' have; the fourth is Exercise 2.

# %% [markdown]
# ## By hand
#
# Four tokens with the logits 2, 1, 0 and −1. We do with them all that a
# sampler does, a line a step:

# %%
z = torch.tensor([2.0, 1.0, 0.0, -1.0])


def line(title: str, values: torch.Tensor) -> None:
    """A row of numbers under a title."""
    print(f"{title:32}", *(f"{value:5.2f}" for value in values))


line("logits minus the largest", z - z.max())
line("e to the power of that", (z - z.max()).exp())
p = (z - z.max()).exp() / (z - z.max()).exp().sum()
line("divided by their sum", p)
line("the same at temperature 2", ((z - z.max()) / 2).softmax(-1))
line("top-k 2", torch.tensor([p[0], p[1], 0, 0]) / p[:2].sum())
line("running sums, for top-p", p.cumsum(-1))
for u in (0.5, 0.7, 0.9):
    print(f"{u} is reached by token", int(torch.searchsorted(p.cumsum(-1), u)))

# %% [markdown]
# Top-p 0.8 needs two tokens: the first alone reaches 0.64, the first two 0.88.
# To draw one of the four, take a random number between 0 and 1 and look which
# running sum is the first to reach it: 0.5 gives token 0 (we count from zero),
# 0.7 token 1, 0.9 token 2. A token is hit as often as its probability says.

# %% [markdown]
# ## The naive version
#
# That is a sampler in eight lines:

# %%
def naive(logits: torch.Tensor, temperature: float, top_k: int,
          top_p: float, u: float) -> int:
    """The token that the random number `u` hits."""
    scores, ids = logits.topk(top_k)
    probs = (scores / temperature).softmax(-1)
    probs[1:][probs.cumsum(-1)[:-1] >= top_p] = 0
    running = probs.cumsum(-1)
    return ids[torch.searchsorted(running, u * running[-1])].item()


print(repr(tokenizer.decode([naive(logits, 1.3, 50, 0.8, u=0.5)])))
try:
    naive(logits, 0, 50, 0.8, u=0.5)
except IndexError:
    print("temperature 0:", (logits / 0).softmax(-1)[:3].tolist(), "...")
print("temperature 1e-40:", (logits / 1e-40).softmax(-1)[:3].tolist(), "...")

# %% [markdown]
# It is nearly right. It breaks at temperature 0, which everybody means as "the
# likeliest", and at very small ones, where the quotient overflows. A model
# that overflowed gives NaN, and it would draw a token from that. And which of
# several equal logits `topk` takes is not said anywhere: on another device it
# may be another. The rest of the chapter settles these, one by one.

# %% [markdown]
# ## What does the temperature do?
#
# With logits $z_1 \dots z_V$ and a temperature $\tau > 0$,
#
# $$ p_i = \frac{e^{(z_i - \max z)/\tau}}
#               {\sum_j e^{(z_j - \max z)/\tau}} . $$ (generate-temperature)
#
# As $\tau \to 0$ every exponent but the maximum's goes to $-\infty$: all
# probability on the largest logit. That is *greedy* decoding, and so 0 means
# that. Subtracting the maximum *before* dividing keeps this true in floating
# point down to the smallest $\tau$ there is: the largest becomes $0/\tau = 0$
# and the others $-\infty$ at worst. Dividing first gives $\infty$ for several,
# and $\infty - \infty$ is no number. We compute in float64, whatever the
# model's numbers are.

# %% [markdown]
# ## Which are the k largest?
#
# **Top-k.** Sort so that $z_{(1)} \ge z_{(2)} \ge \dots$, equal logits by id,
# the lower first; keep $(1) \dots (k)$ and renormalise. The order among equals
# is what makes the set well defined: in bf16 ties are the rule.
#
# A stable sort of all logits does it, and takes long. `torch.topk` is quick
# and promises nothing about equals, so it serves only to find the k-th largest
# *value*, the edge. What lies above the edge is in; of those at the edge we
# take the lowest ids until there are k.

# %% [markdown]
# ## Code
#
# ### Names for what is wrong
#
# The module's own error, and a short way to raise it: what, what was expected,
# what was found.

# %% tags=["export"]
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptoss.weights.errors import Error, is_count, is_number, refuse


class GenerateError(Error):
    """An option, a prompt or logits that generation cannot use."""


reject = partial(refuse, GenerateError)

# %% [markdown]
# ### The k best

# %% tags=["export"]
def best(logits: Tensor, k: int) -> Tensor:
    """Ids (B, k) of the k largest of (B, V), largest first.

    Of equals the lower id comes first; torch.topk breaks ties at will, so
    only its k-th value is used. A full stable sort gives the same and
    takes several times as long for V = 201088.
    """
    if k < logits.shape[-1]:
        edge = logits.topk(k).values[..., -1:]
        above, at = logits > edge, logits == edge
        room = k - above.sum(-1, keepdim=True)
        kept = above | (at & (at.cumsum(-1) <= room))
        ids = kept.nonzero()[:, 1].view(-1, k)  # ascending in each row
    else:
        ids = torch.arange(k, device=logits.device).expand_as(logits)
    order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order.indices)

# %%
print(best(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]]), 3).tolist())

# %% [markdown]
# `best(logits, k)` takes rows (B, V) and gives ids (B, k), the largest first.
# Here: the two threes, the first of them first, and of three twos the one with
# the lowest id.

# %% [markdown]
# ## How many tokens reach a share?
#
# **Top-p** {cite}`nucleus2019`. Keep $(1) \dots (m)$ with the smallest $m$ for
# which
#
# $$ \sum_{j=1}^{m} p_{(j)} \ge \texttt{top\_p} , $$ (generate-nucleus)
#
# that is: a token goes if the tokens *before* it already reach top_p. At least
# one stays for every top_p above 0. Top-p comes after top-k: it acts on the
# probabilities that top-k left, renormalised.

# %% [markdown]
# ### Temperature, top-k, top-p

# %% tags=["export"]
def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`probs` (B, n), largest first, cut to the fewest that reach top_p."""
    mass = probs.cumsum(-1)
    probs = probs.clone()  # a token goes if those before it suffice
    probs[..., 1:].masked_fill_(mass[..., :-1] >= top_p, 0.0)
    return probs / probs.sum(-1, keepdim=True)

# %%
print(nucleus(torch.tensor([[0.5, 0.3, 0.1, 0.1]]), 0.8))

# %% [markdown]
# The first two reach 0.8, and are divided by their sum. The argument is left
# as it was.
#
# `ranked(logits, temperature, top_k, top_p)` puts the three steps together,
# for rows of logits (B, V). It returns probabilities in float64, the likeliest
# first, and the ids that they belong to. What top-p drops has probability 0.
# With top-k that is k columns. With top-p alone, the 1,024 likeliest mostly
# suffice, with the shares that they have of all V; only if these do not reach
# top_p in some row are all tokens sorted.
# With neither (top_k 0 or at least V, top_p 1) nothing needs an order, and the
# ids are None: column i is token i.

# %% tags=["export"]
NUCLEUS = 1024  # top-p looks at so many tokens before it sorts all of them


def ranked(logits: Tensor, temperature: float, top_k: int,
           top_p: float) -> tuple[Tensor, Tensor | None]:
    """What `Sampler` draws from: probabilities (B, n) and ids (B, n).

    Probabilities in float64, likeliest first; ids None: n = V, in order of
    id. `temperature` > 0. What top-k drops is absent, what top-p drops has
    probability 0.
    """
    V = logits.shape[-1]
    scores = logits.double()
    # the maximum first: then a tiny temperature gives -inf, never inf - inf
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if top_k and top_k < V:
        ids = best(logits, top_k)
        probs = scores.gather(-1, ids).softmax(-1)
    elif top_p < 1:
        probs = scores.softmax(-1)
        ids = best(logits, min(NUCLEUS, V))
        if bool((probs.gather(-1, ids).cumsum(-1)[..., -1] < top_p).any()):
            ids = best(logits, V)
        probs = probs.gather(-1, ids)
    else:
        return scores.softmax(-1), None
    return (nucleus(probs, top_p) if top_p < 1 else probs), ids

# %%
probs, ids = ranked(logits[None], 1.3, 0, 0.8)
print("kept by top-p 0.8 at temperature 1.3:", int((probs > 0).sum()))
print("first eight, as in the picture:", ids[0, :8].tolist(),
      order[:8].tolist())
assert ids[0, :8].tolist() == order[:8].tolist()

# %% [markdown]
# ## How is one token drawn?
#
# With the running sums $c_j = p_1 + \dots + p_j$ and one uniform random number
# $u \in (0, 1]$, the token is the first whose sum reaches it:
#
# $$ i = \min \{ j : c_j \ge u \}, \qquad
#    \Pr(i = j) = c_j - c_{j-1} = p_j . $$ (generate-cdf)
#
# Why $u > 0$? A token of probability 0 has the sum of the token before it. The
# only sum that it could be the first to reach is 0, if it stands first. So 0
# must not be drawn. `torch.rand` gives $[0, 1)$, and we take one minus that.
# Rounding may leave the last sum at a little less than 1, so $u$ is multiplied
# by it. One number a token, from a generator on the CPU, makes a seed mean the
# same on every device.

# %% [markdown]
# ### Drawing with one uniform number

# %% tags=["export"]
def draw(probs: Tensor, ids: Tensor | None = None,
         generator: torch.Generator | None = None) -> Tensor:
    """One token a row (B,) from `probs` (B, n), by inverting the CDF.

    `ids` (B, n) names the columns (None: the column is the id). A token
    of probability 0 is never drawn.
    """
    # 1 - u lies in (0, 1]: the first column whose running sum reaches it has
    # a probability above 0
    uniform = 1.0 - torch.rand((probs.shape[0], 1), dtype=torch.float64,
                               generator=generator)
    running = probs.cumsum(-1)
    target = uniform.to(probs.device) * running[..., -1:]
    column = torch.searchsorted(running, target)
    if ids is not None:
        column = ids.gather(-1, column)
    return column[..., 0]

# %%
quarter = torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64)
drawn = draw(quarter.expand(4000, -1),
             generator=torch.Generator().manual_seed(0))
print("4,000 draws:", drawn.bincount(minlength=3).tolist())

# %% [markdown]
# ### The sampler
#
# A sampler is three numbers, and checks them when it is made. Called with
# logits (B, V) and a generator it gives ids (B,). At temperature 0 it takes
# the first of the largest and no random number. `probabilities(logits)` tells
# what it draws from, (B, V) in order of id; at temperature 0 that is a single
# 1. The defaults are 1, 0 and 1: draw from all, as they are.
#
# Logits that are not finite must not give a token. The activations of gpt-oss
# can exceed 65,504, the largest number of float16, and what comes out then is
# NaN (unsloth#3152). So the largest logit of each row is looked at first, and
# to `max` a NaN is larger than all. If it is NaN or infinite, the error says
# so and names the dtype, and for float16 also the way out: bfloat16 or
# float32. A single $-\infty$ is no fault: it forbids a token; a row of nothing
# else is refused.

# %% tags=["export"]
def _likeliest(logits: Tensor) -> Tensor:
    """Ids (B,) of the largest of each row (B, V), the first if several are.

    Raises unless it is finite: NaN anywhere, +inf, or nothing but -inf would
    otherwise give a token all the same.
    """
    peak, ids = logits.max(-1)  # in bf16 argmax takes longer
    if not bool(torch.isfinite(peak).all()):
        raise GenerateError(
            f"logits: expected finite numbers, found {peak.tolist()} as the "
            f"largest of a row; the model runs in {logits.dtype}"
            + (" (float16 ends at 65504: use bfloat16 or float32)"
               if logits.dtype == torch.float16 else ""))
    return ids

# %% tags=["export"]
@dataclass(frozen=True)
class Sampler:
    """Draws the next token: temperature, then top-k, then top-p.

    `temperature` 0 is greedy; `top_k` keeps exactly that many tokens
    (0: all; of equal logits the lower id wins); `top_p` the smallest set
    of likeliest tokens whose probability reaches it (1: all).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.temperature)
                and math.isfinite(self.temperature)
                and self.temperature >= 0):
            reject("temperature", "a finite number >= 0", self.temperature)
        if not (is_count(self.top_k) and self.top_k >= 0):
            reject("top_k", "an integer >= 0", self.top_k)
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            reject("top_p", "a number > 0 and <= 1", self.top_p)

    def __call__(self, logits: Tensor,
                 generator: torch.Generator | None = None) -> Tensor:
        """Next tokens (B,) int64 from `logits` (B, V).

        Takes one uniform number a row from `generator` (a CPU one,
        whatever the device) unless greedy, so that a seed gives the same
        text on every device that gives the same logits.
        """
        likeliest = _likeliest(logits)
        if self.temperature == 0:
            return likeliest
        return draw(*ranked(logits, self.temperature, self.top_k,
                            self.top_p), generator)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from: (B, V) float64, in order of id."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(
                logits.argmax(-1), logits.shape[-1]).double()
        probs, ids = ranked(logits, self.temperature, self.top_k, self.top_p)
        if ids is None:
            return probs
        full = torch.zeros_like(logits, dtype=probs.dtype)
        return full.scatter_(-1, ids, probs)

# %%
print("greedy:", Sampler(temperature=0)(logits[None]).tolist(),
      "the likeliest:", order[:1].tolist())
seeded = torch.Generator().manual_seed(1)
print([tokenizer.decode(Sampler(1.3, top_p=0.8)(logits[None], seeded))
       for _ in range(6)])

# %% [markdown]
# ### One object for all options
#
# Whoever has a text written chooses the same things: how a token is drawn,
# how long the text may be, what ends it. `generate`, a whole batch, a chat
# and the command line therefore share one object, and an option is named and
# checked here alone. A caller may hand over the object, or single options
# that change it (`with_changes`), or both. Instead of temperature, top-k and
# top-p it may hold a sampler of one's own, any function of logits and a
# generator; `draws` is that or a `Sampler`. The options are named, never given
# by place, and cannot be changed afterwards; `stop` becomes a frozenset.
#
# How many tokens may be made where a text has, say, 3 positions left? Four:
# the last needs no position, since nothing is fed after it. `room(3)` is 4, or
# `max_new_tokens` if that is less; None means as many as there is room for.

# %% tags=["export"]
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a text is drawn, how long it may be and what ends it.

    temperature, top_k, top_p: as in `Sampler`. seed: from 0 to 2**63 - 1;
    None: drawn from torch's own numbers. max_new_tokens: None for as many
    as there are positions. stop: ids that end a text. prefill_chunk: tokens
    of a prompt that are fed at once. sampler: what draws instead of those
    three, a function of logits (B, V) and a generator that gives ids (B,).
    Raises GenerateError, which names the option.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = 256
    stop: Iterable[int] = ()
    prefill_chunk: int = 512
    sampler: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        own = Sampler(self.temperature, self.top_k, self.top_p)
        if self.sampler is not None and own != Sampler():
            reject("sampler", "none beside temperature, top_k or top_p",
                    self.sampler)
        for name, least, most, words in (
                ("seed", 0, 2 ** 63 - 1, "from 0 to 2**63 - 1"),
                ("max_new_tokens", 1, math.inf, ">= 1"),
                ("prefill_chunk", 1, math.inf, ">= 1")):
            value = getattr(self, name)
            if value is None and name != "prefill_chunk":
                continue
            if not (is_count(value) and least <= value <= most):
                reject(name, f"an integer {words}", value)
        try:
            ids = frozenset(map(operator.index, self.stop))
        except TypeError:
            reject("stop", "token ids", self.stop)
        object.__setattr__(self, "stop", ids)

    def with_changes(self, **changes: Any) -> "SamplingOptions":
        """These options but for `changes`; TypeError for an unknown one."""
        return replace(self, **changes)

    @property
    def draws(self) -> Callable[..., Tensor]:
        """What draws a token: `sampler`, or a Sampler of the three."""
        return self.sampler or Sampler(self.temperature, self.top_k,
                                       self.top_p)

    def room(self, positions: int) -> int:
        """How many tokens may be made where there are `positions` for them.

        The last one needs none of its own: nothing is fed after it.
        """
        most = self.max_new_tokens
        return positions + 1 if most is None else min(most, positions + 1)

# %%
usual = SamplingOptions(temperature=0.8, max_new_tokens=40)
print(usual.with_changes(seed=7))
print("room for 3 and for 100 positions:", usual.room(3), usual.room(100))

# %% [markdown]
# ## What is refused
#
# | option | what the error says was expected | None |
# |---|---|---|
# | temperature | a finite number >= 0 | |
# | top_k | an integer >= 0 | |
# | top_p | a number > 0 and <= 1 | |
# | seed | an integer from 0 to 2**63 - 1 | may be |
# | max_new_tokens | an integer >= 1 | may be |
# | prefill_chunk | an integer >= 1 | |
# | stop | token ids | |
# | sampler | none beside temperature, top_k or top_p | may be |
#
# All are a `GenerateError` that `reject` raises under the option's name, in
# these words. `True` is no number here, although Python thinks it is 1. Only
# `stop` takes all that `operator.index` takes, in any collection: what a
# tensor or a numpy array holds are ids, too. The three beside a sampler count
# as given if they are not at their defaults. An option that does not exist is
# a `TypeError`: it must not be ignored.

# %%
for wrong in ({"temperature": -1}, {"top_k": 2.5}, {"top_p": 0},
              {"seed": -1}, {"max_new_tokens": 0}, {"stop": "end"},
              {"sampler": Sampler(0)}, {"top_n": 5}):
    try:
        usual.with_changes(**wrong)
    except (GenerateError, TypeError) as error:
        print(error)
try:
    Sampler()(torch.tensor([[1.0, torch.nan]], dtype=torch.float16))
except GenerateError as error:
    print(error)

# %% [markdown]
# ## It holds
#
# **Top-k keeps exactly k, top-p the smallest set.** Rows of few different
# values, in bf16, so that ties abound; against the definitions in plain
# Python.

# %%
import random

rng, checked = random.Random(0), 0
for _ in range(300):
    row = [rng.randint(-8, 8) / 4 for _ in range(rng.randint(1, 12))]
    rows = torch.tensor([row], dtype=torch.bfloat16)
    first = sorted(range(len(row)), key=lambda n: (-row[n], n))
    k = rng.randint(1, 12)
    kept = Sampler(top_k=k).probabilities(rows)[0].nonzero()[:, 0]
    assert kept.tolist() == sorted(first[:k])
    p, whole = rng.random() or 1.0, Sampler().probabilities(rows)[0]
    kept = Sampler(top_p=p).probabilities(rows)[0] > 0
    mass = whole[kept].sum()
    assert mass >= p - 1e-12 and mass - whole[kept].min() < p + 1e-12
    checked += 1
print(checked, "rows: exactly k, and the smallest set")

# %% [markdown]
# **What is drawn is what is stated.** Pearson's statistic over $m$ kept
# tokens has a mean of at most $m$ and a variance of about $2m$ if it is; five
# standard deviations are allowed.

# %%
for sampler in (Sampler(), Sampler(2.0, top_k=9), Sampler(1.5, top_p=0.9)):
    wanted = 20_000 * sampler.probabilities(logits[None, :64])[0]
    drawn = sampler(logits[:64].expand(20_000, -1),
                    torch.Generator().manual_seed(1)).bincount(minlength=64)
    assert (drawn[wanted == 0] == 0).all()
    often = wanted >= 5  # the rest are too rare for the statistic
    chi = ((drawn - wanted)[often] ** 2 / wanted[often]).sum().item()
    freedom = int(often.sum())
    assert chi < freedom + 5 * (2 * freedom) ** 0.5
    print(f"{freedom} tokens: {chi:.0f}, allowed are "
          f"{freedom + 5 * (2 * freedom) ** 0.5:.0f}")

# %% [markdown]
# **Cold is greedy**, down to the smallest positive number.

# %%
for temperature in (1e-3, 1e-30, 5e-324):
    cold = Sampler(temperature)(logits[None]).item()
    print(temperature, "->", repr(tokenizer.decode([cold])))
    assert cold == order[0]

# %% [markdown]
# **The sentence again.** [The page](../one_page.ipynb) always takes the best
# token. Our sampler does the same at temperature 0, and in the cold. At
# temperature 1 it draws, and tells another story.

# %%
from gptoss.one_page import SENTENCE, sentence

seeded = torch.Generator().manual_seed(8)
for temperature in (0, 1e-30, 1):
    retold = sentence(12, next_token=lambda logits, t=temperature: int(
        Sampler(t)(logits[None], seeded)))
    assert temperature == 1 or retold == sentence(12)
    print(f"{temperature}:", " ".join(
        retold.removeprefix(SENTENCE).split()))

# %% [markdown]
# ## Against the others
#
# transformers has the same three steps in the same order. Without ties the
# probabilities agree to the rounding of its fp32:

# %%
from transformers.generation import GenerationConfig, logits_process

worst = 0.0
for temperature, k, p in ((0.7, 20, 0.9), (1.5, 100, 0.5), (1.0, 7, 0.99)):
    scores = torch.randn(4, 1000)
    ours = Sampler(temperature, k, p).probabilities(scores)
    for step in (logits_process.TemperatureLogitsWarper(temperature),
                 logits_process.TopKLogitsWarper(k),
                 logits_process.TopPLogitsWarper(p)):
        scores = step(None, scores)
    worst = max(worst, (scores.softmax(-1) - ours).abs().max().item())
    print(f"the likeliest of the last row: {ours[-1].max():.3f} here, "
          f"{scores[-1].softmax(-1).max():.3f} there")
assert worst < 1e-6

# %% [markdown]
# With ties they do not: its top-k removes what is *smaller than the k-th
# value* and so keeps all that equal it. Random logits of the real size,
# rounded to bf16 as a bf16 `lm_head` gives them, asked for the best 50:

# %%
top_50, counts, tied = logits_process.TopKLogitsWarper(50), [], 0
noise = torch.Generator().manual_seed(0)
for _ in range(25):
    real = (3 * torch.randn(1, 201_088, generator=noise)).bfloat16()
    counts.append(int(top_50(None, real).isfinite().sum()))
    tied += int((real == real.max()).sum() > 1)
    assert best(real, 50).unique().numel() == 50
print(f"{round(real.unique().numel(), -2):,} different values of 201,088")
print(f"more than 50 kept in {sum(n > 50 for n in counts)} of 25 rows, "
      f"at most {max(counts)}; the maximum itself is shared in {tied}")
print("top_k if nothing says otherwise:",
      GenerationConfig()._get_default_generation_params()["top_k"])

# %% [markdown]
# The last line matters more than the ties: generation_config.json of gpt-oss
# says `do_sample: true` and nothing of top-k, and transformers then takes
# 50. OpenAI's own code samples from all tokens, as `Sampler()` does.

# %% [markdown] tags=["measured"]
# ## Cost
#
# Sampling is a fixed number of passes over $V$ numbers in float64: for
# 201,088 of them it took about a millisecond on one core of an EPYC (Zen 3),
# and a full sort fifteen or more; `best` avoids it for top-k always, and for
# top-p whenever 1,024 tokens reach the mass.

# %%
V = 201_088
print(f"{V * 8 / 1e6:.1f} MB of float64 a row")

# %% [markdown]
# ## Takeaways
#
# - Ties are normal in bf16: "the k largest" needs a rule for equals, or it
#   keeps more than k. NaN must raise, not choose.
# - Subtract the maximum before dividing by the temperature: then even the
#   smallest positive one is greedy, and 0 is its limit.
# - One uniform number a token, from a CPU generator: a seed means the same
#   on every device.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# How many tokens does top-p 0.9 keep as the temperature rises from 0.5 to 3?
# Why is top-p alone a weak guard at high temperature?

# %% tags=["hide-cell"]
kept = [int((Sampler(t, top_p=0.9).probabilities(logits[None]) > 0).sum())
        for t in (0.5, 1.0, 2.0, 3.0)]
print(kept)
# the flatter the distribution, the more of the tail it takes to reach 0.9
assert kept == sorted(kept) and kept[-1] > 5 * kept[0]

# %% [markdown]
# ### Exercise 2
#
# min-p keeps tokens with at least a share of the likeliest token's
# probability. Write it. Show that it needs no sort, and that the temperature
# must come before it.

# %% tags=["hide-cell"]
def min_p(logits: Tensor, temperature: float, share: float) -> Tensor:
    probs = (logits.double() / temperature).softmax(-1)
    kept = probs.where(probs >= share * probs.amax(-1, keepdim=True), 0)
    return kept / kept.sum(-1, keepdim=True)


z = 3 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
sizes = [int((min_p(z, t, 0.1) > 0).sum()) for t in (0.5, 1, 2)]
print(sizes)
# p_i / p_max = exp((z_i - max z) / t), so a comparison with max z + t log 0.1
# does: no sort. The cut moves with t; before the temperature min-p would
# keep the set of t = 1 at all of them.
assert sizes == [int((z >= z.max() + t * math.log(0.1)).sum())
                 for t in (0.5, 1, 2)]

# %% [markdown]
# ### Exercise 3
#
# If every $g_i$ is $-\log(-\log u_i)$ with uniform $u_i$, then
# $\operatorname{argmax}_i (z_i/\tau + g_i)$ is distributed as in
# {eq}`generate-temperature`. Check it. Why is {eq}`generate-cdf` used here?

# %% tags=["hide-cell"]
few = logits[order[:8]].double()
u = torch.rand(20_000, 8, dtype=torch.float64,
               generator=torch.Generator().manual_seed(2))
drawn = (few / 1.5 - torch.log(-torch.log(u))).argmax(-1)
wanted = 20_000 * Sampler(1.5).probabilities(few[None])[0]
chi = ((drawn.bincount(minlength=8) - wanted) ** 2 / wanted).sum().item()
for title, counts in (("wanted", wanted), ("drawn", drawn.bincount())):
    print(f"{title:7}", *(f"{n / 20_000:.0%}" for n in counts.tolist()))
assert chi < 7 + 5 * 14 ** 0.5
# It takes V uniform numbers a token instead of one, so the same seed gives
# another text when the vocabulary is cut or padded.

# %% [markdown]
# ## Sources
#
# - Top-p: {cite}`nucleus2019`.
# - huggingface/transformers, `generation/logits_process.py`
#   (`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`) and
#   `generation/configuration_utils.py` (`_get_default_generation_params`).
# - openai/gpt-oss, `gpt_oss/torch/model.py` (`TokenGenerator`).
# - google-deepmind/gemma, `gm/text/_sampling.py`: samplers as frozen
#   dataclasses.
# - Thread: unsloth#3152.
