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
#     module: shards
# ---

# %% [markdown]
# # Splitting the model

# %% [markdown]
# ## Question
#
# How do several processors become one model, so that nobody could tell from
# its output, and what do they have to say to each other for every token?
#
# One GPU that decodes with the 20b reads 3.7 GB for a token. Eight of them
# read at best an eighth each, which an H100 does in 0.14 ms. For the same
# token they must agree 49 times on a sum of vectors of 5,760 bytes. If an
# agreement among eight takes 15 microseconds however small it is, talking
# takes over five times as long as reading.

# %%
import os

import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor
plt.style.use("_static/book.mplstyle")
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
# A *rank* is one of the processes, each with a processor of its own. Below is
# the model on two ranks (blue and green), and where they meet (orange). What
# is grey is copied. Every rank has the whole residual stream; what is split
# lies between two orange bars.

# %% tags=["hide-input"]
# Figure: the model from embedding to head in two columns, rank 0 and rank 1,
# each with its half of the heads, of every expert and of the vocabulary.
# Orange bars across both are the meetings: a sum after embedding, attention
# and experts, a gather at the head.
rows = (("embedding", "rows 0 … V/2", "rows V/2 … V"),
        ("sum", "B T D numbers"),
        ("attention", "query heads 0 … 31\nkey heads 0 … 3",
         "query heads 32 … 63\nkey heads 4 … 7"),
        ("sum", "B T D numbers"),
        ("router", "all E logits", "all E logits"),
        ("experts", "first half of F\nof every expert",
         "second half of F\nof every expert"),
        ("sum", "B T D numbers"),
        ("head", "logits 0 … V/2", "logits V/2 … V"),
        ("gather", "B T V numbers"))
fig, ax = plt.subplots(figsize=(7, 4.6))
for y, (name, *texts) in enumerate(rows):
    if len(texts) == 1:
        ax.barh(-y, 6.2, 0.36, color="C1")
        ax.text(3.1, -y, name, ha="center", va="center", fontsize=8)
        ax.text(6.35, -y, texts[0], va="center", fontsize=8)
        continue
    for x, text, colour in zip((0, 3.3), texts, ("C0", "C2"), strict=True):
        plain = name == "router"
        ax.barh(-y, 2.9, 0.74, left=x, color="0.85" if plain else colour,
                alpha=1 if plain else 0.3)
        ax.text(x + 1.45, -y, text, ha="center", va="center", fontsize=8)
    ax.text(-0.15, -y, name, ha="right", va="center", fontsize=9)
ax.annotate("L times", (-1.35, -4), (-1.35, -4), ha="center", va="center",
            rotation=90, fontsize=8)
ax.plot([-1.1, -1.2, -1.2, -1.1], [-1.6, -1.6, -6.3, -6.3], color="0.4",
        lw=1)
for x, text in ((1.45, "rank 0"), (4.75, "rank 1")):
    ax.text(x, 0.62, text, ha="center", fontsize=9, weight="bold")
ax.set(xlim=(-1.6, 8), ylim=(-8.4, 1.1))
ax.axis("off")
plt.show()

# %% [markdown]
# Two meetings a layer, one after the embedding and one at the head. The
# norms and the residual additions need none: each rank does them on its own
# copy of the stream, and the copies stay equal bit for bit.

# %% [markdown]
# ## The naive version
#
# A layer of attention: give every rank half of the query heads, half of the
# key and value heads, the columns of the output projection that belong to
# them, and add up. Chapter 10's module takes its sizes from its weights, so
# it runs with half of them.

# %%
import torch
from torch.func import functional_call

from gptoss.model.layers import Attention
from gptoss.attention.rope import rope_parameters, rope_tables

torch.manual_seed(0)
small = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=64, hidden_size=32, intermediate_size=64, head_dim=8,
    num_attention_heads=8, num_key_value_heads=2)
attention = Attention(small, 1, torch.float32)
state = {name: torch.randn_like(value) / 4
         for name, value in attention.named_parameters()}
x, positions = torch.randn(1, 6, 32), torch.arange(6)[None]
inputs = (x, *rope_tables(positions, *rope_parameters(small), x.dtype),
          positions)
wanted = functional_call(attention, state, inputs)


def half(i: int) -> dict[str, torch.Tensor]:
    """Rows of q, k, v and sinks, columns of o, and o's bias: the naive i-th
    half."""
    part = {name: value.chunk(2)[i] for name, value in state.items()}
    part["o_proj.weight"] = state["o_proj.weight"].chunk(2, 1)[i]
    part["o_proj.bias"] = state["o_proj.bias"]
    return part


summed = sum(functional_call(attention, half(i), inputs) for i in (0, 1))
excess = summed - wanted
print(f"relative error {excess.norm() / wanted.norm():.0%}")
assert torch.allclose(excess, state["o_proj.bias"].expand_as(excess),
                      atol=1e-5)

# %% [markdown]
# The error is exactly one bias: both halves added it, and with eight ranks it
# would be there eight times. Nothing crashes; the text gets worse, and more
# so the more GPUs work on it. The same happens at the experts' `down_proj`,
# whose bias is added by everyone who holds a part of the expert.
#
# The second trap is in the other layout. `original/` stores q, k and v as one
# matrix of H + 2G heads, here twelve. Who cuts its rows in two without looking
# gives the first rank six query heads, and calls them four of q, one of k and
# one of v:

