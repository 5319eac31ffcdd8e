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
# A router makes 128 numbers of a token, keeps the four largest, and turns
# them into weights. Two things look harmless. Take the softmax before the
# choice instead of after it: the experts' answer shrinks to a fifth of what
# it should be. Round the 128 numbers to bf16: in one layer 2 tokens in
# 100 get another expert, in the 36 layers of the 120b about half of all
# tokens meet at least one. Both are measured below, on standard normal
# logits.
#
# Which order is right, what happens near a tie, and how many of the experts
# does a batch have to read?
#
# ## Picture
#
# The model that ships with the package ([training](../training/training.ipynb)
# makes it) drew this: the first sentences of a story, and for each token which
# two of the eight experts of a layer the router chose, and with what weights.

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
# others than the first time, since the router sees what attention and the
# layers below have made of it, not the token itself.
#
# ## The naive version
#
# Softmax over all experts, as in a classifier, then the four largest:

# %%
def naive(logits, k):
    return logits.softmax(-1).topk(k)


for E in (32, 128):
    weights, _ = naive(torch.randn(20_000, E), 4)
    total = weights.sum(-1)
    print(f"{E:3} experts: the weights of a token sum to "
          f"{total.mean().item():.2f} on average, never to 1:",
          bool((total < 0.999).all()))

# %% [markdown]
# Nothing crashes. The output of every expert layer is too small, by a
# factor that changes from token to token, so no constant repairs it:

# %% tags=["hide-input"]
# Figure: left, the weights of 32 experts for one token: four tall bars, and
# under them the low bars of a softmax over all. Right, the sum of the four
# weights: one if chosen first, else spread about 0.4 for 32 experts and
# about 0.2 for 128.
token = torch.randn(32)
best = token.topk(4).indices
after = torch.zeros(32)
after[best] = token[best].softmax(0)
fig, (left, right) = plt.subplots(1, 2)
left.bar(torch.arange(32), after, color="C0", label="choose, then softmax")
left.bar(torch.arange(32), token.softmax(0), color="C1",
         label="softmax over all 32")
left.set(xlabel="expert", ylabel="weight", ylim=(0, 0.56))
left.legend(loc="upper left")
for E, color in ((32, "C1"), (128, "C2")):
    mass = torch.randn(5000, E).softmax(-1).topk(4).values.sum(-1)
    right.hist(mass, bins=40, range=(0, 1), color=color, alpha=0.8,
               label=f"{E} experts")
right.axvline(1, color="C0", lw=2)
right.text(0.97, 300, "choose,\nthen softmax", ha="right")
right.set(xlabel="sum of a token's four weights", ylabel="tokens of 5000")
right.legend(loc="upper right", bbox_to_anchor=(0.96, 1))
plt.show()

