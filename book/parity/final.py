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

# %% [markdown]
# ## Question
#
# Is it the same model: on one card and on many, by plain torch and by
# kernels, as 20b and as 120b, ours and somebody else's?
#
# One command puts the walk, the judge and the suspects together and answers
# for two sides at once. Texts could not: with random weights in the 20b's
# shapes two correct implementations agreed on **2 of 16** written tokens, and
# no operation of either was wrong.

# %% tags=["export"]
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptoss.model.transformer import GptOss, check_tokens
from gptoss.parity.contracts import (
    CONTRACTS,
    ParityError,
    computing,
    contract_for,
)
from gptoss.parity.judge import Judge
from gptoss.parity.rounding import FLOOR
from gptoss.parity.suspects import FAULTS, Finding, judge_walk, trace_faulty
from gptoss.parity.walk import Key, Parts, Trace, points, trace_ours
from gptoss.parity.walk_others import REFERENCES, trace_exact
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.hub import resolve
from gptoss.weights.sizes import bf16_bytes

# %%
import importlib.util
import json
import subprocess
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor; the
# kernels are walked over further down, in processes of their own

import matplotlib.pyplot as plt

from gptoss.weights.write import random_tensors, write_checkpoint

plt.style.use("../_static/book.mplstyle")
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
# ### The report
#
# How far two sides are apart, in numbers; then who is right.

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


def other_experts(found: Trace, wanted: Trace, layer: int) -> int:
    """How many tokens go to another set of experts in a layer."""
    a, b = (t[layer, "chosen"].sort(-1)[0] for t in (found, wanted))
    return (a != b).any(-1).sum().item()

# %%
tokens = prompt(0)
trace = trace_ours(GptOss.from_pretrained(path), tokens)
same = compare_logits(trace[None, "logits"], trace[None, "logits"])
print(compare(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))["mean"],
      same["argmax"], same["top_k"], same["kl_max"])

# %% tags=["export"]
def default_tokens(config: GptOssConfig) -> Tensor:
    """(1, T) random tokens, always the same; 16 more than a window, so that
    its edge is seen."""
    g = torch.Generator().manual_seed(0)
    length = min(config.sliding_window + 16, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=g)

# %% tags=["export"]
def error_of(trace: Trace, exact: Trace | None, key: Key) -> float | None:
    """Relative error against the float64 run, if there was one; for
    "chosen" the tokens that go to other experts."""
    if exact is None:
        return None
    if key[1] == "chosen":
        return other_experts(trace, exact, key[0])
    return compare(trace[key], exact[key])["relative"]


def table_rows(sides: Mapping[str, Trace | None], excesses: Mapping[str, dict],
               keys: list[Key]) -> list[dict]:
    """A row a point: differences between the two sides, and for each its
    relative error against float64 and its excess."""
    (ours, theirs, exact), rows = sides.values(), []
    for layer, point in keys:
        key = layer, point
        row = {"layer": layer, "point": point}
        row |= {f"{side}_excess": found[key]
                for side, found in excesses.items()}
        row |= ({"others": other_experts(ours, theirs, layer)}
                if point == "chosen" else compare(ours[key], theirs[key]))
        row |= {"ours_error": error_of(ours, exact, key),
                "theirs_error": error_of(theirs, exact, key)}
        rows.append(row)
    return rows

# %% tags=["export"]
def three_traces(model: GptOss, path: Path, tokens: Tensor, against: str,
                 dtype: torch.dtype, contract: str, fault: str | None,
                 parts: Parts | None = None) -> dict[str, Trace | None]:
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
    return {"ours": ours, "theirs": theirs, "exact": exact}

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

