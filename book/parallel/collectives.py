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
#     module: collectives
#     public: [Group, join, leave, rehearse]
# ---

# %% [markdown]
# # What do ranks say to each other?
#
# ## Question
#
# Eight H100s share the 20b. Each reads its eighth of the weights that a token
# needs in 0.14 ms. For the same token all eight must agree 49 times on the sum
# of eight vectors of 5,760 bytes. How do eight processors add up, how many
# steps does that take, and how many bytes does each of them send?
#
# If one such sum takes 15 microseconds, however short its vectors are, then
# talking takes over five times as long as reading:

# %%
import os

import matplotlib.pyplot as plt
import torch

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor
plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()
D, L = big.hidden_size, big.num_hidden_layers
sums, size = 2 * L + 1, 2 * D
reading = bytes_read_per_token(big) / 8 / 3350e9
print(f"{bytes_read_per_token(big) / 1e9:.2f} GB a token, "
      f"{bytes_read_per_token(big) / 8e9:.2f} GB for each of eight")
print(f"{sums} sums of {size:,} bytes: {sums * size / 1e6:.2f} MB")
print(f"reading {1e3 * reading:.2f} ms, 49 times 15 microseconds "
      f"{sums * 1.5e-2:.2f} ms")
assert 5 < sums * 1.5e-5 / reading < 6

# %% [markdown]
# ## Picture
#
# The model's parts are held by *ranks*: processes with a number each, one
# process a processor ([who holds which part](shards.ipynb)). Below four ranks
# have a vector each, cut into four chunks, and all four want the sum. They
# stand in a *ring*: each sends to the next one only, the last to the first.
# In every step each rank sends one chunk.

# %% tags=["hide-input"]
# Figure: seven tables of four ranks by four chunks. Start: every field has
# one vector in it. After three steps that add, a diagonal of fields holds the
# sum of four; after three more that copy, all fields do. In each step one
# field of a rank, framed in orange, has just arrived.
def ring_counts(R: int) -> list[tuple[list[list[int]], list[int]]]:
    """(how many vectors are summed in each field, the field that arrived at
    each rank) at the start and after each step."""
    now = [[1] * R for _ in range(R)]
    states = [([row[:] for row in now], [-1] * R)]
    for copying in (False, True):
        for step in range(R - 1):
            sent = [(r - step + copying) % R for r in range(R)]
            said = [now[r][sent[r]] for r in range(R)]
            for r in range(R):
                kept = 0 if copying else now[r][sent[r - 1]]
                now[r][sent[r - 1]] = kept + said[r - 1]
            states.append(([row[:] for row in now],
                           [sent[r - 1] for r in range(R)]))
    return states


states = ring_counts(4)
fig, axes = plt.subplots(1, 7, figsize=(7.4, 1.75))
for step, (ax, (counts, arrived)) in enumerate(zip(axes, states,
                                                   strict=True)):
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=6)
    for r, row in enumerate(counts):
        for k, count in enumerate(row):
            ax.text(k, r, count, ha="center", va="center", fontsize=8,
                    weight="bold" if count == 4 else "normal")
        if arrived[r] >= 0:
            ax.add_patch(plt.Rectangle((arrived[r] - 0.46, r - 0.46), 0.92,
                                       0.92, fill=False, ec="C1", lw=1.8))
    ax.set(xticks=range(4), yticks=range(4), xticklabels=list("abcd"))
    ax.set_yticklabels([f"rank {r}" for r in range(4)] if step == 0 else [])
    ax.tick_params(length=0)
    what = ("start" if step == 0 else f"step {step}\nadd" if step < 4
            else f"step {step}\ncopy")
    ax.set_title(what, fontsize=8, loc="center")
    ax.grid(visible=False)
plt.show()

# %% [markdown]
# What to see: a number says how many of the four vectors are summed in a
# field; orange is what has just arrived. In steps 1 to 3 a chunk wanders
# round the ring and collects: rank 0's chunk a goes to rank 1, which adds its
# own a and hands on the sum of two. After step 3 each rank has one finished
# chunk. In steps 4 to 6 the finished chunks go round once more and are
# copied. No rank ever sends more than a quarter of a vector at a time.