# %% [markdown]
# Left, one token: the same four experts lead, but a softmax over all 32
# gives most of the weight to experts that are not asked. Right, what is
# left for the four: a different fraction for each token, and less with more
# experts.
#
# ## Derivation
#
# **The weights.** Let $l_1 \dots l_E$ be a token's logits and
# $\mathcal{C}$ the $K$ experts with the largest. gpt-oss weighs expert
# $e \in \mathcal{C}$ by
#
# $$
# w_e = \frac{e^{l_e}}{\sum_{c \in \mathcal{C}} e^{l_c}} .
# $$ (routing-weights)
#
# **The two orders.** Softmax over all gives $p_e = e^{l_e} / Z$ with
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
# **Rounding.** Rounding to bf16 is monotone: if $a > b$, the rounded $a$ is
# at least the rounded $b$. It never swaps two logits, it can only merge
# them. So the chosen set changes only where the $K$-th and the $(K+1)$-th
# largest logit become equal, and then only if the tie is broken the wrong
# way, half of the time. For standard normal logits the threshold lies near
# $t = \Phi^{-1}(1 - K/E)$, where there are $\lambda = E \varphi(t)$ logits
# to the unit; the gap between the two is then about exponential with mean
# $1/\lambda$. bf16 is a grid of step $u$ there, and two numbers a gap
# $g < u$ apart round to the same point with probability $1 - g/u$. Hence,
# for $\lambda u$ well below one,
#
# $$
# P(\text{flip}) \approx \frac12 \int_0^u \lambda e^{-\lambda g}
#   \Bigl(1 - \frac gu\Bigr) dg \approx \frac{\lambda u}{4} .
# $$ (routing-flip)
#
# ($\Phi$, $\varphi$: distribution and density of the standard normal.
# $u = 2^{-7}$ for logits between 1 and 2. The step grows with the logit:
# logits twice as large have half the $\lambda$ and twice the $u$.) For 128
# experts $t = 1.86$, $\lambda = 9.0$ and the estimate is 1.8 %; with more
# experts $\lambda$ grows, and with it the flips.
#
# **Load.** If all experts are equally likely and tokens independent, an
# expert's count among $N$ tokens is binomial with probability $K/E$. Its
# coefficient of variation (standard deviation over mean) and the number of
# distinct experts that the $N$ tokens hit together are
#
# $$
# \mathrm{CV} = \sqrt{\frac{E/K - 1}{N}}, \qquad
# \mathbb{E}[\text{hit}] = E \,\Bigl(1 - \bigl(1 - \tfrac KE\bigr)^N\Bigr) .
# $$ (routing-load)
#
# Weights are read from memory once per expert that is hit, whatever the
# number of tokens, so the second number is what batched decoding pays. An
# expert that a token chooses with probability $q_e$ is hit with probability
# $1 - (1 - q_e)^N$. That is concave in $q_e$ and the $q_e$ sum to $K$, so
# an unbalanced router hits fewer.
#
# ## Code
#
# ### Choose, then weigh
#
# `torch.topk` leaves open which of two equal values it returns. A stable
# sort does not: equal logits keep the order of their experts. Sorting 128
# numbers takes about a thousand comparisons, the four experts 200 million
# FLOPs.

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
flat = torch.zeros(1, 32)
print("32 equal logits:", route(flat, 4)[1][0].tolist())

# %% [markdown]
# ### The other order

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
for ours, other in zip(route(logits, 4), softmax_then_topk(logits, 4),
                       strict=True):
    torch.testing.assert_close(ours, other, rtol=1e-12, atol=0)
print("choose then softmax = softmax, choose, renormalise")

# %% [markdown]
# In few bits the equality holds on paper only: the softmax over all is a
# second rounding before the choice. Near 0 the bf16 grid of logits is fine,
# at 0.1 its step is 0.0005. A probability keeps 8 significant bits wherever
# it lies, a step of 0.4 to 0.8 %, which is 0.004 to 0.008 in the logit.

# %%
low = logits[:, :32].bfloat16()
for name, values in (("logits", low), ("probabilities", low.softmax(-1))):
    ordered = values.sort(-1, descending=True).values
    merged = (ordered[:, 1:] == ordered[:, :-1]).float().mean()
    print(f"neighbouring {name:13} that are equal: {merged:.0%}")

# %% [markdown]
# ### The router
#
# What gives the logits is a linear layer with bias, from D to E. The
# [layers](../model/layers.ipynb) make a module of it and of `route`.

# %%
layer = torch.nn.Linear(96, 8)
weights, ids = route(layer(torch.randn(5, 96)), 2)
print(tuple(weights.shape), weights.dtype, tuple(ids.shape), ids.dtype)

# %% [markdown]
# ### Load

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
    print(f"K = {k}, ties {where}: equal outputs:", bool(gap < 1e-6))

# %% [markdown]
# Our rule makes the result reproducible; it does not make it right. Two
# correct programs may differ on such a token.
#
# **Flips.** Standard normal logits, rounded; the chosen set is compared
# with that of float64:

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


