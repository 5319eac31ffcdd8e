"""Who holds which part?

Generated from book/parallel/shards.py; edit the chapter, not this file.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.errors import Error
from gptoss.weights.layout import DTYPES, TensorSpec, tensor_table
from gptoss.weights.mxfp4 import BLOCK

# --- The table ---------------------------------------------------------------

class ParallelError(Error, RuntimeError):
    """Ranks that do not fit the model, or that lost each other."""


# End of a tensor's name; what each dimension is cut by (- not at all); and
# by which coordinate only rank 0 holds it: among all of the stage, or among
# those that share an expert. The others have zeros: a bias is added once.
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
    ("o_proj.bias", "-", "tp_rank"),
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


# --- Where is a rank in the grid? --------------------------------------------

@dataclass(frozen=True)
class MeshRank:
    """Where a rank is in the mesh: in which stage of the pipeline (pp), and
    there with which part of the tensors (tp). The tp_size ranks of a stage
    are ep_size groups with different experts, each of `slices` ranks with
    different slices of F.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    slices: int = 1

    @property
    def ep_size(self) -> int:
        return self.tp_size // self.slices

    @property
    def ep_rank(self) -> int:
        return self.tp_rank // self.slices

    @property
    def part(self) -> int:
        """Which of the slices of F."""
        return self.tp_rank % self.slices


# --- How many ranks can share a model? ---------------------------------------

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


def mesh_rank(config: GptOssConfig, rank: int, world: int,
              stages: int = 1) -> MeshRank:
    """The coordinates of a rank; neighbours in rank share a stage.

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
    return MeshRank(rank % tensors, tensors, rank // tensors, stages,
                hidden_slices(config, tensors))


# --- What does a rank own along each letter? ---------------------------------

def share(size: int, index: int, parts: int, unit: int = 1) -> slice:
    """The index-th of `parts` parts of range(size), times unit."""
    return slice(size * index // parts * unit,
                 size * (index + 1) // parts * unit)


@lru_cache(maxsize=256)
def owned(config: GptOssConfig, mesh: MeshRank) -> dict[str, slice]:
    """What a rank owns along each letter of SHARDS; not to be changed."""
    H, C = config.num_attention_heads, config.head_dim
    heads = share(H, mesh.tp_rank, mesh.tp_size)
    shared = H // config.num_key_value_heads  # query heads of one key head
    first, end = heads.start // shared, -(-heads.stop // shared)
    blocks = config.intermediate_size // BLOCK, mesh.part, mesh.slices
    rows = vocabulary_rows(config, mesh.tp_size)
    return {
        "V": slice(rows * mesh.tp_rank,
                   min(rows * (mesh.tp_rank + 1), config.vocab_size)),
        "H": heads, "Q": slice(heads.start * C, heads.stop * C),
        "KV": slice(first * C, end * C),
        "E": share(config.num_local_experts, mesh.ep_rank, mesh.ep_size),
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


def on_stage(config: GptOssConfig, mesh: MeshRank, name: str) -> bool:
    """Whether a tensor or module of this name is on the rank's stage."""
    layer = layer_of(name)
    if layer is not None:
        return layer in stage_layers(config, mesh.pp_size)[mesh.pp_rank]
    return mesh.pp_rank == (0 if "embed_tokens" in name else mesh.pp_size - 1)


@lru_cache(maxsize=256)
def rank_config(config: GptOssConfig, mesh: MeshRank) -> GptOssConfig:
    """The layers that a rank has, and what it has of them, as a model's
    configuration. A token may choose fewer of its experts than of all."""
    layers = stage_layers(config, mesh.pp_size)[mesh.pp_rank]
    mine = {letter: part.stop - part.start
            for letter, part in owned(config, mesh).items()}
    return replace(
        config, num_hidden_layers=len(layers),
        layer_types=(config.layer_types or ())[layers.start:layers.stop],
        num_attention_heads=mine["H"],
        num_key_value_heads=mine["KV"] // config.head_dim,
        num_local_experts=mine["E"],
        num_experts_per_tok=min(config.num_experts_per_tok, mine["E"]),
        intermediate_size=mine["F"])


# --- Reading one's own bytes -------------------------------------------------

def cut(config: GptOssConfig, mesh: MeshRank, spec: TensorSpec
        ) -> tuple[tuple[slice, ...], tuple[int, ...], bool]:
    """Where a rank's part of a tensor lies, its shape, and whether it is
    read at all: if not, another rank holds it and this one has zeros."""
    letters, holder = shard_rule(spec.name)
    mine = owned(config, mesh)
    index = tuple(mine.get(letter, slice(None)) for letter in letters)
    shape = tuple(len(range(size)[part]) for size, part
                  in zip(spec.shape, index, strict=True))
    return index, shape, not (holder and getattr(mesh, holder))


class Shard:
    """A checkpoint as one rank sees it: fewer tensors, and less of each.

    Has what `load_tensors` asks of a Checkpoint: path, names, read.
    bytes_read counts what was taken from the file.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: MeshRank) -> None:
        self.whole, self.mesh = checkpoint, mesh
        self.path, self.bytes_read = checkpoint.path, 0

    def names(self) -> list[str]:
        config = self.whole.config
        return [name for name in self.whole.names()
                if on_stage(config, self.mesh, name)]

    def read(self, name: str) -> Tensor:
        """The rank's part of a tensor, contiguous.

        Whole rows stay views of the mapped file; others are copied.
        """
        spec = self.whole.spec(name)
        index, shape, held = cut(self.whole.config, self.mesh, spec)
        if not held:
            return torch.zeros(shape, dtype=DTYPES[spec.dtype])
        rows = self.whole.read(name, index[0])
        part = rows[(slice(None), *index[1:])].contiguous()
        self.bytes_read += part.nbytes
        return part


__all__ = [
    "MeshRank",
    "ParallelError",
    "SHARDS",
    "Shard",
    "cut",
    "fits",
    "hidden_slices",
    "layer_of",
    "mesh_rank",
    "on_stage",
    "owned",
    "rank_config",
    "shard_rule",
    "share",
    "stage_layers",
    "vocabulary_rows",
]
