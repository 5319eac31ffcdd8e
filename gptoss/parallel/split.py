"""What changes in the model?

Generated from book/parallel/splitting.py; edit the chapter, not this file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptoss.model.cache import Cache
from gptoss.model.layers import Attention, Experts, Linear
from gptoss.model.transformer import GptOss, file_name, file_tensor, pick_dtype
from gptoss.parallel.collectives import Group, join
from gptoss.parallel.launch import launched, process_rank
from gptoss.parallel.shards import (
    MeshRank,
    Shard,
    mesh_rank,
    on_stage,
    owned,
    rank_config,
    stage_layers,
    vocabulary_rows,
)
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.hub import resolve
from gptoss.weights.loading import load_tensors

# --- Which modules own a part? -----------------------------------------------

@dataclass(frozen=True)
class Partition:
    """What a module must know of the rank that it is on."""

    whole: GptOssConfig  # of the model in one piece
    mesh: MeshRank
    group: Group
    dtype: torch.dtype
    device: torch.device

    @property
    def config(self) -> GptOssConfig:
        """Of what this rank has of it."""
        return rank_config(self.whole, self.mesh)

    @property
    def mine(self) -> dict[str, slice]:
        return owned(self.whole, self.mesh)

    @property
    def layers(self) -> range:
        return stage_layers(self.whole, self.mesh.pp_size)[self.mesh.pp_rank]


class SplitEmbedding(nn.Module):
    """Rows of the vocabulary: zeros for tokens of other ranks, then a sum."""

    def __init__(self, whole: nn.Embedding, part: Partition) -> None:
        super().__init__()
        self.group, self.rows = part.group, part.mine["V"]
        self.weight = nn.Parameter(whole.weight[self.rows])

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.rows.start
        other = (local < 0) | (local >= self.weight.shape[0])
        x = nn.functional.embedding(local.masked_fill(other, 0), self.weight)
        return self.group.all_reduce(x.masked_fill(other[..., None], 0))


class SplitAttention(Attention):
    """Some heads; the output projections' parts are summed."""

    def __init__(self, whole: Attention, part: Partition) -> None:
        layer = whole.layer - part.layers.start  # in the rank's cache, too
        super().__init__(part.config, layer, part.dtype, "meta")
        self.group = part.group

    def forward(self, *inputs) -> Tensor:
        return self.group.all_reduce(super().forward(*inputs))


class SplitExperts(Experts):
    """Some experts, or slices of them; what they give is summed."""

    def __init__(self, whole: Experts, part: Partition) -> None:
        super().__init__(part.config, whole.packed, part.dtype, "meta")
        self.group, self.experts = part.group, part.mine["E"]
        self.every = part.mesh.ep_size == 1

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.every:  # a slice of every expert
            return self.group.all_reduce(super().forward(x, ids, weights))
        first, end = self.experts.start, self.experts.stop
        n, k = ((ids >= first) & (ids < end)).nonzero(as_tuple=True)
        y = torch.zeros_like(
            x, dtype=torch.promote_types(x.dtype, torch.float32))
        if len(n):
            out = super().forward(x[n], ids[n, k, None] - first,
                                  weights[n, k, None])
            y.index_add_(0, n, out.to(y.dtype))
        return self.group.all_reduce(y.to(x.dtype))


class SplitHead(Linear):
    """Logits of some rows of the vocabulary, gathered, for all stages. A
    rank with fewer rows fills up with zeros; they come last and are cut."""

    def __init__(self, whole: Linear, part: Partition) -> None:
        rows = part.mine["V"]
        super().__init__(whole.in_features, rows.stop - rows.start,
                         bias=False, dtype=part.dtype, device="meta")
        self.group, self.vocabulary = part.group, whole.out_features
        self.rows = vocabulary_rows(part.whole, part.mesh.tp_size)

    def forward(self, x: Tensor) -> Tensor:
        mine = super().forward(x)
        short = self.rows - mine.shape[-1]
        mine = nn.functional.pad(mine, (0, short)) if short else mine
        logits = self.group.all_gather(mine)[..., :self.vocabulary]
        return self.group.broadcast_last(logits)


# --- What stands where another stage works? ----------------------------------

