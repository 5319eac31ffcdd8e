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
#     module: report
#     public: [compare, compare_logits, parity_table]
# ---

# %% [markdown]
# # Parity, then many GPUs

# %% [markdown] tags=["measured"]
# ## Question
#
# Is it the same model: on one card and on many, by plain torch and by
# kernels, as 20b and as 120b, ours and somebody else's?
#
# Texts cannot tell. With random weights in the 20b's shapes, on two cores of a
# virtual machine, two correct implementations agreed on **2 of 16** written
# tokens, and no operation of either was wrong. So this last chapter puts
# [the walk](walk.ipynb), [the judge](judge.ipynb) and
# [the suspects](suspects.ipynb) into one command that answers for two sides at
# once; then it splits the model over 1, 2, 4 and 8 processes; and then it says
# what changes when the 120b takes the place of the 20b.

# %% tags=["export"]
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptoss.kernels.eight import eight_fits, pack_eight, unpack_eight
from gptoss.model.transformer import GptOss, check_tokens
from gptoss.parity.contracts import (
    CONTRACTS,
    ParityError,
    computing,
    contract_for,
)
from gptoss.parity.judge import Judge
from gptoss.parity.rounding import FLOOR, EightRounding
from gptoss.parity.suspects import FAULTS, Finding, judge_walk, trace_faulty
from gptoss.parity.walk import Key, Parts, Trace, points, trace_ours
from gptoss.parity.walk_others import REFERENCES, trace_exact
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.hub import resolve
from gptoss.weights.sizes import bf16_bytes

# %% [markdown]
# ## Picture
#
# The shipped model twice, drawn by the finished package: right, and with a
# fault, its sliding layers seeing 65 keys instead of 64. Plotted is what a
# *comparison* sees: how far each recorded point is from a float64 run.

# %% tags=["hide-input", "picture"]
# Figure: relative error against float64 over the points of four layers. The
# lines of the right and of the faulty model lie on each other, with two high
# peaks in layers 1 and 2 where a token changes experts; circles at the
# weights and heads of layers 0 and 2, where both lines are low, say where the
# judge finds the faulty model far beyond rounding.
from importlib.resources import files

import matplotlib.pyplot as plt

from gptoss.parity.report import report as walk_and_judge

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor; the
# kernels are walked over further down, in processes of their own
plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
fig, ax = plt.subplots(figsize=(7.4, 2.9))
fig.tolerance = 0.05  # the last bits depend on the processor
for fault, look, text in ((None, "C0.-", "right"), ("window", "C1.--",
                                                    "65 keys")):
    rows = [row for row in walk_and_judge(
        POCKET, "float64", dtype=torch.bfloat16, fault=fault)["rows"]
        if row["point"] != "chosen"]
    errors = [row["ours_error"] for row in rows]
    ax.plot(errors, look, lw=1.1, ms=4)
    ax.text(len(rows), errors[-1] + (0.004 if fault else -0.004), text,
            va="center", color="#a85f00" if fault else "C0", fontsize=8)
    for n, row in enumerate(rows):
        if row["ours_excess"] > 1:
            ax.plot(n, errors[n], "o", mfc="none", mec="C5", ms=11, mew=1.5)
for n, row in enumerate(rows):
    if row["point"] == "norm":
        ax.axvline(n - 0.5, color="0.75", lw=0.8)
        ax.text(n, 0.97, f"layer {row['layer']}", va="top", fontsize=8,
                transform=ax.get_xaxis_transform())
ax.set(ylim=(0, None), xlim=(-1, len(rows) + 5), xticks=(),
       xlabel="points of the walk, in order",
       ylabel="relative error\nagainst float64")
plt.show()

# %% [markdown]
# What to see: the two lines hardly differ. Both models round, both have the
# same peaks, where a token changes experts, and at the end nobody could say
# which line belongs to the broken one. The circles are what the *judge* sees:
# at these points alone, where the lines are low, an operation did more than
# its rounding explains. Both columns stand in the report, and only the second
# says who is wrong.
#
# ## Four kinds of "the same"
#
# | the same … | asked by | answer |
# |---|---|---|
# | bits | `torch.equal` | between ranks, and under one contract |
# | operations | the walk: error over bound, at most 1 | if all is right |
# | numbers | a tolerance | in fp32; in bf16 until an expert changes |
# | text | greedy tokens | in fp32; in bf16 where no two nearly tie |
#
# Each line is weaker evidence than the one above, and easier to get. A naive
# check starts at the bottom and finds differences that mean nothing. We go
# from the top.

# %%
import importlib.util
import json
import subprocess
import sys
import tempfile

from gptoss.weights.write import random_tensors, write_checkpoint

