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
#     module: train
#     public: [Recipe, put_on_grid, weighted_loss]
# ---

# %% [markdown]
# # How is a gpt-oss trained over lunch?
#
# ## Question
#
# How small can a gpt-oss be and still think before it answers?
#
# The checkpoint in `gptoss/pocket/` has a ten-thousandth of the 20b's
# parameters. One processor core trained it in 86 minutes. It speaks
# harmony: asked for a sum of three-digit numbers it works it out column by
# column in its analysis channel, longer or shorter as the system message
# says, and then answers. It reads the definitions of tools it has never seen
# together, calls the right one with the right arguments and uses the result.
# It remembers what it was told a story ago, and in its stories a red kite
# stays a red kite. Everything the big models have is in it: alternating
# sliding and full layers, sinks, YaRN, top-k routing, a clamped SwiGLU,
# experts in MXFP4.
#
# [Stories](stories.ipynb), [lessons](lessons.ipynb),
# [tools](disguises.ipynb), [rows](rows.ipynb) and
# [the weights to start from](planting.ipynb) are there. This chapter trains,
# with a loss that keeps the experts busy, and puts them on the four-bit grid
# while the model can still get used to it. The whole training is one command,
# `python -m gptoss train FOLDER --seed 0`.

# %% tags=["export"]
from collections.abc import Iterator

import torch
from torch import Tensor

# %%
import json
from itertools import islice
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.text.harmony import render
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.conversations import lesson_stream
from gptoss.training.planting import start_at_random
from gptoss.training.rows import padded, story_row
from gptoss.training.stories import story_stream
from gptoss.weights.config import GptOssConfig

torch.set_num_threads(1)  # faster than more for tensors of this size
plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
reader = Tokenizer.from_pretrained(POCKET)

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: left, the loss over the steps, falling with spikes, with lines where
# the recipe changes; right, the share of questions right at every thousandth
# step: stories and far facts come first, then tools, sums last.
saved = json.loads((POCKET / "train_log.json").read_text())
log, recipe = saved["log"], saved["recipe"]
steps = [entry["step"] for entry in log]
marks = saved["marks"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2))
losses = torch.tensor([entry["loss"] for entry in log])
middle = losses.unfold(0, 25, 1).median(1).values     # of 25 entries
axes[0].plot(steps, losses, color="0.8", linewidth=0.5)
axes[0].plot(steps[12:len(middle) + 12], middle, color="C0", linewidth=1.4)
for name, at, high in (("easy rows end", recipe["easy"], 14),
                       ("more sums", recipe["change"], 14),
                       ("four bits", recipe["grid_from"], 9),
                       ("digits", recipe["last"], 14)):
    axes[0].axvline(at * recipe["steps"], color="C1", linestyle=":")
    axes[0].text(at * recipe["steps"], high, f" {name}", fontsize=8)
axes[0].set(xlabel="step", ylabel="nats per token", yscale="log",
            ylim=(0.02, 22), title="The loss")
axes[0].set_yticks((0.3, 0.5, 1, 2, 5), ("0.3", "0.5", "1", "2", "5"))
axes[0].minorticks_off()
for ax in axes:
    ax.set_xticks(range(0, recipe["steps"] + 1, 4000))
for n, (kind, name) in enumerate((("story", "stories"), ("sum", "sums"),
                                  ("tool", "tools"), ("far", "far facts"))):
    axes[1].plot([mark["step"] for mark in marks],
                 [mark[kind] for mark in marks], f"{'osD^'[n]}-", label=name)
axes[1].set(xlabel="step", ylabel="share of held-out questions right",
            title="What it can do", ylim=(-0.03, 1.03))
axes[1].legend()
plt.show()
print(f"{log[-1]['seconds'] / 60:.0f} minutes on one core, "
      f"{recipe['steps']:,} steps of {recipe['tokens']:,} tokens")

