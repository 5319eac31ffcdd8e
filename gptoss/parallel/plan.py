"""What is a second card worth?

Generated from book/parallel/second_card.py; edit the chapter, not this file.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from torch.utils._python_dispatch import TorchDispatchMode

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
from gptoss.weights.layout import DTYPES, component_of, tensor_table
from gptoss.weights.sizes import (
    bytes_read_per_token,
    cache_bytes,
    expert_bytes,
)

# --- The busiest group -------------------------------------------------------

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


# --- What goes over the links? -----------------------------------------------

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


# --- What is a card? ---------------------------------------------------------

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


# --- How long does a token take? ---------------------------------------------

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


# --- Does it fit, and how fast would it be? ----------------------------------

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


__all__ = [
    "CARDS",
    "Card",
    "Estimate",
    "MOST_CONTEXT",
    "RESERVE",
    "Tally",
    "estimate",
    "expected_most",
    "plan",
    "plan_table",
    "rank_bytes",
    "token_seconds",
    "traffic",
]
