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
# What do several processors have to say to each other for every token, how
# often, and what does it take to say it?
#
# One GPU that decodes with the 20b reads 3.7 GB for a token. Eight of them
# read at best an eighth each, which an H100 does in 0.14 ms. For the same
# token they must agree 49 times on a sum of vectors of 5,760 bytes. If an
# agreement among eight takes 15 microseconds however small it is, talking
# takes over five times as long as reading.

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
# Four ranks have a vector each, and all want the sum: an *all-reduce*. In a
# *ring* every rank talks to the next one only. The vector is cut into as many
# parts as there are ranks. In the first step rank $r$ hands on its part $r$;
# then, in every step, each rank adds what arrived to its own copy of that part
# and hands the sum on. When each part is complete on one rank, the sums are
# handed round.

# %%
from collections.abc import Iterator


def ring(given: list[torch.Tensor]) -> Iterator[list[list[torch.Tensor]]]:
    """All-reduce of one vector a rank, by a ring: the parts on every rank,
    at the start and after each step."""
    R = len(given)
    parts = [list(x.clone().chunk(R)) for x in given]
    yield parts
    for handing_round in (False, True):
        for step in range(R - 1):
            sent = [(r - step + handing_round) % R for r in range(R)]
            letters = [parts[r][sent[r]].clone() for r in range(R)]
            for r in range(R):
                k, letter = sent[r - 1], letters[r - 1]
                parts[r][k] = letter if handing_round else (
                    parts[r][k] + letter)
            yield parts

# %% tags=["hide-input"]
# Figure: seven squares of four by four fields, from the start to step 6 of a
# ring of four ranks. A row is a rank, a column a part; the number in a field
# says how many vectors have been added up there. After step 3 a diagonal of
# fields has all four, after step 6 every field.
ones = [torch.ones(4) for _ in range(4)]
shown = [[[int(part) for part in row] for row in parts]
         for parts in ring(ones)]
fig, axes = plt.subplots(1, len(shown), figsize=(7, 1.5))
for step, (ax, counts) in enumerate(zip(axes, shown, strict=True)):
    ax.imshow(counts, cmap="Blues", vmin=0, vmax=6)
    for r, row in enumerate(counts):
        for k, count in enumerate(row):
            ax.text(k, r, count, ha="center", va="center", fontsize=8,
                    weight="bold" if count == 4 else "normal")
    ax.set(xticks=[], yticks=range(4) if step == 0 else [],
           title=f"step {step}" if step else "start")
    ax.title.set_fontsize(9)
    ax.grid(visible=False)
axes[0].set_ylabel("rank")
plt.show()
assert shown[-1] == [[4] * 4] * 4
assert sorted(counts.count(4) for counts in shown[3]) == [1] * 4

# %% [markdown]
# After three steps every part is complete on one rank; who stops there has a
# *reduce-scatter*. Three more steps hand round what each has, which is an
# *all-gather*. The two in a row are the all-reduce.

# %% [markdown]
# ## Derivation
#
# **How often.** With $R > 1$ tensor ranks and one stage
# ([who holds which part](shards.ipynb)), T tokens of which the last one's
# logits are wanted ask for
#
# $$2L + 1 \text{ sums of } 2\,T D \text{ bytes, and one gathering of }
# 2V/R \text{ bytes from each}$$ (parallel-calls)
#
# in bf16.
#
# **How many steps, how many bytes.** Each step of the ring sends an $R$-th of
# the tensor over each link, and no step can begin before the one before has
# arrived. For a tensor of $N$ bytes a rank therefore sends
#
# $$
# 2(R - 1) \text{ times } \frac{N}{R} \text{ bytes, together }
# \frac{R - 1}{R} \, 2N < 2N .
# $$ (parallel-ring)
#
# The bytes do not grow with the ranks, but the steps do. If instead everyone
# sends its whole vector to everyone, there is one step, but $(R - 1) N$ bytes
# arrive on every rank.

# %%
rng = torch.Generator().manual_seed(0)
for R in (2, 3, 4, 8):
    given = torch.randint(-99, 99, (R, 24), generator=rng).unbind()
    states = list(ring(given))
    assert all(torch.equal(torch.cat(row), sum(given)) for row in states[-1])
    steps = len(states) - 1
    print(f"{R} ranks: {steps:2} steps, in each a part of {24 // R:2} of 24; "
          f"a rank sends {steps * 24 // R}, to everyone {(R - 1) * 24}")
    assert steps == 2 * (R - 1)

# %% [markdown]
# **The same bits.** Each part is summed once, in one order, and then copied:
# whatever rounding does, all ranks hold the same bits. That is what keeps the
# copies of the residual stream equal.

# %% [markdown]
# ## Code

# %% [markdown]
# ### What ranks say to each other
#
# Five things, and the modules of [a split model](splitting.ipynb) know no
# others. In a world of one they
# say nothing.

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
# The real one goes through `torch.distributed`. A rank that has died makes
# the next collective of the others fail (gloo notices the closed connection,
# NCCL after a timeout); what it raises becomes one line.

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

