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
#     module: routing
#     public: [route]
# ---

# %% [markdown]
# # Routing
#
# ## Question
#
# A layer of gpt-oss-120b owns 3.2 billion parameters in 128 small networks,
# its *experts*, and uses 4 of them for a token: one in 32. Why own what is
# not used? And who picks the four?
#
# The second question looks harmless, and is not. Take a softmax before the
# choice instead of after it, and with 128 experts the answer shrinks to a
# fifth. Round the scores to bf16, and 2 tokens in 100 get another expert.
#
# ## Picture
#
# The model that ships with the package ([training](../training/training.ipynb)
# makes it) drew this: the first sentences of a story, and for each token which
# two of the eight experts of a layer were chosen, and with what weights.

# %% tags=["hide-input", "picture"]
# Figure: four maps, one a layer, of eight experts by 43 tokens. Each column
# has two filled cells, on other rows from token to token and from layer to
# layer, dark where an expert has most of the weight.
import math
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.text.tokenizer import Tokenizer
from gptoss.model.transformer import GptOss
from gptoss.parity.walk import trace_ours

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)

text = ("Once upon a time there was a little fox named Mira. Mira lived in "
        "the cave. For her birthday Mira got a white lamp. One morning she "
        "went to the park with the lamp.")
pocket = files("gptoss") / "pocket"
reader = Tokenizer.from_pretrained(pocket)
ids = reader.encode(text)
words = [reader.decode([token]).strip() or "·" for token in ids]
trace = trace_ours(GptOss.from_pretrained(pocket, dtype=torch.float32),
                   torch.tensor([ids]))
fig, axes = plt.subplots(4, 1, figsize=(7.4, 5.4), sharex=True)
for layer, ax in enumerate(axes):
    shares = trace[layer, "shares"].T  # (E, T), 0 for the experts not chosen
    image = ax.imshow(torch.where(shares > 0, shares, torch.nan), vmin=-0.25,
                      vmax=1, cmap="Blues", aspect="auto")
    ax.set(ylabel=f"layer {layer}\nexpert", yticks=(0, 7))
    ax.set_yticks(torch.arange(9) - 0.5, minor=True)
    ax.set_xticks(torch.arange(len(ids) + 1) - 0.5, minor=True)
    ax.grid(False)
    ax.grid(which="minor")
    ax.tick_params(which="both", length=0)
axes[-1].set_xticks(range(len(ids)), words, rotation=90, fontsize=7)
bar = fig.colorbar(image, ax=axes, label="weight of the expert", aspect=40)
bar.ax.set_ylim(0, 1)
plt.show()
again = sorted({word for word in words if words.count(word) > 1})
same = [sum(len({tuple(trace[layer, "chosen"][t].tolist())
                 for t, word in enumerate(words) if word == one}) == 1
            for one in again) for layer in range(4)]
print(f"of {len(again)} tokens that recur, with the same two experts each "
      f"time: {same}")

# %% [markdown]
# What to see: two cells in every column, which sum to one. Neighbours go to
# different experts, and each layer divides the tokens in its own way, among
# experts of its own. A token that comes again, like `Mira`, mostly meets
# others than the first time. The chooser, called the *router*, sees what
# attention and the layers below have made of a token, not the token itself.
#
# ## Why experts at all?
#
# Between two rounds of attention, each token passes alone through a network:
# a matrix that widens its D numbers to F, a nonlinearity, a matrix back to
# D. In most models there is one such network a layer, and every token uses
# all of it; that is a *dense* layer. What a model knows by heart is largely
# stored there, so we would like it to be large. But every parameter has to
# be read from memory, and multiplied with, for every token. A larger dense
# layer knows more and is slower, by the same factor.
#
# A *mixture of experts* cuts this tie {cite}`moe2017`. It owns E networks,
# and each token uses K of them. Let us count one layer of each model. A
# unit of the inner width F costs three rows of D numbers ([the next
# chapter](experts.ipynb) says why three):

# %%
from gptoss.weights.config import GptOssConfig

configs = {"20b": GptOssConfig.gpt_oss_20b(),
           "120b": GptOssConfig.gpt_oss_120b()}
for name, c in configs.items():
    E, K = c.num_local_experts, c.num_experts_per_tok
    D, width = c.hidden_size, c.intermediate_size
    for kind, used, owned in (
            (f"{K} experts of {E}", K * width, E * width),
            ("dense, same cost", K * width, K * width),
            ("dense, same size", E * width, E * width)):
        print(f"{name:4} {kind:17} owns {3 * D * owned / 1e9:.2f}, reads "
              f"{3 * D * used / 1e9:.2f} billion parameters a token")

# %% [markdown]
# So the mixture costs what the first dense layer costs, and owns what the
# second owns. Does it also *know* what the second knows? Let us ask the
# question directly. We draw 2,000 random facts, a vector and one of 32
# answers each, with nothing in common, so that they can only be learned by
# heart. Three layers learn them, all for as many steps: 32 units; eight
# experts of 16 units of which each fact uses two, so 32 units again; and
# 128 units. Each is the same dozen lines.

