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
#     module: plan
#     public: [CARDS, estimate, plan_table, traffic]
# ---

# %% [markdown]
# # What is a second card worth?
#
# ## Question
#
# A second card halves what each must read for a token. Why does it not halve
# the time? At best two H100s write with the 20b 1.2 times as fast as one, four
# 1.4 times, and eight are slower than four.

# %%
import os

import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor
plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()
released = {"20b": big, "120b": GptOssConfig.gpt_oss_120b()}

# %% [markdown]
# ## Picture
#
# Where the time of a token goes, on 1, 2, 4 and 8 cards, as if every model
# fitted: *reading* weights and cache from the card's own memory, and
# *meeting* the other cards for the sums. Drawn by the finished package. On
# the left cards with NVLink, NVIDIA's direct links between cards; on the
# right cards that talk through PCIe, the computer's common bus.

# %% tags=["hide-input", "picture"]
# Figure: milliseconds a token on 1, 2, 4 and 8 cards, four panels: 20b and
# 120b on fast and on slow cards. Each bar is reading, below, and meetings,
# on top. Reading shrinks with the cards and meetings grow: on the fast cards
# four are fastest and eight need more time again.
import math

from gptoss.parallel.plan import CARDS, Card, token_seconds
from gptoss.parallel.shards import mesh_rank

fig, axes = plt.subplots(1, 4, figsize=(7.4, 2.7))
panels = [(card, name) for card in (CARDS[2], CARDS[0]) for name in released]
for ax, (card, name) in zip(axes, panels, strict=True):
    free = Card(card.name, card.memory, card.read, math.inf, 0.0)
    top = []
    for x, n in enumerate((1, 2, 4, 8)):
        mesh = mesh_rank(released[name], 0, n)
        read, every = (1e3 * token_seconds(released[name], mesh, kind, 8192)
                       for kind in (free, card))
        ax.bar(x, read, 0.72, color="C0")
        ax.bar(x, every - read, 0.72, bottom=read, color="C1")
        ax.text(x, every, f"{every:.1f}", ha="center", va="bottom",
                fontsize=7.5)
        top.append(every)
    link = "NVLink" if card.link > 1e11 else "PCIe"
    ax.set(xticks=range(4), xticklabels=("1", "2", "4", "8"), xlabel="cards",
           title=f"{name}, {card.read / 1e12:.2f} TB/s\n{link}",
           ylim=(0, (2 if link == "NVLink" else 6.2)))
    ax.title.set_fontsize(8.5)
    ax.grid(axis="x", visible=False)
axes[0].set_ylabel("ms a token, at best")
axes[1].text(3.42, 1.86, "orange: meeting", color="#a85f00", fontsize=8,
             ha="right")
axes[1].text(3.42, 1.7, "blue: reading", color="C0", fontsize=8, ha="right")
plt.show()

# %% [markdown]
# What to see: the blue parts shrink with the cards, the orange ones grow. With
# four or eight of the fast cards, meeting takes longer than reading, and on
# eight of the slow ones too.
#
# ## The naive version
#
# Bytes over bandwidth: R cards read a part each, so a token takes an R-th of
# the time. That is true of the reading and of nothing else. For the 20b:

# %%
for n in (1, 2, 4, 8):
    whole = bytes_read_per_token(big) / 3350e9
    print(f"{n} H100: {1e3 * whole / n:.2f} ms of reading a token, "
          f"{n} times as fast")

# %% [markdown]
# ## Derivation
#
# ### One token on eight cards, by hand
#
# [What ranks say](collectives.ipynb) counts $2L + 1 = 49$ sums a token for
# the 20b. A sum is an all-reduce, in a ring of eight $2 \cdot 7 = 14$ steps
# one after the other. We need three times of a card:
#
# - $\tau$: to begin a collective at all. A GPU starts a program, its *kernel*,
#   for each one.
# - $\alpha$: for a step, however short.
# - $1/\lambda$: for a byte on the link.
#
# NCCL reckons with 6.6 microseconds, 0.6 a step, and the H100's link takes
# 450 GB a second:

# %%
tau, alpha, link = 6.6e-6, 0.6e-6, 450e9
step = alpha + 2 * big.hidden_size / 8 / link
meeting = tau + 14 * step
print(f"a step {1e6 * step:.2f} microseconds, a sum of 14 steps "
      f"{1e6 * meeting:.1f}, 49 sums {1e3 * 49 * meeting:.2f} ms")
