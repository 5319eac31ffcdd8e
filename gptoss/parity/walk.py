"""How do you look into a black box?

Generated from book/parity/walk.py; edit the chapter, not this file.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.attention.rope import apply_rope, rope_parameters, rope_tables
from gptoss.model.layers import Block, Experts, RMSNorm
from gptoss.model.norm import rms_norm
from gptoss.model.transformer import GptOss
from gptoss.parity.contracts import CONTRACTS, Contract, computing, held
from gptoss.weights.config import GptOssConfig
from gptoss.weights.encoding import encode

# --- Which results are recorded? ---------------------------------------------

# In a layer, in the order of computation; T comes first in every tensor.
LAYER_POINTS = (
    "norm", "q", "k", "v", "q turned", "k turned", "weights", "heads",
    "attention", "middle", "norm 2", "router", "chosen", "shares", "hidden",
    "experts", "block")
Key = tuple[int | None, str]  # layer (None: outside of all), point
Trace = dict[Key, Tensor]


def points(config: GptOssConfig) -> list[Key]:
    """Every point of a model, in the order of computation."""
    layers = [(n, point) for n in range(config.num_hidden_layers)
              for point in LAYER_POINTS]
    return [(None, "embedding"), *layers, (None, "last norm"),
            (None, "logits")]


# --- How is a black box asked? -----------------------------------------------

def probe(attend: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Attention weights (T, H, S) of a black box attend(v) -> (1, T, H, C).

    Values that are 1 at one key and 0 elsewhere come out as that key's
    weight; C keys are asked for at a time. v (1, S, G, C).
    """
    S, C = v.shape[1], v.shape[3]
    out = []
    for start in range(0, S, C):
        one, keys = torch.zeros_like(v), torch.arange(min(C, S - start))
        one[0, start + keys, :, keys] = 1
        out.append(attend(one)[0, ..., :len(keys)])
    return torch.cat(out, -1)


@contextmanager
def swapped_in(module: nn.Module, tensors: Mapping[str, Tensor]
               ) -> Iterator[None]:
    """Other tensors under the module's names inside the with."""
    held = {name: getattr(module, name) for name in tensors}
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False)
                if isinstance(held[name], nn.Parameter) else tensor)
    try:
        yield
    finally:
        for name, tensor in held.items():
            setattr(module, name, tensor)


def copying(bias: Tensor, width: int, start: int) -> Tensor:
    """A down matrix (D, F) that copies entries start, start + 1, ... of
    the hidden vector. bias (E, D) says D and the dtype."""
    rows = torch.eye(width, dtype=bias.dtype)[start:start + bias.shape[1]]
    return F.pad(rows, (0, 0, 0, bias.shape[1] - len(rows)))


def probe_experts(call: Callable, module: nn.Module, x: Tensor, ids: Tensor,
                  width: int, down: Callable[[Tensor], dict[str, Tensor]]
                  ) -> Tensor:
    """Hidden vectors (T, K, F) of a black box call(x, ids, weights).

    With a down matrix that copies and no bias, an expert's output is what
    stands between its two matrices. down(matrix (D, F)) names the tensors
    to put into module.
    """
    bias, out = held(module, "down_proj_bias"), []
    one = torch.ones_like(ids[:, :1], dtype=x.dtype)
    for start in range(0, width, bias.shape[1]):
        tensors = down(copying(bias, width, start))
        tensors["down_proj_bias"] = torch.zeros_like(bias)
        with swapped_in(module, tensors):
            part = [call(x, ids[:, k:k + 1], one)
                    for k in range(ids.shape[1])]
        out.append(torch.stack(part, 1)[..., :width - start])
    return torch.cat(out, -1)


def our_down(module: Experts) -> Callable[[Tensor], dict[str, Tensor]]:
    """`probe_experts`' down for our module, packed or dense."""
    def put(matrix: Tensor) -> dict[str, Tensor]:
        E = len(held(module, "down_proj_bias"))
        if not module.packed:
            return {"down_proj": matrix.expand(E, -1, -1)}
        return {f"down_proj_{part}": t.expand(E, *t.shape).contiguous()
                for part, t in zip(("blocks", "scales"), encode(matrix),
                                   strict=True)}
    return put


# --- Walking ours ------------------------------------------------------------