# %% [markdown]
# Left the loss, from the saved log (grey each entry, blue the median of 25
# around it); right, what the weights at every
# thousandth step could do with 40 questions of each kind that training never
# shows. (Dotted: where the recipe changes; see the training loop.) The loss
# falls and says little (its spikes are batches of senseless drills). The
# abilities come one after another: stories and facts from far
# above, which are copying, then tools, which are copying the right thing, and
# arithmetic last. While the rate is high a few steps can undo one of them for
# a while.

# %% [markdown]
# ## The naive version
#
# Train in full precision and round the experts to four bits when all is done.
# The log holds the price, measured on the same batch before and after
# rounding.

# %%
price = next(entry for entry in log if "unrounded" in entry)
print(f"step {price['step']}: {price['unrounded']:.4f} nats, "
      f"rounded at once {price['loss']:.4f}")

# %% [markdown]
# Small on one batch, but never paid back: what is shipped is then a copy near
# the model that was trained, and nobody has examined the copy.
#
# ## Derivation
#
# **The balance.** Nothing in {eq}`train-ce` stops the router from sending
# every token to the same two experts: whichever are ahead get the gradients
# and get further ahead. Let $f_e$ be the share of the $NK$ assignments that
# went to expert $e$, and $p_e$ its mean probability under a softmax over all
# $E$ logits. The auxiliary loss {cite}`switch2021`
#
# $$ \mathcal{L}_{\text{balance}} = E \sum_e f_e \, p_e $$ (train-balance)
#
# is 1 when both are uniform, and grows when the experts that are chosen most
# are also the ones the router likes most. $f_e$ is a count and has no
# gradient; $p_e$ has one, and it pushes probability away from whatever is
# overloaded. OpenAI's configuration names this coefficient
# `router_aux_loss_coef`.
#
# **The grid.** Let $Q(w)$ be the rounding to
# [MXFP4](../weights/mxfp4.ipynb). Its derivative is zero almost everywhere, so
# a model that computes with $Q(w)$ could not learn. The straight-through
# estimator keeps the value and pretends the derivative is one:
#
# $$ \tilde w = w + \operatorname{stop}\big(Q(w) - w\big), \qquad
#    \frac{\partial \tilde w}{\partial w} := 1. $$ (train-ste)
#
# The optimiser goes on moving the full-precision $w$; the forward pass, and
# so every gradient, sees only values that the file can hold. After the last
# step $Q(w)$ *is* what the file holds: writing it loses nothing.

# %% [markdown]
# ## Code
#
# ### What is the loss?
#
# The next token, and a fair share for every expert.

# %% tags=["export"]
from typing import cast

import torch.nn.functional as F
from torch import nn

from gptoss.model.layers import Block, Router
from gptoss.model.transformer import GptOss
from gptoss.moe.routing import expert_load, top_logits


def weighted_loss(model: GptOss, tokens: Tensor, weights: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy in nats, and the mean over the tokens of
    weight 1 alone. tokens, weights (B, T): each token but the first is
    predicted from those before it."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    own = weights == 1
    return ((weights * nats).sum() / weights.sum(),
            (nats.detach() * own).sum() / own.sum().clamp_min(1))


def that_matter(weights: Tensor) -> Tensor:
    """(B, T) bool: places with something that counts at or behind them; the
    others are padding, or as good as that."""
    return weights.flip(-1).cummax(-1).values.flip(-1) > 0


def load_balance(logits: Tensor, k: int) -> Tensor:
    """The auxiliary loss of Switch Transformers, for K experts a token.

    Args:
        logits: (N, E) router logits of one layer.
        k: experts chosen per token.
    Returns:
        E * sum_e f_e * p_e, a scalar: f_e the share of assignments that
        expert e gets, p_e its mean probability over all E. 1 when both
        are uniform; up to E / K when K experts take everything.
    """
    experts = logits.shape[-1]
    _, ids = top_logits(logits, k)
    share = expert_load(ids, experts) / ids.numel()
    return experts * (share * logits.softmax(-1).mean(0)).sum()


class RouterTap:
    """Collects the router logits of one forward pass, layer by layer."""

    def __init__(self, model: GptOss) -> None:
        self.logits: list[Tensor] = []
        self.hooks = [
            cast(Block, layer).mlp.router.register_forward_hook(self._keep)
            for layer in model.layers]

    def _keep(self, router: Router, inputs: tuple, output: object) -> None:
        self.logits.append(F.linear(inputs[0], router.weight, router.bias))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self) -> list[Tensor]:
        taken, self.logits = self.logits, []
        return taken