have_openai = importlib.util.find_spec("gpt_oss") is not None
TINY = GptOssConfig(
    num_hidden_layers=3, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=96, hidden_size=64, intermediate_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, swiglu_limit=2.0,
    eos_token_id=2, pad_token_id=0)
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "tiny"
write_checkpoint(path, TINY, random_tensors(TINY))


def prompt(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (1, 144), generator=g)


# %% [markdown]
# ## Code
#
# ### How far apart are two sides?
#
# Four numbers for two tensors: the largest and the mean difference, the
# relative error (length of the difference over length of what was wanted) and
# the cosine between them. For logits there are better ones, since a softmax
# forgets what is common to all of them: how often the likeliest token is the
# same, how many of the k likeliest, and how many nats one loses by believing
# the other side's probabilities (KL).

# %% tags=["export"]
def compare(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """max and mean |found - wanted|, their relative error (2-norms) and
    the cosine between them."""
    a, b = found.double().flatten(), wanted.double().flatten()
    error, size = a - b, b.norm().clamp_min(FLOOR)
    return {"max": error.abs().max().item(),
            "mean": error.abs().mean().item(),
            "relative": (error.norm() / size).item(),
            "cosine": (a @ b / (a.norm().clamp_min(FLOOR) * size)).item()}


def compare_logits(found: Tensor, wanted: Tensor, k: int = 5
                   ) -> dict[str, float]:
    """Logits (T, V) of two sides: the share of tokens with the same argmax,
    the mean share of common top k, and KL(wanted || found) in nats."""
    a, b = (t.double().log_softmax(-1) for t in (found, wanted))
    kl = (b.exp() * (b - a)).sum(-1)
    k = min(k, a.shape[-1])
    same = (a.topk(k)[1][:, :, None] == b.topk(k)[1][:, None]).any(-1)
    return {"argmax": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
            "top_k": same.double().mean().item(), "k": k,
            "kl_mean": kl.mean().item(), "kl_max": kl.max().item()}


def other_experts(found: Trace, wanted: Trace, layer: int | None) -> int:
    """How many tokens go to another set of experts in a layer."""
    a, b = (t[layer, "chosen"].sort(-1)[0] for t in (found, wanted))
    return int((a != b).any(-1).sum())

# %%
tokens = prompt(0)
trace = trace_ours(GptOss.from_pretrained(path), tokens)
print({name: round(value, 3) for name, value in compare(
    torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).items()})
print({name: abs(round(value, 3)) for name, value in compare_logits(
    trace[None, "logits"], trace[None, "logits"].float() + 1).items()})

# %% [markdown]
# ### Which tokens, and how many at a time?
#
# Unless told otherwise random tokens, always the same, sixteen more than a
# window holds, so that its edge is seen; never more than the model has
# positions. Under the contract `kernels` they are taken as `generate` takes
# them: the prompt at once, each written token alone.

# %% tags=["export"]
def default_tokens(config: GptOssConfig) -> Tensor:
    """(1, T) random tokens, always the same; 16 more than a window, so that
    its edge is seen."""
    g = torch.Generator().manual_seed(0)
    length = min(config.sliding_window + 16, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=g)

# %% tags=["export"]
ONE_BY_ONE = 16  # tokens that a walk over kernels takes as decoding does


def taken(tokens: Tensor, written: int, contract: str) -> list[int]:
    """The parts of a walk: under "kernels" those that `generate` would take,
    the prompt at once and each token written after it alone; of a prompt
    after which nothing is written the last ONE_BY_ONE."""
    T = tokens.shape[1]
    alone = min(written or ONE_BY_ONE, T - 1)
    return ([T - alone] + [1] * alone if CONTRACTS[contract].kernels
            else [T])

# %%
print(taken(prompt(0), 3, "kernels"), taken(prompt(0), 3, "fp32"))

# %% [markdown]
# ### What does a row of the report hold?
#
# Three traces: ours, theirs, and ours in float64 as a yardstick for both. A
# row has the differences of the two sides, and for each its distance from
# float64 and its excess {eq}`parity-excess`. At `chosen` no difference makes
# sense, so it counts the tokens that go to other experts.

# %% tags=["export"]
class Sides(NamedTuple):
    """The walks that are compared."""

    ours: Trace
    theirs: Trace
    exact: Trace | None  # our float64 run


def error_of(trace: Trace, exact: Trace | None, key: Key) -> float | None:
    """Relative error against the float64 run, if there was one; for
    "chosen" the tokens that go to other experts."""
    if exact is None:
        return None
    if key[1] == "chosen":
        return other_experts(trace, exact, key[0])
    return compare(trace[key], exact[key])["relative"]


def table_rows(sides: Sides, excesses: Mapping[str, dict],
               keys: list[Key]) -> list[dict[str, Any]]:
    """A row a point: differences between the two sides, and for each its
    relative error against float64 and its excess."""
    rows: list[dict[str, Any]] = []
    for key in keys:
        row: dict[str, Any] = dict(zip(("layer", "point"), key, strict=True))
        row |= {f"{side}_excess": found[key]
                for side, found in excesses.items()}
        row |= ({"others": other_experts(sides.ours, sides.theirs, key[0])}
                if key[1] == "chosen"
                else compare(sides.ours[key], sides.theirs[key]))
        row |= {"ours_error": error_of(sides.ours, sides.exact, key),
                "theirs_error": error_of(sides.theirs, sides.exact, key)}
        rows.append(row)
    return rows

# %% tags=["export"]
def three_traces(model: GptOss, path: Path, tokens: Tensor, against: str,
                 dtype: torch.dtype, contract: str, fault: str | None,
                 parts: Parts | None = None) -> Sides:
    """ours, theirs and exact (our float64 run; none beside "streamed",
    which is for models that fill the memory); names as in `report`."""
    ours = (trace_faulty(model, tokens, fault, contract, parts) if fault
            else trace_ours(model, tokens, contract, parts=parts))
    theirs = REFERENCES[against][0](path, tokens, dtype)
    exact = (theirs if against == "float64" else None
             if against == "streamed"
             else trace_exact(path, tokens, torch.float64))
    for trace in (ours, theirs):
        trace[None, "tokens"] = tokens[0]
    return Sides(ours, theirs, exact)

# %% [markdown]
# ### Does it fit, and would the other side write the same?
#
# A reference that would fill more than 60 % of the memory when decoded is
# [streamed](others.ipynb) instead. And ours may write some tokens first: one
# walk over prompt and answer tells of each whether the reference would have
# chosen it too, after the same tokens.

# %% tags=["export"]
def too_large(config: GptOssConfig, dtype: torch.dtype) -> bool:
    """Whether decoded weights would fill most of this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return bf16_bytes(config) // 2 * dtype.itemsize > 0.6 * memory


def written_on(model: GptOss, tokens: Tensor, count: int) -> Tensor:
    """tokens (1, T) and the `count` that ours writes after them."""
    check_tokens(tokens, None, model.config)
    if not count:
        return tokens
    room = model.config.max_position_embeddings - tokens.shape[1]
    if count > room:
        raise ParityError(f"new_tokens: expected at most {room} (what the "
                          f"context holds after the prompt), found {count}")
    ids = list(generate(model, tokens[0].tolist(), max_new_tokens=count,
                        sampler=Sampler(temperature=0.0)))
    return torch.cat([tokens, torch.tensor([ids])], 1)


def chosen_too(tokens: Tensor, before: int, theirs: Trace) -> dict:
    """Of the tokens from `before` on, those the reference chooses too,
    each after the same tokens; one walk tells it for all of them."""
    ours = tokens[0, before:]
    chosen = theirs[None, "logits"][before - 1:-1].argmax(-1)
    return {"tokens": ours.tolist(), "reference": chosen.tolist(),
            "same": int((ours == chosen).sum())}

# %% [markdown]
# ### The report

# %% tags=["export"]
def report(path: str | Path, against: str = "transformers",
           tokens: Tensor | None = None, dtype: torch.dtype = torch.float32,
           contract: str | None = None, fault: str | None = None,
           new_tokens: int = 0, compact: bool = False, dense: int = 16
           ) -> dict:
    """Walk ours and a reference over tokens (1, T), judge both.

    path: a folder or hub id; against: one of REFERENCES; dtype: of both
    (the reference float64 has its own); contract: one of CONTRACTS, ours
    (None: `contract_for`); fault: one of FAULTS to plant in ours;
    new_tokens: how many ours writes first, greedily, and both then walk over
    too; dense: bits of the dense matrices in ours, which is then judged by
    them (`hold_dense`); compact: 12 of them. All in memory at once, the
    reference decoded, unless "streamed", which "transformers" becomes
    where `too_large`. ParityError: an unknown name, a missing package.
    Returns what json.dump takes: rows, logits, generated, findings,
    verdict, and as "kernels" what ours computed with.
    """
    for option, name, known in (
            ("against", against, REFERENCES), ("fault", fault, FAULTS),
            ("contract", contract, CONTRACTS)):
        if name is not None and name not in known:
            raise ParityError(f"{option}: expected one of "
                              f"{', '.join(known)}, found {name}")
    path, contract = resolve(path), contract_for(contract, dtype)
    with (Checkpoint.open(path) as checkpoint,
          computing(contract, dtype) as what):
        if tokens is None:
            tokens = default_tokens(checkpoint.config)
        if against == "transformers" and too_large(checkpoint.config, dtype):
            against = "streamed"
        before, model = tokens.shape[1], GptOss.from_pretrained(path, dtype)
        dense = 12 if compact else dense
        if dense != 16:
            shrink(model, contract, dense)
        tokens = written_on(model, tokens, new_tokens)
        parts = taken(tokens, new_tokens, contract)
        traces = three_traces(model, path, tokens, against, dtype, contract,
                              fault, parts)
        judged = judge_both(checkpoint, traces, dtype, contract, against,
                            dense == 8)
        rows = table_rows(traces, {side: found for side, (found, _)
                                   in judged.items()},
                          points(checkpoint.config))
    findings = [finding for _, finding in judged.values() if finding]
    return {"path": str(path), "against": against, "contract": contract,
            "kernels": what, "compact": dense == 12, "dense": dense,
            "parts": parts,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": before, "rows": rows,
            "generated": chosen_too(tokens, before, traces.theirs),
            "logits": compare_logits(traces.ours[None, "logits"],
                                     traces.theirs[None, "logits"]),
            "findings": [vars(finding) for finding in findings],
            "verdict": verdict(rows, findings)}

# %% tags=["export"]
class EightJudge(Judge):
    """Of a run whose dense matrices are in eight bits (`hold_dense`)."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype,
                 inner: bool, kernels: bool = False) -> None:
        super().__init__(checkpoint, dtype, inner, kernels)
        self.rounding = EightRounding.of(dtype, inner, kernels)

    def weight(self, name: str, layer: int | None = None,
               rows: slice | Tensor = slice(None)) -> Tensor:
        exact = super().weight(name, layer, rows)
        weight = exact.to(self.dtype)
        if name.endswith(("_proj.weight", "lm_head.weight")) and eight_fits(
                weight):
            return unpack_eight(pack_eight(weight), torch.float64)
        return exact