def plain_torch_layer(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer or a norm in plain torch, whatever kernels are loaded:
    equal bits need the reference's own operations."""
    if isinstance(module, RMSNorm):
        return rms_norm(x, module.weight, module.eps)
    return F.linear(x, held(module, "weight"), held(module, "bias"))


def own_layer(module: nn.Module, x: Tensor) -> Tensor:
    """The module as it is, its operators and kernels included."""
    return module(x)


def dense_shares(ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """(T, K) ids and weights -> (T, E), 0 where an expert is not chosen."""
    out = torch.zeros(len(ids), experts, dtype=weights.dtype)
    return out.scatter(1, ids, weights)


Parts = Sequence[int]  # how many tokens at a time


def in_parts(call: Callable, parts: Parts, dim: int = 0) -> Callable:
    """call(*tensors), its tensors split along dim, its results joined."""
    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        split = zip(*(t.split(list(parts), dim) for t in tensors),
                    strict=True)
        out = [call(*part) for part in split]
        if isinstance(out[0], tuple):
            return tuple(torch.cat(each, dim)
                         for each in zip(*out, strict=True))
        return torch.cat(out, dim)
    return run


def trace_attention(block: Block, x: Tensor, tables: tuple[Tensor, Tensor],
                    positions: Tensor, use: Contract, parts: Parts
                    ) -> tuple[Tensor, ...]:
    """x (1, T, D) -> norm, q, k, v, q and k turned, weights, heads and
    attention, the first points of a layer of ours."""
    a = block.self_attn
    layer = plain_torch_layer if use.inner else own_layer

    def call(module: nn.Module, value: Tensor) -> Tensor:
        return in_parts(partial(layer, module), parts, 1)(value)
    turn = in_parts(apply_rope if use.inner else torch.ops.gptoss.rope,
                    parts, 1)
    norm = call(block.input_layernorm, x)
    q, k, v = (call(project, norm).unflatten(-1, (-1, a.head_dim))
               for project in (a.q_proj, a.k_proj, a.v_proj))
    q_turned, k_turned = (turn(t, *tables) for t in (q, k))

    def attend(values: Tensor) -> Tensor:
        return in_parts(lambda queries, at: use.attention(
            queries, k_turned, values, a.sinks, at, a.window,
            a.head_dim ** -0.5), parts, 1)(q_turned, positions)
    heads = attend(v)
    return (norm[0], q[0], k[0], v[0], q_turned[0], k_turned[0],
            probe(attend, v), heads[0], call(a.o_proj, heads.flatten(2))[0])


def trace_block(block: Block, x: Tensor, tables: tuple[Tensor, Tensor],
                positions: Tensor, use: Contract, parts: Parts
                ) -> dict[str, Tensor]:
    """x (1, T, D) -> every point of one layer of ours."""
    first = trace_attention(block, x, tables, positions, use, parts)
    router, m = block.mlp.router, block.mlp.experts
    middle = x[0] + first[-1]
    norm_2 = in_parts(partial(
        plain_torch_layer if use.inner else own_layer,
        block.post_attention_layernorm), parts)(middle)
    product = F.linear if use.inner else torch.ops.gptoss.linear
    logits = in_parts(lambda rows: product(rows, router.weight, router.bias),
                      parts)(norm_2)
    weights, ids = in_parts(partial(use.choose, router), parts)(norm_2)
    call, ordered = in_parts(partial(use.experts, m), parts), ids.sort(-1)[0]
    experts = call(norm_2, ids, weights)
    hidden = probe_experts(call, m, norm_2, ordered,
                           held(m, "gate_up_proj_bias").shape[1] // 2,
                           our_down(m))
    return dict(zip(LAYER_POINTS, (
        *first, middle, norm_2, logits, ordered,
        dense_shares(ids, weights, logits.shape[1]), hidden, experts,
        middle + experts), strict=True))


@torch.inference_mode()
def trace_ours(model: GptOss, tokens: Tensor, contract: str = "fp32",
               rope: Callable = rope_parameters, parts: Parts | None = None
               ) -> Trace:
    """Every point of our model for tokens (1, T), under a contract.

    parts: how many tokens at a time, T in sum; None: all at once.
    ParityError: a contract that cannot be kept here (`computing`).
    """
    x, parts = model.embed_tokens(tokens), parts or [tokens.shape[1]]
    with computing(contract, x.dtype):
        return _trace(model, x, CONTRACTS[contract], rope, parts)


def _trace(model: GptOss, x: Tensor, use: Contract, rope: Callable,
           parts: Parts) -> Trace:
    positions = torch.arange(x.shape[1])[None]
    inv_freq, factor = rope(model.config)
    wide = torch.promote_types(x.dtype, torch.float32)
    tables = rope_tables(positions, inv_freq.to(wide), factor, x.dtype)
    out: Trace = {(None, "embedding"): x[0]}
    for n in range(model.config.num_hidden_layers):
        block = cast(Block, model.layers[n])
        seen = trace_block(block, x, tables, positions, use, parts)
        out |= {(n, point): value for point, value in seen.items()}
        x = seen["block"][None]
    last = x[0]
    for point, module in (("last norm", model.norm),
                          ("logits", model.lm_head)):
        last = in_parts(partial(
            plain_torch_layer if use.inner else own_layer, module),
            parts)(last)
        out[None, point] = last
    return out


__all__ = [
    "Key",
    "LAYER_POINTS",
    "Parts",
    "Trace",
    "copying",
    "dense_shares",
    "in_parts",
    "our_down",
    "own_layer",
    "plain_torch_layer",
    "points",
    "probe",
    "probe_experts",
    "swapped_in",
    "trace_attention",
    "trace_block",
    "trace_ours",
]