# %% tags=["export"]
class TorchGroup(Group):
    """A group of processes: NCCL on GPUs, gloo on CPUs.

    device_mesh: torch's, with dimensions "pp" and "tp". same: how the first
    rank tells something to all, see `World`.
    """

    def __init__(self, mesh: MeshRank, device_mesh,
                 same: Callable[[Callable[[], object]], object]) -> None:
        self.mesh, self.same = mesh, same
        self._tp = device_mesh.get_group("tp")
        self._pp = device_mesh.get_group("pp")

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
# ### A rehearsal with threads
#
# Nothing says that ranks must be processes. With threads of this one, which
# hand tensors to each other, a split can be tried in a notebook: the same
# mesh, files and modules, no processes. The tests hold many splits to the
# whole model this way.

# %% tags=["export"]
import json
from queue import SimpleQueue
from threading import Barrier, BrokenBarrierError, Thread


class _Exchange:
    """Where threads along one dimension put tensors for each other."""

    def __init__(self, size: int) -> None:
        self.slots: list = [None] * size
        self.queues = [SimpleQueue() for _ in range(size)]
        self.barrier = Barrier(size)

    def all(self, rank: int, x: Tensor) -> list[Tensor]:
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
# ### Processes that belong together
#
# `torchrun` starts the processes and tells each its number through the
# environment. How many they are must be known before torch is loaded, since
# a command that refuses should answer at once. So these two questions have a
# module of their own, which needs nothing.

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

# %%
print(launched(), process_rank())

# %% [markdown]
# They meet at a store that `torchrun` keeps, a dictionary over TCP.
# Through it rank 0 also tells the others what only it knows: a seed, a line
# that somebody typed, what a tool has answered. A collective would time out
# while that person thinks or the tool works; waiting for a key of the store
# does not. A [chat](../chat/memory.ipynb) asks before every token, so a key is
# thrown away by the last rank that has read it.

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
# ## It holds
#
# Four processes that `torchrun` starts, each with random numbers of its own,
# over gloo. Every rank's sum has the same bits, and is the sum.

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
# - A split model knows five things to say: sum, gather, hand on, take over,
#   and tell all the last stage's logits.
# - A ring of $R$ ranks takes $2(R-1)$ steps and sends less than twice the
#   tensor, however many ranks there are.
# - Each part of a sum is added up in one place, so all ranks hold the same
#   bits.
# - What only the first process knows goes through a store that can wait; a
#   collective cannot.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Add up along a *tree*: in each step half of those who still have a sum give
# theirs, whole, to the other half; then the result goes back the same way.
# How many steps does it take, and how many bytes does the busiest rank send?
# Which is better for vectors of 5,760 bytes, which for a long prompt's?

# %% tags=["hide-cell"]
def tree(given: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """All-reduce by a tree; R is a power of two: results and steps."""
    held, R, steps, stride = [x.clone() for x in given], len(given), 0, 1
    while stride < R:
        for r in range(0, R, 2 * stride):
            held[r] += held[r + stride]
        stride, steps = 2 * stride, steps + 1
    while stride > 1:
        stride //= 2
        for r in range(0, R, 2 * stride):
            held[r + stride] = held[r].clone()
        steps += 1
    return held, steps


for R in (2, 4, 8):
    given = torch.randint(-99, 99, (R, 24), generator=rng).unbind()
    held, steps = tree(given)
    assert all(torch.equal(x, sum(given)) for x in held)
    print(f"{R} ranks: {steps} steps, the ring {2 * (R - 1)}; the busiest "
          f"sends {steps // 2} vectors, in the ring {2 * (R - 1) / R:.2f}")
# few bytes: the steps decide, so the tree; many: the bytes, so the ring

# %% [markdown]
# ### Exercise 2
#
# Everyone sends its vector to everyone, and each rank adds up what it has in
# the order in which it came, its own first. Where do the ranks' results
# differ, and what does a model make of it?

# %% tags=["hide-cell"]
given = [torch.randn(4096, generator=rng) for _ in range(4)]
own_first = [sum((given[(r + i) % 4] for i in range(1, 4)), given[r].clone())
             for r in range(4)]
differ = sum(not torch.equal(x, own_first[0]) for x in own_first)
print(f"{differ} of 3 other ranks have other bits than the first")
assert differ == 3
*_, last = ring(given)
assert all(torch.equal(torch.cat(row), torch.cat(last[0])) for row in last)
# the residual streams drift apart, and may choose different experts and at
# last different tokens: then the ranks no longer compute the same text

# %% [markdown]
# ## Sources
#
# - NVIDIA/nccl, `src/graph/tuning.cc`: an all-reduce along a ring takes
#   `2 * (nRanks - 1)` steps, a gathering `nRanks - 1`.
# - torch.distributed: `init_device_mesh`, `torchrun`, `PrefixStore` and the
#   collectives of `c10d`.