# %%
import torch.nn.functional as F

facts, answers = torch.randn(2000, 32), torch.randint(32, (2000,))


def learn(experts, used, width, steps=200):
    """Share of facts learned by a mixture; one expert is a dense layer."""
    sizes = ((32, experts), (experts, 32, width), (experts, width, 32))
    router, up, down = weights = [
        (torch.randn(size) * size[-2] ** -0.5).requires_grad_()
        for size in sizes]
    optimiser = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(steps):
        best = (facts @ router).topk(used)  # the router's choice
        share = torch.zeros(2000, experts).scatter(
            1, best.indices, best.values.softmax(-1))
        hidden = torch.einsum("nd,edf->nef", facts, up).relu()
        each = torch.einsum("nef,efa->nea", hidden, down)
        guess = (share[..., None] * each).sum(1)  # 0 for the others
        loss = F.cross_entropy(guess, answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (guess.argmax(-1) == answers).double().mean().item()


torch.manual_seed(0)
kinds = {"dense, 32 units": (1, 1, 32), "2 experts of 8": (8, 2, 16),
         "dense, 128 units": (1, 1, 128)}
learned = {name: learn(*sizes) for name, sizes in kinds.items()}
for name, (experts, used, width) in kinds.items():
    print(f"{name:17} owns {64 * experts * width:5,} parameters, uses "
          f"{64 * used * width:5,} a fact, knows about "
          f"{round(10 * learned[name]) / 10:.0%}")

# %% tags=["hide-input"]
# Figure: three layers as lines from the parameters that a fact uses to those
# that are owned. The dense layer of 32 units uses and owns 2,048 and knows a
# third; the mixture uses 2,048, owns 8,192 and knows all, as does the dense
# layer that uses all 8,192.
fig, ax = plt.subplots(figsize=(7, 1.9))
fig.tolerance = 0.05  # training ends a little differently elsewhere
for row, (name, (experts, used, width)) in enumerate(kinds.items()):
    ends = 64 * used * width, 64 * experts * width
    ax.plot(ends, (row, row), color="0.7", lw=3, zorder=1)
    ax.scatter(ends[1], row, s=130, fc="white", ec="C0", lw=2, zorder=2)
    ax.scatter(ends[0], row, s=45, color="C1", zorder=3)
    ax.text(9300, row, f"knows {round(10 * learned[name]) / 10:.0%}",
            va="center")
ax.text(2048, -0.42, "used for a fact", color="0.3", ha="center")
ax.text(8192, -0.42, "owned", color="0.3", ha="center")
ax.set(xlim=(1000, 11500), ylim=(2.5, -0.9), xlabel="parameters",
       xticks=(2048, 8192), yticks=range(3), yticklabels=kinds)
ax.set_xticks((2048, 8192), ("2,048", "8,192"))
ax.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# What to see: the mixture stands at the price of the first layer (filled
# dot) and knows what the third knows (circle). Knowledge follows what is
# owned, cost what is used. Real text is not a list of random facts, and the
# gain there is smaller than this; {cite:t}`switch2021` measured that a
# mixture reaches a given loss in a fraction of the training steps of a
# dense model of equal cost.
#
# Two prices remain. All experts have to lie in memory, which is why they
# alone are stored [in four bits](../weights/mxfp4.ipynb). And somebody has
# to choose well. That is the rest of this chapter.
#
# ## The naive version
#
# The router is a linear layer. It makes E numbers of a token, one *logit*
# for each expert, and the experts with the K largest compute. Their answers
# are added with weights that come from the logits. How? As in a classifier:
# a softmax over all experts, then the largest. Here are the logits of the
# shipped model's layer 1 for the token of the story where its router was
# least sure, and the weights of the two chosen experts:

# %%
def naive(logits, k):
    return logits.softmax(-1).topk(k)


E, K = 8, 2
routed = torch.stack([trace[layer, "router"].view(-1, E)
                      for layer in range(4)])  # (layers, tokens, E)
token = int(naive(routed[1], K)[0].sum(-1).argmin())
one = routed[1, token]
print(f"{words[token]!r}:", [f"{x:.1f}" for x in one.tolist()])
print("weights of the two:",
      [f"{x:.2f}" for x in naive(one, K)[0].tolist()])
totals = {"the story, 2 of 8": naive(routed.flatten(0, 1), 2)[0].sum(-1)}
for experts in (32, 128):
    logits = torch.randn(5000, experts)
    totals[f"noise, 4 of {experts}"] = naive(logits, 4)[0].sum(-1)
for name, total in totals.items():
    print(f"{name:18} a token's weights sum to {total.mean():.2f} on "
          f"average, from {total.min():.1f} to {total.max():.1f}")

# %% [markdown]
# They do not sum to one, as the experts that were not asked have taken
# their share. Nothing crashes. The output of every expert layer is too
# small, by a factor that changes from token to token, so no constant
# repairs it. (*Noise* stands for standard normal logits. We have no router
# of the released models here, and use noise where their sizes matter.)

# %% tags=["hide-input"]
# Figure: left, eight experts and two weights for each: choose first, and two
# have all of it; softmax over all, and every expert has some. Right, the sum
# of the chosen weights over tokens: one if chosen first, else spread about
# 0.6 for the story, 0.4 for 32 experts, 0.2 for 128.
best = one.topk(K).indices
after, before = torch.zeros(E), one.softmax(0)
after[best] = one[best].softmax(0)
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
left.vlines(torch.arange(E), before, after, color="0.75", lw=2, zorder=1)
left.plot(torch.arange(E), after, "o", color="C0", ms=7)
left.plot(torch.arange(E), before, "s", color="C1", ms=5)
left.text(0.98, 0.95, "● choose, then softmax", color="C0", ha="right",
          transform=left.transAxes)
left.text(0.98, 0.86, "■ softmax over all", color="#A06A00", ha="right",
          transform=left.transAxes)
left.set(xlabel="expert", ylabel="weight", ylim=(-0.03, 0.95),
         xlim=(-0.5, 7.5), title=f"one token: “{words[token]}”")
for (name, total), color in zip(totals.items(), ("C1", "C2", "C5"),
                                strict=True):
    heights, edges = torch.histogram(total.double(), 25, range=(0.0, 1.0))
    heights = heights / heights.max()
    right.stairs(heights, edges, color=color, lw=1.6)
    right.text(total.mean(), 1.04, name, color=color, ha="center",
               fontsize=8, rotation=20)
right.axvline(1, color="C0", lw=2)
right.text(0.985, 0.1, "choose, then softmax", color="C0", ha="right",
           va="bottom", rotation=90, fontsize=8)
right.set(xlabel="sum of the chosen weights", yticks=[], ylim=(0, 1.35),
          xlim=(0, 1.02), title="all tokens (peaks drawn alike)")
right.spines.left.set_visible(False)
plt.show()

# %% [markdown]
# What to see: left, the same two experts lead, but a softmax over all eight
# leaves part of the weight with experts that are not asked. Right, what is
# left for the chosen is a different fraction for each token, and less with
# more experts.
#
# ## Derivation
#
# ### Which weights?
#
# A worked number first. Let the logits be 2, 1, 0, and K = 2. The chosen
# are 2 and 1; $e^2 = 7.39$ and $e^1 = 2.72$ have the sum 10.11, so the
# weights are 0.73 and 0.27. The third, $e^0 = 1$, plays no part.
#
# In general let $l_1 \dots l_E$ be a token's logits and $\mathcal{C}$ the
# $K$ experts with the largest. gpt-oss weighs expert $e \in \mathcal{C}$ by
#
# $$
# w_e = \frac{e^{l_e}}{\sum_{c \in \mathcal{C}} e^{l_c}} .
# $$ (routing-weights)
#
# In two lines, a sort and a softmax:

# %%
def choose_then_weigh(logits, k):
    """(N, E) -> weights (N, k), experts (N, k), the largest first."""
    ordered, experts = logits.sort(dim=-1, descending=True, stable=True)
    return ordered[:, :k].softmax(-1), experts[:, :k]


weights, experts = choose_then_weigh(torch.tensor([[2.0, 1.0, 0.0]]), 2)
print(f"{math.exp(2) + math.exp(1):.2f}",
      [f"{w:.2f}" for w in weights[0].tolist()], experts[0].tolist())

# %% [markdown]
# ### Is the other order wrong?
#
# Not quite. Softmax over all gives $p_e = e^{l_e} / Z$ with
# $Z = \sum_{i=1}^{E} e^{l_i}$. The exponential is increasing, so the
# largest $p$ belong to the same experts; and
#
# $$
# \frac{p_e}{\sum_{c \in \mathcal{C}} p_c}
#   = \frac{e^{l_e} / Z}{\sum_{c \in \mathcal{C}} e^{l_c} / Z} = w_e .
# $$ (routing-order)
#
# The orders agree once the chosen weights are divided by their sum. Without
# the division they differ by the factor $\sum_{c \in \mathcal{C}} p_c < 1$.
# Models of both kinds exist (`norm_topk_prob` in other configurations),
# which is why the mistake is made in both directions.
#
# ### What does rounding do to the choice?
#
# Between 1 and 2 the numbers that bf16 can hold lie $u = 2^{-7} = 0.0078$
# apart. Take two logits, 1.8600 and 1.8575. They round to 1.8594 both. Now
# they are equal, and which of them is chosen depends on a rule for ties.
#
# Rounding is monotone: if $a > b$, the rounded $a$ is at least the rounded
# $b$. So it never swaps two logits, it can only merge them. The chosen set
# changes only where the $K$-th and the $(K+1)$-th largest logit become
# equal, and then only if the tie is broken the wrong way, half of the time.

# %% tags=["hide-input"]
# Figure: three pairs of logits, the fourth and the fifth, above a grid of
# bf16 numbers, each joined to the number that it rounds to. The first pair
# stays apart; the second and the third merge, and in the third the wrong
# expert has the lower index.
u = 2 ** -7
fig, axes = plt.subplots(1, 3, figsize=(7.4, 1.9), sharey=True)
cases = (("far apart: nothing changes", 1.8650, 1.8555, (5, 21)),
         ("merged, the right one first", 1.8600, 1.8575, (5, 21)),
         ("merged, the wrong one first", 1.8600, 1.8575, (21, 5)))
for ax, (title, fourth, fifth, numbers) in zip(axes, cases, strict=True):
    grid = torch.arange(237, 241) * u
    ax.vlines(grid, -0.12, 0.12, color="black", lw=1.2)
    ax.axhline(0, color="black", lw=0.8)
    for value, number, color in ((fourth, numbers[0], "C0"),
                                 (fifth, numbers[1], "C5")):
        rounded = round(value / u) * u
        ax.plot((value, rounded), (1, 0), color=color, lw=1.4)
        ax.plot(value, 1, "o", color=color)
        ax.text(value, 1.22, f"expert {number}", color=color, fontsize=8,
                ha="left" if value == fourth else "right")
    ax.set(title=title, ylim=(-0.4, 1.7), xlim=(1.849, 1.877), yticks=[],
           xticks=grid[:3].tolist())
    ax.set_xticks(grid.tolist(), [f"{x:.4f}" for x in grid.tolist()],
                  fontsize=7)
    ax.title.set_fontsize(9)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
plt.show()

# %% [markdown]
# What to see: above, the fourth logit (blue) and the fifth (orange) as they
# are; below, the grid of bf16. In the middle both land on one point and
# expert 5 is chosen, as its index is lower, which happens to be right. On
# the right the same numbers belong to other experts, and rounding has put
# the wrong one in.
#
# <div class="live" data-live="routing">In the web book, a slider moves the
# fifth logit here: the choice, the tie in bf16, and the weights of both
# orders follow.</div>
#
# How often? For standard normal logits the threshold lies near
# $t = \Phi^{-1}(1 - K/E)$, where there are $\lambda = E \varphi(t)$ logits
# to the unit ($\Phi$, $\varphi$: distribution and density of the standard
# normal); the gap between the two is then about exponential with mean
# $1/\lambda$. Two numbers a gap $g < u$ apart round to the same point with
# probability $1 - g/u$. Hence, for $\lambda u$ well below one,
#
# $$
# P(\text{flip}) \approx \frac12 \int_0^u \lambda e^{-\lambda g}
#   \Bigl(1 - \frac gu\Bigr) dg \approx \frac{\lambda u}{4} .
# $$ (routing-flip)
#
# The step grows with the logit: logits twice as large have half the
# $\lambda$ and twice the $u$, so scaling them changes little. With more
# experts $\lambda$ grows, and with it the flips:

# %%
def estimate(E, bits, k=4):
    t = torch.special.ndtri(torch.tensor(1 - k / E)).item()
    density = E * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    step = 2.0 ** (math.floor(math.log2(t)) - bits)
    return t, density, density * step / 4


print("in bf16:", [f"{x:.4f}" for x in torch.tensor(
    (1.86, 1.8575)).bfloat16().tolist()])
for E in (32, 128):
    t, density, flip = estimate(E, 7)
    print(f"E = {E:3}: t = {t:.2f}, λ = {density:.1f}, estimate "
          f"{100 * flip:.1f} % of tokens")

# %% [markdown]
# ### How many experts does a batch read?
#
# One token reads 4 experts of a layer; how many do 8 tokens together? If
# all experts are equally likely and tokens independent, a token misses a
# given expert with probability $1 - K/E$, for 128 experts 124/128, and
# eight tokens all miss it with $(124/128)^8 = 0.776$. So 22.4 % of the 128
# are hit: 28.7, not 32. In general, with $N$ tokens,
#
# $$
# \mathbb{E}[\text{hit}] = E \,\Bigl(1 - \bigl(1 - \tfrac KE\bigr)^N\Bigr) .
# $$ (routing-load)
#
# Weights are read from memory once per expert that is hit, whatever the
# number of tokens, so this number is what batched decoding pays. An
# unbalanced router hits fewer (exercise 3).
#
# ## Code
#
# ### How are the largest chosen?
#
# `torch.topk` leaves open which of two equal values it returns. A stable
# sort does not: equal logits keep the order of their experts. Sorting 128
# numbers takes about a thousand comparisons, the four experts 200 million
# FLOPs, so we can afford it. Two things are added to the two lines above.
# The slices are copied, so that the results are contiguous and hold k
# columns: a slice would keep all E in memory. And k outside 1 to E is a
# ValueError, in the form of all our refusals: the config's key, what was
# expected, what was found. With nine of eight experts,
# `num_experts_per_tok: expected 1 to 8, found 9`.
# ([Layers](../model/layers.ipynb) put the linear layer with bias, from D to
# E logits, in front of it.)

# %% tags=["export"]
import torch
from torch import Tensor


def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of (N, E), largest first: (N, k) logits, (N, k) int64.

    Equal logits keep the order of their experts, so the choice depends on
    the numbers alone. ValueError: k not in 1..E.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"num_experts_per_tok: expected 1 to "
                         f"{logits.shape[-1]}, found {k}")
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # contiguous: a slice would keep all E columns in memory
    return ordered[..., :k].contiguous(), ids[..., :k].contiguous()


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, E) logits -> weights (N, k) summing to one, ids (N, k) int64.

    Softmax over the k chosen logits, in the dtype of the logits, as
    transformers does (GptOssTopKRouter). ValueError: k not in 1..E.
    """
    chosen, ids = top_logits(logits, k)
    return chosen.softmax(-1), ids

# %%
logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -1.0, 1.0]])
weights, ids = route(logits, 3)
print("experts", ids[0].tolist(), [f"{w:.2f}" for w in weights[0].tolist()])
print("32 equal logits:", route(torch.zeros(1, 32), 4)[1][0].tolist())
try:
    route(torch.zeros(2, 8), 9)
except ValueError as error:
    print(error)

# %% [markdown]
# ### And the other order?
#
# {eq}`routing-order`, with the division or, for models that want it so,
# without. Ties are broken as above.

# %% tags=["export"]
def softmax_then_topk(logits: Tensor, k: int, renormalise: bool = True
                      ) -> tuple[Tensor, Tensor]:
    """(N, E) -> weights (N, k), ids (N, k): softmax over all E, then choose.

    Equal to `route` when renormalised; without, each token's weights sum
    to less than one. Other models want that, gpt-oss does not.
    """
    probs, ids = top_logits(logits.softmax(-1), k)
    if renormalise:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids

# %%
logits = torch.randn(1000, 128).double()
gaps = [(ours - other).abs().max().item() for ours, other in zip(
    route(logits, 4), softmax_then_topk(logits, 4), strict=True)]
assert gaps[0] < 1e-12 and gaps[1] == 0
print(f"largest difference of weights below 1e-12, of experts {gaps[1]}")

# %% [markdown]
# ### How is the load counted?
#
# Load is the number of tokens that chose an expert, int64, one number for
# each of the `experts`, also for those that nobody chose.

# %% tags=["export"]
def expert_load(ids: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert: ids (N, K) -> counts (E,) int64."""
    return torch.bincount(ids.flatten(), minlength=experts)


