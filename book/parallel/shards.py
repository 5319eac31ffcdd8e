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
#     public: [MeshRank, ParallelError, Shard, mesh_rank, rank_config]
# ---

# %% [markdown]
# # Who holds which part?
#
# ## Question
#
# How do several processors become one model, so that nobody could tell from
# its output? Of the 13.8 GB of the 20b eight of them hold 1.72 GB each, of
# which only 5 MB is a copy of what the others have too. What decides which
# bytes, and who adds the biases?

# %% [markdown]
# ## Picture
#
# A *rank* is one of the processes, each with a processor of its own, by its
# number. Below is the model on two ranks (blue and green), and where they
# meet (orange). What is grey is copied. Every rank has the whole residual
# stream; what is split lies between two orange bars.

# %%
import os

import matplotlib.pyplot as plt

from gptoss.weights.config import GptOssConfig

os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor
plt.style.use("../_static/book.mplstyle")
big = GptOssConfig.gpt_oss_20b()

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
        ("gather", "B 1 V numbers"))
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
# What to see: two meetings a layer, one after the embedding and one at the
# head, of whose T tokens mostly only the last is kept. The norms and the
# residual additions need none: each rank does them on its own copy of the
# stream. The copies stay equal bit for bit, since a sum gives all ranks the
# same bits; how it does that is
# [the next chapter's](collectives.ipynb) question.
#
# ## The table
#
# How each tensor is cut is a table of 22 lines, and the rest of the chapter
# explains it. A line has the end of a tensor's name, a letter for each of its
# dimensions that says along what it is cut (`-`: not at all), and who adds it
# if only one may. The letters are those of all shapes, with Q for the H C rows
# of the query heads and KV for the G C rows of the key heads. So
# `q_proj.weight`, "Q -", is cut by rows into query heads; `o_proj.weight`,
# "- Q", by columns into the same heads; `norm.weight`, the end of all three
# norms' names, is copied. Experts that are not packed have lines too: there a
# matrix lies as (E, in, out). Where only one rank may add, the line names the
# coordinate that decides: who has 0 there holds the tensor, and the others
# have zeros.

# %% tags=["export"]
import math
from dataclasses import dataclass

from gptoss.weights.config import GptOssConfig
from gptoss.weights.errors import Error
from gptoss.weights.mxfp4 import BLOCK


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

# %%
for name in ("model.layers.7.self_attn.o_proj.bias",
             "model.layers.7.mlp.experts.gate_up_proj_blocks",
             "lm_head.weight"):
    print(name, *shard_rule(name))

# %% [markdown]
# ## The naive version
#
# A layer of attention: give every rank half of the query heads, half of the
# key and value heads, the columns of the output projection that belong to
# them, and add up. The [model's attention](../model/transformer.ipynb) takes
# its sizes from its weights, so it runs with half of them.

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
# **Rows, then columns.** First with numbers: two outputs of two inputs, cut in
# two ways.

# %%
A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
v = torch.tensor([5.0, 6.0])
print("whole    ", (A @ v).tolist())
print("by rows  ", [(A[i:i + 1] @ v).tolist() for i in (0, 1)],
      "side by side; each rank needs all of v")
print("by columns", [(A[:, i:i + 1] @ v[i:i + 1]).tolist() for i in (0, 1)],
      "to be added; each needs one entry of v")

# %% [markdown]
# Cut by rows, each rank gets some of the outputs and needs all of the input;
# cut by columns, each needs only some of the input, and gets a part of every
# output that has to be added up. Now take two matrices with a function $f$ in
# between that works on heads or pairs, each by itself. Cut the first by rows:
# rank $i$ gets its heads. It applies $f$ to them. Cut the second by the
# columns that read these heads: no rank needs anything of the others, until
# the end. With $R$ ranks
#
# $$y = A_2\, f(A_1 x) + b = \sum_{i=1}^{R} A_2^{(:,\,i)} f(A_1^{(i,\,:)} x)
# + b$$ (parallel-rows)
#
# That is one sum over the ranks for two matrices, with $b$ outside of it. In
# the code one rank has $b$ and the others have zeros.