def estimate(E, bits, k=4):
    t = torch.special.ndtri(torch.tensor(1 - k / E)).item()
    density = E * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    step = 2.0 ** (math.floor(math.log2(t)) - bits)
    return density * step / 4


sizes = (16, 32, 64, 128, 256)
measured = {E: flips(E) for E in sizes}
for E in sizes:
    assert 0.5 < measured[E][0] / estimate(E, 7) < 2
    assert 0.35 < measured[E][0] / measured[E][1] < 0.65
assert f"{100 * estimate(128, 7):.1f}" == "1.8"  # per cent
print("flips happen at ties only; about half of the ties flip")

# %% tags=["hide-input"]
# Figure: the share of tokens whose chosen experts rounding changes, over 16
# to 256 experts. It grows with their number; the estimate follows the bf16
# curve, ties are about twice as many, fp16 lies far below.
fig, ax = plt.subplots()
ax.plot(sizes, [100 * measured[E][1] for E in sizes], "^-", color="C3",
        label="bf16, ties at the border")
ax.plot(sizes, [100 * measured[E][0] for E in sizes], "o-", color="C0",
        label="bf16, chosen set changes")
ax.plot(sizes, [100 * estimate(E, 7) for E in sizes], "k:",
        label="estimate λu/4")
ax.plot(sizes, [100 * measured[E][2] for E in sizes], "s-", color="C2",
        label="fp16, chosen set changes")
ax.set(xscale="log", yscale="log", xlabel="experts E (4 chosen)",
       ylabel="% of tokens")
ax.set_xticks(sizes, [str(E) for E in sizes])
ax.set_yticks([0.1, 1], ["0.1", "1"])
ax.minorticks_off()
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The fraction grows with $E$ and is about eight times smaller in fp16,
# which has three bits more. It grows fastest from 16 to 32 and from 128 to
# 256, where the threshold passes 1 and 2 and the step of bf16 doubles. Over
# all layers, if they were independent, and what one flip changes:

# %%
for E, L in ((32, 24), (128, 36)):
    f = measured[E][0]
    fourth = route(torch.randn(20_000, E), 4)[0][:, 3].mean().item()
    print(f"E = {E:3}: {100 * f:.0f} % of tokens a layer, "
          f"{100 * (1 - (1 - f) ** L):.0f} % in {L} layers; "
          f"the fourth weight is {fourth:.2f} on average")
assert 0.4 < 1 - (1 - f) ** L < 0.6  # about half, says the question

# %% [markdown]
# A near tie is thus not a small change: about a sixth of the layer's
# answer comes from another expert. That is one reason not to judge a bf16
# implementation by whether its top token equals another's: each is a fair
# rounding of the model, and they part where the router was undecided. Judge
# both against float64 and report the chosen experts.
#
# **Load and hits**, against simulation. With independent logits
# {eq}`routing-load` holds. In a random router the logits are products of a
# weight matrix and hidden states, here noise plus a part common to all
# tokens, 0, 0.5 or 1 times as long as the noise:

# %%
def random_router(E, tokens, common=0.0, D=64):
    """ids of a random router; common: length of a shared part of x."""
    g = torch.Generator().manual_seed(E)
    x = torch.randn(tokens, D, generator=g)
    x = x + common * torch.randn(D, generator=g)
    weight = torch.randn(E, D, generator=g) / D ** 0.5
    return route(x.double() @ weight.double().T, 4)[1]


def cv(load):
    return (load.double().std(correction=0) / load.double().mean()).item()