print(f"reading an eighth {1e3 * bytes_read_per_token(big) / 8 / 3350e9:.2f}"
      " ms")

# %% [markdown]
# So eight cards read for 0.14 ms and talk for 0.74. With $R$ ranks and memory
# at $\beta$ bytes a second a token takes about
#
# $$
# t_R \approx \frac{\text{bytes read}}{R \beta} + (2L + 1) \bigg(\tau +
# 2(R - 1) \Big(\alpha + \frac{2D}{R \lambda}\Big)\bigg) .
# $$ (parallel-time)
#
# The first term falls with $R$, the second grows with it. It is not the bytes
# that make it grow, as $\frac{R-1}{R} < 1$: the *steps* do. So $\tau +
# 2(R-1)\alpha$, the latency of a sum, depends on the number of ranks, and
# whoever writes one constant for it finds that cards always help. The formula
# in Python, for the 20b:

# %%
def seconds(R: int, tau: float, alpha: float, link: float) -> float:
    reading = bytes_read_per_token(big) / (R * 3350e9)
    steps = 2 * (R - 1)
    step = alpha + 2 * big.hidden_size / (R * link)
    return reading + (R > 1) * 49 * (tau + steps * step)


print("cards               1     2     4     8")
for name, latency in (("a ring", (6.6e-6, 0.6e-6)),
                      ("a constant 8 us", (8e-6, 0.0))):
    row = [1e3 * seconds(R, *latency, 450e9) for R in (1, 2, 4, 8)]
    print(f"{name:15}", *(f"{ms:5.2f}" for ms in row), "ms a token")

# %% [markdown]
# With a constant, eight cards would be the fastest. A library may add short
# tensors up along a tree instead, in about $2 \log_2 R$ steps: 6 instead of 14
# for eight ranks, the same 2 for two. The truth lies between the two, and
# above both where a rank has to wait for another.

# %% [markdown] tags=["measured"]
# **And over gloo?** The previous chapter measured it: on a virtual machine
# with two cores a sum took 125 microseconds among two processes, 318 among
# three, about 70 microseconds a step and nearly nothing to begin. (Four
# processes on two cores took 664: they also wait for a turn.) The cell below
# puts that $\alpha$ into the same formula, with a memory of 20 GB/s.

# %%
print("CPUs of 20 GB/s over gloo: reading, talking, together, in ms")
for R in (1, 2, 4, 8):
    reading = bytes_read_per_token(big) / R / 20e9
    talking = 49 * 2 * (R - 1) * (70e-6 + 2 * big.hidden_size / R / 2e9)
    print(f"{R}: {1e3 * reading:6.1f} {1e3 * talking:5.1f} "
          f"{1e3 * (reading + talking):6.1f}: "
          f"{bytes_read_per_token(big) / 20e9 / (reading + talking):.1f} "
          "times as fast as one")

# %% [markdown]
# A hundred times the latency, and yet four such computers would be 2.8 times
# as fast as one, where four H100s are 1.4 times: beside so slow a memory
# talking counts for less. What a second card is worth is decided by latency
# *beside* reading. The faster the memory, the less the second card helps.

# %% [markdown]
# ### The busiest group
#
# One thing makes the reading shrink by less than $R$. Where experts are dealt
# out in groups ([who holds which part](shards.ipynb)), a token's experts need
# not lie evenly. By hand: four experts in two pairs, of which a token chooses
# two. There are six choices. In two of them both lie in one pair, so the
# busier group runs 2; in four it runs 1. On average the busiest runs
# $(2 \cdot 2 + 4 \cdot 1) / 6 = 1.33$ experts, not 1.
#
# In general each choice of K of the E experts is taken as equally likely. How
# many has the busiest of $n$ groups, on average? Call that number $M$. A group
# takes $j$ of its $E/n$ experts in $\binom{E/n}{j}$ ways. Write that as the
# coefficient of $z^j$, leave out $j > m$, and multiply the polynomials of all
# groups: the coefficient of $z^K$, written $[z^K]$, counts the choices with
# $M \le m$. In the example with $m = 1$: $(1 + 2z)^2$ has $4 z^2$, the four
# choices above. And the mean of a count is $\sum_{m \ge 0} P(M > m)$, so
#
# $$\mathrm{E}[M] = \sum_{m=0}^{K-1} \bigg(1 - \binom{E}{K}^{-1} [z^K]
# \Big(\sum_{j \le m} \binom{E/n}{j} z^j\Big)^{n}\bigg) .
# $$ (parallel-busiest)