# %% [markdown]
# ## The words
#
# - A *collective* is something that all ranks of a group call together, each
#   with its own tensor: nobody gets an answer before everybody has called.
# - The *group* says who takes part. The ranks form a grid, torch's *device
#   mesh*: the ranks of a row share tensors, those of a column follow each
#   other as stages. Each row and each column is a group.
# - A *backend* carries the bytes. **NCCL** (said "nickel") is NVIDIA's, from
#   GPU to GPU; **gloo** is the one for CPUs, over TCP between processes, on
#   one machine or several. torch calls both by the same names.
# - `torchrun` is torch's program that starts the processes and tells each its
#   number.

# %% [markdown]
# ## The naive version
#
# Every rank sends its whole vector to every other one, and each adds up what
# it has. That is one step, as all can send at once. What does it cost, and
# what comes out? Four ranks, the vectors of 1,000 tokens in bf16; each rank
# adds its own first and then those that arrive, from its neighbour on.

# %%
import torch

rng = torch.Generator().manual_seed(0)
R = 4
given = [torch.randn(1000, 64, generator=rng).bfloat16() for _ in range(R)]
own_first = [sum((given[(r + i) % R] for i in range(1, R)), given[r].clone())
             for r in range(R)]
exact = sum(x.double() for x in given)
print(f"each sends {(R - 1) * given[0].nbytes:,} bytes, for vectors of "
      f"{given[0].nbytes:,}")
for r, x in enumerate(own_first):
    off = ((x - exact).norm() / exact.norm()).item()
    print(f"rank {r}: relative error {off:.4f}, other bits than rank 0 in "
          f"{(x != own_first[0]).double().mean().item():3.0%} of the numbers")

# %% [markdown]
# Two things are wrong. Three times the vector goes out of each rank, and with
# eight ranks it would be seven times. And the ranks do not have the same sum.
# All four are equally good, but floating-point addition depends on its order,
# and each rank took another one.
#
# **Why must the copies be equal bit for bit?** Because each rank goes on with
# its own copy. Every layer's router runs on every rank, on that rank's copy of
# the residual stream, and the K largest logits decide which experts are
# computed. Where two logits almost tie, a last bit decides. Then one rank adds
# its part of expert 3 and the other its part of expert 5, and the sum of the
# two is the output of no expert at all. The four copies above, through one
# router of 32 experts:

# %%
router = torch.randn(64, 32, generator=rng).double()
chosen = [(x.double() @ router).topk(4)[1].sort(-1)[0] for x in own_first]
print("of 1,000 tokens rank 0 and rank r choose other experts for:",
      [(ids != chosen[0]).any(-1).sum().item() for ids in chosen])

# %% [markdown]
# One token in a hundred, at one router, and a token passes 24 of them. One hit
# is enough, and from there on the ranks compute different texts. So we want a
# sum that has *the same bits on every rank*, however it rounds.

# %% [markdown]
# ## Derivation
#
# ### Four moves
#
# We build the sum from smaller parts. Each is a loop over steps; in a step
# every rank sends one chunk to the next rank. Let `parts[r][k]` be chunk $k$
# on rank $r$. First the simplest question: each rank has *one* chunk, and all
# want all of them. In each step a rank hands on what it got last. That is an
# **all-gather**:

# %%
from collections.abc import Callable

Parts = list[list[torch.Tensor]]  # of each rank: its chunks
SENT: list[int] = []  # bytes that each rank sends in a step


def step(parts: Parts, sends: Callable[[int], int], add: bool) -> None:
    """Rank r sends chunk sends(r) to rank r + 1, which adds or keeps it."""
    R = len(parts)
    letters = [parts[r][sends(r) % R].clone() for r in range(R)]
    SENT.append(letters[0].nbytes)
    for r in range(R):
        k = sends(r - 1) % R
        parts[r][k] = parts[r][k] + letters[r - 1] if add else letters[r - 1]


def all_gather(parts: Parts, first: int = 0) -> None:
    """Rank r has chunk r + first; afterwards all have all."""
    for n in range(len(parts) - 1):
        step(parts, lambda r, n=n: r + first - n, add=False)

# %% [markdown]
# Second question: each rank has *all* chunks, a whole vector, and the sum is
# to be left in pieces, one finished chunk a rank. That is a
# **reduce-scatter**. The same loop, but what arrives is added before it is
# handed on. Chunk $k$ starts at rank $k$ and ends at rank $k - 1$, which is
# the last to add its own:

# %%
def reduce_scatter(parts: Parts) -> None:
    """Afterwards rank r has the whole sum of chunk r + 1."""
    for n in range(len(parts) - 1):
        step(parts, lambda r, n=n: r - n, add=True)

# %% [markdown]
# Third question: all want the whole sum. Do the one, then the other. That is
# an **all-reduce**, and it is what the picture shows:

# %%
def all_reduce(parts: Parts) -> None:
    reduce_scatter(parts)
    all_gather(parts, first=1)

# %% [markdown]
# Fourth, one rank has something and all others want it: a **broadcast**. The
# last stage of a pipeline tells its logits to all in this way.
#
# Now we count. A vector of 5,760 bytes on four ranks, chunks of 1,440:

# %%
vectors = [torch.randn(2880, generator=rng).bfloat16() for _ in range(4)]
print(f"{'4 ranks':16} {'steps':>5} {'bytes that a rank sends':>25}")
for collective in (all_gather, reduce_scatter, all_reduce):
    parts = [list(x.chunk(4)) for x in vectors]
    SENT.clear()
    collective(parts)
    print(f"{collective.__name__:16} {len(SENT):5} "
          f"{' + '.join(map(str, SENT)):>40} = {sum(SENT):,}")
together = [torch.cat(row) for row in parts]
print("ranks that have rank 0's bits:",
      sum(torch.equal(x, together[0]) for x in together), "of 4")

# %% [markdown]
# Six steps of 1,440 bytes, 8,640 in all: one and a half times the vector. In
# general, with $R$ ranks and a tensor of $N$ bytes, a rank of the ring sends
#
# $$
# 2(R - 1) \text{ times } \frac{N}{R} \text{ bytes, together }
# \frac{R - 1}{R} \, 2N < 2N .
# $$ (parallel-ring)
#
# The bytes stay below twice the tensor, however many ranks there are. The
# steps grow with the ranks, and no step can begin before the one before it
# has arrived.

# %%
for R in (2, 4, 8):
    SENT.clear()
    all_reduce([list(torch.ones(2880).bfloat16().chunk(R)) for _ in range(R)])
    assert len(SENT) == 2 * (R - 1) and sum(SENT) == 2 * (R - 1) * 5760 // R
    print(f"{R} ranks: {len(SENT):2} steps, {sum(SENT):6,} bytes; to everyone "
          f"1 step, {(R - 1) * 5760:6,}")

# %% [markdown]
# ### The same bits
#
# Look at the ring once more. Each chunk is summed *once*, along one chain of
# ranks, and finished on one rank; what the others get is a copy. Whatever
# rounding did along the chain, all ranks hold the same bits. That is the
# property that we need of an all-reduce: **every number is added up in one
# place and then copied.** The naive version lacks it, as everybody adds for
# himself. A tree, which adds up towards one rank and sends the result back,
# has it too. gloo's all-reduce has it, as a cell further down asserts; NCCL's
# ring and tree are made in the same way, but we have not tried them.
#
# The property does not say that the sum is the one that a single process
# would get: other orders round differently. So a split model is equal to the
# whole one within rounding, and its ranks are equal to each other exactly.

# %% [markdown]
# ### Latency and bandwidth
#
# How long does a step take? Two things count. Something passes however short
# the message is: a call, a signal, a wait, written $\alpha$, the *latency*.
# And the bytes need their time on a link of $\lambda$ bytes a second, its
# *bandwidth*. A step of $n$ bytes takes about $\alpha + n / \lambda$.
#
# One number first. Between two H100s $\lambda$ is 450 GB/s, and NCCL itself
# reckons with 0.6 microseconds for a step. The step of a ring of four for one
# token sends 1,440 bytes: 0.6 + 0.003 microseconds. The bytes do not matter at
# all. For 4,096 tokens it sends 5,898,240 bytes: 0.6 + 13. Now the step does
# not matter. Written for all $R$ and $N$, from {eq}`parallel-ring`:
#
# $$
# t_{\text{ring}} = 2(R - 1)\Big(\alpha + \frac{N}{R \lambda}\Big) .
# $$ (parallel-alpha)