def judge_both(checkpoint: Checkpoint, traces: Sides, dtype: torch.dtype,
               contract: str, against: str, eight: bool = False
               ) -> dict[str, tuple[dict[Key, float], Finding | None]]:
    """`judge_walk` of ours, under its contract, and of the reference."""
    use, (_, inner) = CONTRACTS[contract], REFERENCES[against]
    kind = torch.float64 if against == "float64" else dtype
    return {
        "ours": judge_walk((EightJudge if eight else Judge)(
            checkpoint, dtype, use.inner, use.kernels), traces.ours, "ours"),
        "theirs": judge_walk(Judge(checkpoint, kind, inner), traces.theirs,
                             against)}


def shrink(model: GptOss, contract: str, bits: int = 12) -> None:
    """`hold_dense`, in place. ParityError: not under that contract."""
    if not CONTRACTS[contract].kernels:
        raise ParityError(f"{'compact' if bits == 12 else 'dense'}: expected "
                          f"the contract kernels, found {contract}")
    from gptoss.kernels.eight import hold_dense

    hold_dense(model, bits)

# %% tags=["export"]
def verdict(rows: list[dict], findings: list[Finding]) -> str:
    """What the walk found, in a few lines."""
    if findings:
        return "\n".join(finding.describe() for finding in findings)
    text = ("both: each operation is within the rounding of its own inputs")
    moved = [row for row in rows if row.get("others")]
    if moved:
        text += (f"\n  near ties: {moved[0]['others']} tokens go to other "
                 f"experts in layer {moved[0]['layer']}, the first that "
                 "differs")
    return text