# %% [markdown]
# Two extremes of {eq}`train-balance`, for 8 experts and 2 per token: logits
# that prefer nobody, and logits that always prefer the same two.

# %%
torch.manual_seed(0)
even = torch.randn(4096, 8) * 1e-3
greedy = even + torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0])
print(f"{load_balance(even, 2):.2f} {load_balance(greedy, 2):.2f}")
assert abs(load_balance(even, 2) - 1) < 0.01
assert abs(load_balance(greedy, 2) - 8 / 2) < 0.01

# %% [markdown]
# ### How do weights live on the grid?

# %% tags=["export"]
from torch.nn.utils import parametrize

from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode


class OnGrid(nn.Module):
    """Replace a weight by its MXFP4 rounding; gradients pass unchanged."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            grid = decode(*encode(weight), weight.dtype)
        return weight + (grid - weight).detach()


def put_on_grid(model: GptOss) -> None:
    """From now on every expert computes with four-bit weights."""
    for layer in model.layers:
        experts = cast(Block, layer).mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(experts, name, OnGrid())

# %%
weight = torch.randn(4, 64, requires_grad=True)
rounded = OnGrid()(weight)
(rounded * torch.arange(64.0)).sum().backward()
again = decode(*encode(rounded.detach()), torch.float32)
off = (again - rounded.detach()).abs().max().item()
print(f"largest distance from the grid: {off}")
print("gradients of the first five:", weight.grad[0, :5].tolist())
assert torch.equal(weight.grad, torch.arange(64.0).expand(4, 64))

# %% [markdown]
# ### How does a run go?
#
# The run has three stretches. In the first the learning rate stays high and
# the model learns where to look; by its end stories, tools and far facts are
# mostly right, and sums are not: the columns are found, but a digit in them
# comes out beside the right one. So in the second nearly half of the lessons
# are sums. A lesson holds three columns among two hundred tokens, though. In
# the third, 15 % of the rows are tables: twenty-odd columns in a row of the
# same length. From the middle of the second on, the experts are on the grid.

# %% tags=["export"]
import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; the same recipe and seed on
    the same machine give the same file.

    `tokens`: of a batch, with its padding. `easy`: share of the steps with
    short rows and many plain stories. `change`: share after which the mix
    of lessons is `SECOND`; `last`: after which it is `THIRD` and `table` of
    the rows are digits alone. At both the optimiser begins afresh, and the
    rate rises to the next of `rates`. `grid_from`: share after which the
    experts compute with four bits.
    """

    seed: int = 0
    steps: int = 19000
    tokens: int = 1250
    rates: tuple[float, ...] = (2e-3, 1.2e-3, 8e-4)
    warmup: int = 100
    weight_decay: float = 0.05
    balance: float = 0.01
    easy: float = 0.0909
    change: float = 15 / 35
    grid_from: float = 19 / 35
    last: float = 23 / 35
    table: float = 0.15
    clip: float = 1.0

    def at(self, share: float) -> int:
        """The step at which `share` of the run is over."""
        return round(share * self.steps)

    @property
    def begins(self) -> tuple[int, int, int]:
        """The steps at which the three stretches begin."""
        return 0, self.at(self.change), self.at(self.last)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine towards a hundredth, three times;
        the first is cut short by the change."""
        part = sum(step >= begin for begin in self.begins[1:])
        begin, peak = self.begins[part], self.rates[part]
        end = self.begins[2] if part < 2 else self.steps
        warmup = self.warmup // 2 if part else self.warmup
        step -= begin
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, end - begin - warmup)
        floor = 0.01
        cosine = (1 + math.cos(math.pi * done)) / 2
        return peak * (floor + (1 - floor) * cosine)

# %% tags=["export"]
def optimizer_for(model: GptOss, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, sinks and norms are not decayed towards zero."""
    vectors = ("bias", "sinks", "norm.weight")
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if name.endswith(vectors) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rates[0],
                             betas=(0.9, 0.98))