for E in (32, 128):
    ids = route(torch.randn(8192, E), 4)[1]
    fair = math.sqrt((E / 4 - 1) / 8192)
    assert 0.7 < cv(expert_load(ids, E)) / fair < 1.4
    row = [cv(expert_load(random_router(E, 8192, c), E)) for c in (0, 0.5, 1)]
    print(f"E = {E:3}: CV {fair:.2f} if fair; random router, common part "
          "0, 0.5, 1:", [f"{x:.1f}" for x in row])
    shares = expert_load(random_router(E, 8192, 1.0), E) * E / 4 / 8192
    print(f"         with 1: the busiest expert has {shares.max():.1f} times "
          f"its fair share, {(shares < 0.1).sum()} have less than a tenth")

# %%
for E in (32, 128):
    for N in (1, 4, 16, 64):
        sets = route(torch.randn(400 * N, E), 4)[1].view(400, -1)
        hits = torch.zeros(400, E).scatter(1, sets, 1.0).sum(1).mean().item()
        assert abs(hits / expected_hits(E, 4, N) - 1) < 0.03
uneven = random_router(32, 8192, 1.0).view(512, -1)
hit = torch.zeros(512, 32).scatter(1, uneven, 1.0).sum(1).mean().item()
print(f"16 tokens hit {expected_hits(32, 4, 16):.0f} of 32 if fair, "
      f"{hit:.0f} with a common part of 1")

# %% [markdown]
# An untrained router is not fair: its rows differ in length, and what the
# tokens have in common favours the same experts in all of them. Balance has
# to be trained, and the gradient does not do it by itself: experts that
# were not chosen get none.

# %%
logits = torch.randn(1, 32, requires_grad=True)
weights, ids = route(logits, 4)
(weights * torch.randn(1, 4)).sum().backward()
moved = logits.grad[0].nonzero().flatten()
print("logits with a gradient:", len(moved), "- the chosen:",
      torch.equal(moved, ids[0].sort().values))

# %% [markdown] The auxiliary loss that repairs this {cite}`switch2021` is that
# of [training](../training/training.ipynb).
#
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
    return (ids != hf_ids).any(-1), tied


for E, K, D in ((4, 1, 32), (8, 2, 96), (32, 4, 64), (128, 4, 64)):
    different, tied = compare(E, K, D, torch.float32)
    assert not (different & ~tied).any()
    different, tied = compare(E, K, D, torch.bfloat16)
    assert not (different & ~tied).any()
print("weights equal bit for bit; experts too, wherever there is no tie")

# %% [markdown]
# On exact ties our sort and their `topk` may name different experts. On a
# row of equal logits `torch.topk` does not take them in order:

# %%
for E in (8, 32, 128):
    stable = route(torch.zeros(1, E), 4)[1][0].tolist()
    print(f"E = {E:3}: ours {stable}, topk in this order too:",
          torch.zeros(E).topk(4).indices.tolist() == stable)

# %% [markdown]
# ### Known trouble
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
# - [torchtitan#2212][t3], closed, "corrects" the 120b to 8 experts a token.
#   The released configuration says 4.
#
# [t1]: https://github.com/pytorch/torchtitan/issues/2258
# [t2]: https://github.com/pytorch/torchtitan/pull/2319
# [t3]: https://github.com/pytorch/torchtitan/pull/2212
# [m]: https://github.com/lablup/mlxcel/pull/391
# [p1]: https://github.com/pytorch/pytorch/issues/27542
# [p2]: https://github.com/pytorch/pytorch/issues/88227
#
# ## In the 20b and the 120b

# %%
def expert_bytes(c):
    """One expert's weights in MXFP4 (17 bytes for 32), biases in bf16."""
    weights = 3 * c.hidden_size * c.intermediate_size
    biases = 2 * c.intermediate_size + c.hidden_size
    return weights * 17 // 32 + 2 * biases


from gptoss.weights.config import GptOssConfig

configs = {"20b": GptOssConfig.gpt_oss_20b(),
           "120b": GptOssConfig.gpt_oss_120b()}