def parity_table(result: dict) -> str:
    """The report as text."""
    made, parts = result["generated"], result["parts"]
    lines = [f"ours: {result['kernels']}, contract {result['contract']}, "
             f"{result['dtype']}; {parts[0]} tokens at once"
             + (f", then {len(parts) - 1} one by one" if parts[1:] else "")]
    if made["tokens"]:
        lines.append(f"{len(made['tokens'])} tokens written by ours; the "
                     f"reference chooses the same {made['same']} times\n")
    lines += [f"{'layer, point':12} {'max':>7} {'mean':>7} "
             f"{'relative':>8} {'cosine':>8} {'off bound':^16}  "
             "from float64", " " * 47 + f"{'ours':>7}{'theirs':>8}"
             f"{'ours':>9}{'theirs':>8}"]
    for row in result["rows"]:
        layer = "" if row["layer"] is None else row["layer"]
        middle = (f"{row['others']} tokens go to other experts"
                  if "others" in row else
                  f"{row['max']:7.1e} {row['mean']:7.1e} "
                  f"{row['relative']:8.1e} {row['cosine']:8.5f}")
        marks = [f"{row[f'{side}_excess']:7.2g}{'!' if beyond else ' '}"
                 for side in ("ours", "theirs")
                 for beyond in [not row[f"{side}_excess"] <= 1]]
        errors = ["      -" if error is None else f"{error:7.1e}"
                  for error in (row["ours_error"], row["theirs_error"])]
        lines.append(f"{layer:>2} {row['point']:9} {middle:33} "
                     f"{''.join(marks)} {' '.join(errors)}")
    logits = result["logits"]
    lines.append(f"argmax {logits['argmax']:.1%}, top {logits['k']} "
                 f"{logits['top_k']:.1%}, KL mean {logits['kl_mean']:.1e} "
                 f"max {logits['kl_max']:.1e} nats")
    return "\n".join([*lines, result["verdict"]])