# %%
def ring_seconds(R: int, size: float, alpha: float, link: float) -> float:
    return 2 * (R - 1) * (alpha + size / (R * link))


for name, size in (("one token", 5760), ("4,096 tokens", 4096 * 5760)):
    step_bytes = size / 4
    ring, sending = ring_seconds(4, size, 0.6e-6, 450e9), step_bytes / 450e9
    print(f"{name:12} a step of {step_bytes:9,.0f} bytes: 0.6 + "
          f"{1e6 * sending:6.3f} µs; ring of four {1e6 * ring:4.1f} µs")

# %% [markdown]
# Short vectors would rather have fewer steps, long ones fewer bytes. So a
# library has several ways and chooses by size. In a *tree* half of those who
# still have a sum give theirs, whole, to the other half, and back the same
# way: $2 \log_2 R$ steps of $N$ bytes. Sending to everyone is one step in
# which $(R - 1) N$ bytes leave each rank.

# %% tags=["hide-input"]
# Figure: microseconds against bytes, both logarithmic, for eight ranks with
# a step of 0.6 microseconds and 450 GB/s. To everyone is fastest for short
# vectors, the ring for long ones; the lines cross at some hundred kilobytes.
# One token's 5,760 bytes lie far left, 4,096 tokens' 23.6 MB far right.
sizes = [2.0 ** n for n in range(10, 27)]
R, alpha, link = 8, 0.6e-6, 450e9
fig, ax = plt.subplots(figsize=(7, 3))
for name, seconds, look in (
        ("ring: 14 steps", lambda n: ring_seconds(R, n, alpha, link), "C0-"),
        ("tree: 6 steps", lambda n: 6 * (alpha + n / link), "C1--"),
        ("to everyone: 1 step", lambda n: alpha + (R - 1) * n / link,
         "C2-.")):
    ax.loglog(sizes, [1e6 * seconds(n) for n in sizes], look)
    ax.text(1100, 1.15e6 * seconds(1100), name, va="bottom", fontsize=8,
            color=look[:2])
for size, name in ((5760, "one token"), (4096 * 5760, "4,096 tokens")):
    ax.axvline(size, color="0.6", lw=0.8)
    ax.text(size * 0.9, 700, name, ha="right", va="top", fontsize=8,
            color="0.35")
ax.set(xlabel="bytes of the vector", ylabel="microseconds",
       xlim=(1e3, 7e7), ylim=(0.4, 1200))
plt.show()

# %% [markdown] tags=["measured"]
# **Measured over gloo.** `bench/gloo_alpha.py` on a virtual machine with two
# cores that other programs used as well, fastest of 400 calls, 29 November
# 2026: an all-reduce of 5,760 bytes took 125 microseconds among two processes
# and 318 among three, that is 2 and 4 steps of 63 and 80 microseconds. With
# 1 MiB it took 654 and 1,268. So over gloo, on that machine, $\alpha$ is about
# 70 microseconds and $\lambda$ about 2 GB/s, and a third rank makes the sum
# more expensive, as {eq}`parallel-alpha` says: two thirds of the bytes a step,
# but twice the steps. A hundred times NCCL's $\alpha$; the form is the same.
# [A second card](second_card.ipynb) reckons with it.

# %% [markdown]
# ### How often
#
# In a layer attention and experts each end in a sum, and one more follows the
# embedding. With $R > 1$ ranks that share tensors and one stage, T tokens of
# which the last one's logits are wanted ask for
#
# $$2L + 1 \text{ sums of } 2\,T D \text{ bytes, and one gathering of }
# 2V/R \text{ bytes from each}$$ (parallel-calls)
#
# in bf16: the 49 times 5,760 bytes of the question.

# %% [markdown]
# ## Code
#
# ### What may a module ask of the others?
#
# Six things, and the modules of [a split model](splitting.ipynb) know no
# others. `Group` is the list of them, and at the same time the group of one:
# there is nothing to add and nobody to tell, so each tensor that is given is
# returned as it is.

# %% tags=["export"]
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gptoss.parallel.shards import MeshRank, ParallelError, mesh_rank
from gptoss.weights.config import GptOssConfig


