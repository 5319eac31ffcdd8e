"""What can rounding explain?

Generated from book/parity/rounding.py; edit the chapter, not this file.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.attention.masks import visible
from gptoss.model.layers import Experts, Router
from gptoss.moe.experts import clamped_swiglu
from gptoss.weights.errors import Error
from gptoss.weights.mxfp4 import decode

# --- Who rounds where? Four contracts ----------------------------------------

def attention_fp32(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                   positions: Tensor, window: int, scale: float) -> Tensor:
    """Our operator: fp32 from q to the one rounding at the end.

    q (1, T, H, C), k and v (1, S, G, C) of positions 0 ... S - 1, positions
    (1, T) of the queries, window 0: none. Returns (1, T, H, C).
    """
    keys = torch.arange(k.shape[1])[None]
    return torch.ops.gptoss.sink_attention(
        q, k, v, sinks, positions, keys, window, scale)


def attention_hf(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                 positions: Tensor, window: int, scale: float) -> Tensor:
    """transformers' eager attention: scores, the difference to the row's
    maximum, and the softmax are each rounded. As `attention_fp32`."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    hidden = ~visible(positions, positions, window or None)[:, None]
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    column = sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)
    both = torch.cat([scores, column], -1)
    both = both - both.amax(-1, keepdim=True)
    return (both.softmax(-1)[..., :-1] @ v).transpose(1, 2)


def attention_openai(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                     positions: Tensor, window: int, scale: float) -> Tensor:
    """OpenAI's sdpa: scores and softmax rounded, no maximum subtracted.
    As `attention_fp32`."""
    groups = k.shape[2]
    q = q[0].unflatten(1, (groups, -1))
    k, v = (x[0].unsqueeze(2).expand_as(q) for x in (k, v))
    scores = torch.einsum("qhmd,khmd->hmqk", q, k) * scale
    hidden = ~visible(positions, positions, window or None)
    scores = scores.masked_fill(hidden, -torch.inf)
    column = sinks.view(groups, -1, 1, 1).expand(*scores.shape[:3], 1)
    probs = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("hmqk,khmd->qhmd", probs, v).flatten(1, 2)[None]