# %%
print(report(path, "float64", tokens)["verdict"])

# %% [markdown]
# ## What is refused
#
# Names that no table has, a reference whose package is not installed, more new
# tokens than the context has room for, twelve bits without kernels: each a
# `ParityError` of one line.

# %%
for options in ({"against": "vllm"}, {"fault": "gremlin"},
                {"new_tokens": 10 ** 6}, {"compact": True}):
    try:
        report(path, **{"against": "float64", **options})
    except ParityError as error:
        print(error)

# %% [markdown]
# ## It holds
#
# **What runs is judged.** The command walks over what `generate` would
# compute with: the kernels, where they can be compiled, in bf16. It reads the
# first 64 of 80 tokens at once and the last sixteen one by one, so that both
# ways to multiply are judged; `--plain` asks for plain torch instead. The
# shipped model, and the same with a fault:

# %%
def walk(*options: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "gptoss", "parity", "--against", "float64",
         "--json", *options], capture_output=True, text=True,
        env=os.environ | {"GPTOSS_KERNELS": "auto"})
    return json.loads(done.stdout)


right, planted = walk(), walk("--plant", "nibbles")
by_kernels = not right["kernels"].startswith("plain torch")
assert right["contract"] == ("kernels" if by_kernels else "fp32")
assert planted["contract"] == right["contract"]
assert right["parts"] == ([64] + [1] * 16 if by_kernels else [80])
print(len(right["rows"]), "operations,", len(right["findings"]), "findings;")
for found in planted["findings"]:
    print("planted:", found["layer"], found["point"], "-", found["cause"])

# %% [markdown]
# ## Against the others
#
# The walk beside transformers in bf16. The columns: largest and mean
# difference, relative error and cosine of the two sides; then, for each
# side, the excess and the relative error against a float64 run. What to see: a
# token that goes to other experts (`chosen`) makes the sides differ several
# times as much from there on, and still no excess is above 1. (The last digits
# depend on the processor, so this output is not compared.)

# %% tags=["nbval-ignore-output"]
result = report(path, "transformers", dtype=torch.bfloat16)
print(parity_table(result))

# %%
assert result["findings"] == []
others = [("transformers", torch.float32), ("grouped_mm", torch.bfloat16)]
if have_openai:
    others.append(("openai", torch.bfloat16))
for against, dtype in others:
    assert report(path, against, dtype=dtype)["findings"] == []
print("every operation of every side is within its rounding")

# %% [markdown] tags=["measured"]
# ## In the 20b's shapes
#
# Measured once, on a virtual machine with two cores and 23 GiB, with random
# weights in the 20b's shapes (144 random tokens), ours in plain torch, which
# is `--plain` now, against transformers streamed. It took 20 minutes and held
# 3.2 GB of its own beside the mapped file; what the system calls resident,
# 27.6 GB, counts a page of the file once for each of its two mappings. Of all
# 411 points none was outside its bound on either side. In layer 0 the first of
# the near ties sent one token to another expert, and from there on the two
# were different computations. Random weights do not forgive that: their logits
# lie so close together that the two agreed on the best token at 24 % of the
# positions and on 2 of the 16 written ones. A comparison of texts would have
# called that a fault; the judge found none. The kernels were walked over in
# the same widths, one layer with six experts and 40 tokens: within their bound
# at every point, and at `hidden` 4.7 times beyond that of plain torch.

# %% [markdown]
# ## Then many GPUs
#
# Last, the model that [many ranks share](../parallel/splitting.ipynb). First
# its operations: what the modules of two tensor ranks in each of two stages
# put out, beside those of the model in one piece. Here a relative error will
# do, for in fp32 no token changes experts. The shipped checkpoint, 144 tokens.

# %%
from gptoss.parallel.collectives import rehearse
from gptoss.parallel.split import SplitGptOss