for name, c in configs.items():
    E, D, L = c.num_local_experts, c.hidden_size, c.num_hidden_layers
    router = torch.nn.Linear(D, E, dtype=torch.bfloat16, device="meta")
    count = sum(p.numel() for p in router.parameters())
    assert count == E * D + E
    four = c.num_experts_per_tok * expert_bytes(c)
    print(f"{name:4}: routers {L * count:,} parameters; four experts "
          f"{four / 1e6:.1f} MB of a layer's {E * four / 4e6:.0f} MB")

# %% [markdown]
# What decoding reads, by {eq}`routing-load`. With a batch of 1 each token
# reads four experts in every layer; a larger batch shares them:

# %% tags=["hide-input"]
# Figure: left, the share of a layer's experts that are read, rising to all
# of them as more tokens are decoded together, later for the 120b; right,
# the gigabytes of experts read for each token, falling.
fig, (left, right) = plt.subplots(1, 2)
batch = [2 ** i for i in range(10)]
for name, c in configs.items():
    E, K = c.num_local_experts, c.num_experts_per_tok
    hits = [expected_hits(E, K, N) for N in batch]
    size = expert_bytes(c) * c.num_hidden_layers / 1e9
    left.plot(batch, [100 * h / E for h in hits], "o-", ms=3, label=name)
    right.plot(batch, [h * size / N for h, N in zip(hits, batch,
               strict=True)], "o-", ms=3, label=name)
left.set(xscale="log", xlabel="tokens decoded together, N",
         ylabel="% of the experts read")
right.set(xscale="log", yscale="log", xlabel="tokens decoded together, N",
          ylabel="GB of experts a token")
for ax in (left, right):
    ax.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
    ax.minorticks_off()
    ax.legend()
right.set_yticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
plt.show()

# %%
for name, c in configs.items():
    E, K = c.num_local_experts, c.num_experts_per_tok
    layer = expert_bytes(c) * c.num_hidden_layers / 1e9
    print(f"{name:4}:", ", ".join(
        f"N = {N}: {expected_hits(E, K, N) * layer / N:.2f} GB a token"
        for N in (1, 8, 64)))

# %% [markdown]
# Batching pays later than in a dense model: there 8 tokens cost as many
# bytes as one; here 8 tokens of the 120b read 7.2 times the experts of one,
# and the saving begins where the experts start to coincide, near
# $N = E/K$.
#
# ## Cost
#
# The router needs $2 N D E$ FLOPs and reads $2 D E + 2 E$ bytes; the chosen
# experts need $6 N K D F$. The ratio $E / (3 K F)$ is 0.09 % in the 20b
# and 0.37 % in the 120b. Torch's counter sees matrix products only, so the
# sort and the softmax of four are not in it.

# %%
from torch.utils.flop_counter import FlopCounterMode

for c in configs.values():
    D, E, K = c.hidden_size, c.num_local_experts, c.num_experts_per_tok
    router = torch.nn.Linear(D, E, dtype=torch.bfloat16, device="meta")
    with FlopCounterMode(display=False) as counter:
        route(router(torch.empty(16, D, dtype=torch.bfloat16,
                                 device="meta")), K)
    assert counter.get_total_flops() == 2 * 16 * D * E
    print(f"{100 * E / (3 * K * c.intermediate_size):.2f} %")

# %% [markdown]
# ## Takeaways
#
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
print("fp32: almost none, bf16: more than 1 %:", narrow > 40)
# Cost: the weights (E, D) in fp32, or a widened copy: under 0.4 % of the
# experts' FLOPs. But it is not what the released model was run with.

# %% [markdown]
# ## Sources
#
# - OpenAI, gpt-oss: `gpt_oss/torch/model.py`, `MLPBlock.forward`
#   {cite}`gptoss2025`: "the softmax of the router projection over only the
#   selected experts".
# - transformers: `models/gpt_oss/modeling_gpt_oss.py`, `GptOssTopKRouter`.
# - Sparse mixtures of experts: {cite}`moe2017`; one expert and the balance
#   loss: {cite}`switch2021`.