# %% tags=["export"]
import math


def expected_most(experts: int, chosen: int, groups: int) -> float:
    """Experts that the busiest of `groups` equal groups has to run, on
    average, if a token's `chosen` of `experts` are all equally likely."""
    size, every, expected = experts // groups, math.comb(experts, chosen), 0.0
    for most in range(chosen):
        ways = [1] + [0] * chosen  # to choose so many, at most `most` a group
        for _ in range(groups):
            ways = [sum(ways[n - m] * math.comb(size, m)
                        for m in range(min(n, most) + 1))
                    for n in range(chosen + 1)]
        expected += 1 - ways[chosen] / every
    return expected

# %%
print(f"two of four in two pairs: {expected_most(4, 2, 2):.2f}")
for n in (1, 2, 4, 8):
    print(f"4 of 32 experts in {n} groups: the busiest runs "
          f"{expected_most(32, 4, n):.2f}, even would be {4 / n:.2f}")

# %% [markdown]
# ## Code
#
# ### What goes over the links?
#
# {eq}`parallel-calls` for every rank, as a table: name of the collective ->
# (calls, bytes a call). Two sums a layer of the stage, and one more on the
# first stage for the embedding, if tensors are shared; a gathering on the last
# stage, of as many rows as the largest part of the vocabulary; between stages
# a sending and a receiving, and at the end the logits for all. What is not
# called is not in the table. The names are those of torch's operators.

# %% tags=["export"]
from gptoss.parallel.shards import (
    MeshRank,
    ParallelError,
    cut,
    fits,
    mesh_rank,
    on_stage,
    rank_config,
    stage_layers,
    vocabulary_rows,
)
from gptoss.weights.config import GptOssConfig


def traffic(config: GptOssConfig, mesh: MeshRank, tokens: int = 1,
            kept: int = 1, width: int = 2) -> dict[str, tuple[int, int]]:
    """Collectives of one forward on a mesh: name -> (calls, bytes a call).

    tokens of all rows together, kept of them with logits, width bytes a
    number. The bytes are those of the tensor that the rank puts in (or, for
    recv and broadcast, takes out).
    """
    stream = tokens * config.hidden_size * width
    logits = kept * config.vocab_size * width
    mine = kept * vocabulary_rows(config, mesh.tp_size) * width
    first, last = mesh.pp_rank == 0, mesh.pp_rank == mesh.pp_size - 1
    layers = len(stage_layers(config, mesh.pp_size)[mesh.pp_rank])
    several, staged = mesh.tp_size > 1, mesh.pp_size > 1
    calls = {"allreduce_": (several * (2 * layers + first), stream),
             "allgather_": (several * last, mine),
             "send": (int(not last), stream),
             "recv_": (int(not first), stream),
             "broadcast_": (int(staged), logits)}
    return {name: call for name, call in calls.items() if call[0]}

# %%
for world, stages in ((1, 1), (8, 1), (8, 2)):
    print(f"{world} ranks in {stages} stages, rank 0:\n   ",
          traffic(big, mesh_rank(big, 0, world, stages)))

# %% [markdown]
# And a witness: torch dispatches its collectives as operators, where they can
# be counted without asking our code.

# %% tags=["export"]
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class Tally(TorchDispatchMode):
    """Inside, counts what torch.distributed is asked for: `counts` has
    (name, bytes a call) -> calls, as torch dispatches them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "c10d":
            name = operator.overloadpacket.__name__
            given = args[1] if name == "allgather_" else args[0]
            size = sum(x.nbytes for x in given)
            self.counts[name, size] += 1
        return operator(*args, **(kwargs or {}))

# %% [markdown]
# ### What is a card?
#
# Bytes and speeds are the makers' numbers. For $\tau$ and $\alpha$ we take
# what NCCL itself reckons with when it chooses between ring and tree: 6.6
# microseconds, and 0.6 a step over NVLink or 1.0 over PCIe. Those are its
# tuner's constants for small messages, not measurements of these cards. The
# reserve is an assumption.

# %% tags=["export"]
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU: bytes, bytes a second from its memory and to another card,
    seconds to begin a collective, and seconds for each of its steps however
    small (what NCCL's tuner assumes; not measured)."""

    name: str
    memory: float
    read: float
    link: float
    latency: float
    step: float = 0.0