class Group:
    """What the modules of a rank ask of the others. This one is for a
    world of one, where there is nothing to ask."""

    mesh = MeshRank()

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides for all (text/generate)."""
        return self.mesh.tp_rank == self.mesh.pp_rank == 0

    def same(self, make: Callable[[], object]) -> object:
        """make() of the first rank, as JSON has it, on all ranks."""
        return make()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all x of the stage, the same on all its ranks."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """All x of the stage, side by side in the last dimension."""
        return x

    def send_next(self, x: Tensor) -> None:
        """Give x to the same place in the next stage."""

    def recv_previous(self, x: Tensor) -> Tensor:
        """What the stage before gives; x has its shape and dtype."""
        return x

    def broadcast_last(self, x: Tensor) -> Tensor:
        """What the last stage has in x, on all stages."""
        return x

# %% [markdown]
# The real one goes through `torch.distributed`. A sum is taken in place: what
# was given is overwritten, unless it was not contiguous and had to be copied
# first. Where there is only one rank in a dimension, nothing is called.

# %% tags=["export"]
class TorchGroup(Group):
    """A group of processes: NCCL on GPUs, gloo on CPUs.

    device_mesh: torch's, with dimensions "pp" and "tp". same: how the first
    rank tells something to all, see `World`.
    """

    def __init__(self, mesh: MeshRank, device_mesh,
                 same: Callable[[Callable[[], object]], object]) -> None:
        self.mesh, self._same = mesh, same
        self._tp = device_mesh.get_group("tp")
        self._pp = device_mesh.get_group("pp")

    def same(self, make: Callable[[], object]) -> object:
        return self._same(make)

    def leave(self) -> None:
        """Let go of torch's groups; the group is of no use afterwards."""
        self._tp = self._pp = None

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.mesh.tp_size > 1:
            with _told(self.mesh):
                dist.all_reduce(x, group=self._tp)  # in place
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        if self.mesh.tp_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.mesh.tp_size)]
        with _told(self.mesh):
            dist.all_gather(parts, x.contiguous(), group=self._tp)
        return torch.cat(parts, -1)

    def send_next(self, x: Tensor) -> None:
        with _told(self.mesh):
            dist.send(x.contiguous(), group=self._pp,
                      group_dst=self.mesh.pp_rank + 1)

    def recv_previous(self, x: Tensor) -> Tensor:
        with _told(self.mesh):
            dist.recv(x, group=self._pp, group_src=self.mesh.pp_rank - 1)
        return x

    def broadcast_last(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.mesh.pp_size > 1:
            with _told(self.mesh):
                dist.broadcast(x, group=self._pp,
                               group_src=self.mesh.pp_size - 1)
        return x

# %% [markdown]
# ### How is a split tried without processes?
#
# Nothing says that ranks must be processes. With threads of this one, which
# hand tensors to each other, a split can be tried in a notebook: the same
# mesh, files and modules, no processes. Every thread adds up all tensors in
# the order of the ranks, so here too all get the same bits. What the first
# rank has to tell goes through JSON, as between processes.

# %% tags=["export"]
import json
from queue import SimpleQueue
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any


class _Exchange:
    """Where threads along one dimension put tensors for each other."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.queues: list[SimpleQueue[Tensor]] = [
            SimpleQueue() for _ in range(size)]
        self.barrier = Barrier(size)

    def all(self, rank: int, x: Any) -> list[Any]:
        """Put x down and take what lies in every slot."""
        self.slots[rank] = x
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()  # nobody puts the next before all have taken
        return found


class ThreadGroup(Group):
    """A group of threads of one process, to try a split without any."""

    def __init__(self, mesh: MeshRank, tp: _Exchange, pp: _Exchange) -> None:
        self.mesh, self._tp, self._pp = mesh, tp, pp

    def all_reduce(self, x: Tensor) -> Tensor:
        first, *rest = self._tp.all(self.mesh.tp_rank, x)
        return sum(rest, first.clone())

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._tp.all(self.mesh.tp_rank, x), -1)

    def send_next(self, x: Tensor) -> None:
        self._pp.queues[self.mesh.pp_rank + 1].put(x.clone())

    def recv_previous(self, x: Tensor) -> Tensor:
        return self._pp.queues[self.mesh.pp_rank].get(timeout=60)

    def broadcast_last(self, x: Tensor) -> Tensor:
        return self._pp.all(self.mesh.pp_rank, x)[-1].clone()

    def same(self, make: Callable[[], object]) -> object:
        told = json.dumps(make()) if self.first else ""
        told = self._tp.all(self.mesh.tp_rank, told)[0]
        return json.loads(self._pp.all(self.mesh.pp_rank, told)[0])

# %% [markdown]
# `rehearse` runs the same work on all ranks and returns a list of what each
# returned. If a thread fails, the others must not wait for it for ever: their
# barriers are broken, all end, and the first real error is raised, not one of
# the broken barriers that followed from it.

# %% tags=["export"]
def rehearse(config: GptOssConfig, world: int, stages: int,
             work: Callable[[MeshRank, Group], object]) -> list:
    """work(mesh, group) for all ranks at once, as threads; the results.

    The first error of a thread is raised, after all have ended.
    """
    ranks = [mesh_rank(config, rank, world, stages) for rank in range(world)]
    rows = [_Exchange(world // stages) for _ in range(stages)]
    columns = [_Exchange(stages) for _ in range(world // stages)]
    results: list = [None] * world
    failed: list[Exception] = []

    def run(rank: int, mesh: MeshRank) -> None:
        group = ThreadGroup(mesh, rows[mesh.pp_rank], columns[mesh.tp_rank])
        try:
            results[rank] = work(mesh, group)
        except Exception as error:
            failed.append(error)
            for exchange in rows + columns:
                exchange.barrier.abort()

    threads = [Thread(target=run, args=each) for each in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in failed if not isinstance(e, BrokenBarrierError)]
    if failed:
        raise (real or failed)[0]
    return results

# %%
def meet(mesh: MeshRank, group: Group) -> tuple[float, list[float]]:
    """A rank that says its number."""
    x = torch.tensor([float(mesh.tp_rank)])
    return group.all_reduce(x).item(), group.all_gather(x).tolist()


print(rehearse(big, 4, 1, meet)[3])

# %% [markdown]
# ### How does a process learn its number?
#
# `torchrun` starts the processes and tells each through the environment:
# `WORLD_SIZE` says how many there are, `RANK` which one this is. We believe
# them only together, and only if they are what `torchrun` writes: up to nine
# of the digits 0 to 9. Anything else means "alone": one process, rank 0. How
# many there are must be known before torch is loaded, since a command that
# refuses should answer at once. So these two questions have a module of their
# own, `launch`, which imports nothing but `os` and `re`.

# %% tags=["export:launch"]
import os
import re


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "")
    started = "RANK" in os.environ and re.fullmatch("[0-9]{1,9}", size)
    return max(int(size), 1) if started else 1


def process_rank() -> int:
    """Which of them this is; 0 speaks for all, and is also alone."""
    rank = os.environ.get("RANK", "")
    several = launched() > 1 and re.fullmatch("[0-9]{1,9}", rank)
    return int(rank) if several else 0

# %% [markdown]
# ### How does one rank tell the others what only it knows?
#
# A seed, a line that somebody typed, what a tool has answered: only rank 0
# has them. A collective would time out while that person thinks or the tool
# works. But `torchrun` keeps a *store*, a dictionary over TCP through which
# the processes find each other, and waiting for a key of the store has no
# such limit. So `same(make)` calls `make` on rank 0 only, writes the result as
# JSON under the next number, and the others wait for that number. A
# [chat](../chat/memory.ipynb) asks before every token, so the last rank that
# has read a key throws it away.

# %% tags=["export"]
import os
from functools import lru_cache

TIMEOUT = timedelta(minutes=10)  # for one collective; then the others fail
_EVER = timedelta(days=3650)


class World:
    """The processes of one run; see `join`. rank, size: this one's."""

    def __init__(self, store, rank: int, size: int, kind: str) -> None:
        self.rank, self.size, self.kind = rank, size, kind
        self._store, self._asked = dist.PrefixStore("gptoss", store), 0
        self._groups: list[TorchGroup] = []

    def same(self, make: Callable[[], object]) -> object:
        """make() of rank 0, told to all ranks as JSON. Waits for it as long
        as it takes, for a person may be asked.

        What make() raises is raised on rank 0. The others raise
        KeyboardInterrupt if it was that, and ParallelError otherwise.
        """
        self._asked += 1
        key = str(self._asked)
        if self.rank == 0:
            return self._tell(key, make)
        try:
            self._store.wait([key], _EVER)
            told = json.loads(self._store.get(key))
            if self._store.add(f"{key} read", 1) == self.size - 1:
                for each in (key, f"{key} read"):
                    self._store.delete_key(each)
        except RuntimeError as error:
            raise ParallelError(f"rank {self.rank}: lost rank 0") from error
        if told.get("error") == "KeyboardInterrupt":
            raise KeyboardInterrupt
        if "error" in told:
            raise ParallelError(f"rank 0: {told['error']}")
        return told["value"]

    def _tell(self, key: str, make: Callable[[], object]) -> object:
        """make(), and to the others what came of it."""
        told: dict = {"error": "no answer"}
        try:
            told = {"value": make()}
            json.dumps(told)
        except KeyboardInterrupt:
            told = {"error": "KeyboardInterrupt"}
            raise
        except BaseException as error:
            told = {"error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            text = json.dumps(told)
            if self.size > 1:
                self._store.set(key, text)
        return json.loads(text)["value"]

    def group(self, mesh: MeshRank) -> TorchGroup:
        """This rank's groups, new ones: all ranks call it alike."""
        device_mesh = dist.init_device_mesh(
            self.kind, (mesh.pp_size, mesh.tp_size),
            mesh_dim_names=("pp", "tp"))
        self._groups.append(TorchGroup(mesh, device_mesh, self.same))
        return self._groups[-1]

    def leave(self) -> None:
        """A group of torch's that outlives the others has threads when the
        process ends, and these end it with an abort: so all go now."""
        while self._groups:
            self._groups.pop().leave()
        dist.destroy_process_group()

# %% tags=["export"]
_JOINED: list["World"] = []  # one at most; what `leave` has to part from


@lru_cache(maxsize=1)
def join(kind: str = "cpu", timeout: timedelta = TIMEOUT) -> World:
    """Meet the other processes that torchrun started, once.

    kind: "cuda" (NCCL; this process takes the GPU of its LOCAL_RANK) or
    "cpu" (gloo). From now on torch's random numbers are the same on all.
    """
    try:
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", timeout=timeout,
            store=dist.PrefixStore("torch", store), rank=rank,
            world_size=size)
    except (RuntimeError, ValueError, KeyError) as error:
        why = (str(error).splitlines() or ["no reason given"])[0]
        raise ParallelError(f"the processes do not meet: {why}") from error
    world = World(store, rank, size, kind)
    _JOINED.append(world)
    torch.manual_seed(world.same(torch.initial_seed))
    return world


def leave() -> None:
    """Part from the others, at the end."""
    while _JOINED:
        _JOINED.pop().leave()
        join.cache_clear()

# %% [markdown]
# ## What is refused
#
# A rank that has died makes the next collective of the others fail: gloo
# notices the closed connection, NCCL waits for the timeout of ten minutes.
# What torch raises then is a `RuntimeError` of many lines. It becomes a
# `ParallelError` of one: which tensor rank and stage *lost the others*, and
# the first line of torch's reason. Likewise a rank that loses rank 0 while it
# waits for the store, and processes that do not meet at all. If `make()`
# fails on rank 0, its own error is raised there; the others raise a
# `ParallelError` that says which it was, or `KeyboardInterrupt`, if it was
# that.

# %% tags=["export"]
@contextmanager
def _told(mesh: MeshRank) -> Iterator[None]:
    """A collective that fails is told in a line."""
    try:
        yield
    except RuntimeError as error:
        why = (str(error).splitlines() or ["no reason given"])[0]
        raise ParallelError(
            f"tensor rank {mesh.tp_rank} of {mesh.tp_size}, stage "
            f"{mesh.pp_rank} of {mesh.pp_size}: lost the others: one has "
            f"ended or hangs ({why})") from error

# %%
try:
    with _told(MeshRank(1, 2)):
        raise RuntimeError("Connection closed by peer\nmany more lines")
except ParallelError as error:
    print(error)

# %% [markdown]
# ## It holds
#
# Four processes of `torchrun`, each with random numbers of its own, over gloo:
# every rank's sum has the same bits, and is the sum.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import torch
from gptoss.parallel.collectives import join, leave
from gptoss.parallel.shards import MeshRank

world = join()
group = world.group(MeshRank(world.rank, world.size))
drawn = torch.randn(3)  # join has seeded them all alike
assert torch.equal(drawn, torch.tensor(world.same(drawn.tolist)))
mine = torch.randn(4096, generator=torch.Generator().manual_seed(world.rank))
every = group.all_gather(mine).view(world.size, -1)
assert torch.equal(every[world.rank], mine)
total = group.all_reduce(mine.clone())
for other in group.all_gather(total).view(world.size, -1):
    assert torch.equal(other, total)
error = (total - every.double().sum(0)).abs().max()
assert error < 1e-6
if world.rank == 0:
    print(world.size, "ranks, the same bits, within 1e-6 of the sum")
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
    print(torchrun(4, str(program)), end="")

# %% [markdown]
# **Not tested: GPUs.** All of this ran over gloo on CPUs. With `--device
# cuda` the same calls go to NCCL; that path and CUDA devices in `join` have
# never run.

# %% [markdown]
# ## Takeaways
#
# - An all-reduce is a reduce-scatter and an all-gather. In a ring of $R$ ranks
#   it takes $2(R-1)$ steps, and a rank sends less than twice the tensor.
# - A step costs a latency and its bytes. For one token only the latency
#   counts, for a long prompt only the bytes.
# - Each number is added up in one place and then copied: so all ranks hold
#   the same bits, choose the same experts and write the same text.
# - What only the first process knows goes through a store that can wait; a
#   collective cannot.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Add up along a *tree*: in each step half of those who still have a sum give
# theirs, whole, to the other half; then the result goes back the same way.
# How many steps does it take, and how many vectors does the busiest rank
# send? Which is better for vectors of 5,760 bytes, which for a long prompt's?

# %% tags=["hide-cell"]
for R in (2, 4, 8):
    held, steps, stride = [1] * R, 0, 1  # how many vectors are in the sum
    while stride < R:
        for r in range(0, R, 2 * stride):
            held[r] += held[r + stride]
        stride, steps = 2 * stride, steps + 1
    assert held[0] == R  # rank 0 has all; the way back takes as many steps
    print(f"{R} ranks: {2 * steps} steps, the ring {2 * (R - 1)}; the busiest "
          f"sends {steps} vectors, in the ring {2 * (R - 1) / R:.2f}")
# short vectors: the steps decide, so the tree; long ones: the ring

# %% [markdown]
# ### Exercise 2
#
# One of the four ranks sits behind a slow link: 1 ms instead of 0.6
# microseconds a step. How long does the ring of four take for one token, and
# how many of its six steps are slow? Would the tree of exercise 1 be better
# off, if the slow rank is one that only gives and takes once?

# %% tags=["hide-cell"]
# a step of the ring ends when the slowest link has arrived: all six are slow;
# in the tree rank 3 gives in one step and takes in one
print(f"ring: {6 * 1e-3 * 1e3:.1f} ms, 6 of 6 steps are slow")
print(f"tree: {1e3 * (2 * 1e-3 + 2 * 0.6e-6):.1f} ms, 2 of 4 steps are slow")

# %% [markdown]
# ### Exercise 3
#
# The ranks' logits are gathered, 2V/R bytes from each. What would it cost to
# give every rank all of `lm_head` instead, for the 20b on eight H100s (3,350
# GB/s from memory, 450 GB/s and 0.6 microseconds a step)?

# %% tags=["hide-cell"]
V = big.vocab_size
head = 2 * V * D  # bytes of lm_head
gather = 7 * (0.6e-6 + 2 * V / 8 / 450e9)
print(f"split: reading {1e6 * head / 8 / 3350e9:.0f} microseconds and "
      f"gathering {1e6 * gather:.0f}; whole: reading "
      f"{1e6 * head / 3350e9:.0f}")

# %% [markdown]
# ## Sources
#
# - NVIDIA/nccl, `src/graph/tuning.cc`: an all-reduce along a ring takes
#   `2 * (nRanks - 1)` steps, a gathering `nRanks - 1`; its latencies.
# - facebookincubator/gloo: the collectives for CPUs.
# - torch.distributed: `init_device_mesh`, `torchrun`, `PrefixStore` and the
#   collectives of `c10d`.
