"""Splitting the model

Generated from book/15_parallel.py; edit the chapter, not this file.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue
from threading import Barrier, BrokenBarrierError, Thread

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss.cache import Cache
from gptoss.checkpoint import (
    DTYPES,
    Checkpoint,
    TensorSpec,
    resolve,
    tensor_table,
)
from gptoss.config import GptOssConfig
from gptoss.experts import Experts
from gptoss.model import Attention, GptOss, Linear, load_tensors, pick_dtype
from gptoss.mxfp4 import BLOCK

# --- A seat for every rank ---------------------------------------------------

class ParallelError(RuntimeError):
    """Ranks that do not fit the model, or that lost each other."""


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: in which stage, and there with which part of the
    tensors. The `tensors` ranks of a stage are `groups` with different
    experts, each of `slices` ranks with different slices of F.
    """

    tensor: int = 0
    tensors: int = 1
    stage: int = 0
    stages: int = 1
    slices: int = 1

    @property
    def groups(self) -> int:
        return self.tensors // self.slices

    @property
    def group(self) -> int:
        return self.tensor // self.slices

    @property
    def part(self) -> int:
        return self.tensor % self.slices


def hidden_slices(config: GptOssConfig, tensors: int) -> int:
    """Into how many slices F is cut for so many ranks: as many as divide
    both the ranks and the MXFP4 blocks of F; groups of experts do the rest.
    """
    return math.gcd(tensors, config.intermediate_size // BLOCK)


def vocabulary_rows(config: GptOssConfig, tensors: int) -> int:
    """Rows of the vocabulary on each of so many ranks, if none had fewer."""
    return -(-config.vocab_size // tensors)


def fits(config: GptOssConfig, tensors: int) -> bool:
    """Whether heads and experts divide among so many ranks, and each gets
    some of the vocabulary."""
    H, G = config.num_attention_heads, config.num_key_value_heads
    groups = tensors // hidden_slices(config, tensors)
    before_last = (tensors - 1) * vocabulary_rows(config, tensors)
    return not (H % tensors or min(G % tensors, tensors % G)
                or config.num_local_experts % groups
                or before_last >= config.vocab_size)


def take_seat(config: GptOssConfig, rank: int, world: int,
              stages: int = 1) -> Seat:
    """The seat of a rank; neighbours in rank share a stage.

    ParallelError, naming the sizes that do, if the world does not divide.
    """
    L, H = config.num_hidden_layers, config.num_attention_heads
    sizes = [n for n in range(1, H + 1) if fits(config, n)]
    if not 1 <= stages <= L:
        raise ParallelError(f"--stages: expected 1 to {L} (the model's "
                            f"layers), found {stages}")
    tensors, rest = divmod(world, stages)
    if rest or tensors not in sizes:
        found = ", ".join(str(n * stages) for n in sizes)
        staged = f" in {stages} stages" * (stages > 1)
        raise ParallelError(f"number of processes{staged}: expected one of "
                            f"{found}, found {world}")
    return Seat(rank % tensors, tensors, rank // tensors, stages,
                hidden_slices(config, tensors))


# --- The shard table ---------------------------------------------------------

# End of a tensor's name; what each dimension is cut by (- not at all); and
# of which ranks only the first holds it: of all, or of those that share an
# expert. The others have zeros there: it is a bias, added once.
SHARDS = (
    ("embed_tokens.weight", "V -", ""),
    ("norm.weight", "-", ""),
    ("q_proj.weight", "Q -", ""),
    ("q_proj.bias", "Q", ""),
    ("k_proj.weight", "KV -", ""),
    ("k_proj.bias", "KV", ""),
    ("v_proj.weight", "KV -", ""),
    ("v_proj.bias", "KV", ""),
    ("sinks", "H", ""),
    ("o_proj.weight", "- Q", ""),
    ("o_proj.bias", "-", "tensor"),
    ("router.weight", "- -", ""),
    ("router.bias", "-", ""),
    ("gate_up_proj_blocks", "E 2F - -", ""),
    ("gate_up_proj_scales", "E 2F -", ""),
    ("gate_up_proj", "E - 2F", ""),  # decoded layout: (E, in, out)
    ("gate_up_proj_bias", "E 2F", ""),
    ("down_proj_blocks", "E - F/32 -", ""),
    ("down_proj_scales", "E - F/32", ""),
    ("down_proj", "E F -", ""),
    ("down_proj_bias", "E -", "part"),
    ("lm_head.weight", "V -", ""),
)


def shard_rule(name: str) -> tuple[tuple[str, ...], str]:
    """The row of SHARDS for a tensor: its letters, and who alone holds it."""
    for end, letters, holder in SHARDS:
        if name.endswith(end):
            return tuple(letters.split()), holder
    raise ParallelError(f"{name}: expected a tensor that SHARDS names")


def share(size: int, index: int, parts: int, unit: int = 1) -> slice:
    """The index-th of `parts` parts of range(size), times unit."""
    return slice(size * index // parts * unit,
                 size * (index + 1) // parts * unit)


@lru_cache(maxsize=256)
def owned(config: GptOssConfig, seat: Seat) -> dict[str, slice]:
    """What a seat owns along each letter of SHARDS; not to be changed."""
    H, C = config.num_attention_heads, config.head_dim
    heads = share(H, seat.tensor, seat.tensors)
    shared = H // config.num_key_value_heads  # query heads of one key head
    first, end = heads.start // shared, -(-heads.stop // shared)
    blocks = config.intermediate_size // BLOCK, seat.part, seat.slices
    rows = vocabulary_rows(config, seat.tensors)
    return {
        "V": slice(rows * seat.tensor,
                   min(rows * (seat.tensor + 1), config.vocab_size)),
        "H": heads, "Q": slice(heads.start * C, heads.stop * C),
        "KV": slice(first * C, end * C),
        "E": share(config.num_local_experts, seat.group, seat.groups),
        "F/32": share(*blocks), "F": share(*blocks, BLOCK),
        "2F": share(*blocks, 2 * BLOCK)}


# --- Stages ------------------------------------------------------------------

def layer_of(name: str) -> int | None:
    """The layer that a tensor or a module belongs to, if any."""
    found = re.search(r"\blayers\.(\d+)", name)
    return int(found[1]) if found else None


@lru_cache(maxsize=64)
def stage_layers(config: GptOssConfig, stages: int) -> tuple[range, ...]:
    """The layers of each stage, so that their bytes come out alike; the
    first also holds the embedding, the last the head."""
    sizes, L = [0] * config.num_hidden_layers, config.num_hidden_layers
    for spec in tensor_table(config).values():
        layer = layer_of(spec.name)
        at = (0 if "embed" in spec.name else -1) if layer is None else layer
        sizes[at] += spec.nbytes
    filled = [0, *accumulate(sizes)]
    borders = [0]
    for stage in range(1, stages):
        wanted = filled[-1] * stage / stages
        choices = range(borders[-1] + 1, L - (stages - stage) + 1)
        borders.append(min(choices, key=lambda n: abs(filled[n] - wanted)))
    return tuple(map(range, borders, [*borders[1:], L]))


def on_stage(config: GptOssConfig, seat: Seat, name: str) -> bool:
    """Whether a tensor or module of this name is on the seat's stage."""
    layer = layer_of(name)
    if layer is not None:
        return layer in stage_layers(config, seat.stages)[seat.stage]
    return seat.stage == (0 if "embed_tokens" in name else seat.stages - 1)


# --- Reading one's own bytes -------------------------------------------------

def cut(config: GptOssConfig, seat: Seat, spec: TensorSpec
        ) -> tuple[tuple[slice, ...], tuple[int, ...], bool]:
    """Where a seat's part of a tensor lies, its shape, and whether it is
    read at all: if not, another seat holds it and this one has zeros."""
    letters, holder = shard_rule(spec.name)
    mine = owned(config, seat)
    index = tuple(mine.get(letter, slice(None)) for letter in letters)
    shape = tuple(len(range(size)[part]) for size, part
                  in zip(spec.shape, index, strict=True))
    return index, shape, not (holder and getattr(seat, holder))


class Shard:
    """A checkpoint as one seat sees it: fewer tensors, and less of each.

    Has what `load_tensors` asks of a Checkpoint: path, names, read.
    bytes_read counts what was taken from the file.
    """

    def __init__(self, checkpoint: Checkpoint, seat: Seat) -> None:
        self.whole, self.seat = checkpoint, seat
        self.path, self.bytes_read = checkpoint.path, 0

    def names(self) -> list[str]:
        config = self.whole.config
        return [name for name in self.whole.names()
                if on_stage(config, self.seat, name)]

    def read(self, name: str) -> Tensor:
        """The seat's part of a tensor, contiguous.

        Whole rows stay views of the mapped file; others are copied.
        """
        spec = self.whole.spec(name)
        index, shape, held = cut(self.whole.config, self.seat, spec)
        if not held:
            return torch.zeros(shape, dtype=DTYPES[spec.dtype])
        rows = self.whole.read(name, index[0])
        part = rows[(slice(None), *index[1:])].contiguous()
        self.bytes_read += part.nbytes
        return part


# --- What ranks say to each other --------------------------------------------

class Link:
    """What the modules of a seat ask of the others. This one is for a
    world of one, where there is nothing to ask."""

    seat = Seat()

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides for all (chapter 12)."""
        return self.seat.tensor == self.seat.stage == 0

    def same(self, make: Callable[[], object]) -> object:
        """make() of the first rank, as JSON has it, on all ranks."""
        return make()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all x of the stage, the same on all its ranks."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All x of the stage, side by side in the last dimension."""
        return x

    def to_next(self, x: Tensor) -> None:
        """Give x to the same place in the next stage."""

    def from_before(self, x: Tensor) -> Tensor:
        """What the stage before gives; x has its shape and dtype."""
        return x

    def from_last(self, x: Tensor) -> Tensor:
        """What the last stage has in x, on all stages."""
        return x


@contextmanager
def _told(seat: Seat) -> Iterator[None]:
    """A collective that fails is told in a line."""
    try:
        yield
    except RuntimeError as error:
        why = (str(error).splitlines() or ["no reason given"])[0]
        raise ParallelError(
            f"tensor rank {seat.tensor} of {seat.tensors}, stage {seat.stage}"
            f" of {seat.stages}: lost the others: one has ended or hangs "
            f"({why})") from error


class GroupLink(Link):
    """A link through torch.distributed: NCCL on GPUs, gloo on CPUs.

    mesh: a DeviceMesh with dimensions "pipeline" and "tensor". same: how
    the first rank tells something to all, see `World`.
    """

    def __init__(self, seat: Seat, mesh,
                 same: Callable[[Callable[[], object]], object]) -> None:
        self.seat, self.same = seat, same
        self._row = mesh.get_group("tensor")
        self._column = mesh.get_group("pipeline")

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.seat.tensors > 1:
            with _told(self.seat):
                dist.all_reduce(x, group=self._row)  # in place
        return x

    def gather(self, x: Tensor) -> Tensor:
        if self.seat.tensors == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.seat.tensors)]
        with _told(self.seat):
            dist.all_gather(parts, x.contiguous(), group=self._row)
        return torch.cat(parts, -1)

    def to_next(self, x: Tensor) -> None:
        with _told(self.seat):
            dist.send(x.contiguous(), group=self._column,
                      group_dst=self.seat.stage + 1)

    def from_before(self, x: Tensor) -> Tensor:
        with _told(self.seat):
            dist.recv(x, group=self._column, group_src=self.seat.stage - 1)
        return x

    def from_last(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.seat.stages > 1:
            with _told(self.seat):
                dist.broadcast(x, group=self._column,
                               group_src=self.seat.stages - 1)
        return x


# --- A rehearsal with threads ------------------------------------------------

class _Board:
    """Where threads of one row or column put tensors for each other."""

    def __init__(self, size: int) -> None:
        self.slots: list = [None] * size
        self.queues = [SimpleQueue() for _ in range(size)]
        self.barrier = Barrier(size)

    def all(self, place: int, x: Tensor) -> list[Tensor]:
        """Put x down and take what lies in every place."""
        self.slots[place] = x
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()  # nobody puts the next before all have taken
        return found


class ThreadLink(Link):
    """A link between threads of one process, to try a split without any."""

    def __init__(self, seat: Seat, row: _Board, column: _Board) -> None:
        self.seat, self._row, self._column = seat, row, column

    def sum(self, x: Tensor) -> Tensor:
        first, *rest = self._row.all(self.seat.tensor, x)
        return sum(rest, first.clone())

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._row.all(self.seat.tensor, x), -1)

    def to_next(self, x: Tensor) -> None:
        self._column.queues[self.seat.stage + 1].put(x.clone())

    def from_before(self, x: Tensor) -> Tensor:
        return self._column.queues[self.seat.stage].get(timeout=60)

    def from_last(self, x: Tensor) -> Tensor:
        return self._column.all(self.seat.stage, x)[-1].clone()

    def same(self, make: Callable[[], object]) -> object:
        told = json.dumps(make()) if self.first else ""
        told = self._row.all(self.seat.tensor, told)[0]
        return json.loads(self._column.all(self.seat.stage, told)[0])


def rehearse(config: GptOssConfig, world: int, stages: int,
             work: Callable[[Seat, Link], object]) -> list:
    """work(seat, link) for all seats at once, as threads; the results.

    The first error of a thread is raised, after all have ended.
    """
    seats = [take_seat(config, rank, world, stages) for rank in range(world)]
    rows = [_Board(world // stages) for _ in range(stages)]
    columns = [_Board(stages) for _ in range(world // stages)]
    results: list = [None] * world
    failed: list[Exception] = []

    def run(rank: int, seat: Seat) -> None:
        link = ThreadLink(seat, rows[seat.stage], columns[seat.tensor])
        try:
            results[rank] = work(seat, link)
        except Exception as error:
            failed.append(error)
            for board in rows + columns:
                board.barrier.abort()

    threads = [Thread(target=run, args=each) for each in enumerate(seats)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in failed if not isinstance(e, BrokenBarrierError)]
    if failed:
        raise (real or failed)[0]
    return results


# --- Modules that own a part -------------------------------------------------

@dataclass(frozen=True)
class Here:
    """What a module must know of the rank that it is on."""

    config: GptOssConfig
    seat: Seat
    link: Link
    dtype: torch.dtype
    device: torch.device

    @property
    def mine(self) -> dict[str, slice]:
        return owned(self.config, self.seat)

    @property
    def layers(self) -> range:
        return stage_layers(self.config, self.seat.stages)[self.seat.stage]


class _Instead:
    """Takes over all that the module has in whose place it is put."""

    def __init__(self, whole: nn.Module, here: Here) -> None:
        vars(self).update(vars(whole))
        self.link, self.mine = here.link, here.mine


class SplitEmbedding(_Instead, nn.Embedding):
    """Rows of the vocabulary: zeros for tokens of other ranks, then a sum."""

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.mine["V"].start
        other = (local < 0) | (local >= self.weight.shape[0])
        x = super().forward(local.masked_fill(other, 0))
        return self.link.sum(x.masked_fill(other[..., None], 0))


class SplitAttention(_Instead, Attention):
    """Some heads; the output projections' parts are summed."""

    def __init__(self, whole: Attention, here: Here) -> None:
        super().__init__(whole, here)
        self.layer = whole.layer - here.layers.start  # in the rank's cache

    def forward(self, *inputs) -> Tensor:
        return self.link.sum(super().forward(*inputs))


class SplitExperts(_Instead, Experts):
    """Some experts, or slices of them; what they give is summed."""

    def __init__(self, whole: Experts, here: Here) -> None:
        super().__init__(whole, here)
        self.every = here.seat.groups == 1

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.every:  # a slice of every expert
            return self.link.sum(super().forward(x, ids, weights))
        experts = self.mine["E"]
        n, k = ((ids >= experts.start) & (ids < experts.stop)).nonzero(
            as_tuple=True)
        y = torch.zeros_like(
            x, dtype=torch.promote_types(x.dtype, torch.float32))
        if len(n):
            out = super().forward(x[n], ids[n, k, None] - experts.start,
                                  weights[n, k, None])
            y.index_add_(0, n, out.to(y.dtype))
        return self.link.sum(y.to(x.dtype))


class SplitHead(_Instead, Linear):
    """Logits of some rows of the vocabulary, gathered, for all stages. A
    rank with fewer rows fills up with zeros; they come last and are cut."""

    def __init__(self, whole: Linear, here: Here) -> None:
        super().__init__(whole, here)
        self.rows = vocabulary_rows(here.config, here.seat.tensors)

    def forward(self, x: Tensor) -> Tensor:
        mine = super().forward(x)
        short = self.rows - mine.shape[-1]
        mine = nn.functional.pad(mine, (0, short)) if short else mine
        logits = self.link.gather(mine)[..., :self.out_features]
        return self.link.from_last(logits)


# --- What stands where another stage works -----------------------------------

class FromStageBefore(nn.Module):
    """In place of the embedding: the stream as the stage before left it."""

    def __init__(self, whole: nn.Embedding, here: Here) -> None:
        super().__init__()
        self.link = here.link
        self.weight = torch.empty(0, whole.weight.shape[1],
                                  dtype=here.dtype, device=here.device)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.link.from_before(
            self.weight.new_empty(*tokens.shape, self.weight.shape[1]))


class OtherStage(nn.Module):
    """In place of a layer of another stage: nothing happens."""

    def __init__(self, whole: nn.Module, here: Here) -> None:
        super().__init__()

    def forward(self, x: Tensor, *others) -> Tensor:
        return x


class ToNextStage(OtherStage):
    """In place of the next stage's first layer: the stream goes there."""

    def __init__(self, whole: nn.Module, here: Here) -> None:
        super().__init__(whole, here)
        self.link = here.link

    def forward(self, x: Tensor, *others) -> Tensor:
        self.link.to_next(x)
        return x


class FromLastStage(nn.Module):
    """In place of the head: the logits that the last stage has."""

    def __init__(self, whole: nn.Linear, here: Here) -> None:
        super().__init__()
        self.link, self.vocabulary = here.link, whole.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.link.from_last(
            x.new_empty(*x.shape[:2], self.vocabulary))


# --- The same model, with other modules --------------------------------------

# name of a module; what takes its place on its own stage, and on others
MODULES = (
    (r"embed_tokens", SplitEmbedding, FromStageBefore),
    (r"layers\.\d+", None, OtherStage),
    (r"layers\.\d+\.self_attn", SplitAttention, None),
    (r"layers\.\d+\.mlp\.experts", SplitExperts, None),
    (r"norm", None, OtherStage),
    (r"lm_head", SplitHead, FromLastStage),
)


def replacements(model: nn.Module, here: Here
                 ) -> Iterator[tuple[str, nn.Module]]:
    """Name and successor of every module that MODULES replaces."""
    for name, module in list(model.named_modules()):
        for pattern, own, other in MODULES:
            if re.fullmatch(pattern, name):
                made = own if on_stage(here.config, here.seat, name) else other
                if made:
                    yield name, made(module, here)
    if here.layers.stop < here.config.num_hidden_layers:
        yield f"layers.{here.layers.stop}", ToNextStage(None, here)


def assign(model: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Put tensors in the places of the model's, which are on "meta"; their
    shapes may differ. ParallelError if one of the model's gets none."""
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in dict(module.named_parameters(recurse=False)):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(module, leaf, tensor)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ParallelError(f"{name}: expected in the checkpoint, found "
                                "nothing")


# --- The cache of a seat -----------------------------------------------------

def seat_config(config: GptOssConfig, seat: Seat) -> GptOssConfig:
    """What a seat's cache is for: its layers, its key/value heads."""
    layers = stage_layers(config, seat.stages)[seat.stage]
    keys = owned(config, seat)["KV"]
    return replace(config, num_hidden_layers=len(layers),
                   layer_types=config.layer_types[layers.start:layers.stop],
                   num_key_value_heads=(keys.stop - keys.start)
                   // config.head_dim)


def seat_cache(config: GptOssConfig, seat: Seat, *options, **more) -> Cache:
    """The part of a cache that a seat needs; options as of `Cache`.

    A rollback may have to replay as many tokens as the sliding layers of
    all stages together see: the same for every seat, so that all replay.
    """
    sliding = config.layer_types.count("sliding_attention")
    return Cache(seat_config(config, seat), *options, **more,
                 replay=sliding * (config.sliding_window - 1))


class SplitGptOss(GptOss):
    """What one rank holds of a model; use it as a GptOss, on all ranks.

    Every rank gives the same calls with the same tokens, and every rank
    gets the same logits, all V of them. For inference only.
    """

    def __init__(self, config: GptOssConfig, seat: Seat, link: Link,
                 dtype: torch.dtype = torch.bfloat16, device="cpu",
                 packed: bool = True) -> None:
        super().__init__(config, dtype, "meta", packed)
        self.requires_grad_(False)
        self.seat, self.link, self.bytes_read = seat, link, 0
        here = Here(config, seat, link, dtype, torch.device(device))
        for name, module in replacements(self, here):
            self.set_submodule(name, module)

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None,
                  slack: int = 0) -> Cache:
        """As `GptOss.new_cache`, for this rank's layers and heads."""
        weight = self.embed_tokens.weight
        return seat_cache(self.config, self.seat, batch_size, max_tokens,
                          slack=slack, dtype=weight.dtype,
                          device=weight.device)

    @classmethod
    def part(cls, path: str | Path, seat: Seat, link: Link,
             dtype: torch.dtype | str = torch.bfloat16, device="cpu",
             packed: bool = True, revision: str | None = None
             ) -> "SplitGptOss":
        """A seat's part of a checkpoint; arguments as `from_pretrained`.

        Reads nothing else. bytes_read tells how much that was.
        """
        with Checkpoint.open(resolve(path, revision)) as checkpoint:
            dtype = pick_dtype(dtype, checkpoint)
            packed = packed and checkpoint.layout != "bf16"
            model = cls(checkpoint.config, seat, link, dtype, device, packed)
            shard = Shard(checkpoint, seat)
            assign(model, load_tensors(shard, dtype, device, packed))
        model.bytes_read = shard.bytes_read
        return model.eval()


# --- Processes that belong together ------------------------------------------

TIMEOUT = timedelta(minutes=10)  # for one collective; then the others fail
_EVER = timedelta(days=3650)


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() and "RANK" in os.environ else 1


class World:
    """The processes of one run; see `join`. rank, size: this one's."""

    def __init__(self, store, rank: int, size: int, kind: str) -> None:
        self.rank, self.size, self.kind = rank, size, kind
        self._store, self._asked = dist.PrefixStore("gptoss", store), 0

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

    def link(self, seat: Seat) -> GroupLink:
        """This rank's link, with new groups: all ranks call it alike."""
        mesh = dist.init_device_mesh(
            self.kind, (seat.stages, seat.tensors),
            mesh_dim_names=("pipeline", "tensor"))
        return GroupLink(seat, mesh, self.same)


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
    torch.manual_seed(world.same(torch.initial_seed))
    return world


def leave() -> None:
    """Part from the others, at the end."""
    if join.cache_info().currsize:
        dist.destroy_process_group()
        join.cache_clear()


def load_split(path: str | Path, dtype: torch.dtype | str = torch.bfloat16,
               device="cpu", packed: bool = True, stages: int = 1
               ) -> SplitGptOss:
    """`GptOss.from_pretrained` for the processes of torchrun: the part of
    this one. stages: of the pipeline; the rest of the world shares tensors.
    """
    device, folder = torch.device(device), resolve(path)
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.config
    world, rank = launched(), int(os.environ.get("RANK", 0))
    seat = take_seat(config, rank, world, stages)  # before any waiting
    link = join(device.type).link(seat) if world > 1 else Link()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return SplitGptOss.part(folder, seat, link, dtype, device, packed)


# --- What goes over the links ------------------------------------------------

def traffic(config: GptOssConfig, seat: Seat, tokens: int = 1,
            kept: int = 1, width: int = 2) -> dict[str, tuple[int, int]]:
    """Collectives of one forward on a seat: name -> (calls, bytes a call).

    tokens of all rows together, kept of them with logits, width bytes a
    number. The bytes are those of the tensor that the rank puts in (or, for
    recv and broadcast, takes out).
    """
    stream = tokens * config.hidden_size * width
    logits = kept * config.vocab_size * width
    mine = kept * vocabulary_rows(config, seat.tensors) * width
    first, last = seat.stage == 0, seat.stage == seat.stages - 1
    layers = len(stage_layers(config, seat.stages)[seat.stage])
    several, staged = seat.tensors > 1, seat.stages > 1
    calls = {"allreduce_": (several * (2 * layers + first), stream),
             "allgather_": (several * last, mine),
             "send": (int(not last), stream),
             "recv_": (int(not first), stream),
             "broadcast_": (int(staged), logits)}
    return {name: call for name, call in calls.items() if call[0]}


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


__all__ = [
    "FromLastStage",
    "FromStageBefore",
    "GroupLink",
    "Here",
    "Link",
    "MODULES",
    "OtherStage",
    "ParallelError",
    "SHARDS",
    "Seat",
    "Shard",
    "SplitAttention",
    "SplitEmbedding",
    "SplitExperts",
    "SplitGptOss",
    "SplitHead",
    "TIMEOUT",
    "Tally",
    "ThreadLink",
    "ToNextStage",
    "World",
    "assign",
    "cut",
    "fits",
    "hidden_slices",
    "join",
    "launched",
    "layer_of",
    "leave",
    "load_split",
    "on_stage",
    "owned",
    "rehearse",
    "replacements",
    "seat_cache",
    "seat_config",
    "shard_rule",
    "share",
    "stage_layers",
    "take_seat",
    "traffic",
    "vocabulary_rows",
]