class FromStageBefore(nn.Module):
    """In place of the embedding: the stream as the stage before left it."""

    def __init__(self, whole: nn.Embedding, part: Partition) -> None:
        super().__init__()
        self.group = part.group
        self.register_buffer("weight", torch.empty(  # its type and place
            0, whole.embedding_dim, dtype=part.dtype, device=part.device),
            persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        weight: Tensor = self.get_buffer("weight")
        return self.group.recv_previous(
            weight.new_empty(*tokens.shape, weight.shape[1]))


class OtherStage(nn.Module):
    """In place of a layer of another stage: nothing happens."""

    def __init__(self, whole: nn.Module | None, part: Partition) -> None:
        super().__init__()

    def forward(self, x: Tensor, *others) -> Tensor:
        return x


class ToNextStage(OtherStage):
    """In place of the next stage's first layer: the stream goes there."""

    def __init__(self, whole: nn.Module | None, part: Partition) -> None:
        super().__init__(whole, part)
        self.group = part.group

    def forward(self, x: Tensor, *others) -> Tensor:
        self.group.send_next(x)
        return x


class FromLastStage(nn.Module):
    """In place of the head: the logits that the last stage has."""

    def __init__(self, whole: nn.Linear, part: Partition) -> None:
        super().__init__()
        self.group, self.vocabulary = part.group, whole.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.group.broadcast_last(
            x.new_empty(*x.shape[:2], self.vocabulary))


# --- How is the model replaced module by module? -----------------------------

# name of a module; what takes its place on its own stage, and on others
MODULES = (
    (r"embed_tokens", SplitEmbedding, FromStageBefore),
    (r"layers\.\d+", None, OtherStage),
    (r"layers\.\d+\.self_attn", SplitAttention, None),
    (r"layers\.\d+\.mlp\.experts", SplitExperts, None),
    (r"norm", None, OtherStage),
    (r"lm_head", SplitHead, FromLastStage),
)


def replacements(model: nn.Module, part: Partition
                 ) -> Iterator[tuple[str, nn.Module]]:
    """Name and successor of every module that MODULES replaces."""
    for name, module in list(model.named_modules()):
        for pattern, own, other in MODULES:
            if re.fullmatch(pattern, name):
                made = own if on_stage(part.whole, part.mesh, name) else other
                if made:
                    yield name, made(module, part)
    if part.layers.stop < part.whole.num_hidden_layers:
        yield f"layers.{part.layers.stop}", ToNextStage(None, part)


# --- The cache of a rank -----------------------------------------------------

def rank_cache(config: GptOssConfig, mesh: MeshRank, batch_size: int = 1,
               max_tokens: int | None = None, **options: Any) -> Cache:
    """The part of a cache that a rank needs; options as of `Cache`.

    A rollback may have to replay as many tokens as the sliding layers of
    all stages together see: the same for every rank, so that all replay.
    """
    sliding = (config.layer_types or ()).count("sliding_attention")
    return Cache(rank_config(config, mesh), batch_size, max_tokens,
                 replay=sliding * (config.sliding_window - 1), **options)


class SplitGptOss(GptOss):
    """What one rank holds of a model; use it as a GptOss, on all ranks.

    Every rank gives the same calls with the same tokens, and every rank
    gets the same logits, all V of them. For inference only.
    """

    def __init__(self, config: GptOssConfig, mesh: MeshRank, group: Group,
                 dtype: torch.dtype = torch.bfloat16, device="cpu",
                 packed: bool = True) -> None:
        super().__init__(config, dtype, "meta", packed)
        self.mesh, self.group, self.bytes_read = mesh, group, 0
        part = Partition(config, mesh, group, dtype, torch.device(device))
        for name, module in replacements(self, part):
            self.set_submodule(name, module)
        self.requires_grad_(False)

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None,
                  slack: int = 0) -> Cache:
        """As `GptOss.new_cache`, for this rank's layers and heads."""
        weight = self.embed_tokens.weight
        return rank_cache(self.config, self.mesh, batch_size, max_tokens,
                          slack=slack, dtype=weight.dtype,
                          device=weight.device)

    @classmethod
    def part(cls, path: str | Path, mesh: MeshRank, group: Group,
             dtype: torch.dtype | str = torch.bfloat16, device="cpu",
             packed: bool = True, revision: str | None = None
             ) -> "SplitGptOss":
        """A rank's part of a checkpoint; arguments as `from_pretrained`.

        Reads nothing else. bytes_read tells how much that was.
        """
        with Checkpoint.open(resolve(path, revision)) as checkpoint:
            dtype = pick_dtype(dtype, checkpoint)
            packed = packed and checkpoint.layout != "bf16"
            model = cls(checkpoint.config, mesh, group, dtype, device, packed)
            shard = Shard(checkpoint, mesh)
            tensors = {file_name(name): file_tensor(name, tensor)
                       for name, tensor in load_tensors(  # it has the names
                           cast(Checkpoint, shard), dtype, device, packed)}
        model.load_state_dict(tensors, assign=True)
        model.bytes_read = shard.bytes_read
        return model.eval()


def load_split(path: str | Path, dtype: torch.dtype | str = torch.bfloat16,
               device="cpu", packed: bool = True, stages: int = 1
               ) -> SplitGptOss:
    """`GptOss.from_pretrained` for the processes of torchrun: the part of
    this one. stages: of the pipeline; the rest of the world shares tensors.
    """
    device, folder = torch.device(device), resolve(path)
    with Checkpoint.open(folder) as checkpoint:
        config = checkpoint.config
    world = launched()
    mesh = mesh_rank(config, process_rank(), world, stages)  # before waiting
    group = join(device.type).group(mesh) if world > 1 else Group()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return SplitGptOss.part(folder, mesh, group, dtype, device, packed)


__all__ = [
    "FromLastStage",
    "FromStageBefore",
    "MODULES",
    "OtherStage",
    "Partition",
    "SplitAttention",
    "SplitEmbedding",
    "SplitExperts",
    "SplitGptOss",
    "SplitHead",
    "ToNextStage",
    "load_split",
    "rank_cache",
    "replacements",
]