KINDS = ("embed_tokens", "self_attn", "mlp", "norm", "lm_head")


def outputs(model: GptOss, tokens: Tensor) -> dict[str, Tensor]:
    """Name of a module -> what it gave; only of those that compute here."""
    found, names = {}, {module: name for name, module
                        in model.named_modules()}
    for module, name in names.items():
        if name.endswith(KINDS) and list(module.parameters()):
            module.register_forward_hook(
                lambda module, _, out: found.update({names[module]: out}))
    with torch.inference_mode():
        model(tokens)
    return found


whole = GptOss.from_pretrained(POCKET, torch.float32)
tokens = torch.randint(whole.config.vocab_size, (1, 144),
                       generator=torch.Generator().manual_seed(0))
exact, names = outputs(whole, tokens), set()
for found in rehearse(whole.config, 4, 2, lambda mesh, group: outputs(
        SplitGptOss.part(POCKET, mesh, group, torch.float32), tokens)):
    names |= set(found)
    for name, out in found.items():
        assert (out - exact[name]).norm() < 1e-5 * exact[name].norm(), name
print(f"{len(names)} modules, on four ranks: within 1e-5")
assert names >= {"lm_head", "layers.0.self_attn", "layers.3.mlp"}

# %% [markdown]
# Then its text. `torchrun` starts 1, 2, 4 and 8 processes, each reads its part
# of the weights, and all write 24 tokens greedily over gloo. The program says
# what rank 0 read and wrote; here we write the same with the whole model.

# %%
import hashlib

from gptoss.text.tokenizer import Tokenizer

PROGRAM = """
import hashlib, sys
from gptoss.parallel.collectives import leave
from gptoss.parallel.launch import launched, process_rank
from gptoss.parallel.split import load_split
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler

model = load_split(sys.argv[1], "float32")
ids = list(generate(model, [int(n) for n in sys.argv[2].split(",")],
                    sampler=Sampler(temperature=0.0), max_new_tokens=24))
if process_rank() == 0:
    digest = hashlib.sha256(str(ids).encode()).hexdigest()[:8]
    print(f"{launched()} processes: rank 0 read {model.bytes_read:9,} bytes,"
          f" {len(ids)} tokens, {digest}")
leave()
"""
program = Path(folder.name) / "program.py"
program.write_text(PROGRAM)
reader = Tokenizer.from_pretrained(POCKET)
ids = reader.encode("Once upon a time there was a little fox named")
wrote = list(generate(whole, ids, sampler=Sampler(temperature=0.0),
                      max_new_tokens=24))
wanted = hashlib.sha256(str(wrote).encode()).hexdigest()[:8]
for processes in (1, 2, 4, 8):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(processes), str(program), str(POCKET),
         ",".join(map(str, ids))], capture_output=True, text=True,
        timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    print(done.stdout, end="")
    assert done.stdout.rstrip().endswith(f"24 tokens, {wanted}")
print(f"the whole model: 24 tokens, {wanted}:{reader.decode(wrote)}")

# %% [markdown]
# The same eight digits mean the same 24 tokens. On one machine or several the
# command line is the same, here for cards (**not run on GPUs**):
#
# ```console
# $ torchrun --nproc-per-node 4 -m gptoss generate --device cuda \
#     --model openai/gpt-oss-120b --prompt "Once upon a time"
#
# $ torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 \
#     --master-addr FIRST_MACHINE --master-port 29500 \
#     -m gptoss generate --device cuda --stages 2 \
#     --model openai/gpt-oss-120b --prompt "Once upon a time"
# ```
#
# and on the second machine the same with `--node-rank 1`. Sampled text and a
# chat on two processes are in `tests/parallel/test_split.py`.

# %% [markdown]
# ## From 20b to 120b
#
# You develop with the 20b and deploy the 120b. What is different? Ask the two
# configurations:

# %%
import dataclasses

small, large = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
fields = [field.name for field in dataclasses.fields(small)]
differ = [name for name in fields
          if getattr(small, name) != getattr(large, name)]
print(f"{len(fields) - len(differ)} of {len(fields)} fields are equal;",
      "different are", len(differ))
print(f"  (equal: vocabulary {small.vocab_size:,}, context "
      f"{small.max_position_embeddings:,}, experts a token "
      f"{small.num_experts_per_tok})")
for name in differ:
    a, b = (getattr(config, name) for config in (small, large))
    print(f"  {name}: {a if isinstance(a, int) else len(a)} and "
          f"{b if isinstance(b, int) else len(b)}")