# %% [markdown]
# **Attention** is {eq}`parallel-rows` with a head as the unit: $A_1$ are q,
# k and v, $A_2$ is o, and a head never looks at another. In the 20b 64 query
# heads share 8 key heads, eight each. Rank 1 of 4 has the query heads 16 to
# 31, so it needs the key heads 2 and 3. On 16 ranks rank 1 has the query heads
# 4 to 7, half of those that read key head 0; rank 0 has the other half, and
# both hold key head 0. In general query head $h$ reads key head
# $\lfloor h G / H \rfloor$, so a rank with the query heads
# $h_0 \le h < h_1$ needs the key heads $g$ with
#
# $$
# \lfloor h_0\, G/H \rfloor \;\le\; g \;<\; \lceil h_1\, G/H \rceil
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
# released models. Eight does not divide 90, but two does: eight ranks make
# *slices* of 45 blocks. And the sum over the chosen experts is a sum, so it
# can be cut as well: there remain four *groups* of two ranks, and each group
# has a quarter of the experts. In general there are $s = \gcd(R, F/32)$ slices
# and $n = R/s$ groups:
#
# $$y = \sum_{\text{group}}\; \sum_{e\, \in\, \text{chosen} \cap
# \text{group}} w_e \sum_{\text{slice}} \text{expert}_e^{(\text{slice})}(x)
# $$ (parallel-experts)
#
# The middle sum is the rank's own; the other two are one sum over all ranks.
# Slices share the work evenly. Groups do not: of K = 4 experts in two groups,
# the busier has two, three or four. How many that is on average, the chapter
# on [a second card](second_card.ipynb) works out.
#
# **Biases.** The bias of q, k, v and of `gate_up` goes with its rows. That of
# `o_proj` belongs to the sum, so one rank of the stage has it (`tp_rank` in
# the table). That of `down` belongs to an expert, so of the ranks that share
# an expert the one with its first slice has it (`part`).
#
# **Vocabulary.** A rank that does not hold a token's row of the embedding
# contributes zeros to the sum. The head is cut by rows; its outputs are not
# added but put side by side, and each logit is computed in one place only.
# That is worth more than the time it saves: whatever rounding did elsewhere,
# all ranks hold the same logits, and with the same random numbers draw the
# same token.
#
# **Stages.** Layers can also be dealt out, a *stage* after the other: the
# stream is handed on once a stage. For one text that saves memory and no
# time, since the stages wait for each other. With several stages, the $R$
# above are the ranks of one stage, its *tensor ranks*.

# %% [markdown]
# ## The ranks as a grid
#
# Neighbouring ranks share a stage: `torchrun` numbers the processes of a
# machine in a row, so the many sums stay inside a machine and only the stream
# between stages leaves it. So the ranks form a *mesh*, a grid of two
# dimensions, like torch's `DeviceMesh`: along a row they share tensors (`tp`,
# tensor parallel), down a column they follow each other in the pipeline
# (`pp`). In a row, those with different experts count along `ep`, expert
# parallel.

# %% tags=["hide-input"]
# Figure: a grid of two rows, the stages, and eight columns, the tensor ranks,
# numbered 0 to 15. Pairs of columns share a frame: a group with eight experts
# of its own; in it the left rank has the first slice, the right the second.
fig, ax = plt.subplots(figsize=(7.4, 2.5))
for stage in range(2):
    for tp in range(8):
        ax.add_patch(plt.Rectangle((tp + 0.06, -stage - 0.86), 0.88, 0.72,
                                   color=("C0", "C2")[tp % 2], alpha=0.3))
        ax.text(tp + 0.5, -stage - 0.5,
                f"rank {8 * stage + tp}\nslice {tp % 2}", ha="center",
                va="center", fontsize=8)
    ax.text(-0.1, -stage - 0.5, f"pp {stage}: layers\n"
            + ("0 … 11", "12 … 23")[stage], ha="right", va="center",
            fontsize=8)
