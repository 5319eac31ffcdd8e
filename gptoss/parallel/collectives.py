"""What do ranks say to each other?

Generated from book/parallel/collectives.py; edit the chapter, not this file.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from queue import SimpleQueue
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptoss.parallel.shards import MeshRank, ParallelError, mesh_rank
from gptoss.weights.config import GptOssConfig

# --- What may a module ask of the others? ------------------------------------

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


# --- How is a split tried without processes? ---------------------------------

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


# --- How does one rank tell the others what only it knows? -------------------

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


# --- What is refused ---------------------------------------------------------

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


__all__ = [
    "Group",
    "TIMEOUT",
    "ThreadGroup",
    "TorchGroup",
    "World",
    "join",
    "leave",
    "rehearse",
]