# %% tags=["export"]
def train(model: GptOss, source: Iterator[tuple[Tensor, Tensor]],
          recipe: Recipe,
          report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train in place; `report` gets one dict per step: `loss`, the
    weighted mean, and `own`, of the tokens to be written, in nats."""
    tap = RouterTap(model)
    k, begin = model.config.num_experts_per_tok, time.perf_counter()
    for step in range(recipe.steps):
        batch, extra = next(source), {}
        if step in recipe.begins:
            optimizer = optimizer_for(model, recipe)
        if step == recipe.at(recipe.grid_from):
            with torch.no_grad():
                extra = {"unrounded": weighted_loss(model, *batch)[0].item()}
            put_on_grid(model)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        tap.take()  # what was looked at between two steps
        loss, own = weighted_loss(model, *batch)
        real = that_matter(batch[1][:, 1:]).flatten()
        routed = [load_balance(each.flatten(0, -2)[real], k)
                  for each in tap.take()]
        balance = torch.stack(routed).mean()
        (loss + recipe.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report({"step": step, "loss": loss.item(), "own": own.item(),
                "balance": balance.item(), "norm": norm.item(),
                "seconds": time.perf_counter() - begin} | extra)
    tap.close()

# %% [markdown]
# Sixty steps of a very small model on stories, once with the balance loss and
# once without, show what it does.

# %%
from dataclasses import replace

small = replace(GptOssConfig.from_pretrained(POCKET), num_hidden_layers=2,
                layer_types=None, hidden_size=32, intermediate_size=32,
                head_dim=8)
told = story_stream(0)
some = [padded([story_row(reader, next(told))]) for _ in range(60)]
history = {}
for balance in (0.0, 0.05):
    model = GptOss(small, dtype=torch.float32, packed=False)
    start_at_random(model, seed=0)
    history[balance] = entries = []
    train(model, iter(some), Recipe(steps=60, warmup=3, balance=balance),
          entries.append)
print([entry["step"] for entry in entries if "unrounded" in entry])
assert entries[-1]["loss"] < entries[0]["loss"] - 1

# %% tags=["hide-input", "nbval-ignore-output"]
# Figure: the balance loss over the steps, 1 being even shares. Both curves
# rise at first; with the push one turns and falls again, without it the other
# stays high.
fig, ax = plt.subplots(figsize=(6, 2.6))
for balance, entries in history.items():
    ax.plot([entry["balance"] for entry in entries],
            label=f"weight {balance:g}")
ax.axhline(1, color="black", linestyle="--", linewidth=1)
ax.set(xlabel="step", ylabel="balance loss",
       title="Without its push the routers stay uneven")
ax.legend()
plt.show()

# %% [markdown]
# ## It holds
#
# The file is on the grid: encoding what it decodes to gives the same
# values, and the model computes the same with packed and with dense experts.

# %%
pocket = GptOss.from_pretrained(POCKET, dtype=torch.float32)
dense = GptOss.from_pretrained(POCKET, dtype=torch.float32, packed=False)
for layer in dense.layers:
    for weight in (layer.mlp.experts.gate_up_proj,
                   layer.mlp.experts.down_proj):
        again = decode(*encode(weight), torch.float32)
        assert torch.equal(again, weight)
prompt = torch.tensor([reader.encode("What is 347 + 285?")])
with torch.inference_mode():
    gap = (dense(prompt) - pocket(prompt)).abs().max().item()
print(f"packed and dense differ by less than {1e-4 if gap < 1e-4 else gap}")

# %% [markdown]
# And every expert works: the share of assignments per layer and expert, over
# the prompts of twenty sums and twenty stories.

# %% tags=["hide-input"]
# Figure: a table of shares of assignments, four layers by eight experts,
# coloured by size: uneven, but no cell is empty.
told = story_stream(seed=5, hold_out=True)
asked = lesson_stream(1, hold_out=True, mix={"sum": 1})
texts = [render(reader, lesson.messages[:lesson.turn])
         for lesson in islice(asked, 20)]
texts += [reader.encode(next(told)) for _ in range(20)]
experts = pocket.config.num_local_experts
tap, shares = RouterTap(pocket), torch.zeros(pocket.config.num_hidden_layers,
                                             experts)
with torch.inference_mode():
    for row in texts:
        pocket(torch.tensor([row]))
        for n, logits in enumerate(tap.take()):
            shares[n] += expert_load(top_logits(logits, 2)[1], experts)
tap.close()
shares /= shares.sum(1, keepdim=True)
fig, ax = plt.subplots(figsize=(7, 2.4))
image = ax.imshow(shares, vmin=0, vmax=2 / experts, aspect="auto",
                  cmap="Blues")
for n in range(shares.shape[0]):
    for e in range(experts):
        ax.text(e, n, f"{shares[n, e]:.2f}", ha="center", va="center",
                color="white" if shares[n, e] > 1.3 / experts else "black",
                fontsize=8)
ax.set(xlabel="expert", ylabel="layer", xticks=range(experts),
       yticks=range(shares.shape[0]),
       title=f"Share of assignments (even = {1 / experts:.3f})")
ax.grid(False)
fig.colorbar(image, ax=ax)
plt.show()
print(f"used least: {shares.min():.0%} of a layer's assignments")

# %% [markdown]
# ## Against the others
#
# Transformers has the same auxiliary loss, `load_balancing_loss_func` in
# `models/gpt_oss/modeling_gpt_oss.py`. It counts each of the K choices as a
# full token, so for one layer its value is K times ours. Of several layers it
# averages $f_e$ and $p_e$ first and multiplies then, so an expert that is
# overloaded in one layer may make up for being idle in another.

# %%
import os

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers.models.gpt_oss import modeling_gpt_oss as hf  # noqa: E402

logits = torch.randn(512, 8)
theirs = hf.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
ours = load_balance(logits, 2)
print(f"theirs / ours = {theirs / ours:.3f}")
assert torch.isclose(theirs, 2 * ours)

# %% [markdown]
# Elsewhere the way back to four bits is missing: transformers can read
# MXFP4 and fine-tune after dequantising, but not return to it
# (transformers#39969, gpt-oss#108). Here the return trip is `encode`, and
# because training ended on the grid it changes no value.
#
# ## In the 20b and the 120b
#
# The same loop fits the real models only on paper. AdamW in full precision
# keeps 16 bytes per parameter: the weight, its gradient and two moments.

# %%
from gptoss.weights.sizes import active_parameters, total_parameters

for name, config in (("pocket", pocket.config),
                     ("20b", GptOssConfig.gpt_oss_20b()),
                     ("120b", GptOssConfig.gpt_oss_120b())):
    total, active = total_parameters(config), active_parameters(config)
    print(f"{name:>6}: {total:>15,} parameters, "
          f"{16 * total / 1e9:>8,.3g} GB to train, "
          f"{6 * active / 1e9:>7,.3g} GFLOP a token")

# %% [markdown]
# The lessons are another matter. A conversation with tools for the 20b is
# rendered by the same functions as one for the pocket model, and
# [`Chat`](../chat/memory.ipynb) cannot tell the two apart.
#
# ## Cost
#
# A token of training costs about $6 P$ floating-point operations, $P$ the
# active parameters: two for each weight forwards, four backwards. Attention
# over T keys has no weights and comes on top, $4 H C$ for each key and layer
# forwards and twice that backwards:
#
# $$ \text{FLOPs} = B T \, \Big( 6 P + 12 \, L H C \, T \Big).
#    $$ (train-flops)
#
# Sliding layers count in full, because the plain implementation computes
# all T keys and masks them. PyTorch's counter sees the products with
# weights, the first term; attention is an operator of our own, which it does
# not look into.

# %%
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

B, T = 2, 256
config = pocket.config
model = GptOss(config, dtype=torch.float32, packed=False)
tokens = torch.randint(0, 1000, (B, T + 1))
with FlopCounterMode(display=False) as counter:
    weighted_loss(model, tokens, torch.ones(B, T + 1))[0].backward()
attention = 12 * (config.num_hidden_layers * config.num_attention_heads
                  * config.head_dim * T)
weights = 6 * active_parameters(config)
ratio = counter.get_total_flops() / (B * T * weights)
print(f"counted / first term = {ratio:.2f}")
print(f"attention adds {attention / weights:.0%} at T = {T}")
assert 0.95 < ratio < 1.05

# %% [markdown]
# ## Takeaways
#
# - Without a balance loss routers collapse, since whoever is chosen learns;
#   $E \sum_e f_e p_e$ is 1 when nobody is preferred.
# - Train the last part on the MXFP4 grid and the four-bit file *is* the
#   model that was trained and examined, not a copy near it.
# - A recipe is data: the same recipe and seed on the same machine give the
#   same file.
# - A token of training costs $6 P$ operations and, in full precision, 16
#   bytes of memory for each parameter.
#
# ## Exercises
#
# ### Exercise 1
#
# {eq}`train-balance` is 1 when nobody is preferred. Is that its minimum? Find
# router logits for E = 2, K = 1 that give less, and say why this does no
# harm.

# %% tags=["hide-cell"]
# Two tokens in three choose expert 0, but only just; the third is sure of
# expert 1. So the expert that is chosen more is liked less.
logits = torch.tensor([[0.02, 0.0]] * 200 + [[0.0, 5.0]] * 100)
value = load_balance(logits, 1).item()
print(f"{value:.2f}")
assert value < 0.95
# The gradient sees f as constants: it goes on pushing p away from expert 0,
# and tokens that chose it "only just" change over.

# %% [markdown]
# ### Exercise 2
#
# What would training do if `OnGrid` returned the rounded weight itself? And
# how many times the bytes would the experts take in bf16?

# %% tags=["hide-cell"]
weight = torch.randn(4, 64, requires_grad=True)
rounded = decode(*encode(weight.detach()), torch.float32)
assert not rounded.requires_grad  # experts would stay, the rest would learn
experts = sum(p.numel() for name, p in dense.named_parameters()
              if name.endswith(("gate_up_proj", "down_proj")))
packed_bytes = experts * 17 // 32
print(f"{2 * experts / packed_bytes:.2f} times the bytes of the experts")
assert packed_bytes == sum(
    b.numel() for name, b in pocket.named_buffers()
    if name.endswith(("_blocks", "_scales")))

# %% [markdown]
# ### Exercise 3
#
# How much does the rate of a step change where a stretch begins? Draw up the
# rates just before and fifty steps after each beginning, and say why the
# optimiser's memory is thrown away there.

# %% tags=["hide-cell"]
plan = Recipe()
for begin in plan.begins[1:]:
    print(f"step {begin:,}: {plan.rate(begin - 1):.1e} before, "
          f"{plan.rate(begin + 50):.1e} after")
# AdamW divides by a running mean of squared gradients. That of the old mix of
# lessons, gathered at a small rate, would scale the first steps of the new.

# %% [markdown]
# ## Sources
#
# - Load balancing: {cite}`switch2021`, section 2.2, after {cite}`moe2017`;
#   transformers `modeling_gpt_oss.py`, `load_balancing_loss_func`.
# - AdamW: {cite}`adamw2019`. MXFP4: {cite}`ocpmx2023`. Configuration:
#   {cite}`gptoss2025`.