# %%
fused = torch.cat([state[f"{n}_proj.weight"] for n in "qkv"])
biases = torch.cat([state[f"{n}_proj.bias"] for n in "qkv"])


def blind(i: int) -> dict[str, torch.Tensor]:
    """The i-th half of the fused rows, read as q, k, v."""
    part = half(i)
    for kind, tensor in (("weight", fused), ("bias", biases)):
        pieces = tensor.chunk(2)[i].split([4 * 8, 8, 8])
        part |= {f"{n}_proj.{kind}": piece
                 for n, piece in zip("qkv", pieces, strict=True)}
    part["o_proj.bias"] = part["o_proj.bias"] * (i == 0)
    return part


summed = sum(functional_call(attention, blind(i), inputs) for i in (0, 1))
print(f"relative error {(summed - wanted).norm() / wanted.norm():.0%}")
assert (summed - wanted).norm() > wanted.norm() / 2

# %% [markdown]
# ## Derivation
#
# **Rows, then columns.** A matrix can be cut in two ways. Cut by rows, each
# rank gets some of the outputs and needs all of the input; cut by columns,
# each needs only some of the input, and gets a part of every output that has
# to be added up. Let $R$ ranks share two matrices with a function $f$ in
# between that works on heads or pairs, each by itself. Where no cut divides
# one of these,
#
# $$y = W_2\, f(W_1 x) + b = \sum_{i=1}^{R} W_2^{(:,\,i)} f(W_1^{(i,\,:)} x)
# + b$$ (parallel-rows)
#
# That is one sum over the ranks for two matrices, with $b$ outside of it. In
# the code one rank has $b$ and the others have zeros.
#
# **Attention** is {eq}`parallel-rows` with a head as the unit: $W_1$ are q,
# k and v, $W_2$ is o, and a head never looks at another. Query head $h$ reads
# key head $\lfloor h G / H \rfloor$, so a rank with the query heads
# $h_0 \le h < h_1$ needs the key heads $g$ with
#
# $$\lfloor h_0\, G/H \rfloor \;\le\; g \;<\; \lceil h_1\, G/H \rceil
# . $$ (parallel-heads)
#
# These are $G/R$ of them if $R$ divides $G$, and one, shared with other ranks,
# if $R$ is a multiple of $G$. The sinks go with the query heads, the cache
# with the key heads.
#
# **Experts** can be cut twice. SwiGLU works on pairs (gate, up), one for each
# of F, so {eq}`parallel-rows` holds with a pair as the unit: the pair is two
# neighbouring rows of `gate_up` and one column of `down`. Columns of `down`
# come in MXFP4 blocks of 32, so the unit is a block: F/32 = 90 of them in the
# released models. And the sum over the chosen experts is a sum, so it can be
# cut as well. With $s = \gcd(R, F/32)$ slices, there remain $n = R/s$ groups
# of ranks with different experts:
#
# $$y = \sum_{\text{group}}\; \sum_{e\, \in\, \text{chosen} \cap
# \text{group}} w_e \sum_{\text{slice}} \text{expert}_e^{(\text{slice})}(x)
# $$ (parallel-experts)
#
# The middle sum is the rank's own; the other two are one all-reduce. Slices
# share the work evenly. Groups do not: of K = 4 experts in two groups, the
# busier has two, three or four. If each choice of K of the E experts is
# equally likely, how many has the busiest of $n$ groups, on average? Call that
# number $M$. A group takes $j$ of its $E/n$ experts in $\binom{E/n}{j}$ ways.
# Write that as the coefficient of $z^j$, leave out $j > m$, and multiply the
# polynomials of all groups: the coefficient of $z^K$, written $[z^K]$, counts
# the choices with $M \le m$. And the mean of a count is
# $\sum_{m \ge 0} P(M > m)$, so
#
# $$\mathrm{E}[M] = \sum_{m=0}^{K-1} \bigg(1 - \binom{E}{K}^{-1} [z^K]
# \Big(\sum_{j \le m} \binom{E/n}{j} z^j\Big)^{n}\bigg) .
# $$ (parallel-busiest)
#
# **Vocabulary.** A rank that does not hold a token's row of the embedding
# contributes zeros to the sum. The head is cut by rows; its outputs are not
# added but put side by side, and each logit is computed in one place only.
# That is worth more than the time it saves: whatever rounding did elsewhere,
# all ranks hold the same logits, and with the same random numbers draw the
# same token.
#
# **Stages.** Layers can also be dealt out, a stage after the other: the
# stream is handed on once a stage. For one text that saves memory and no
# time, since the stages wait for each other. With several stages, the $R$
# above are the ranks of one stage, its *tensor ranks*.
#
# **What a token costs.** With $R > 1$ tensor ranks and one stage, T tokens of
# which the last one's logits are wanted ask for
#
# $$2L + 1 \text{ sums of } 2\,T D \text{ bytes, and one gathering of }
# 2V/R \text{ bytes from each}$$ (parallel-calls)
#
# in bf16. In a ring every rank talks to the next one only. The tensor is cut
# into $R$ parts. In the first step rank $r$ hands on its part $r$; then, in
# every step, each rank adds what arrived to its own copy of that part and
# hands the sum on. After $R - 1$ steps each part is complete on one rank, and
# $R - 1$ more steps hand the sums round:

# %%
def ring_sum(given: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """All-reduce of one vector a rank, by a ring: results and steps."""
    R, steps = len(given), 0
    parts = [list(x.clone().chunk(R)) for x in given]
    for handing_round in (False, True):
        for step in range(R - 1):
            sent = [(r - step + handing_round) % R for r in range(R)]
            letters = [parts[r][sent[r]].clone() for r in range(R)]
            for r in range(R):
                k, letter = sent[r - 1], letters[r - 1]
                parts[r][k] = letter if handing_round else (
                    parts[r][k] + letter)
            steps += 1
    return [torch.cat(part) for part in parts], steps


rng = torch.Generator().manual_seed(0)
for R in (2, 3, 4, 8):
    given = torch.randint(-99, 99, (R, 24), generator=rng).unbind()
    results, steps = ring_sum(given)
    assert all(torch.equal(y, sum(given)) for y in results)
    print(f"{R} ranks: {steps} steps, in each a part of {24 // R} of 24")
    assert steps == 2 * (R - 1)

# %% [markdown]
# Each part is summed once, in one order, and then copied: whatever rounding
# does, all ranks hold the same bits.
#
# Each of the $2(R - 1)$ steps sends an $R$-th of the tensor over each link,
# and no step can begin before the one before has arrived. So with memory at
# $\beta$, links at $\lambda$ bytes a second, a time $\tau$ to begin a
# collective and a time $\alpha$ for the smallest step, a token takes about
#
# $$
# t_R \approx \frac{\text{bytes read}}{R \beta} + (2L + 1) \bigg(\tau +
# 2(R - 1) \Big(\alpha + \frac{2D}{R \lambda}\Big)\bigg) .
# $$ (parallel-time)
#
# The first term falls with $R$, more slowly where there are groups; the second
# grows with it. Bytes do not make it grow, as $\frac{R-1}{R} < 1$: the
# steps do. The gathering takes $R - 1$ steps. A library may add small tensors
# up along a tree instead, in about $2 \log_2 R$ steps: 6 instead of 14 for
# eight ranks, the same 2 for two. The code below reckons with the ring, and
# also counts the gathering and the busiest group.

# %% [markdown]
# ## Code
#
# ### Coordinates of a rank
#
# Neighbouring ranks share a stage: `torchrun` numbers the processes of a
# machine in a row, so the many sums stay inside a machine and only the stream
# between stages leaves it. So the ranks form a *mesh* of two dimensions, like
# torch's `DeviceMesh`: along one they share tensors (`tp`, tensor parallel),
# along the other they stand in the pipeline (`pp`). Of the ranks that share
# tensors, those with different experts count along `ep`, expert parallel.
#
# Heads, experts and blocks must divide among the ranks of a stage. The
# vocabulary need not: fine-tunes add a few tokens, and 201,089 rows divide by
# nothing. Each rank takes as many as would suffice if all had the same, and
# the last has what is left. In the gathering all must give equally much, so
# there the last one fills up with zeros, which fall away again.

# %% tags=["export:parallel/shards"]
import math
from dataclasses import dataclass

from gptoss.weights.config import GptOssConfig
from gptoss.weights.errors import Error
from gptoss.weights.mxfp4 import BLOCK


class ParallelError(Error, RuntimeError):
    """Ranks that do not fit the model, or that lost each other."""


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

# %% tags=["export:parallel/shards"]
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

# %%
for world, stages in ((2, 1), (8, 1), (8, 2)):
    print(world, stages, mesh_rank(big, world - 1, world, stages))
try:
    mesh_rank(big, 0, 6, 2)
except ParallelError as error:
    print(error)

# %% [markdown]
# ### The shard table
#
# How each tensor is cut is a table, as the names were in chapter 3. Its
# letters are those of the shapes, with Q for the H C rows of the query heads
# and KV for the G C rows of the key heads. A second table, `owned`, says what
# a rank has of each letter.

# %% tags=["export:parallel/shards"]
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

# %% tags=["export:parallel/shards"]
from functools import lru_cache


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

# %%
for rank in (0, 1, 7):
    mine = owned(big, mesh_rank(big, rank, 8))
    print(rank, {letter: (part.start, part.stop) for letter, part
                 in mine.items() if letter in ("V", "H", "KV", "E", "F")})
ranks = [mesh_rank(big, rank, 8) for rank in range(8)]
for letter, size in (("V", 201088), ("H", 64), ("KV", 512)):
    parts = [owned(big, mesh)[letter] for mesh in ranks]
    assert [n for part in parts for n in range(size)[part]] == list(
        range(size))
from dataclasses import replace

more = replace(big, vocab_size=201089)
print("one token more:", [len(range(201089)[owned(more, mesh_rank(
    more, rank, 8))["V"]]) for rank in range(8)])

# %% [markdown]
# Eight ranks on the 20b: two slices of F, and four groups of eight experts.
#
# ### Stages
#
# A stage gets layers until its share of the file's bytes is reached. In the
# 20b the embedding is as heavy as 2.4 layers, and so is the head, so the
# outer stages get fewer:

# %% tags=["export:parallel/shards"]
import re
from itertools import accumulate

from gptoss.weights.layout import TensorSpec, tensor_table


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

# %%
for stages in (1, 2, 4, 8):
    print([len(layers) for layers in stage_layers(big, stages)])

# %% [markdown]
# So what a rank has of the layers is a model again, a smaller one, and can be
# described as one: fewer layers, heads and experts, a smaller F. The
# vocabulary stays, and so do the positions.

# %% tags=["export:parallel/shards"]
from dataclasses import replace


@lru_cache(maxsize=256)
def rank_config(config: GptOssConfig, mesh: MeshRank) -> GptOssConfig:
    """The layers that a rank has, and what it has of them, as a model's
    configuration. A token may choose fewer of its experts than of all."""
    layers = stage_layers(config, mesh.pp_size)[mesh.pp_rank]
    mine = {letter: part.stop - part.start
            for letter, part in owned(config, mesh).items()}
    return replace(
        config, num_hidden_layers=len(layers),
        layer_types=config.layer_types[layers.start:layers.stop],
        num_attention_heads=mine["H"],
        num_key_value_heads=mine["KV"] // config.head_dim,
        num_local_experts=mine["E"],
        num_experts_per_tok=min(config.num_experts_per_tok, mine["E"]),
        intermediate_size=mine["F"])

# %%
config = rank_config(big, mesh_rank(big, 7, 16, 2))
print(config.num_hidden_layers, "layers,", config.num_attention_heads,
      "query heads,", config.num_key_value_heads, "key heads,",
      config.num_local_experts, "experts of", config.intermediate_size)

# %% [markdown]
# ### Reading one's own bytes
#
# Chapter 10 loads a model from anything that has names and reads them. A
# `Shard` has both: it answers as if the file held nothing but this rank's
# part. Packed experts stay packed. Parts that are whole rows of a tensor
# remain views of the mapped file. The columns of `o_proj` and of `down_proj`
# are copied, since they do not lie together; the system reads files in pages
# of 4 KiB, so of these two it may read more than is taken. With groups of
# whole experts that is only `o_proj`.

# %% tags=["export:parallel/shards"]
import torch
from torch import Tensor

from gptoss.weights.layout import DTYPES
from gptoss.weights.checkpoint import Checkpoint


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

# %%
from importlib.resources import files

POCKET = files("gptoss") / "pocket"  # 8 query heads, 2 key heads, 8 experts
pocket = GptOssConfig.from_pretrained(POCKET)
with Checkpoint.open(POCKET) as checkpoint:
    for world, stages in ((1, 1), (2, 1), (4, 2)):
        read = []
        for rank in range(world):
            shard = Shard(checkpoint, mesh_rank(pocket, rank, world, stages))
            for name in shard.names():
                shard.read(name)
            read.append(shard.bytes_read)
        print(f"{world} ranks, {stages} stages:", read)
        assert max(read) < 1.05 * checkpoint.nbytes / world

# %% [markdown]
# ### What ranks say to each other
#
# Five things, and the modules below know no others. In a world of one they
# say nothing.

# %% tags=["export:parallel/collectives"]
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gptoss.weights.config import GptOssConfig



class Group:
    """What the modules of a rank ask of the others. This one is for a
    world of one, where there is nothing to ask."""

    mesh = MeshRank()

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides for all (chapter 12)."""
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

# %% tags=["export:parallel/collectives"]
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

# %% tags=["export:parallel/collectives"]
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

# %% tags=["export:parallel/collectives"]
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

# %% tags=["export:parallel/collectives"]
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


print(rehearse(pocket, 4, 1, meet)[3])

# %% [markdown]
# ### Processes that belong together
#
# `torchrun` starts the processes and tells each its number through the
# environment. How many they are must be known before torch is loaded, since
# a command that refuses should answer at once. So these two questions have a
# module of their own, which needs nothing.

# %% tags=["export:parallel/launch"]
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
# does not. A chat asks before every token (chapter 12), so a key is thrown
# away by the last rank that has read it.

# %% tags=["export:parallel/collectives"]
import os
from functools import lru_cache

TIMEOUT = timedelta(minutes=10)  # for one collective; then the others fail
_EVER = timedelta(days=3650)


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

    def group(self, mesh: MeshRank) -> TorchGroup:
        """This rank's groups, new ones: all ranks call it alike."""
        device_mesh = dist.init_device_mesh(
            self.kind, (mesh.pp_size, mesh.tp_size),
            mesh_dim_names=("pp", "tp"))
        return TorchGroup(mesh, device_mesh, self.same)

# %% tags=["export:parallel/collectives"]
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

# %% [markdown]
# ### Modules that own a part
#
# What a rank has of the layers is a smaller model, with a configuration of its
# own: `rank_config`. So a rank's attention is an `Attention` made for that
# configuration, with fewer heads, whose output is summed; that is all the code
# it needs. The experts must also leave out the tokens that chose experts of
# other groups.

# %% tags=["export:parallel/split"]
from dataclasses import dataclass

import torch
from torch import Tensor, nn


from gptoss.weights.config import GptOssConfig
from gptoss.model.layers import Experts
from gptoss.model.layers import Attention, Linear
from gptoss.model.transformer import GptOss



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

# %% tags=["export:parallel/split"]
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

# %% [markdown]
# ### What stands where another stage works
#
# Four stand-ins: one takes the stream from the stage before, one hands it on,
# one takes the logits from the last stage, and one does nothing.

# %% tags=["export:parallel/split"]
class FromStageBefore(nn.Module):
    """In place of the embedding: the stream as the stage before left it."""

    def __init__(self, whole: nn.Embedding, part: Partition) -> None:
        super().__init__()
        self.group = part.group
        self.register_buffer("weight", torch.empty(  # its type and place
            0, whole.embedding_dim, dtype=part.dtype, device=part.device),
            persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.group.recv_previous(
            self.weight.new_empty(*tokens.shape, self.weight.shape[1]))


class OtherStage(nn.Module):
    """In place of a layer of another stage: nothing happens."""

    def __init__(self, whole: nn.Module, part: Partition) -> None:
        super().__init__()

    def forward(self, x: Tensor, *others) -> Tensor:
        return x


class ToNextStage(OtherStage):
    """In place of the next stage's first layer: the stream goes there."""

    def __init__(self, whole: nn.Module, part: Partition) -> None:
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

# %% [markdown]
# ### The same model, with other modules
#
# A `SplitGptOss` is a `GptOss` on the meta device, where nothing takes
# memory, in which a table replaces some modules; then the rank's tensors are
# put in. Its `run` is the one of chapter 10: the layers of other stages are
# there and do nothing, and names stay those of the file.

# %% tags=["export:parallel/split"]
import re
from collections.abc import Iterator



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

# %% [markdown]
# ### The cache of a rank
#
# A rank remembers its own layers and key heads. One thing it must not decide
# alone: how far a rollback goes back. Chapter 9 replays (W - 1) tokens for
# every sliding layer of the model; a stage that counted only its own layers
# would replay fewer, and its keys would come from a stream that was wrong
# further down.

# %% tags=["export:parallel/split"]
from gptoss.model.cache import Cache


def rank_cache(config: GptOssConfig, mesh: MeshRank, *options, **more
               ) -> Cache:
    """The part of a cache that a rank needs; options as of `Cache`.

    A rollback may have to replay as many tokens as the sliding layers of
    all stages together see: the same for every rank, so that all replay.
    """
    sliding = config.layer_types.count("sliding_attention")
    return Cache(rank_config(config, mesh), *options, **more,
                 replay=sliding * (config.sliding_window - 1))

# %% tags=["export:parallel/split"]
from pathlib import Path

from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.hub import resolve
from gptoss.weights.loading import load_tensors
from gptoss.model.transformer import pick_dtype



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
            tensors = dict(load_tensors(shard, dtype, device, packed))
        model.load_state_dict(tensors, assign=True)
        model.bytes_read = shard.bytes_read
        return model.eval()

# %%
def parts_of(mesh: MeshRank, group: Group) -> list[str]:
    model = SplitGptOss.part(POCKET, mesh, group, torch.float32)
    parts = [model.embed_tokens, *model.layers, model.lm_head]
    return [type(part).__name__ for part in parts]


for rank, parts in enumerate(rehearse(pocket, 4, 2, parts_of)):
    print(rank, *parts)

# %% [markdown]
# Under `torchrun` that is all a program has to call: every process gets its
# own part of the model.

# %% tags=["export:parallel/split"]
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

# %% [markdown]
# ### What goes over the links
#
# {eq}`parallel-calls` for every rank, and a witness: torch dispatches its
# collectives as operators, where they can be counted without asking our code.

# %% tags=["export:parallel/plan"]
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

# %% tags=["export:parallel/plan"]
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
# ### A plan
#
# From {eq}`parallel-time` and {eq}`parallel-busiest`: what fits on which
# cards, and how fast it could be at best. Bytes and speeds are the makers'
# numbers. For $\tau$ and $\alpha$ we take what NCCL itself reckons with when
# it chooses between ring and tree: 6.6 microseconds, and 0.6 a step over
# NVLink or 1.0 over PCIe. Those are its tuner's constants for small messages,
# not measurements of these cards. The reserve is an assumption.

# %% tags=["export:parallel/plan"]
import math
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

# %% tags=["export:parallel/plan"]
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
    touched = sum(parts.values()) - parts["experts"] - parts.get(
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

# %% tags=["export:parallel/plan"]
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
by_hand = (1 * (1 - 2 * 1 / 6) + 2 * (2 * 1 / 6))  # 2 of 4, in two pairs
assert math.isclose(expected_most(4, 2, 2), by_hand)
print([round(expected_most(32, 4, n), 2) for n in (1, 2, 4, 8)])
print(plan_table("gpt-oss-20b", big))
one, two, four, eight = (estimate(big, n, CARDS[2], 8192)
                         for n in (1, 2, 4, 8))
assert two.tensor < eight.tensor < four.tensor < 1.4 * one.tensor
assert eight.pipeline < one.pipeline

# %% [markdown]
# Of the four chosen experts of the 20b, the busiest of two groups runs 2.7, of
# eight groups 1.5 instead of a half. Of the fast cards four are at best 1.4
# times as fast as one, and eight are slower than four: what they save in
# reading, the ring of eight takes in steps. Stages are slower than one card
# for one text; they are for models that do not fit.

# %% [markdown]
# ## It holds
#
# First with threads, five splits of the shipped model over up to eight ranks:
# a prompt longer than the window, in pieces through the cache, then a rollback
# that has to replay. Against one process, in fp32.

# %%
from gptoss.model.transformer import GptOss as Whole

model = Whole.from_pretrained(POCKET, dtype=torch.float32)
tokens = torch.randint(pocket.vocab_size, (1, 90))


@torch.inference_mode()
def trial(model: Whole) -> torch.Tensor:
    """Logits of 90 tokens, then of the last 40 once more."""
    cache = model.new_cache()
    first = [model(part, cache) for part in tokens.split([70, 1, 19], 1)]
    start = cache.rollback(50)
    again = model(tokens[:, start:], cache)
    return torch.cat([*first, again[:, 50 - start:]], 1)[0]


def on_a_rank(mesh: MeshRank, group: Group) -> torch.Tensor:
    return trial(SplitGptOss.part(POCKET, mesh, group, torch.float32))


expected = trial(model)
for world, stages in ((2, 1), (2, 2), (4, 1), (4, 2), (8, 4)):
    found = rehearse(pocket, world, stages, on_a_rank)
    error = max((rank - expected).abs().max() for rank in found)
    same = all(torch.equal(rank, found[0]) for rank in found)
    close = bool(error < 1e-5 * expected.std())  # of the logits' spread
    print(f"{world // stages} tensor ranks x {stages} stages: within 1e-5 "
          f"{close}, ranks equal bit for bit {same}")
    assert close and same

# %% [markdown]
# Then in earnest: four processes that `torchrun` starts, over gloo. The
# program is the same on all; only the first prints. It splits the model in
# three ways, compares with the whole one, writes 32 tokens greedily, and
# holds what torch dispatched against {eq}`parallel-calls`.

# %%
import subprocess
import sys
import tempfile

PROGRAM = """
import sys
import torch
import torch.distributed as dist
from gptoss.weights.config import GptOssConfig
from gptoss.text.sampling import Sampler
from gptoss.text.generate import generate
from gptoss.model.transformer import GptOss
from gptoss.parallel.collectives import join, leave
from gptoss.parallel.plan import Tally, traffic
from gptoss.parallel.shards import mesh_rank
from gptoss.parallel.split import SplitGptOss

path, world, greedy = sys.argv[1], join(), Sampler(temperature=0.0)
config = GptOssConfig.from_pretrained(path)
whole = GptOss.from_pretrained(path, dtype=torch.float32)
prompt = torch.randint(config.vocab_size, (1, 80))  # the same on all ranks
with torch.inference_mode():
    wanted = whole(prompt)
text = world.same(lambda: list(generate(
    whole, prompt[0].tolist(), sampler=greedy, max_new_tokens=32)))
for stages in (1, 2, 4):
    mesh = mesh_rank(config, world.rank, world.size, stages)
    model = SplitGptOss.part(path, mesh, world.group(mesh), torch.float32)
    with torch.inference_mode():
        logits = model(prompt)
        first = logits.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, logits)
        # fp32 itself is up to 1.4e-5 from float64 here, on either side
        assert (logits - wanted).abs().max() < 4e-5 * wanted.std()
        with Tally() as tally:
            model(prompt[:, :1])
    found = generate(model, prompt[0].tolist(), sampler=greedy,
                     max_new_tokens=32)
    assert list(found) == text
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
# The tests go further: worlds of 1, 2, 4 and 8 processes, 128 greedy tokens,
# batches with padding, all three layouts, `generate`, `chat` and `bench` on
# two ranks with one stdin, two agents of `torchrun` as on two machines, and a
# rank that is killed in the middle of a text.
#
# **Not tested: GPUs.** All of this ran over gloo on CPUs. With `--device
# cuda` the same calls go to NCCL; that path, CUDA devices in `join` and the
# kernels on a rank's part of the experts have never run.

# %% [markdown]
# ## Against the others
#
# **Biases.** With one of its options, GPT-NeoX adds the biases of a split
# layer on every rank before the sum (gpt-neox#962); so did MinivLLM
# (MinivLLM#80). TensorRT-Model-Connect#136 adds the experts' `down` biases
# "once after rank reduction". nano-vllm and text-generation-inference add
# them on rank 0 only, as here, and both have a report that the bias is added
# by every rank (nano-vllm#99, text-generation-inference#1036): the rule is
# easy to misread where it stands in an `if` and not in a table.
#
# **Routing.** transformers#40031: nonsense under `torchrun` with the MXFP4
# kernels even when the model was *not* split, each GPU having all of it
# (repaired by #40283). #40545: experts that are elsewhere were masked with
# the number 0, which is an expert, so every rank ran its first one for them.
# Here an expert of another group is left out before anything is computed, and
# whether a model is split is decided by who builds it, not by whether
# `torch.distributed` happens to be initialised.
#
# **Blocks.** Four slices of F = 2880 would be 720 wide, 22.5 blocks. When
# SGLang once did not pad such slices, gpt-oss-120b on eight GPUs scored 0.76
# instead of 0.80 in GPQA, and nothing crashed (sglang#9473; its remedy is to
# round up, for four slices to 23 blocks). We take the largest number of slices
# that divides, and groups of experts for the rest: nothing is padded, but
# groups share the work less evenly. Padding is the better choice where the
# busiest rank decides, that is, for one text at a time:

# %%
for n in (4, 8):
    slices = hidden_slices(big, n)
    ours = expected_most(32, 4, n // slices) / slices
    padded = 4 * math.ceil(90 / n) / 90
    print(f"{n} ranks, experts a layer on the busiest: {ours:.2f} here, "
          f"{padded:.2f} padded, {4 / n:.2f} even")
    assert 4 / n < padded < ours

# %% [markdown]
# **Heads that do not divide.** With more devices than key heads,
# tenstorrent/vllm#50 had given each device of its cache G/R heads, less than
# one; tt-xla#5017 pads the heads until they divide. With {eq}`parallel-heads`
# a key head is copied and its query heads are split. In Megatron-LM#6400 the
# sinks were sized by all heads instead of a rank's, as its review noticed.
#
# **Sizes of a shard.** vllm-gaudi#1411: with expert parallelism the loader
# still cut F and failed at the shapes. Here one row of the table says both
# how a tensor is cut by experts and how by F, and the loader has no case of
# its own.
#
# OpenAI's own torch code splits F of all experts and nothing else, and adds
# the biases after the sum. It sums before the router's weights are applied,
# so K vectors of D go over the link where one would do. Weights first, sum
# afterwards gives the same layer:

# %%
from gptoss.model.layers import Experts as WholeExperts


def expert_layer(mesh: MeshRank, group: Group) -> torch.Tensor:
    layer = SplitGptOss.part(POCKET, mesh, group, torch.float32)
    with torch.inference_mode():
        return layer.layers[0].mlp(hidden)


hidden = torch.randn(1, 9, pocket.hidden_size)
assert isinstance(model.layers[0].mlp.experts, WholeExperts)
with torch.inference_mode():
    alone = model.layers[0].mlp(hidden)
for result in rehearse(pocket, 4, 1, expert_layer):
    assert torch.allclose(result, alone, atol=1e-5)
print("experts: the sum of what the ranks give equals the whole")

# %% [markdown]
# ## In the 20b and the 120b
#
# What a rank holds of the released files. Norms and routers are copied; of the
# rest a rank has its even part.

# %%
released = {"20b": big, "120b": GptOssConfig.gpt_oss_120b()}
for name, config in released.items():
    copied = sum(spec.nbytes for spec in tensor_table(config).values()
                 if set(shard_rule(spec.name)[0]) == {"-"})
    print(f"{name}: copied on every rank {copied / 1e6:.0f} MB")
    for n in (2, 4, 8):
        held = sum(rank_bytes(config, mesh_rank(config, 0, n)).values())
        split = sum(rank_bytes(config, mesh_rank(config, 0, 1)).values())
        share_of = (held - copied) / ((split - copied) / n)
        print(f"  of {n}: {held / 1e9:6.2f} GB, {share_of:.3f} of an even "
              "part")
        assert 0.95 < share_of < 1.05

# %% [markdown]
# The plan for the 120b, as `python -m gptoss inspect 120b --plan` prints it.
# "tensor" shares every layer among all cards, "stages" gives each card some
# layers. They are limits of {eq}`parallel-time`, which no program reaches.

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
# Where the time of a token goes, by {eq}`parallel-time`, for cards with
# NVLink and with PCIe, as if every model fitted. Left of each pair the 20b,
# right the 120b.

# %% tags=["hide-input"]
# Figure: milliseconds a token on 1, 2, 4 and 8 cards, split into reading and
# meetings, for a fast and a slow kind of card. Reading shrinks with the cards,
# meetings grow: on the fast cards, eight need more time in all than four.
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, card in zip(axes, (CARDS[2], CARDS[0]), strict=True):
    free = Card(card.name, card.memory, card.read, math.inf, 0.0)
    for place, (name, config) in enumerate(released.items()):
        for x, n in enumerate((1, 2, 4, 8)):
            mesh = mesh_rank(config, 0, n)
            read = 1e3 * token_seconds(config, mesh, free, 8192)
            every = 1e3 * token_seconds(config, mesh, card, 8192)
            at = x + 0.4 * place - 0.2
            ax.bar(at, read, 0.34, color=f"C{2 * place}",
                   label=f"{name}, reading" if x == 0 else None)
            ax.bar(at, every - read, 0.34, bottom=read, color="C1",
                   alpha=0.9 - 0.4 * place,
                   label=f"{name}, meetings" if x == 0 else None)
    ax.set(xticks=range(4), xticklabels=("1", "2", "4", "8"),
           xlabel="cards", title=f"{card.read / 1e12:.2f} TB/s, "
           + ("NVLink" if card.link > 1e11 else "PCIe"))
    ax.grid(axis="x", visible=False)
axes[0].set(ylabel="ms a token, at best", ylim=(0, 6))
axes[0].legend(loc="upper right")
plt.show()

# %% [markdown]
# The blue and green parts shrink with the cards, the orange ones grow: with
# four or eight of the fast cards, meeting takes longer than reading, and on
# eight of the slow ones too. For one token the bytes hardly matter: even on
# PCIe, sending them takes less than a fiftieth of the steps' time. Reading a
# long prompt is the other way round, since its sums grow with T and the steps
# do not.

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
# That the counts are what happens was asserted above, in every process and
# for every split, against what torch dispatched.

# %% [markdown]
# ## Takeaways
#
# - A model is split by a table: which dimension of which tensor, and who adds
#   the bias.
# - Two sums a layer, one for the embedding, one gathering of logits: for one
#   token it is their number that costs, and their steps, not their bytes.
# - A ring of $R$ ranks takes $2(R-1)$ steps, so meetings grow with the ranks
#   while reading shrinks: more cards can be slower.
# - All ranks agree on the next token because each logit is computed in one
#   place, and the random numbers are the same everywhere.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# How many tensor ranks can share the 20b and the 120b, and what rules out the
# next power of two? Which numbers remain if a rank holds whole experts only,
# without slices of F?

# %% tags=["hide-cell"]
for name, config in released.items():
    sizes = [n for n in range(1, 129) if fits(config, n)]
    assert config.num_attention_heads == max(sizes)  # no rank without a head
    remain = [n for n in sizes if config.num_local_experts % n == 0]
    print(f"{name}: {sizes}, with whole experts up to {remain[-1]}")

# %% [markdown]
# ### Exercise 2
#
# Read four ranks' shards of the shipped model and put the tensors together
# again: every byte of the file must be there. How many bytes are read more
# than once?

# %% tags=["hide-cell"]
ranks = [mesh_rank(pocket, rank, 4) for rank in range(4)]
extra = 0
with Checkpoint.open(POCKET) as checkpoint:
    for name in checkpoint.names():
        spec, total = checkpoint.spec(name), None
        times = torch.zeros(spec.shape)
        whole = torch.zeros_like(checkpoint.read(name))
        for mesh in ranks:
            index, _, held = cut(pocket, mesh, spec)
            if held:
                whole[index] = Shard(checkpoint, mesh).read(name)
                times[index] += 1
        assert torch.equal(whole, checkpoint.read(name)) and times.min() >= 1
        extra += int((times - 1).sum()) * DTYPES[spec.dtype].itemsize
print(f"{extra:,} bytes more than once")  # norms, routers, k and v

# %% [markdown]
# ### Exercise 3
#
# A rank forgets to leave out the experts of other groups and runs its own in
# their place. How wrong is the layer? Show that a test which looks only at
# shapes and finiteness passes.

# %% tags=["hide-cell"]
class Forgetful(SplitExperts):
    def forward(self, x, ids, weights):
        size = self.experts.stop - self.experts.start
        return self.group.all_reduce(
            WholeExperts.forward(self, x, ids % size, weights))


def forgetful(mesh: MeshRank, group: Group) -> torch.Tensor:
    layer = SplitGptOss.part(POCKET, replace(mesh, slices=1), group,
                             torch.float32).layers[0].mlp
    layer.experts.__class__ = Forgetful
    with torch.inference_mode():
        return layer(hidden)


wrong = rehearse(pocket, 2, 1, forgetful)[0]
assert wrong.shape == alone.shape and wrong.isfinite().all()
error = (wrong - alone).norm() / alone.norm()
print(f"relative error {error:.1f}")
assert error > 0.5

# %% [markdown]
# ### Exercise 4
#
# How long may a step take before eight H100s are slower than one, for the
# 20b? Estimate it with {eq}`parallel-time`, then find it with
# `token_seconds`. Would a tree change that?

# %% tags=["hide-cell"]
def eight(step: float) -> float:
    card = replace(CARDS[2], step=step)
    return token_seconds(big, mesh_rank(big, 0, 8), card, 8192)


one = token_seconds(big, mesh_rank(big, 0, 1), CARDS[2], 8192)
low, high = 0.0, 1e-4
for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if eight(middle) < one else (low, middle)
saved = 7 / 8 * bytes_read_per_token(big) / CARDS[2].read
guess = (saved / sums - CARDS[2].latency) / (2 * 7)
print(f"{1e6 * low:.2f} microseconds, estimated {1e6 * guess:.2f}")
print(f"in a tree of 6 steps about {1e6 * low * 14 / 6:.1f}")
assert eight(0.99 * low) < one < eight(1.01 * low)
assert 0 < low < guess < 2 * low

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py` (`MLPBlock`: F in slices, one
#   all-reduce, biases afterwards) and `weights.py` (reading a slice).
# - meta-pytorch/gpt-fast, `tp.py`: a model without parallelism, split from
#   outside; pytorch/torchtitan, `models/gpt_oss/sharding.py`: the table.
# - NVIDIA/nccl, `src/graph/tuning.cc`: a collective takes a base latency and
#   one for each of `2 * (nRanks - 1)` or `nRanks - 1` steps; of its constants
#   those of ring and LL, its protocol for small messages.
# - torch.distributed: `init_device_mesh`, `torchrun`, and the operators
#   `c10d::*` that `torch.distributed.tensor.debug.CommDebugMode` counts too.
# - OCP Microscaling Formats {cite}`ocpmx2023`: blocks of 32. Routing:
#   {cite}`switch2021`. Rooflines: {cite}`roofline2009`.
# - Threads: EleutherAI/gpt-neox#962, Wenyueh/MinivLLM#80,
#   NVIDIA/TensorRT-Model-Connect#136, GeeeekExplorer/nano-vllm#99,
#   huggingface/text-generation-inference#1036, huggingface/transformers#40031,
#   #40283 and #40545, sgl-project/sglang#9473, tenstorrent/vllm#50,
#   tenstorrent/tt-xla#5017, NVIDIA/Megatron-LM#6400,
#   vllm-project/vllm-gaudi#1411.
# - Data sheets: GeForce RTX 4090 (1,008 GB/s, PCIe 4.0 x16: 32 GB/s each
#   way), A100 SXM 40 GB (1,555 GB/s, NVLink 3: 300 GB/s each way), H100 SXM
#   (3,350 GB/s, NVLink 4: 450 GB/s each way). One measurement of the last
#   found 380 of the 450 (NVIDIA/nccl#1264).