# %% [markdown]
# **What stays.** The [tokenizer](../text/tokens.ipynb) and its 201,088 ids,
# the [template](../text/conversation.ipynb), the three
# [stop ids](../text/generating.ipynb), the recommended
# [sampling](../text/sampling.ipynb), how tools are written and called, the
# window, the context of 131,072 tokens, every tensor's name and its shape but
# for the experts' first dimension. So prompts, tool schemas, parsers and
# caches of token ids carry over without a change, and so does every line of
# this package.
#
# **What changes.** Half again as many layers, four times as many experts, of
# which a token still uses four. So memory grows more than time:

# %%
from gptoss.weights.sizes import (
    active_parameters,
    bytes_read_per_token,
    cache_bytes,
    checkpoint_bytes,
    total_parameters,
)

print(f"{'':30} {'20b':>8} {'120b':>8} {'ratio':>6}")
for what, count, unit in (
        ("parameters, billions", total_parameters, 1e9),
        ("of them active, billions", active_parameters, 1e9),
        ("file, GB", checkpoint_bytes, 1e9),
        ("read a token, GB", bytes_read_per_token, 1e9),
        ("cache of 32,768 tokens, GB",
         lambda config: cache_bytes(config, 32768), 1e9),
        ("sums over ranks a token",
         lambda config: 2 * config.num_hidden_layers + 1, 1),
        ("points of a walk", lambda config: len(points(config)), 1),
        ("decoded, GB", bf16_bytes, 1e9)):
    a, b = (count(config) / unit for config in (small, large))
    print(f"{what:30} {a:8.{0 if unit == 1 else 2}f} "
          f"{b:8.{0 if unit == 1 else 2}f} {b / a:6.1f}")

# %% [markdown]
# **What to check**, when the model behind your program changes:
#
# 1. *Prompts to the token.* Render your conversations with both folders: the
#    ids must be equal. If not, a server has another template.
# 2. *Stop ids.* All three, from `generation_config.json`. Who stops at one of
#    them runs on after a tool call.
# 3. *The cache.* Its size a token grows with the layers, half again.
# 4. *Effort.* The same word, `low` to `high`, buys another number of reasoning
#    tokens in another model. Measure it with your questions; limits on tokens
#    that were tuned on the 20b may cut answers of the 120b off.
# 5. *Its mistakes.* Malformed calls and wrong tools become rarer or others.
#    Keep the repairs, and count them on both.
# 6. *Parity.* The commands below on the 120b, not only on the 20b: four times
#    the experts are four times the places where a loader can err.
#
# **What a turn costs.** An agent's turn: it reads 3,000 tokens (tools,
# history, question), writes 400 (reasoning and a call), reads 300 (an answer)
# and writes 300. Writing takes `token_seconds` of
# [the plan](../parallel/second_card.ipynb) a token. Reading is reckoned as the
# slowest of arithmetic, memory and links: two operations a parameter and
# token, at 40 % of the 989 TFLOP/s of the H100's data sheet (the 40 % is an
# assumption), all weights once, and the ring's bytes and steps.

# %%
from gptoss.parallel.plan import CARDS, RESERVE, token_seconds, traffic
from gptoss.parallel.shards import mesh_rank


def turn(config: GptOssConfig, cards: int, reads: int, writes: int
         ) -> tuple[float, float]:
    """Seconds of reading and of writing on so many H100s, at best."""
    card, mesh = CARDS[2], mesh_rank(config, 0, cards)
    calls, size = traffic(config, mesh, tokens=reads).get("allreduce_",
                                                          (0, 0))
    steps = 2 * (cards - 1)
    sums = calls * (card.latency + steps * (
        card.step + size / cards / card.link))
    work = max(2 * active_parameters(config) * reads / (0.4 * 989e12),
               checkpoint_bytes(config) / card.read) / cards
    return work + sums, writes * token_seconds(config, mesh, card, 4096)


print(f"{'H100s':>11} {'GB a card':>10} {'reading':>9} {'writing':>9} "
      f"{'turn':>7} {'turns an hour and card':>23}")
for name, config in (("20b", small), ("120b", large)):
    for cards in (1, 2, 4, 8):
        read, write = turn(config, cards, 3300, 700)
        held = (checkpoint_bytes(config) / cards + RESERVE) / 1e9
        print(f"{name:>4} on {cards:3} {held:10.1f} {read:7.2f} s {write:7.2f}"
              f" s {read + write:5.2f} s "
              f"{3600 / (read + write) / cards:23,.0f}")

# %% [markdown]
# Limits, which no program reaches, for one conversation at a time. Two things
# can be read off all the same. Writing is nearly everything, so effort, which
# is written tokens, is what a turn costs. And for one conversation more cards
# shorten a turn by little and waste most of themselves: cards are for models
# that do not fit, or for many conversations at once.