# memory, its speed and the links from the makers' data sheets: RTX 4090
# (PCIe 4.0 x16), A100 SXM 40 GB (NVLink 3), H100 SXM 80 GB (NVLink 4)
CARDS = (Card("24 GB, PCIe", 24e9, 1008e9, 32e9, 6.6e-6, 1.0e-6),
         Card("40 GB, NVLink", 40e9, 1555e9, 300e9, 6.6e-6, 0.6e-6),
         Card("80 GB, NVLink", 80e9, 3350e9, 450e9, 6.6e-6, 0.6e-6))
MOST_CONTEXT = 2 ** 30  # tokens; no configuration has more positions
RESERVE = 1.5e9  # bytes of a card for CUDA, NCCL and activations (assumed)

# %% [markdown]
# ### How long does a token take?
#
# {eq}`parallel-time` with all that a rank does: its part of attention, router
# and head, of the experts those of the busiest group, its part of the cache;
# then each collective of `traffic` with its steps. An all-reduce has $2(R-1)$
# of them with an $R$-th of the bytes each, the gathering $R-1$ with all that
# the rank gives; handing on is one step, which the sender pays. The embedding
# is left out: of that a token reads one row.

# %% tags=["export"]
from functools import lru_cache

from gptoss.weights.layout import DTYPES, component_of, tensor_table
from gptoss.weights.sizes import (
    bytes_read_per_token,
    cache_bytes,
    expert_bytes,
)


@lru_cache(maxsize=256)
def rank_bytes(config: GptOssConfig, mesh: MeshRank) -> dict[str, int]:
    """Bytes of weights on a mesh, by component; released layout. Not to be
    changed."""
    parts: dict[str, int] = {}
    for spec in tensor_table(config).values():
        if on_stage(config, mesh, spec.name):
            _, shape, _ = cut(config, mesh, spec)
            part = component_of(spec.name)
            parts[part] = (parts.get(part, 0) + math.prod(shape)
                           * DTYPES[spec.dtype].itemsize)
    return parts


def token_seconds(config: GptOssConfig, mesh: MeshRank, card: Card,
                  context: int) -> float:
    """Seconds for a token on a mesh at the roofline: reading, then talking.

    Weights that it touches and the cache, from memory; each collective has
    to begin and takes the steps of a ring, one after the other.
    """
    mine = rank_config(config, mesh)
    parts = rank_bytes(config, mesh)
    touched: float = sum(parts.values()) - parts["experts"] - parts.get(
        "embedding", 0)
    chosen = expected_most(config.num_local_experts,
                           config.num_experts_per_tok, mesh.ep_size)
    touched += (mine.num_hidden_layers * chosen * expert_bytes(config)
                / mesh.slices)
    seconds = (touched + cache_bytes(mine, context)) / card.read
    others = mesh.tp_size - 1  # name -> steps, and the share sent in each
    ring = {"allreduce_": (2 * others, 1 / mesh.tp_size),
            "allgather_": (others, 1)}
    for name, (calls, size) in traffic(config, mesh).items():
        if name != "recv_":  # the sender's time; others hand on once
            steps, share = ring.get(name, (1, 1))
            seconds += calls * (card.latency + steps * (
                card.step + share * size / card.link))
    return seconds

# %% [markdown]
# ### Does it fit, and how fast would it be?
#
# One row of a plan. If tensors can be shared by so many cards, the fullest of
# them decides whether it fits; else each card becomes a stage; and if there
# are not enough layers for that either, nothing fits: all numbers are 0 and
# both speeds `None`. The longest context is what the free memory of the
# fullest card holds, at most what the configuration allows.

# %% tags=["export"]
@dataclass(frozen=True)
class Estimate:
    """So many cards for a model: bytes on the fullest of them (0: it divides
    in no way), whether that fits, the longest context that would, and tokens
    a second with shared tensors, and with a stage a card (None: it does not
    divide so)."""

    gpus: int
    card: str
    weights: int
    cache: int
    fits: bool
    longest: int
    tensor: float | None
    pipeline: float | None