for group in range(4):
    ax.add_patch(plt.Rectangle((2 * group + 0.02, -1.94), 1.96, 1.9,
                               fill=False, ec="C1", lw=1.6))
    ax.text(2 * group + 1, -2.2, f"ep {group}: experts {8 * group} … "
            f"{8 * group + 7}", ha="center", fontsize=8, color="#a85f00")
for tp in range(8):
    ax.text(tp + 0.5, 0.1, f"tp {tp}", ha="center", fontsize=8)
ax.set(xlim=(-1.1, 8.1), ylim=(-2.35, 0.4))
ax.axis("off")
plt.show()

# %% [markdown]
# What to see: sixteen ranks of the 20b in two stages. Rank 10 is in stage 1
# (`pp` 1), has place 2 in its row (`tp` 2), and so the first slice of the
# experts of group 1 (`ep` 1). Sums are taken along a row; the stream goes down
# a column, from rank 2 to rank 10.
#
# ## Code
#
# ### Where is a rank in the grid?

# %% tags=["export"]
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

# %% [markdown]
# ### How many ranks can share a model?
#
# Heads, experts and blocks must divide among the ranks of a stage. The
# vocabulary need not: fine-tunes add a few tokens, and 201,089 rows divide by
# nothing. Each rank takes as many as would suffice if all had the same,
# $\lceil V/R \rceil$, and the last has what is left, but at least one. In the
# gathering all must give equally much, so there the last one fills up with
# zeros, which fall away again.

# %% tags=["export"]
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
for world, stages in ((2, 1), (8, 1), (16, 2)):
    print(f"{world} ranks, {stages} stages; the last rank:\n   ",
          mesh_rank(big, world - 1, world, stages))

# %% [markdown]
# ### What does a rank own along each letter?

# %% tags=["export"]
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
# The stages should be equally heavy in bytes of the file. So a border is set
# before or after the layer where its even share would end, whichever is
# nearer; but each stage gets a layer at least. The embedding belongs to the
# first stage, the last norm and the head to the last. In the 20b the embedding
# is as heavy as 2.4 layers, and so is the head, so the outer stages get fewer:

# %% tags=["export"]
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
layer, head = (sum(spec.nbytes for spec in tensor_table(big).values()
                   if part in spec.name) for part in ("layers.0.", "lm_head"))
print(f"the head is as heavy as {head / layer:.1f} layers")
for stages in (1, 2, 4, 8):
    print([len(layers) for layers in stage_layers(big, stages)])

# %% [markdown]
# So what a rank has of the layers is a model again, a smaller one, and can be
# described as one: fewer layers, heads and experts, a smaller F. Of fewer
# experts than K a token chooses all. The vocabulary stays, and so do the
# positions.

# %% tags=["export"]
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
        layer_types=(config.layer_types or ())[layers.start:layers.stop],
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
# A model is loaded from anything that has names and reads them
# ([reading](../weights/reading.ipynb)). A `Shard` has both: it answers as if
# the file held nothing but this rank's part, and counts the bytes that it
# takes in `bytes_read`; zeros cost none. Packed experts stay packed. Parts
# that are whole rows of a tensor remain views of the mapped file. The columns
# of `o_proj` and of `down_proj` are copied, since they do not lie together;
# the system reads files in pages of 4 KiB, so of these two it may read more
# than is taken. With groups of whole experts that is only `o_proj`.

# %% tags=["export"]
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
# ## What is refused
#
# A number of stages that is not 1 to L, named `--stages` as the user typed
# it; a number of processes that the model cannot be shared by, "in 2 stages"
# if there are several, with the numbers that do as a list with commas, all of
# them multiples of the stages; and a tensor that the table does not know. Each
# is a `ParallelError`, before anything is read or waited for, and says what
# was expected and what was found.

# %%
for wrong in (lambda: mesh_rank(big, 0, 6, 2), lambda: mesh_rank(big, 0, 3),
              lambda: mesh_rank(big, 0, 8, 25),
              lambda: shard_rule("model.rotary")):
    try:
        wrong()
    except ParallelError as error:
        print(error)