# %% tags=["export"]
def report(path: str | Path, against: str = "transformers",
           tokens: Tensor | None = None, dtype: torch.dtype = torch.float32,
           contract: str | None = None, fault: str | None = None,
           new_tokens: int = 0, compact: bool = False) -> dict:
    """Walk ours and a reference over tokens (1, T), judge both.

    path: a folder or hub id; against: one of REFERENCES; dtype: of both
    (the reference float64 has its own); contract: one of CONTRACTS, ours
    (None: `contract_for`); fault: one of FAULTS to plant in ours;
    new_tokens: how many ours writes first, greedily, and both then walk over
    too; compact: decode with matrices in twelve bits. All in memory at once,
    the reference decoded, unless "streamed", which "transformers" becomes
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
        if compact:
            shrink(model, contract)
        tokens = written_on(model, tokens, new_tokens)
        parts = taken(tokens, new_tokens, contract)
        traces = three_traces(model, path, tokens, against, dtype, contract,
                              fault, parts)
        judged = judge_both(checkpoint, traces, dtype, contract, against)
        rows = table_rows(traces, {side: found for side, (found, _)
                                   in judged.items()},
                          points(checkpoint.config))
    findings = [finding for _, finding in judged.values() if finding]
    return {"path": str(path), "against": against, "contract": contract,
            "kernels": what, "compact": compact, "parts": parts,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": before, "rows": rows,
            "generated": chosen_too(tokens, before, traces["theirs"]),
            "logits": compare_logits(traces["ours"][None, "logits"],
                                     traces["theirs"][None, "logits"]),
            "findings": [vars(finding) for finding in findings],
            "verdict": verdict(rows, findings)}

# %% tags=["export"]
def judge_both(checkpoint: Checkpoint, traces: Mapping[str, Trace],
               dtype: torch.dtype, contract: str, against: str
               ) -> dict[str, tuple[dict[Key, float], Finding | None]]:
    """`judge_walk` of ours, under its contract, and of the reference."""
    use, (_, inner) = CONTRACTS[contract], REFERENCES[against]
    kind = torch.float64 if against == "float64" else dtype
    return {side: judge_walk(Judge(checkpoint, *how), traces[side], name)
            for side, name, how in (
                ("ours", "ours", (dtype, use.inner, use.kernels)),
                ("theirs", against, (kind, inner)))}


def shrink(model: GptOss, contract: str) -> None:
    """`make_compact`, in place. ParityError: not under that contract."""
    if not CONTRACTS[contract].kernels:
        raise ParityError(f"compact: expected the contract kernels, found "
                          f"{contract}")
    from gptoss.kernels.compact import make_compact

    make_compact(model)

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
    lines += [f"{'layer':>5} {'point':10} {'max':>8} {'mean':>8} "
             f"{'relative':>8} {'cosine':>9}   {'off bound':^13}   "
             f"{'from float64':^15}", " " * 59 + "ours  theirs    ours  "
             "  theirs"]
    for row in result["rows"]:
        layer = "" if row["layer"] is None else row["layer"]
        middle = (f"{row['others']} tokens go to other experts"
                  if "others" in row else
                  f"{row['max']:8.1e} {row['mean']:8.1e} "
                  f"{row['relative']:8.1e} {row['cosine']:9.6f}")
        marks = [f"{row[f'{side}_excess']:6.2g}{'!' if beyond else ' '}"
                 for side in ("ours", "theirs")
                 for beyond in [not row[f"{side}_excess"] <= 1]]
        errors = ["       -" if error is None else f"{error:8.1e}"
                  for error in (row["ours_error"], row["theirs_error"])]
        lines.append(f"{layer:>5} {row['point']:10} {middle:36}  "
                     f"{' '.join(marks)} {' '.join(errors)}")
    logits = result["logits"]
    lines.append(f"argmax {logits['argmax']:.1%}, top {logits['k']} "
                 f"{logits['top_k']:.1%}, KL mean {logits['kl_mean']:.1e} "
                 f"max {logits['kl_max']:.1e} nats")
    return "\n".join([*lines, result["verdict"]])

# %%
print(report(path, "float64", tokens)["verdict"])

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
# side, the excess {eq}`parity-excess` and the relative error against a
# float64 run. What to see: a token that goes to other experts (`chosen`)
# makes the sides differ several times as much from there on, and still no
# excess is above 1. (The last digits depend on the processor, so this output
# is not compared.)

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

# %% [markdown]
# Next, the same walk with 129 keys. Upper panel, what a comparison sees: the
# distance from float64; both models are moved most by tokens that change
# experts. Lower panel, what the judge sees: in layers 0 and 2, which slide,
# the weights and the heads are far above the line (both are judged from the
# same queries and keys); all that is computed from them is not, because it
# was computed correctly.

# %% tags=["hide-input"]
# Figure: above, the error against float64 at each point, nearly the same for
# windows of 128 and 129 keys; below, its excess over what rounding explains.
# The right model stays at or below 1; the faulty one leaps at the weights of
# both sliding layers.
faulty = report(path, "transformers", dtype=torch.bfloat16, fault="window")
names = [f"{'' if row['layer'] is None else row['layer']} {row['point']}"
         for row in result["rows"] if row["point"] != "chosen"]
fig, (above, below) = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True)
fig.tolerance = 0.05  # the last bits depend on the processor
for run, name, look in ((result, "128 keys", "C0.-"),
                        (faulty, "129 keys", "C1.--")):
    rows = [row for row in run["rows"] if row["point"] != "chosen"]
    above.plot([row["ours_error"] for row in rows], look, label=name, lw=1)
    below.plot([min(max(row["ours_excess"], 1e-2), 1e6) for row in rows],
                look, label=name, lw=1)
above.set(ylabel="relative error\nagainst float64", ylim=(0, None))
below.set(yscale="log", ylabel="excess (cut at 1e6)", ylim=(5e-3, 3e6))
below.axhline(1, color="0.4", lw=0.8)
below.text(12, 2, "rounding explains what is below", fontsize=8,
           color="0.4")
below.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
above.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## In the 20b and the 120b

# %%
for name, config in (("20b", GptOssConfig.gpt_oss_20b()),
                     ("120b", GptOssConfig.gpt_oss_120b())):
    print(f"{name}: {len(points(config))} points to judge, "
          f"{bf16_bytes(config) / 1e9:.1f} GB decoded")

# %% [markdown]
# Traces are small; what takes memory are the models. `report` holds ours
# packed, ours in float64 (its experts stay in four bits), and the reference,
# which decodes: 41.8 GB for the 20b in bf16. Against
# [`streamed`](others.ipynb) it holds ours as the file is mapped, one decoded
# layer of transformers' at a time, and makes no float64 run; the judge needs
# none. Where decoded weights would fill more than 60 % of the memory,
# `transformers` becomes `streamed` by itself. So one command walks over a
# prompt with the real weights, lets ours write sixteen tokens first and
# walks over these too: the reference's logits then say of each whether it
# would have written the same.
#
# ```
# python -m gptoss parity openai/gpt-oss-20b --against transformers \
#     --dtype bfloat16 --prompt "The capital of France is" --new-tokens 16
# ```
#
# This was measured once, with random weights in the 20b's shapes (without a
# prompt: 144 random tokens), ours in plain torch, which is `--plain` now. It
# took 20 minutes on two cores with 23 GiB, and held 3.2 GB of its own beside
# the mapped file; what the system calls resident, 27.6 GB, counts a page of
# the file once for each of its two mappings. Of all points none was outside
# its bound on either side. In layer 0 the first of the near ties sent one
# token to another expert, and from there on the two were different
# computations. Random weights do not forgive that: their logits lie so close
# together that the two agreed on the best token at 24 % of the positions and
# on 2 of the 16 written ones. A comparison of texts would have called that a
# fault; the judge found none. The kernels were walked over in the same widths,
# one layer with six experts and 40 tokens: within their bound at every point,
# and at `hidden` 4.7 times beyond that of plain torch.

# %% [markdown]
# ## Then many GPUs
#
# Last, the model that [many ranks share](../parallel/collectives.ipynb):
# what the modules of two tensor ranks in each of two stages put out, beside
# those of the model in one piece. Here a relative error will do, for in fp32
# no token changes experts. The shipped checkpoint, 144 tokens.

# %%
from importlib.resources import files

from gptoss.parallel.collectives import rehearse
from gptoss.parallel.split import SplitGptOss

POCKET = files("gptoss") / "pocket"
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
# And text from two processes. `torchrun` starts the
# command line twice, each process reads its half of the weights, the sampler
# draws, and the first one prints. The same seed in one process here:

# %%
from gptoss.text.generate import complete
from gptoss.text.stops import stop_ids
from gptoss.text.tokenizer import Tokenizer

ARGUMENTS = ["--prompt", "Once upon a time", "--max-new-tokens", "40",
             "--seed", "11", "--temperature", "0.7", "--dtype", "float32"]
done = subprocess.run(
    [sys.executable, "-m", "torch.distributed.run", "--standalone",
     "--nproc-per-node", "2", "-m", "gptoss", "generate", *ARGUMENTS],
    capture_output=True, text=True,
    env=os.environ | {"GPTOSS_KERNELS": "torch"})
assert done.returncode == 0, done.stderr
here = complete(whole, Tokenizer.from_pretrained(POCKET), "Once upon a time",
                max_new_tokens=40, seed=11, sampler=Sampler(0.7),
                stop=stop_ids(POCKET))
print("two processes:" + done.stdout, end="")
print("one process:  " + here.text)
assert done.stdout == here.text + "\n"

# %% [markdown]
# On a machine with four GPUs, and on two machines with eight each, a stage
# of the pipeline a machine (not run on GPUs yet):
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
# and on the second machine the same with `--node-rank 1`.

# %% [markdown]
# ## Takeaways
#
# 1. A comparison says how far two implementations are apart; only a judgement
#    of each operation says whether one of them is wrong.
# 2. What is judged must be what runs: kernels in bf16, many tokens at once
#    and single ones.
# 3. A token that changes experts moves everything after it, and is no fault.
# 4. A split model is the same model: its modules give the same numbers, and
#    two processes write the same text as one.

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
# ## Sources
#
# - {cite}`gptoss2025`: the model and its two sizes.
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`;
#   openai/gpt-oss 0.0.9, `gpt_oss/torch/model.py`: the references.
# - `torchrun`: PyTorch, `torch/distributed/run.py`.