def estimate(config: GptOssConfig, gpus: int, card: Card, context: int
          ) -> Estimate:
    """One row of a plan: bf16, one sequence of `context` tokens."""
    shared = fits(config, gpus)
    if not shared and gpus > config.num_hidden_layers:
        return Estimate(gpus, card.name, 0, 0, False, 0, None, None)
    ranks = [mesh_rank(config, rank, gpus, 1 if shared else gpus)
             for rank in range(gpus)]
    full = max(ranks, key=lambda mesh: sum(rank_bytes(config, mesh).values()))
    weights = sum(rank_bytes(config, full).values())
    mine = rank_config(config, full)
    cache = cache_bytes(mine, context)
    grows = (cache_bytes(mine, 2) - cache_bytes(mine, 1)) or 1
    room = card.memory - RESERVE - weights - cache_bytes(mine, 0)
    longest = min(int(max(room, 0) // grows), config.max_position_embeddings)
    staged = [mesh_rank(config, rank, gpus, gpus) for rank in range(gpus)
              ] if gpus <= config.num_hidden_layers else []
    return Estimate(
        gpus, card.name, weights, cache, context <= longest, longest,
        1 / token_seconds(config, full, card, context) if shared else None,
        1 / sum(token_seconds(config, mesh, card, context)
                for mesh in staged) if staged else None)


def plan(config: GptOssConfig, context: int = 8192) -> list[Estimate]:
    """What 1, 2, 4 and 8 of CARDS can do with a model."""
    if not 1 <= context <= MOST_CONTEXT:
        raise ParallelError(f"--context: expected 1 to {MOST_CONTEXT:,} "
                            "tokens, found "
                            + ("more" if context > 1 else f"{context}"))
    return [estimate(config, gpus, card, context)
            for card in CARDS for gpus in (1, 2, 4, 8)]


def plan_table(name: str, config: GptOssConfig, context: int = 8192) -> str:
    """A plan as text."""
    def number(value: float | None) -> str:
        return f"{value:8,.0f}" if value else f"{'-':>8}"

    lines = [f"{name}, {context:,} tokens of context; a token reads "
             f"{bytes_read_per_token(config) / 1e9:.2f} GB of weights",
             f"{'':16} {'GB on the':>15} {'longest':>14}"
             f"{'tokens a second':>18}",
             f"{'cards':16} {'fullest card':>15} {'context':>14}"
             f"{'tensor':>9} {'stages':>8}"]
    for row in plan(config, context):
        gb = (row.weights + row.cache) / 1e9
        lines.append(f"{row.gpus} x {row.card:13} {gb:14.1f} "
                     + (f"{row.longest:14,}{number(row.tensor)} "
                        f"{number(row.pipeline)}" if row.fits
                        else f"{'does not fit':>14}" if row.weights
                        else f"{'not divisible':>14}"))
    return "\n".join(lines)

# %%
print(plan_table("gpt-oss-20b", big))
one, two, four, eight = (estimate(big, n, CARDS[2], 8192)
                         for n in (1, 2, 4, 8))
print("H100s against one:", *(f"{n}: {row.tensor / one.tensor:.1f} times"
      for n, row in ((2, two), (4, four), (8, eight))), sep="  ")
assert two.tensor < eight.tensor < four.tensor < 1.4 * one.tensor
assert eight.pipeline < one.pipeline

# %% [markdown]
# "tensor" shares every layer among all cards, "stages" gives each card some
# layers. Stages are slower than one card for one text, since they wait for
# each other; they are for models that do not fit.
#
# ## What is refused
#
# A plan for no context, or for more than $2^{30}$ tokens, is refused in the
# words of the command line's option; what is too large is not printed, as it
# may have four hundred digits.

# %%
for context in (0, 10 ** 400):
    try:
        plan(big, context)
    except ParallelError as error:
        print(error)

# %% [markdown]
# ## It holds
#
# Four processes that `torchrun` starts, over gloo, split the shipped model in
# three ways. What torch dispatched in each of them for one token is held
# against `traffic`, which is {eq}`parallel-calls`.

# %%
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

POCKET = files("gptoss") / "pocket"
PROGRAM = """
import sys
import torch
from gptoss.weights.config import GptOssConfig
from gptoss.parallel.collectives import join, leave
from gptoss.parallel.plan import Tally, traffic
from gptoss.parallel.shards import mesh_rank
from gptoss.parallel.split import SplitGptOss

path, world = sys.argv[1], join()
config = GptOssConfig.from_pretrained(path)
for stages in (1, 2, 4):
    mesh = mesh_rank(config, world.rank, world.size, stages)
    model = SplitGptOss.part(path, mesh, world.group(mesh), torch.float32)
    with torch.inference_mode(), Tally() as tally:
        model(torch.tensor([[5]]))
    assert tally.counts == {(name, size): calls for name, (calls, size)
                            in traffic(config, mesh, width=4).items()}
    if world.rank == 0:
        print(f"{mesh.tp_size} tensor ranks x {stages} stages, one token:",
              *(f"{calls} {name.strip('_')} of {size} B" for (name, size),
                calls in tally.counts.items()), sep="\\n  ")
leave()
"""


def torchrun(processes: int, *arguments: str) -> str:
    """What the processes print; an error if one of them fails."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(processes), *arguments],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


with tempfile.TemporaryDirectory() as folder:
    program = Path(folder) / "program.py"
    program.write_text(PROGRAM)
    print(torchrun(4, str(program), str(POCKET)), end="")

# %% [markdown]
# That counts and bytes are right was asserted in every process; the times are
# not measured but reckoned, and no GPU has run this code.

# %% [markdown] tags=["given"]
# ## Against the others
#
# **Blocks.** Four slices of F = 2880 would be 720 wide, 22.5 blocks. When
# SGLang once did not pad such slices, gpt-oss-120b on eight GPUs scored 0.76
# instead of 0.80 in GPQA, and nothing crashed (sglang#9473; its remedy is to
# round up, for four slices to 23 blocks). We take the largest number of slices
# that divides, and groups of experts for the rest: nothing is padded, but
# groups share the work less evenly. Padding is the better choice where the
# busiest rank decides, that is, for one text at a time:

# %%
from gptoss.parallel.shards import hidden_slices

for n in (4, 8):
    slices = hidden_slices(big, n)
    ours = expected_most(32, 4, n // slices) / slices
    padded = 4 * math.ceil(90 / n) / 90
    print(f"{n} ranks, experts a layer on the busiest: {ours:.2f} here, "
          f"{padded:.2f} padded, {4 / n:.2f} even")
    assert 4 / n < padded < ours

# %% [markdown]
# ## In the 20b and the 120b
#
# The plan for the 120b, as `python -m gptoss inspect 120b --plan` prints it.
# They are limits of {eq}`parallel-time`, which no program reaches.

# %%
print(plan_table("gpt-oss-120b", released["120b"]))
assert not estimate(released["120b"], 1, CARDS[1], 8192).fits
assert estimate(released["120b"], 1, CARDS[2], 8192).fits
for config in released.values():
    for card in CARDS:
        speeds = [estimate(config, n, card, 8192).tensor for n in (1, 2, 4, 8)]
        assert all(b < 2 * a for a, b in zip(speeds, speeds[1:], strict=False))
        assert card.read < 3e12 or speeds[3] < speeds[2]

# %% [markdown]
# Two cards of 40 GB hold the 120b, or four of 24. Doubling the cards never
# doubles the speed, because each meeting takes longer than before; from four
# to eight of the fast cards the speed falls.

# %% [markdown]
# ## Cost
#
# For one token the bytes hardly matter: even on PCIe, sending them takes less
# than a fiftieth of the steps' time. Reading a long prompt is the other way
# round, since its sums grow with T and the steps do not.

# %%
print(f"ms, eight cards {'sums':>7} {'MB':>7} "
      + " ".join(f"{link:>6} {what}" for link in ("NVLink", "PCIe")
                 for what in ("send", "meet")))
for name, config in released.items():
    mesh = mesh_rank(config, 0, 8)
    for what, T in (("one token", 1), ("4,096 tokens", 4096)):
        count, size = traffic(config, mesh, tokens=T)["allreduce_"]
        assert count == 2 * config.num_hidden_layers + 1
        assert size == 2 * config.hidden_size * T
        ring = 2 * 7 / 8 * size * count
        row = [1e3 * part for card in (CARDS[2], CARDS[0])
               for part in (ring / card.link, count * (
                   card.latency + 2 * 7 * card.step))]
        print(f"{name:5}{what:13} {count:4} {count * size / 1e6:7,.1f} "
              + " ".join(f"{part:11.3f}" for part in row))

# %% [markdown]
# ## Takeaways
#
# - Two sums a layer, one for the embedding, one gathering of logits: for one
#   token it is their number that costs, and their steps, not their bytes.
# - A ring of $R$ ranks takes $2(R-1)$ steps, so meetings grow with the ranks
#   while reading shrinks: more cards can be slower.
# - What counts is latency beside reading: slow memory gains from more ranks
#   even over a slow network, fast memory hardly does.
# - Stages make no text faster; they are for models that do not fit.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# How long may a step take before eight H100s are slower than one, for the
# 20b? Estimate it with {eq}`parallel-time`, then find it with
# `token_seconds`. Would a tree change that?

# %% tags=["hide-cell"]
from dataclasses import replace


def eight(step: float) -> float:
    card = replace(CARDS[2], step=step)
    return token_seconds(big, mesh_rank(big, 0, 8), card, 8192)


one = token_seconds(big, mesh_rank(big, 0, 1), CARDS[2], 8192)
low, high = 0.0, 1e-4
for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if eight(middle) < one else (low, middle)
saved = 7 / 8 * bytes_read_per_token(big) / CARDS[2].read
sums = 2 * big.num_hidden_layers + 1
guess = (saved / sums - CARDS[2].latency) / (2 * 7)
print(f"{1e6 * low:.2f} microseconds, estimated {1e6 * guess:.2f}")
print(f"in a tree of 6 steps about {1e6 * low * 14 / 6:.1f}")
assert eight(0.99 * low) < one < eight(1.01 * low)
assert 0 < low < guess < 2 * low

# %% [markdown]
# ### Exercise 2
#
# Eight requests are decoded together, so weights are read once for eight
# tokens of a step and the sums grow to eight rows. Leave the experts aside:
# take reading as it was. From how many requests on does sending the bytes take
# as long as the steps, on eight H100s?

# %% tags=["hide-cell"]
per_row = 2 * big.hidden_size / 8 / CARDS[2].link  # seconds a step and row
print(f"from {CARDS[2].step / per_row:.0f} rows on; for 8 rows a step takes "
      f"{1e6 * (CARDS[2].step + 8 * per_row):.2f} microseconds instead of "
      f"{1e6 * (CARDS[2].step + per_row):.2f}")

# %% [markdown]
# ### Exercise 3
#
# What is the cheapest way to run the 120b with 32,768 tokens of context, if a
# card of 24 GB costs 2, one of 40 GB 5, and one of 80 GB 9? And the way with
# the most tokens a second for each unit of cost?

# %% tags=["hide-cell"]
price = dict(zip((card.name for card in CARDS), (2, 5, 9), strict=True))
ways = [(row.gpus * price[row.card], row)
        for row in plan(released["120b"], 32768) if row.fits]
for what, (cost, row) in (
        ("cheapest", min(ways, key=lambda way: way[0])),
        ("most a unit", max(ways, key=lambda way: way[1].tensor / way[0]))):
    print(f"{what}: {row.gpus} x {row.card}, cost {cost}, "
          f"{row.tensor:.0f} tokens a second")

# %% [markdown]
# ## Sources
#
# - NVIDIA/nccl, `src/graph/tuning.cc`: a collective takes a base latency and
#   one for each of `2 * (nRanks - 1)` or `nRanks - 1` steps; of its constants
#   those of ring and LL, its protocol for small messages.
# - torch.distributed: the operators `c10d::*` that
#   `torch.distributed.tensor.debug.CommDebugMode` counts too.
# - Rooflines: {cite}`roofline2009`. Padded slices: sgl-project/sglang#9473.
# - Data sheets: GeForce RTX 4090 (1,008 GB/s, PCIe 4.0 x16: 32 GB/s each
#   way), A100 SXM 40 GB (1,555 GB/s, NVLink 3: 300 GB/s each way), H100 SXM
#   (3,350 GB/s, NVLink 4: 450 GB/s each way). One measurement of the last
#   found 380 of the 450 (NVIDIA/nccl#1264).