def choose_stable(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Our router: of equal logits the lower index. x (T, D) -> weights and
    ids (T, K)."""
    return router(x)


def choose_topk(router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' and OpenAI's: torch.topk, which of equal logits takes
    one or the other. As `choose_stable`."""
    logits = F.linear(x, router.weight, router.bias)
    values, ids = logits.topk(router.k, dim=-1)
    return values.softmax(-1), ids


def held(module: nn.Module, name: str) -> Tensor:
    """A parameter or a buffer of a module by its name."""
    return getattr(module, name)


def expert_weights(module: Experts, e: int, dtype: torch.dtype
                   ) -> tuple[Tensor, Tensor]:
    """Expert e in dtype: gate_up (2F, D) and down (D, F)."""
    def one(name: str) -> Tensor:
        if not module.packed:
            return held(module, name)[e]
        return decode(held(module, f"{name}_blocks")[e],
                      held(module, f"{name}_scales")[e], dtype)
    return one("gate_up_proj"), one("down_proj")


def experts_fp32(module: Experts, x: Tensor, ids: Tensor, weights: Tensor
                 ) -> Tensor:
    """Our experts: weighted and summed in fp32. x (T, D), ids and weights
    (T, K) -> (T, D)."""
    return module(x, ids, weights)


def experts_hf(module: Experts, x: Tensor, ids: Tensor, weights: Tensor
               ) -> Tensor:
    """transformers' eager loop: product, bias, weighting and each addition
    are rounded, experts ascending. As `experts_fp32`."""
    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        k, n = torch.where((ids == e).T)
        up, down = (w.T.contiguous()
                    for w in expert_weights(module, e, x.dtype))
        hidden = clamped_swiglu(
            x[n] @ up + held(module, "gate_up_proj_bias")[e], module.limit)
        out = hidden @ down + held(module, "down_proj_bias")[e]
        y.index_add_(0, n, out * weights[n, k, None])
    return y


def experts_openai(module: Experts, x: Tensor, ids: Tensor, weights: Tensor
                   ) -> Tensor:
    """OpenAI's einsum over copies of the chosen experts; product and bias
    are rounded apart, the sum over K once. As `experts_fp32`."""
    used = ids.unique()
    place = torch.searchsorted(used, ids.contiguous())
    up, down = map(torch.stack, zip(*(
        expert_weights(module, e, x.dtype) for e in used.tolist()),
        strict=True))
    hidden = torch.einsum("beck,bk->bec", up[place], x)
    hidden = clamped_swiglu(
        hidden + held(module, "gate_up_proj_bias")[ids], module.limit)
    out = torch.einsum("beck,bek->bec", down[place], hidden)
    out = out + held(module, "down_proj_bias")[ids]
    return torch.einsum("bec,be->bc", out, weights)


@dataclass(frozen=True)
class Contract:
    """Where an implementation rounds to the dtype of its activations."""

    attention: Callable[..., Tensor]
    choose: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    inner: bool  # rounds inside attention and experts; plain torch only
    rules: Mapping[str, str]  # point -> what is rounded there
    kernels: bool = False  # kernels/build's, which compute in bf16 alone

    def describe(self) -> str:
        """A line a point."""
        return "\n".join(f"{point:10} {rule}"
                         for point, rule in self.rules.items())


_ONCE = {  # what all three do
    "norm": "in fp32, weight included; 1 rounding",
    "q, k, v": "product and bias summed in fp32; 1 rounding",
    "turned": "tables in fp32, rounded; each product and the sum rounded"}
_EACH = {"middle": "1 rounding", "router": "as q, k, v",
         "shares": "softmax of the K chosen in fp32; 1 rounding"}
_TOPK = {"chosen": "torch.topk: of equal logits either"}
CONTRACTS = {
    "fp32": Contract(attention_fp32, choose_stable, experts_fp32, False, {
        **_ONCE, "weights": "never rounded",
        "heads": "in fp32 from q; 1 rounding", **_EACH,
        "chosen": "of equal logits the lower index",
        "experts": "gate_up, SwiGLU's steps and down rounded; "
                   "weighted and summed in fp32; 1 rounding"}),
    "hf-eager": Contract(attention_hf, choose_topk, experts_hf, True, {
        **_ONCE, "weights": "q k, times scale, minus maximum, softmax: "
                            "each rounded",
        "heads": "summed in fp32; 1 rounding", **_EACH, **_TOPK,
        "experts": "as fp32, but bias, weighting and each of the K "
                   "additions rounded"}),
    "openai-torch": Contract(
        attention_openai, choose_topk, experts_openai, True, {
        **_ONCE, "weights": "q k, times scale, softmax: each rounded",
        "heads": "summed in fp32; 1 rounding", **_EACH, **_TOPK,
        "experts": "as fp32, but bias rounded apart"}),
    "kernels": Contract(attention_fp32, choose_stable, experts_fp32, False, {
        **_ONCE, "turned": "tables in fp32, rounded; 1 rounding",
        "weights": "never rounded; each exponential off by 1e-6 at most",
        "heads": "in fp32 from q; 1 rounding", **_EACH,
        "chosen": "of equal logits the lower index",
        "experts": "what enters a packed product in 16-bit integers, a step "
                   "a block; all else in fp32; 1 rounding"}, kernels=True),
}
PLAIN_CONTRACTS = [name for name, use in CONTRACTS.items() if not use.kernels]


# --- What is refused ---------------------------------------------------------

class ParityError(Error):
    """A comparison that cannot be made, and what is missing for it."""


def contract_for(contract: str | None, dtype: torch.dtype) -> str:
    """A name of CONTRACTS; for None that of what runs unasked: in bf16 the
    kernels where they load, else plain torch, "fp32"."""
    if contract is None and dtype == torch.bfloat16:
        from gptoss.kernels.build import load_kernels

        plain = load_kernels().startswith("torch")
        return "fp32" if plain else "kernels"
    return contract or "fp32"


@contextmanager
def computing(contract: str, dtype: torch.dtype) -> Iterator[str]:
    """Inside, ours computes as the contract says: with the kernels, or with
    plain torch, whatever is loaded. Yields which, in words.

    ParityError: the kernels cannot be had here, or not for that dtype.
    """
    kernels = sys.modules.get("gptoss.kernels.build")
    if not CONTRACTS[contract].kernels:  # never imported: none can compute
        with kernels.plain_torch() if kernels else nullcontext():
            yield "plain torch"
        return
    from gptoss.kernels.build import load_kernels

    name = load_kernels()
    if name.startswith("torch") or dtype != torch.bfloat16:
        raise ParityError("contract: kernels need bfloat16 and a compiler, "
                          f"found {str(dtype)[6:]} and {name}")
    yield name


__all__ = [
    "CONTRACTS",
    "Contract",
    "PLAIN_CONTRACTS",
    "ParityError",
    "attention_fp32",
    "attention_hf",
    "attention_openai",
    "choose_stable",
    "choose_topk",
    "computing",
    "contract_for",
    "expert_weights",
    "experts_fp32",
    "experts_hf",
    "experts_openai",
    "held",
]