def expected_hits(experts: int, k: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens hit together, on average.

    Each token chooses k of the experts, all choices equally likely and
    independent: E (1 - (1 - k/E)^N).
    """
    return experts * (1 - (1 - k / experts) ** tokens)

# %%
print("load:", expert_load(ids, 8).tolist())
for tokens in (1, 8, 32):
    print(tokens, "tokens hit", *(f"{expected_hits(E, 4, tokens):.1f} of {E}"
                                  for E in (32, 128)), sep="  ")

# %% [markdown]
# ## It holds
#
# The choice, exhaustively: all rows of 6 logits with values from
# $\{0, 1, 2\}$, every $k$, against a sort that says what is meant.

# %%
from itertools import product

rows = torch.tensor(list(product((0.0, 1.0, 2.0), repeat=6)))
for k in range(1, 7):
    wanted = torch.tensor([
        sorted(range(6), key=lambda e, row=row: (-row[e], e))[:k]
        for row in rows.tolist()])
    weights, ids = route(rows, k)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(rows)))
print(len(rows), "rows, K = 1 to 6")

# %% [markdown]
# **A tie among the chosen does not matter, a tie at the border does.** The
# layer's answer is $\sum_{e \in \mathcal{C}} w_e f_e$, with $f_e$ the
# answer of expert $e$, so exchanging two chosen experts of equal logits
# exchanges equal weights. Exchanging the last chosen with the first refused
# replaces one expert's answer by another's, as good in the router's eyes
# and entirely different in value:

# %%
answers = torch.randn(6, 16)  # f_e of six experts
tied = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, -3.0]])  # 1 = 3, 2 = 4


def mix(logits, k, order):
    """Route after renaming the experts: another order among equals."""
    weights, ids = route(logits[:, order], k)
    return (weights[..., None] * answers[order][ids]).sum(1)


same, swapped = torch.arange(6), torch.tensor([0, 3, 4, 1, 2, 5])
for k, where in ((2, "inside"), (3, "at the border"), (4, "inside")):
    gap = (mix(tied, k, same) - mix(tied, k, swapped)).abs().max()
    print(f"K = {k}, ties {where:13}: outputs differ by {gap:.1f}")

# %% [markdown]
# Our rule makes the result reproducible, not right: two programs may differ.
#
# **In the shipped model.** The closest call of the story above, between the
# second and the third of eight logits, before and after rounding to bf16:

# %%
flat = routed.flatten(0, 1)  # every token in every layer
second_third = top_logits(flat, 3)[0][:, 1:]
n = int((second_third[:, 0] - second_third[:, 1]).argmin())
rounded = second_third[n].bfloat16().tolist()
print(f"layer {n // len(words)}, {words[n % len(words)]!r}:",
      [f"{x:.4f}" for x in second_third[n].tolist()], "in bf16",
      [f"{x:.4f}" for x in rounded])
edge = top_logits(flat.bfloat16(), 3)[0]
print(f"ties at the border in bf16: {int((edge[:, 1] == edge[:, 2]).sum())} "
      f"of {len(flat)}")

# %% [markdown]
# **Flips in general.** Standard normal logits, rounded; the chosen set is
# compared with that of float64:

# %%
def flips(E, tokens=12_000, k=4):
    """Per dtype, fractions of tokens: another set, a tie at the border."""
    g = torch.Generator().manual_seed(E)
    exact = torch.randn(tokens, E, generator=g, dtype=torch.float64)
    wanted = top_logits(exact, k)[1].sort(-1).values
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        values, ids = top_logits(exact.to(dtype), k + 1)
        changed = (ids[:, :k].sort(-1).values != wanted).any(-1)
        tie = values[:, -2] == values[:, -1]
        assert not (changed & ~tie).any()  # rounding merges, never swaps
        found += [changed.double().mean().item(), tie.double().mean().item()]
    return found


sizes = (16, 32, 64, 128, 256)
measured = {E: flips(E) for E in sizes}
for E in sizes:
    assert 0.5 < measured[E][0] / estimate(E, 7)[2] < 2
    assert 0.35 < measured[E][0] / measured[E][1] < 0.65
    print(f"E = {E:3}: ties {measured[E][1]:.1%}, flips {measured[E][0]:.1%}"
          f" (estimate {estimate(E, 7)[2]:.1%}); in fp16 flips "
          f"{measured[E][2]:.1%}")

# %% [markdown]
# The estimate holds within a factor of two, ties flip half of the time, and
# the flips grow with $E$, fastest where the threshold passes 1 and 2 and the
# step of bf16 doubles. fp16 has three bits more, and an eighth of the flips.
# Over all layers, if they were independent, and what one flip changes:

# %%
for E, L in ((32, 24), (128, 36)):
    f = measured[E][0]
    fourth = route(torch.randn(20_000, E), 4)[0][:, 3].mean().item()
    print(f"E = {E:3}: {100 * f:.0f} % of tokens a layer, "
          f"{100 * (1 - (1 - f) ** L):.0f} % in {L} layers; "
          f"mean fourth weight {fourth:.2f}")

# %% [markdown]
# A near tie is thus not a small change. That is one reason not to judge a
# bf16 implementation by whether its top token equals another's: each is a
# fair rounding of the model. Judge both against float64.
#
# **Load.** The hits of {eq}`routing-load` against simulation. A random
# router's logits are products of a matrix and hidden states, here noise plus
# a part that all tokens share, as long as the noise:

# %%
def random_router(E, tokens, D=64):
    """ids of a random router, for tokens with a common part."""
    g = torch.Generator().manual_seed(E)
    x = torch.randn(tokens, D, generator=g) + torch.randn(D, generator=g)
    return route(x @ torch.randn(D, E, generator=g) / D ** 0.5, 4)[1]


def hits(ids, E):
    """Distinct experts a group: ids (groups, tokens * K) -> mean."""
    return torch.zeros(len(ids), E).scatter(1, ids, 1.0).sum(1).mean().item()


fair = route(torch.randn(6400, 32), 4)[1].view(400, -1)
assert abs(hits(fair, 32) / expected_hits(32, 4, 16) - 1) < 0.03
uneven = random_router(32, 8192)
share = expert_load(uneven, 32) * 32 / 4 / 8192
print(f"16 tokens hit {hits(fair, 32):.0f} of 32 if fair (formula "
      f"{expected_hits(32, 4, 16):.0f}), {hits(uneven.view(512, -1), 32):.0f}"
      " with an untrained router")
print(f"its busiest expert has {share.max():.0f} times its fair share, "
      f"{int((share < 0.1).sum())} have less than a tenth of it")
print("the shipped model on this story, layer by layer:", *(
    expert_load(trace[layer, "chosen"], 8).tolist() for layer in range(4)),
    sep="\n")
logits = torch.randn(1, 32, requires_grad=True)
weights, ids = route(logits, 4)
(weights * torch.randn(1, 4)).sum().backward()
print("chosen:", sorted(ids[0].tolist()), "with a gradient:",
      logits.grad[0].nonzero().flatten().tolist())

# %% [markdown]
# What the tokens have in common favours the same experts in all of them.
# Balance has to be trained, and the gradient does not do it by itself, since
# experts that were not chosen get none (the last line). The auxiliary loss
# that repairs this {cite}`switch2021` is that of
# [training](../training/training.ipynb).
#
# **The sentence again,** by our `route` on [the page](../one_page.ipynb):

# %%
from gptoss.one_page import SENTENCE, sentence

retold = sentence(12, route=route)
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## Against the others
#
# Hugging Face's `GptOssTopKRouter` and OpenAI's lines (`topk`, then
# `softmax` of its values), the same weights and inputs, in fp32 and in
# bf16:

# %%
from transformers import GptOssConfig as HFConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter


def compare(E, K, D, dtype, tokens=2000):
    ours = torch.nn.Linear(D, E, dtype=dtype)
    hf = GptOssTopKRouter(HFConfig(
        hidden_size=D, num_local_experts=E, num_experts_per_tok=K)).to(dtype)
    hf.load_state_dict(ours.state_dict())
    x = torch.randn(tokens, D, dtype=dtype)
    with torch.no_grad():
        logits, hf_weights, hf_ids = hf(x)
        weights, ids = route(ours(x), K)
    value, chosen = torch.topk(logits, k=K, dim=-1, sorted=True)
    assert torch.equal(weights, hf_weights)
    assert torch.equal(weights, value.softmax(dim=1))
    edge = top_logits(logits, K + 1)[0]
    tied = (edge[:, 1:] == edge[:, :-1]).any(-1)
    for other in (hf_ids, chosen):
        assert torch.equal(ids[~tied], other[~tied])
    return len(ids)


compared = sum(compare(E, K, D, dtype) for dtype in (
    torch.float32, torch.bfloat16) for E, K, D in (
    (4, 1, 32), (8, 2, 96), (32, 4, 64), (128, 4, 64)))
print(f"{compared:,} tokens: weights equal bit for bit; experts too, "
      "wherever there is no tie")
stable = route(torch.zeros(1, 32), 4)[1][0].tolist()
print(f"32 equal logits: ours {stable}, topk in this order too:",
      torch.zeros(32).topk(4).indices.tolist() == stable)

# %% [markdown] tags=["given"]
# On exact ties our sort and their `topk` may name different experts. Known
# trouble elsewhere:
#
# - [torchtitan#2258][t1], mended in [#2319][t2]: `route_norm=False` for
#   gpt-oss, the naive version above; the same change added the router's
#   bias, whose checkpoint tensor had been loaded into nothing.
# - [mlxcel#391][m]: the mirror image, a softmax over the chosen for
#   OLMoE, which wants the softmax over all; the text was fluent at first
#   and drifted later.
# - [pytorch#27542][p1] and [#88227][p2]: the order of ties in `topk` differs
#   between devices and with $k$; a `stable` option has been asked for since
#   2022.
#
# [t1]: https://github.com/pytorch/torchtitan/issues/2258
# [t2]: https://github.com/pytorch/torchtitan/pull/2319
# [m]: https://github.com/lablup/mlxcel/pull/391
# [p1]: https://github.com/pytorch/pytorch/issues/27542
# [p2]: https://github.com/pytorch/pytorch/issues/88227

# %% [markdown]
# ## In the 20b and the 120b
#
# What decoding reads, by {eq}`routing-load`. One token reads four experts in
# every layer; tokens that are decoded together share them:

# %%
from gptoss.weights.sizes import expert_bytes

gigabytes = {name: expert_bytes(c) * c.num_hidden_layers / 1e9
             for name, c in configs.items()}  # of one expert, all layers
for name, c in configs.items():
    E, K = c.num_local_experts, c.num_experts_per_tok
    print(f"{name:4}: four experts {K * expert_bytes(c) / 1e6:.1f} MB of a "
          f"layer's {E * expert_bytes(c) / 1e6:,.0f} MB; a token reads",
          ", ".join(f"{expected_hits(E, K, N) * gigabytes[name] / N:.2f} GB "
                    f"(N = {N})" for N in (1, 8, 64)))

# %% tags=["hide-input"]
# Figure: left, the share of a layer's experts that are read, rising to all
# of them as more tokens are decoded together, later for the 120b; right,
# the gigabytes of experts read for each token, falling.
fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
batch = [2 ** i for i in range(10)]
for name, c, at in (("20b", configs["20b"], (5, 62)),
                    ("120b", configs["120b"], (34, 48))):
    E, K = c.num_local_experts, c.num_experts_per_tok
    read = [expected_hits(E, K, N) for N in batch]
    line, = left.plot(batch, [100 * h / E for h in read], "o-", ms=3)
    left.text(*at, name, color=line.get_color(), ha="right" if E == 32
              else "left")
    right.plot(batch, [h * gigabytes[name] / N for h, N in zip(
        read, batch, strict=True)], "o-", ms=3)
    right.text(1.15, {"20b": 0.78, "120b": 2.2}[name], name,
               color=line.get_color())
left.set(xscale="log", xlabel="tokens decoded together, N", ylim=(0, 105),
         ylabel="% of the experts read")
right.set(xscale="log", yscale="log", xlabel="tokens decoded together, N",
          ylabel="GB of experts a token")
for ax in (left, right):
    ax.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
    ax.minorticks_off()
right.set_yticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
plt.show()

# %% [markdown]
# Batching pays later than in a dense model. There, 8 tokens cost as many
# bytes as one. Here they read seven times the experts of one, and the saving
# begins where the experts start to coincide, near $N = E/K$.
#
# ## Cost
#
# The router needs $2 N D E$ FLOPs and reads $2 D E + 2 E$ bytes; the chosen
# experts need $6 N K D F$. So the choice costs the share $E / (3 K F)$ of
# what is chosen:

# %%
for name, c in configs.items():
    share = c.num_local_experts / (
        3 * c.num_experts_per_tok * c.intermediate_size)
    print(f"{name}: {100 * share:.2f} %")

# %% [markdown]
# ## Takeaways
#
# - A mixture owns much and uses little: knowledge follows what is owned,
#   cost what is used.
# - Choose first, then softmax over the chosen; the other order is the same
#   only after dividing by the sum of the chosen.
# - Rounding cannot swap two logits, only tie them. In bf16, with 128
#   experts, that changes the choice of 2 tokens in 100 in each layer, and
#   with it a sixth of the layer's answer.
# - $N$ tokens read $E(1 - (1 - K/E)^N)$ experts, not $4N$ and not $E$.
#
# ## Exercises
#
# ### Exercise 1
#
# One change adds the same constant to all logits of a token, another adds
# one to an expert's logit in every token. Which of them can change the
# choice, and which the weights?

# %% tags=["hide-cell"]
logits = torch.randn(500, 32).double()
base = route(logits, 4)
per_token = route(logits + torch.randn(500, 1).double(), 4)
per_expert = route(logits + torch.randn(32).double(), 4)
torch.testing.assert_close(per_token[0], base[0])
assert torch.equal(per_token[1], base[1])
assert not torch.equal(per_expert[1], base[1])
print("a constant for a token: neither; for an expert (a bias): both")

# %% [markdown]
# ### Exercise 2
#
# How many tokens must be decoded together until the 120b reads 90 % of a
# layer's experts, on average? Solve {eq}`routing-load` for $N$, then check.

# %% tags=["hide-cell"]
need = math.ceil(math.log(0.1) / math.log(1 - 4 / 128))
assert expected_hits(128, 4, need) >= 0.9 * 128
assert expected_hits(128, 4, need - 1) < 0.9 * 128
print(need, "tokens")

# %% [markdown]
# ### Exercise 3
#
# A skewed router hits fewer experts. Of 32 experts let half be three times
# as likely as the others, one choice a token, 16 tokens. Compare
# $\sum_e \bigl(1 - (1 - q_e)^N\bigr)$ with the fair value, and both with a
# simulation.

# %% tags=["hide-cell"]
E, N = 32, 16
q = torch.cat([torch.full((16,), 3.0), torch.ones(16)]).double()
q = q / q.sum()
skewed = (1 - (1 - q) ** N).sum().item()
drawn = torch.multinomial(q, 4000 * N, replacement=True).view(4000, N)
hits = torch.zeros(4000, E).scatter(1, drawn, 1.0).sum(1).mean().item()
assert abs(hits - skewed) < 0.1 and skewed < expected_hits(E, 1, N)
print(f"{skewed:.1f} instead of {expected_hits(E, 1, N):.1f}")

# %% [markdown]
# ### Exercise 4
#
# bf16 inputs and weights, but the product and the choice in fp32: how many
# flips are left against float64 on the same rounded inputs? What would it
# cost to route this way?

# %% tags=["hide-cell"]
x = torch.randn(4000, 256).bfloat16()
w = (torch.randn(128, 256) / 16).bfloat16()


def chosen(logits):
    return route(logits, 4)[1].sort(-1).values


exact = chosen(x.double() @ w.double().T)
wide, narrow = chosen(x.float() @ w.float().T), chosen(x @ w.T)
wide, narrow = ((c != exact).any(-1).sum().item() for c in (wide, narrow))
assert wide <= 4 < narrow
print(f"flips in fp32: {wide / 40:.0f} % of tokens, in bf16: "
      f"{narrow / 40:.0f} %")
# It costs little, but is not what the released model was run with.

# %% [markdown]
# ## Sources
#
# - OpenAI, gpt-oss: `gpt_oss/torch/model.py`, `MLPBlock.forward`
#   {cite}`gptoss2025`.
# - transformers: `models/gpt_oss/modeling_gpt_oss.py`, `GptOssTopKRouter`.
# - Sparse mixtures of experts: {cite}`moe2017`; one expert and the balance
#   loss: {cite}`switch2021`.
