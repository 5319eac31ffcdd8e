"""Parity, then many GPUs

Generated from book/parity/final.py; edit the chapter, not this file.
"""

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

# --- How far apart are two sides? --------------------------------------------

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


# --- Which tokens, and how many at a time? -----------------------------------

def default_tokens(config: GptOssConfig) -> Tensor:
    """(1, T) random tokens, always the same; 16 more than a window, so that
    its edge is seen."""
    g = torch.Generator().manual_seed(0)
    length = min(config.sliding_window + 16, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=g)


ONE_BY_ONE = 16  # tokens that a walk over kernels takes as decoding does


def taken(tokens: Tensor, written: int, contract: str) -> list[int]:
    """The parts of a walk: under "kernels" those that `generate` would take,
    the prompt at once and each token written after it alone; of a prompt
    after which nothing is written the last ONE_BY_ONE."""
    T = tokens.shape[1]
    alone = min(written or ONE_BY_ONE, T - 1)
    return ([T - alone] + [1] * alone if CONTRACTS[contract].kernels
            else [T])


# --- What does a row of the report hold? -------------------------------------

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


# --- Does it fit, and would the other side write the same? -------------------

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


# --- The report --------------------------------------------------------------

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


__all__ = [
    "EightJudge",
    "ONE_BY_ONE",
    "Sides",
    "chosen_too",
    "compare",
    "compare_logits",
    "default_tokens",
    "error_of",
    "judge_both",
    "other_experts",
    "parity_table",
    "report",
    "shrink",
    "table_rows",
    "taken",
    "three_traces",
    "too_large",
    "verdict",
    "written_on",
]