# %% [markdown]
# ## It holds
#
# Nothing of the released files is left out, and nothing is held twice but what
# the table copies (and, with more ranks than key heads, those heads): the
# parts of eight ranks, in two stages as well, against the file's own size.

# %%
for stages in (1, 2):
    times = {}
    for rank in range(8):
        mesh = mesh_rank(big, rank, 8, stages)
        for spec in tensor_table(big).values():
            if on_stage(big, mesh, spec.name):
                _, shape, held = cut(big, mesh, spec)
                times[spec.name] = times.get(spec.name, 0) + (
                    held * math.prod(shape))
    for spec in tensor_table(big).values():
        letters, holder = shard_rule(spec.name)
        copies = 8 // stages if set(letters) == {"-"} and not holder else 1
        assert times[spec.name] == copies * math.prod(spec.shape), spec.name
    print(f"{stages} stages: every number of {len(times)} tensors is held")

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

# %% [markdown]
# ## In the 20b and the 120b
#
# What a rank holds of the released files. Norms and routers are copied; of the
# rest a rank has its even part.

# %%
released = {"20b": big, "120b": GptOssConfig.gpt_oss_120b()}
for name, config in released.items():
    specs = tensor_table(config).values()
    whole = sum(spec.nbytes for spec in specs)
    copied = sum(spec.nbytes for spec in specs
                 if set(shard_rule(spec.name)[0]) == {"-"})
    print(f"{name}: {whole / 1e9:.1f} GB, copied on every rank "
          f"{copied / 1e6:.0f} MB")
    for n in (2, 4, 8):
        mesh = mesh_rank(config, 0, n)
        held = sum(math.prod(cut(config, mesh, spec)[1])
                   * DTYPES[spec.dtype].itemsize for spec in specs)
        share_of = (held - copied) / ((whole - copied) / n)
        print(f"  of {n}: {held / 1e9:6.2f} GB, {share_of:.3f} of an even "
              "part")
        assert 0.95 < share_of < 1.05

# %% [markdown]
# ## Takeaways
#
# - A model is split by a table: which dimension of which tensor, and who adds
#   the bias.
# - Rows first, then columns: one sum over the ranks for two matrices.
# - What a rank has of the layers is a smaller model, and can be described by a
#   configuration like any other.
# - Each logit is computed in one place, so all ranks agree on the next token
#   whatever rounding did before.

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
# The table says `gate_up_proj_blocks` is cut "E 2F - -" and `down_proj_blocks`
# "E - F/32 -". A slice of 45 blocks of F: how many rows of gate_up and how
# many bytes of each row of down are that, and why would a slice of half a
# block more not do?

# %% tags=["hide-cell"]
mine = owned(big, mesh_rank(big, 1, 2))
print(f"rank 1 of 2: rows {mine['2F'].start:,} to {mine['2F'].stop:,} of "
      f"gate_up, blocks {mine['F/32'].start} to {mine['F/32'].stop} of a row "
      f"of down: {16 * 45} bytes of {16 * 90}")
# half a block has 16 weights without a scale of their own: two ranks would
# need the same scale, and a kernel that multiplies 32 at a time half of them

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py` (`MLPBlock`: F in slices, one
#   all-reduce, biases afterwards) and `weights.py` (reading a slice).
# - pytorch/torchtitan, `models/gpt_oss/sharding.py`: the table.
# - torch.distributed: `init_device_mesh`, whose two dimensions are ours.
# - OCP Microscaling Formats {cite}`ocpmx2023`: blocks of 32. Routing:
#   {cite}`switch2021`.
# - Threads: EleutherAI/gpt-neox#962, Wenyueh/MinivLLM#80,
#   NVIDIA/TensorRT-Model-Connect#136, GeeeekExplorer/nano-vllm#99,
#   huggingface/text-generation-inference#1036, tenstorrent/vllm#50,
#   tenstorrent/tt-xla#5017, NVIDIA/Megatron-LM#6400,
#   vllm-project/vllm-gaudi#1411.