# %% [markdown]
# ## With the real weights in hand
#
# The files of the 20b, 13.8 GB, and then, in this order, each command only if
# the one before has nothing to say:
#
# ```console
# $ hf download openai/gpt-oss-20b --exclude "original/*" "metal/*"
# $ python -m gptoss inspect openai/gpt-oss-20b
# $ python -m gptoss vectors check tests/parity/vectors
# $ python -m gptoss parity openai/gpt-oss-20b --against float64 \
#     --prompt "The capital of France is" --new-tokens 16
# $ python -m gptoss parity openai/gpt-oss-20b --against transformers \
#     --dtype bfloat16 --prompt "The capital of France is" --new-tokens 16
# $ python -m gptoss parity openai/gpt-oss-20b --against float64 \
#     --plant window
# $ python -m gptoss bench openai/gpt-oss-20b
# $ torchrun --nproc-per-node 2 -m gptoss generate \
#     --model openai/gpt-oss-20b --prompt "The capital of France is" \
#     --temperature 0
# ```
#
# First the names and sizes of the tensors. Then this package on this processor
# against [the vectors](vectors.ipynb). Then the kernels that would run against
# exact arithmetic, which needs no second implementation. Then transformers,
# both sides judged, and of sixteen written tokens how many it would choose
# too. Then a planted fault: a check that cannot fail is none, so see it fail
# once. Then speed, and two processes, whose greedy text must be that of one.
# For the 120b write `openai/gpt-oss-120b`: the same commands, 65 GB of files;
# `transformers` becomes `streamed` by itself where it would not fit.

# %% [markdown]
# ## Takeaways
#
# 1. A comparison says how far two implementations are apart; only a judgement
#    of each operation says whether one of them is wrong.
# 2. What is judged must be what runs: kernels in bf16, many tokens at once
#    and single ones.
# 3. A split model is the same model: its modules give the same numbers, and
#    1, 2, 4 and 8 processes write the same text.
# 4. The 120b is the 20b with more layers and more experts: what you wrote for
#    one works with the other, and what you measured must be measured again.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# An implementation adds 3 to every logit. What do `compare` and
# `compare_logits` say about it? Which of them is right?

# %% tags=["hide-cell"]
logits = trace[None, "logits"].float()
apart, likely = compare(logits + 3, logits), compare_logits(logits + 3, logits)
print(f"largest difference {apart['max']:.1f}; same argmax "
      f"{likely['argmax']:.0%}, KL {abs(likely['kl_max']):.6f}")
assert likely["kl_max"] < 1e-9 and likely["argmax"] == 1
# both: the numbers differ, and softmax forgets a constant. The judge would
# still say "logits": no operation of the model adds 3
folder.cleanup()

# %% [markdown]
# ### Exercise 2
#
# Which of the four kinds of "the same" holds between two and four tensor
# ranks, in fp32? Rehearse both on the shipped model and compare bits, numbers
# and likeliest tokens.

# %% tags=["hide-cell"]
def logits_on(ranks: int) -> torch.Tensor:
    def work(mesh, group):
        with torch.inference_mode():
            return SplitGptOss.part(POCKET, mesh, group, torch.float32)(
                tokens)
    every = rehearse(whole.config, ranks, 1, work)
    print(f"{ranks} ranks: {sum(torch.equal(x, every[0]) for x in every)} of "
          f"{ranks} have the same bits")
    return every[0]


two, four = logits_on(2), logits_on(4)
far = compare(two, four)["relative"]
print("relative error below 1e-5:", round(far, 5), "; likeliest tokens that "
      f"agree: {(two.argmax(-1) == four.argmax(-1)).double().mean():.0%}")
assert far < 1e-5

# %% [markdown]
# ### Exercise 3
#
# For whom is the 120b on two H100s the better buy than on one? Take 131,072
# tokens of context and the cost of a turn above.

# %% tags=["hide-cell"]
for cards in (1, 2):
    room = 80e9 - RESERVE - checkpoint_bytes(large) / cards
    each = cache_bytes(large, 131072) / min(cards, 8)
    print(f"{cards} cards: room for {room // each:.0f} conversations of "
          "131,072 tokens, a turn takes "
          f"{sum(turn(large, cards, 3300, 700)):.2f} s")
# one card holds two of them, two cards many: for long contexts at once

# %% [markdown]
# ## Sources
#
# - {cite}`gptoss2025`: the model and its two sizes.
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`;
#   openai/gpt-oss 0.0.9, `gpt_oss/torch/model.py`: the references.
# - `torchrun`: PyTorch, `torch/distributed/run.py`.
