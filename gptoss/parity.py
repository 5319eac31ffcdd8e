"""Parity, then many GPUs

Generated from book/16_parity.py; edit the chapter, not this file.
"""

import math
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.checkpoint import Checkpoint, convert, resolve
from gptoss.config import GptOssConfig, bf16_bytes
from gptoss.errors import Error
from gptoss.experts import ALPHA, Experts, by_expert, clamped_swiglu
from gptoss.generate import Sampler, generate
from gptoss.masks import visible
from gptoss.model import Block, GptOss, RMSNorm, check_tokens, rms_norm
from gptoss.mxfp4 import BLOCK, FP4_VALUES, SCALE_BIAS, decode, encode
from gptoss.rope import (
    apply_rope,
    inverse_frequencies,
    rope_parameters,
    rope_tables,
)
from gptoss.rope import concentration as rope_concentration
from gptoss.routing import softmax_then_topk

# --- The points --------------------------------------------------------------

class ParityError(Error):
    """A comparison that cannot be made, and what is missing for it."""


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


# --- Four contracts ----------------------------------------------------------

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


def choose_stable(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Our router: of equal logits the lower index. x (T, D) -> weights and
    ids (T, K)."""
    return router(x)


def choose_topk(router: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' and OpenAI's: torch.topk, which of equal logits takes
    one or the other. As `choose_stable`."""
    logits = F.linear(x, router.weight, router.bias)
    values, ids = logits.topk(router.k, dim=-1)
    return values.softmax(-1), ids


def expert_weights(module: Experts, e: int, dtype: torch.dtype
                   ) -> tuple[Tensor, Tensor]:
    """Expert e in dtype: gate_up (2F, D) and down (D, F)."""
    if not module.packed:
        return module.gate_up_proj[e], module.down_proj[e]
    return tuple(decode(getattr(module, f"{name}_blocks")[e],
                        getattr(module, f"{name}_scales")[e], dtype)
                 for name in ("gate_up_proj", "down_proj"))


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
        hidden = clamped_swiglu(x[n] @ up + module.gate_up_proj_bias[e],
                                module.limit)
        out = hidden @ down + module.down_proj_bias[e]
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
    hidden = clamped_swiglu(hidden + module.gate_up_proj_bias[ids],
                            module.limit)
    out = torch.einsum("beck,bek->bec", down[place], hidden)
    out = out + module.down_proj_bias[ids]
    return torch.einsum("bec,be->bc", out, weights)


@dataclass(frozen=True)
class Contract:
    """Where an implementation rounds to the dtype of its activations."""

    attention: Callable[..., Tensor]
    choose: Callable[..., tuple[Tensor, Tensor]]
    experts: Callable[..., Tensor]
    inner: bool  # rounds inside attention and experts; plain torch only
    rules: Mapping[str, str]  # point -> what is rounded there
    kernels: bool = False  # chapter 13's, which compute in bf16 alone

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


def contract_for(contract: str | None, dtype: torch.dtype) -> str:
    """A name of CONTRACTS; for None that of what runs unasked: in bf16 the
    kernels where they load, else plain torch, "fp32"."""
    if contract is None and dtype == torch.bfloat16:
        from gptoss.kernels import load_kernels

        plain = load_kernels().startswith("torch")
        return "fp32" if plain else "kernels"
    return contract or "fp32"


@contextmanager
def computing(contract: str, dtype: torch.dtype) -> Iterator[str]:
    """Inside, ours computes as the contract says: with the kernels, or with
    plain torch, whatever is loaded. Yields which, in words.

    ParityError: the kernels cannot be had here, or not for that dtype.
    """
    kernels = sys.modules.get("gptoss.kernels")
    if not CONTRACTS[contract].kernels:  # never imported: none can compute
        with kernels.plain_torch() if kernels else nullcontext():
            yield "plain torch"
        return
    from gptoss.kernels import load_kernels

    name = load_kernels()
    if name.startswith("torch") or dtype != torch.bfloat16:
        raise ParityError("contract: kernels need bfloat16 and a compiler, "
                          f"found {str(dtype)[6:]} and {name}")
    yield name


# --- Black boxes -------------------------------------------------------------

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
    bias, out = module.down_proj_bias, []
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
        E = len(module.down_proj_bias)
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
    return F.linear(x, module.weight, module.bias)


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
                           m.gate_up_proj_bias.shape[1] // 2, our_down(m))
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
    out = {(None, "embedding"): x[0]}
    for n, block in enumerate(model.layers):
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


# --- Walking transformers ----------------------------------------------------

@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """owner.name is value inside the with, and what it was afterwards."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable]
           ) -> Iterator[None]:
    """hooks[module name](inputs, output) is called after each forward."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            def call(module, args, kwargs, out, hook=hook):
                hook(args or tuple(kwargs.values()), out)
            handle = model.get_submodule(name).register_forward_hook(
                call, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def keeper(trace: Trace, layer: int | None, after: str | None,
           before: str | None = None, shape: tuple[int, ...] = ()
           ) -> Callable:
    """A hook that keeps a module's output, and perhaps its input."""
    def keep(inputs, out) -> None:
        out = out[0] if isinstance(out, tuple) else out
        value = out[0] if out.ndim == 3 else out
        if after:
            trace[layer, after] = (value.unflatten(-1, shape) if shape
                                   else value).clone()
        if before:
            trace[layer, before] = inputs[0].flatten(0, -2).clone()
    return keep


def import_transformers() -> types.ModuleType:
    """The package, quiet. ParityError: it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ParityError("reference transformers: expected the package "
                          f"transformers, found none ({error})") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_transformers(path: str | Path, dtype: torch.dtype = torch.float32,
                      experts: str = "eager") -> nn.Module:
    """transformers' gpt-oss from a folder, decoded, on the CPU.

    experts: "eager" (its loop) or "grouped_mm". Attention is eager, the
    only kind that runs there. ParityError: transformers is not installed.
    """
    transformers = import_transformers()
    with Checkpoint.open(path) as checkpoint:
        packed = checkpoint.layout == "hf"
    more = {"quantization_config": transformers.Mxfp4Config(
        dequantize=True)} if packed else {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager",
        experts_implementation=experts, **more).eval()


HF_POINTS = {  # module in a layer -> point after it, point before it
    "input_layernorm": ("norm", None), "self_attn.q_proj": ("q", None),
    "self_attn.k_proj": ("k", None), "self_attn.v_proj": ("v", None),
    "self_attn.o_proj": ("attention", None),
    "post_attention_layernorm": ("norm 2", "middle"),
    "mlp.router": ("router", None), "mlp.experts": ("experts", None),
    "": ("block", None)}


@torch.inference_mode()
def trace_transformers(model: nn.Module, tokens: Tensor) -> Trace:
    """Every point of transformers' model for tokens (1, T)."""
    from transformers.models.gpt_oss import modeling_gpt_oss as theirs

    c, trace, eager = model.config, {}, theirs.eager_attention_forward

    def attend(module, q, k, v, *args, **kwargs):
        out, weights = eager(module, q, k, v, *args, **kwargs)
        for point, value in (
                ("q turned", q[0].transpose(0, 1)),
                ("k turned", k[0].transpose(0, 1)),
                ("weights", weights[0].transpose(0, 1)), ("heads", out[0])):
            trace[module.layer_idx, point] = value.clone()
        return out, weights

    def choose(layer: int) -> Callable:
        def keep(inputs, out) -> None:
            logits, weights, ids = out
            m, ordered = model.model.layers[layer].mlp.experts, ids.sort(-1)[0]
            trace[layer, "router"], trace[layer, "chosen"] = logits, ordered
            trace[layer, "shares"] = dense_shares(ids, weights,
                                                  logits.shape[1])
            trace[layer, "hidden"] = probe_experts(
                m.forward, m, inputs[0], ordered, c.intermediate_size,
                lambda matrix: {"down_proj": matrix.T.expand(
                    logits.shape[1], -1, -1)})
        return keep
    heads = {point: (-1, c.head_dim) for point in "qkv"}
    hooks = {f"model.layers.{n}.{name}".rstrip("."):
             keeper(trace, n, *two, heads.get(two[0], ()))
             for n in range(c.num_hidden_layers)
             for name, two in HF_POINTS.items()}
    hooks |= {f"model.layers.{n}.mlp.router": choose(n)
              for n in range(c.num_hidden_layers)}
    hooks |= {"model.embed_tokens": keeper(trace, None, "embedding"),
              "model.norm": keeper(trace, None, "last norm"),
              "lm_head": keeper(trace, None, "logits")}
    with (replaced(theirs, "eager_attention_forward", attend),
          hooked(model, hooks)):
        model(tokens, use_cache=False)
    return trace


def their_tensors(checkpoint: Checkpoint, prefix: str, dtype: torch.dtype
                  ) -> dict[str, Tensor]:
    """transformers' weights under prefix, decoded, as it lays them out."""
    out = {}
    for name in checkpoint.names():
        target, read = name.removeprefix(prefix), checkpoint.read
        if not name.startswith(prefix) or name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            target = target.removesuffix("_blocks")
            scales = read(name.removesuffix("blocks") + "scales")
            out[target] = decode(read(name), scales, dtype).transpose(
                1, 2).contiguous()
        else:
            out[target] = read(name).to(dtype)
    return out


def stream_transformers(path: str | Path,
                        dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """`load_transformers` that holds one decoded layer at a time.

    A layer has no weights until it is called; it reads and decodes them
    then, and drops them when it is done. Any layout.
    """
    transformers, checkpoint = import_transformers(), Checkpoint.open(path)
    told = checkpoint.config.to_hf_dict()
    told.pop("quantization_config", None)
    told["pad_token_id"] = None  # changes nothing; the original has no key
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GptOssConfig(**told), dtype=dtype,
            attn_implementation="eager", experts_implementation="eager")
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config)  # not on meta
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        model.get_submodule(name).load_state_dict(
            their_tensors(checkpoint, f"{name}.", dtype), assign=True)
    for n, layer in enumerate(model.model.layers):
        def fill(module, args, n=n) -> None:
            module.load_state_dict(their_tensors(
                checkpoint, f"model.layers.{n}.", dtype), assign=True)
        layer.register_forward_pre_hook(fill)
        layer.register_forward_hook(lambda module, args, out: (
            module.to("meta"), None)[1])
    return model.eval()


# --- Walking OpenAI's code ---------------------------------------------------

def load_openai(path: str | Path, dtype: torch.dtype = torch.float32
                ) -> nn.Module:
    """OpenAI's torch model from a folder in any packed layout, on the CPU.

    It reads its own layout alone, so others are converted into a temporary
    folder. ParityError: gpt_oss is not installed.
    """
    try:
        from gpt_oss.torch.model import Transformer
    except ImportError as error:
        raise ParityError("reference openai: expected the package gpt-oss "
                          f"(its torch model), found none ({error})"
                          ) from error
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoint.open(path) as checkpoint:
            home = checkpoint.folder
        if checkpoint.layout != "original":
            home = Path(folder) / "original"
            convert(path, home, "original")
        model = Transformer.from_checkpoint(str(home), device="cpu")
    model = model.to(dtype).eval()
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()  # as released: scales in fp32
    return model


class _Calls(torch.overrides.TorchFunctionMode):
    """Keeps what OpenAI's MLP computes without a module of its own."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace, self.layer, self.ids = trace, -1, None

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.topk:
            self.layer += 1
            self.ids = out.indices
            self.trace[self.layer, "chosen"] = self.ids.sort(-1)[0]
        elif func is F.softmax:
            logits = self.trace[self.layer, "router"]
            self.trace[self.layer, "shares"] = dense_shares(
                self.ids, out, logits.shape[1])
        elif func is torch.einsum and args[0] == "beck,bek->bec":
            order = self.ids.argsort(-1)[..., None].expand_as(args[2])
            self.trace[self.layer, "hidden"] = args[2].gather(1, order)
        elif func is torch.einsum and args[0] == "bec,be->bc":
            self.trace[self.layer, "experts"] = out
        return out


OPENAI_POINTS = {
    "attn.norm": ("norm", None), "attn.out": ("attention", None),
    "mlp.norm": ("norm 2", "middle"), "mlp.gate": ("router", None),
    "mlp": ("block", None)}


@torch.inference_mode()
def trace_openai(model: nn.Module, tokens: Tensor) -> Trace:
    """Every point of OpenAI's model for tokens (1, T)."""
    from gpt_oss.torch import model as theirs

    trace, sdpa, layers = {}, theirs.sdpa, len(model.block)
    hooks = {f"block.{n}.{name}": keeper(trace, n, *two)
             for n in range(layers) for name, two in OPENAI_POINTS.items()}
    for n, block in enumerate(model.block):
        a = block.attn
        C, H, G = a.head_dim, a.num_attention_heads, a.num_key_value_heads

        def split(inputs, out, n=n, sizes=(H, G, G), C=C) -> None:
            parts = out.unflatten(-1, (-1, C)).split(sizes, dim=1)
            trace.update(zip([(n, name) for name in "qkv"], parts,
                             strict=True))

        def turn(inputs, out, n=n) -> None:
            trace[n, "q turned"] = out[0].flatten(1, 2)
            trace[n, "k turned"] = out[1]
        hooks[f"block.{n}.attn.qkv"] = split
        hooks[f"block.{n}.attn.rope"] = turn
    hooks |= {"embedding": keeper(trace, None, "embedding"),
              "norm": keeper(trace, None, "last norm"),
              "unembedding": keeper(trace, None, "logits")}

    def attend(q, k, v, *more):
        n = sum(point == "weights" for _, point in trace)
        out = sdpa(q, k, v, *more)
        shape = (1, len(q), -1, q.shape[-1])
        trace[n, "weights"] = probe(
            lambda values: sdpa(q, k, values[0], *more).view(shape), v[None])
        trace[n, "heads"] = out.view(shape)[0].clone()
        return out
    with replaced(theirs, "sdpa", attend), hooked(model, hooks):
        with _Calls(trace):
            model(tokens[0])
    return trace


# --- What rounding explains --------------------------------------------------

DEVIATIONS = 5  # in Hoeffding's inequality; see the derivation
FLOOR = 2.0 ** -120  # what underflow may leave
EXPONENTIAL = 1e-6  # the kernels' own, chapter 13
KEYS_AT_ONCE = 64  # keys that their attention takes at a time
LARGEST = 32639  # of their integers, 127 * 256 + 127
LOST = 2.0 ** -107  # a block below this may become zeros
Pair = tuple[Tensor, Tensor]  # float64: a value, and a bound on its error


@dataclass(frozen=True)
class Rounding:
    """The unit roundoffs of a run, and how errors grow through sums."""

    unit: float  # of the activations' dtype
    wide: float  # of what sums are kept in
    inner: float  # of intermediate results inside attention and experts
    step: float  # of the steps of a rotation and of an expert
    power: float = 0.0  # what an exponential is off by, beyond `wide`
    kernels: bool = False  # {eq}`parity-half`, and attention by chunks

    @classmethod
    def of(cls, dtype: torch.dtype, inner: bool, kernels: bool = False
           ) -> "Rounding":
        """For activations in dtype; inner and kernels as in `Contract`."""
        def unit(kind: torch.dtype) -> float:
            return torch.finfo(kind).eps / 2
        wide = unit(torch.promote_types(dtype, torch.float32))
        more = (wide, EXPONENTIAL, True) if kernels else (unit(dtype),)
        return cls(unit(dtype), wide, unit(dtype) if inner else wide, *more)

    def sums(self, n: int) -> float:
        """Relative error of a sum of n rounded terms."""
        return min(n, DEVIATIONS * math.sqrt(n)) * self.wide

    def stored(self, value: Tensor, error: Tensor, step: bool = False
               ) -> Pair:
        """Rounded once more: as activations are, or as a step is."""
        unit = self.step if step else self.unit
        return value, error + unit * (value.abs() + error) + FLOOR

    def linear(self, x: Pair, weight: Tensor, bias: Tensor, inner: bool
               ) -> Pair:
        """x @ weight.T + bias, stored; inner: a step in an expert, its bias
        added apart."""
        value, error = x
        size = value.abs() @ weight.abs().T + bias.abs()
        carried = torch.minimum(
            error @ weight.abs().T,
            DEVIATIONS * (error.square() @ weight.square().T).sqrt())
        y = value @ weight.T
        apart = self.inner * y.abs() if inner else 0.0
        return self.stored(y + bias, carried + apart + size * self.sums(
            weight.shape[1] + 1), inner)


def half_step(x: Pair, stored: bool) -> Tensor:
    """How far from x (…, 32 N) the kernels' integers may be, entry by entry.

    stored: x comes in bf16, its step is a power of two and nothing from
    1/64 of the block's largest on is changed; else the finest step.
    """
    parts = sum(t.abs() for t in x).unflatten(-1, (-1, BLOCK))
    top = parts.amax(-1, keepdim=True)
    if stored:
        whole = torch.ldexp(torch.ones_like(top), top.frexp()[1] - 1)
        half = torch.where(parts < whole / 64, whole * 2.0 ** -14, 0.0)
    else:  # a hundredth for the rounding of the step itself
        half = (1.01 / 2 / LARGEST * top).expand_as(parts)
    return half.flatten(-2) + LOST


# --- A formula with switches -------------------------------------------------

@dataclass(frozen=True)
class Formula:
    """The model's arithmetic; every field but the default is a mistake."""

    norm_plus_one: bool = False  # Gemma's (1 + weight)
    bias: float = 1.0  # times the bias of q, k, v, o or the router
    truncate: bool | None = None  # None: as the configuration says
    stretched: bool = True  # YaRN at all
    concentrated: bool = True
    interleaved: bool = False  # pairs (2i, 2i + 1)
    shift: int = 0  # positions count from here
    longer: int = 0  # keys beyond the window
    exchanged: bool = False  # sliding and full layers
    sink: bool = True
    scaled: bool = True
    modulo: bool = False  # head h reads key head h % G
    softmax_first: bool = False
    nibbles: bool = False  # high nibble first
    gate_up: str = "interleaved"  # "swapped", "halves"
    clamp: str = "right"
    alpha: float = ALPHA
    plus_one: float = 1.0
    up_bias: float = 1.0
    down_bias: float = 1.0


RIGHT = Formula()
_INF = math.inf
CLAMPS = {  # limits of gate and up, in units of swiglu_limit
    "right": ((-_INF, 1), (-1, 1)), "gate below": ((-1, _INF), (-1, 1)),
    "gate both": ((-1, 1), (-1, 1)), "up above": ((-_INF, 1), (-_INF, 1)),
    "none": ((-_INF, _INF), (-_INF, _INF))}


# --- The judge ---------------------------------------------------------------

class Judge:
    """Recomputes one operation in float64 from a run's own inputs.

    checkpoint: open; its weights are rounded to dtype first, as every
    loader does. inner, kernels: of the run's `Contract`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype,
                 inner: bool, kernels: bool = False) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.dtype, self.rounding = dtype, Rounding.of(dtype, inner, kernels)
        packed = kernels and checkpoint.layout != "bf16"
        self.packed = Rounding.of(dtype, inner, packed)  # of its experts

    def weight(self, name: str, layer: int | None = None,
               rows: slice | Tensor = slice(None)) -> Tensor:
        """A tensor, or rows of it, as the run holds it, in float64."""
        name = name if layer is None else f"model.layers.{layer}.{name}"
        return self.checkpoint.read(name)[rows].to(self.dtype).double()

    def expert(self, name: str, layer: int, e: int, f: Formula) -> Tensor:
        """gate_up_proj or down_proj of expert e, (out, in), in float64."""
        full = f"model.layers.{layer}.mlp.experts.{name}"
        rows, read = slice(e, e + 1), self.checkpoint.read
        if self.checkpoint.layout == "bf16":
            return read(full, rows)[0].T.to(self.dtype).double()
        blocks, scales = (read(f"{full}_{part}", rows)[0]
                          for part in ("blocks", "scales"))
        nibbles = [blocks & 15, blocks >> 4]
        codes = torch.stack(nibbles[::-1] if f.nibbles else nibbles, -1)
        grid = torch.tensor(FP4_VALUES, dtype=torch.float64)
        power = torch.exp2(scales.double() - SCALE_BIAS)[..., None]
        values = grid[codes.flatten(-2).long()] * power
        return values.flatten(-2).to(self.dtype).double()

    def expected(self, trace: Trace, key: Key, f: Formula = RIGHT
                 ) -> Pair:
        """What the operation at key should give, and how far off it may
        be: float64 tensors of the recorded shape."""
        layer, point = key

        def see(name: str, at: int | None = layer) -> Tensor:
            value = trace[at, name]
            return value.double() if value.is_floating_point() else value
        return JUDGES[point](self, see, layer, point, f)


See = Callable[..., Tensor]
_NAMES = {"norm": "input_layernorm", "norm 2": "post_attention_layernorm",
          "router": "mlp.router", "attention": "self_attn.o_proj"}
_BEFORE = {"norm 2": "middle", "attention": "heads", "router": "norm 2",
           "q": "norm", "k": "norm", "v": "norm"}


def _stream(j: Judge, see: See, layer: int | None) -> Tensor:
    """The residual stream as it enters a layer, or leaves the last."""
    layer = j.config.num_hidden_layers if layer is None else layer
    return see("block", layer - 1) if layer else see("embedding", None)


def _norm(j: Judge, see: See, layer: int | None, point: str, f: Formula
          ) -> Pair:
    x = (see("middle") if point == "norm 2" else _stream(j, see, layer))
    name = f"{_NAMES[point]}.weight" if layer is not None else (
        "model.norm.weight")
    weight = j.weight(name, layer) + f.norm_plus_one
    y = x * (x.square().mean(-1, keepdim=True)
             + j.config.rms_norm_eps).rsqrt() * weight
    r = j.rounding
    return r.stored(y, y.abs() * (r.sums(x.shape[-1]) + 4 * r.wide))


def _linear(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    x = see(_BEFORE[point]).flatten(1)
    name = _NAMES.get(point, f"self_attn.{point}_proj")
    value, error = j.rounding.linear(
        (x, torch.zeros_like(x)), j.weight(f"{name}.weight", layer),
        f.bias * j.weight(f"{name}.bias", layer), False)
    shape = see(point).shape
    return value.view(shape), error.view(shape)


def _logits(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    """Some rows of lm_head at a time: 201,088 of them take 4.6 GB."""
    x = see("last norm")
    step = max(1, 2 ** 24 // x.shape[1])
    parts = [j.rounding.linear(
        (x, torch.zeros_like(x)),
        j.weight("lm_head.weight", rows=slice(start, start + step)),
        torch.zeros(1), False)
        for start in range(0, j.config.vocab_size, step)]
    return tuple(torch.cat(part, -1) for part in zip(*parts, strict=True))


def _sum(j: Judge, see: See, layer: int | None, point: str, f: Formula
         ) -> Pair:
    y = (see("middle") + see("experts") if point == "block"
         else _stream(j, see, layer) + see("attention"))
    return j.rounding.stored(y, torch.zeros_like(y))


def _tables(j: Judge, length: int, f: Formula) -> tuple[Pair, Pair]:
    """cos and sin (T, 1, C/2) with their errors."""
    c, r = j.config, j.rounding
    yarn = c.rope_type == "yarn" and f.stretched
    factor = c.rope_factor if yarn else 1.0
    truncate = c.rope_truncate if f.truncate is None else f.truncate
    inv_freq = inverse_frequencies(
        c.head_dim, c.rope_theta, factor, c.initial_context_length,
        c.rope_beta_fast, c.rope_beta_slow, truncate).double()
    angle = (torch.arange(length).double() + f.shift)[:, None] * inv_freq
    m = rope_concentration(factor) if f.concentrated else 1.0
    error = m * (4 * r.wide * angle.abs() + 4 * r.wide)
    return tuple(tuple(t[:, None] for t in r.stored(m * wave, error))
                 for wave in (angle.cos(), angle.sin()))


def _turned(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    x, u = see(point[0]), j.rounding.step
    (cos, e_cos), (sin, e_sin) = _tables(j, len(x), f)
    half = x.shape[-1] // 2
    a, b = ((x[..., ::2], x[..., 1::2]) if f.interleaved
            else (x[..., :half], x[..., half:]))
    out = []
    for p, q in ((a, -b), (b, a)):  # p cos + q sin
        error = (p.abs() * e_cos + q.abs() * e_sin
                 + u * (p * cos).abs() + u * (q * sin).abs()) * (1 + u)
        out.append(j.rounding.stored(p * cos + q * sin, error))
    join = ((lambda both: torch.stack(both, -1).flatten(-2))
            if f.interleaved else (lambda both: torch.cat(both, -1)))
    return tuple(join(both) for both in zip(*out, strict=True))


def _scores(j: Judge, see: See, layer: int, f: Formula) -> Pair:
    """Scores (T, H, S + 1) with the sink last, -inf where hidden."""
    c, r = j.config, j.rounding
    q, k = see("q turned"), see("k turned")
    T, H, C = q.shape
    heads = torch.arange(H)
    heads = (heads % k.shape[1] if f.modulo
             else heads // (H // k.shape[1]))
    scale, k = C ** -0.5 if f.scaled else 1.0, k[:, heads]
    raw = torch.einsum("thc,shc->ths", q, k) * scale
    size = torch.einsum("thc,shc->ths", q.abs(), k.abs()) * scale
    sliding = (c.layer_types[layer] == "sliding_attention") ^ f.exchanged
    window = c.sliding_window + f.longer if sliding else None
    positions = torch.arange(T)[None]
    seen = visible(positions, positions, window)[0][:, None]
    sink = j.weight("self_attn.sinks", layer).view(1, -1, 1).expand(T, H, 1)
    sink = sink if f.sink else torch.full_like(sink, -torch.inf)
    scores = torch.cat([raw.masked_fill(~seen, -torch.inf), sink], -1)
    finite = scores.masked_fill(scores.isinf(), 0.0)
    top = scores.amax(-1, keepdim=True)
    inner = r.inner * (2 * finite.abs() + (finite - top).abs())
    error = F.pad((r.sums(C) + 2 * r.wide) * size, (0, 1)) + inner
    if r.kernels:  # what was summed is rescaled when the maximum rises
        error = error + 3 * r.wide * math.ceil(T / KEYS_AT_ONCE)
    return scores, error.masked_fill(scores.isinf(), 0.0)


def _weights(j: Judge, see: See, layer: int | None, point: str, f: Formula
             ) -> Pair:
    scores, error = _scores(j, see, layer, f)
    r, probs = j.rounding, scores.softmax(-1)
    shift = error + (probs * error).sum(-1, keepdim=True)
    relative = torch.expm1(shift) + r.inner + r.sums(scores.shape[-1]) + (
        8 * r.wide + 2 * r.power)
    value, error = probs[..., :-1], (probs * relative)[..., :-1]
    return r.stored(value, error) if point == "weights" else (value, error)


def _heads(j: Judge, see: See, layer: int | None, point: str, f: Formula
           ) -> Pair:
    probs, error = _weights(j, see, layer, point, f)
    v = see("v")
    group = probs.shape[1] // v.shape[1]
    v, r = v.repeat_interleave(group, 1), j.rounding
    error = error + r.sums(len(v)) * probs
    return r.stored(torch.einsum("ths,shc->thc", probs, v),
                    torch.einsum("ths,shc->thc", error, v.abs()))


def _shares(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    logits, ids, r = see("router"), see("chosen"), j.rounding
    chosen = logits.gather(1, ids)
    weights = (logits.softmax(-1).gather(1, ids) if f.softmax_first
               else chosen.softmax(-1))
    span = (logits if f.softmax_first else chosen)
    span = span.amax(1, keepdim=True) - chosen
    error = weights * (r.sums(logits.shape[1]) + (8 + span) * r.wide)
    return tuple(dense_shares(ids, t, logits.shape[1])
                 for t in r.stored(weights, error))


def _chosen(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    """Whether a choice is a top-K of the recorded logits: 1 where so."""
    logits, ids = see("router"), see("chosen")
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    worst = logits.gather(1, ids).amin(1)
    best = logits.masked_fill(taken, -torch.inf).amax(1)
    right = (worst >= best) & (taken.sum(1) == j.config.num_experts_per_tok)
    value = torch.where(right[:, None], ids, -1).double()
    return value, torch.zeros_like(value) + FLOOR


def _swiglu(r: Rounding, gate_up: Pair, f: Formula, limit: float) -> Pair:
    """The clamped product, each of its five steps stored as a step."""
    keep = partial(r.stored, step=True)
    low, high = ((t[..., ::2], t[..., 1::2]) for t in gate_up)
    (gate, up), (e_gate, e_up) = low, high
    gate, up = (t.clamp(a * limit, b * limit) for t, (a, b) in
                zip((gate, up), CLAMPS[f.clamp], strict=True))
    scaled, e = keep(f.alpha * gate, f.alpha * e_gate)
    sigmoid = torch.sigmoid(scaled)
    sigmoid, e_sig = keep(sigmoid, e / 4 + (4 * r.wide + r.power) * sigmoid)
    glu, e_glu = keep(gate * sigmoid, e_gate * (sigmoid + e_sig)
                      + gate.abs() * e_sig)
    more, e_more = keep(up + f.plus_one, e_up)
    return keep(more * glu, more.abs() * e_glu
                + e_more * (glu.abs() + e_glu))


def _hidden(j: Judge, see: See, layer: int | None, point: str, f: Formula
            ) -> Pair:
    """(T, K, F), experts ascending in each row."""
    x, ids, r = see("norm 2"), see("chosen"), j.packed
    half = torch.zeros_like(x)
    if r.kernels:
        half = half_step((x, half), stored=True)
    bias = f.up_bias * j.weight("mlp.experts.gate_up_proj_bias", layer)
    out = [torch.zeros(*ids.shape, bias.shape[1] // 2, dtype=x.dtype)
           for _ in range(2)]
    for e in ids.unique().tolist():
        n, k = torch.where(ids == e)
        both = r.linear((x[n], half[n]),
                        j.expert("gate_up_proj", layer, e, f), bias[e], True)
        if f.gate_up == "swapped":
            both = [t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
                    for t in both]
        elif f.gate_up == "halves":
            both = [torch.stack(t.chunk(2, -1), -1).flatten(-2)
                    for t in both]
        hidden = _swiglu(r, tuple(both), f, j.config.swiglu_limit)
        if r.kernels:  # integers once more, and only then into bf16
            value, error = hidden
            hidden = r.stored(value, error + half_step(hidden, stored=False))
        for whole, part in zip(out, hidden, strict=True):
            whole[n, k] = part
    return tuple(out)


def _experts(j: Judge, see: See, layer: int | None, point: str, f: Formula
             ) -> Pair:
    """The K outputs, weighted and summed, from the hidden vectors."""
    hidden, ids, shares = see("hidden"), see("chosen"), see("shares")
    r = j.packed
    off = r.unit * hidden.abs()  # the probe may have rounded the other way
    if r.kernels:  # and an integer may be another there: a whole step
        off = off + 2 * half_step((hidden, off), stored=False)
    bias = f.down_bias * j.weight("mlp.experts.down_proj_bias", layer)
    y, size, error = (torch.zeros(len(ids), bias.shape[1], dtype=bias.dtype)
                      for _ in range(3))
    for e in ids.unique().tolist():
        n, k = torch.where(ids == e)
        weight, down = shares[n, e, None], j.expert("down_proj", layer, e, f)
        value, wrong = r.linear((hidden[n, k], off[n, k]), down, bias[e],
                                True)
        y[n] += weight * value
        size[n] += weight * value.abs()
        error[n] += weight * wrong
    steps = ids.shape[1] + 1  # the weighting, and K additions
    return r.stored(y, error + steps * r.inner * size)


def _embedding(j: Judge, see: See, layer: int | None, point: str,
               f: Formula) -> Pair:
    value = j.weight("model.embed_tokens.weight", rows=see("tokens"))
    return value, torch.zeros_like(value) + FLOOR


JUDGES = {"embedding": _embedding, "norm": _norm, "q": _linear,
          "k": _linear, "v": _linear, "q turned": _turned,
          "k turned": _turned, "weights": _weights, "heads": _heads,
          "attention": _linear, "middle": _sum, "norm 2": _norm,
          "router": _linear, "chosen": _chosen, "shares": _shares,
          "hidden": _hidden, "experts": _experts, "block": _sum,
          "last norm": _norm, "logits": _logits}


# --- The suspects ------------------------------------------------------------

_BIASES = {"bias added twice": {"bias": 2.0}, "bias left out": {"bias": 0.0}}
_TURNS = {
    "YaRN's range is rounded (truncate)": {"truncate": True},
    "YaRN's range is not rounded": {"truncate": False},
    "the concentration is missing": {"concentrated": False},
    "plain RoPE, no YaRN": {"stretched": False, "concentrated": False},
    "YaRN's frequencies are missing": {"stretched": False},
    "pairs (2i, 2i + 1) instead of halves": {"interleaved": True},
    "positions count from 1": {"shift": 1}}
_MASKS = {
    "the window is one key too long": {"longer": 1},
    "the window is one key too short": {"longer": -1},
    "sliding and full layers are exchanged": {"exchanged": True},
    "the sink is dropped": {"sink": False},
    "scores are not divided by sqrt(head size)": {"scaled": False},
    "query head h reads key head h % G": {"modulo": True}}
_NORMS = {"the norm multiplies by 1 + weight": {"norm_plus_one": True}}
SUSPECTS = {  # point -> cause -> fields of Formula
    "norm": _NORMS, "norm 2": _NORMS, "last norm": _NORMS,
    "q": _BIASES, "k": _BIASES, "v": _BIASES, "attention": _BIASES,
    "router": _BIASES, "q turned": _TURNS, "k turned": _TURNS,
    "weights": _MASKS, "heads": _MASKS,
    "shares": {"softmax over all experts, before the choice":
               {"softmax_first": True}},
    "hidden": {
        "the nibbles of a byte are swapped": {"nibbles": True},
        "gate and up are swapped": {"gate_up": "swapped"},
        "gate and up are halves, not interleaved": {"gate_up": "halves"},
        "the gate is clamped from below, not above": {"clamp": "gate below"},
        "the gate is clamped on both sides": {"clamp": "gate both"},
        "up is clamped from above only": {"clamp": "up above"},
        "nothing is clamped": {"clamp": "none"},
        "SiLU instead of alpha 1.702": {"alpha": 1.0},
        "up is not raised by 1": {"plus_one": 0.0},
        "gate_up's bias added twice": {"up_bias": 2.0},
        "gate_up's bias left out": {"up_bias": 0.0}},
    "experts": {
        "down's nibbles are swapped": {"nibbles": True},
        "down's bias added twice": {"down_bias": 2.0},
        "down's bias left out": {"down_bias": 0.0}}}


# --- The verdict -------------------------------------------------------------

def excess(found: Tensor, expected: Pair) -> float:
    """max |found - value| / bound; infinite for NaN, infinity or another
    shape. At most 1: rounding explains it."""
    value, bound = expected
    if found.shape != value.shape or not found.isfinite().all():
        return math.inf
    error = (found.double() - value).abs()
    return (error / bound.clamp_min(FLOOR)).max().item()


@dataclass(frozen=True)
class Finding:
    """An operation that rounding does not explain."""

    side: str  # "ours" or the reference's name
    layer: int | None
    point: str
    excess: float  # how many times its bound
    cause: str | None  # a suspect that explains it
    cause_excess: float | None  # how many times its bound then

    def describe(self) -> str:
        """Two lines for a person."""
        where = "" if self.layer is None else f"layer {self.layer}, "
        first = (f"{self.side}: first beyond rounding at {where}"
                 f"{self.point}, {self.excess:.1e} times its bound")
        if self.cause is None:
            return f"{first}\n  no known cause explains it"
        return (f"{first}\n  {self.cause}: with that, "
                f"{self.cause_excess:.2f} of the bound")


def explain(judge: Judge, trace: Trace, key: Key
            ) -> tuple[str, float] | tuple[None, None]:
    """The suspect with the least excess among those that explain key."""
    tried = [(excess(trace[key], judge.expected(
        trace, key, replace(RIGHT, **fields))), cause)
        for cause, fields in SUSPECTS.get(key[1], {}).items()]
    best = min(tried, default=(math.inf, None))
    return (best[1], best[0]) if best[0] <= 1 else (None, None)


@torch.inference_mode()
def judge_walk(judge: Judge, trace: Trace, side: str
            ) -> tuple[dict[Key, float], Finding | None]:
    """Every operation's excess, and the first that is above 1."""
    found = {key: excess(trace[key], judge.expected(trace, key))
             for key in points(judge.config)}
    for key, value in found.items():
        if not value <= 1:
            return found, Finding(side, *key, value,
                                  *explain(judge, trace, key))
    return found, None


# --- Planted faults ----------------------------------------------------------

def _swap_rows(block: Block) -> None:
    """Gate rows where up rows belong, and the other way round."""
    experts = block.mlp.experts
    for name, t in [*experts.named_parameters(), *experts.named_buffers()]:
        if name.startswith("gate_up"):
            t.data = t.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def _swap_nibbles(block: Block) -> None:
    for name, t in block.mlp.experts.named_buffers():
        if name.endswith("_blocks"):
            t.data = t << 4 | t >> 4


def _clamp_below(block: Block) -> None:
    """The gate's clamp(max=limit) becomes clamp(min=-limit); in fp32, which
    is within the rounding of every contract."""
    experts = block.mlp.experts

    def one(e: int, rows: Tensor) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        up, down, up_bias, down_bias = (t.to(wide) for t in (
            *expert_weights(experts, e, wide), experts.gate_up_proj_bias[e],
            experts.down_proj_bias[e]))
        gate, up = F.linear(rows.to(wide), up, up_bias).unflatten(
            -1, (-1, 2)).unbind(-1)
        gate = gate.clamp(min=-experts.limit)
        up = up.clamp(-experts.limit, experts.limit)
        hidden = (up + 1) * (gate * torch.sigmoid(ALPHA * gate))
        return F.linear(hidden, down, down_bias)
    experts.forward = lambda x, ids, weights: by_expert(
        x, ids, weights, len(experts.gate_up_proj_bias), one)


def _softmax_first(block: Block) -> None:
    router = block.mlp.router
    router.forward = lambda x: softmax_then_topk(
        F.linear(x, router.weight, router.bias), router.k, renormalise=False)


def _wider(block: Block) -> None:
    block.self_attn.window += bool(block.self_attn.window)


def _no_sink(block: Block) -> None:
    sinks = block.self_attn.sinks
    sinks.data = torch.full_like(sinks, -torch.inf)


def _bias_twice(block: Block) -> None:
    bias = block.self_attn.o_proj.bias
    bias.data = 2 * bias


def _truncated(config: GptOssConfig) -> tuple[Tensor, float]:
    return rope_parameters(replace(config, rope_truncate=True))


def _unconcentrated(config: GptOssConfig) -> tuple[Tensor, float]:
    return rope_parameters(config)[0], 1.0


# name -> what is done to each block or to RoPE, the cause to be named
FAULTS = {
    "truncate": (_truncated, "YaRN's range is rounded (truncate)"),
    "concentration": (_unconcentrated, "the concentration is missing"),
    "window": (_wider, "the window is one key too long"),
    "sink": (_no_sink, "the sink is dropped"),
    "bias": (_bias_twice, "bias added twice"),
    "softmax": (_softmax_first,
                "softmax over all experts, before the choice"),
    "nibbles": (_swap_nibbles, "the nibbles of a byte are swapped"),
    "swapped": (_swap_rows, "gate and up are swapped"),
    "clamp": (_clamp_below, "the gate is clamped from below, not above")}


def trace_faulty(model: GptOss, tokens: Tensor, fault: str,
                 contract: str = "fp32", parts: Parts | None = None) -> Trace:
    """`trace_ours` after one of FAULTS was planted; the model stays broken.

    ParityError: no such fault.
    """
    if fault not in FAULTS:
        raise ParityError(f"fault: expected one of {', '.join(FAULTS)}, "
                          f"found {fault}")
    change = FAULTS[fault][0]
    if change in (_truncated, _unconcentrated):
        return trace_ours(model, tokens, contract, change, parts)
    for block in model.layers:
        change(block)
    return trace_ours(model, tokens, contract, parts=parts)


# --- The report --------------------------------------------------------------

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


def default_tokens(config: GptOssConfig) -> Tensor:
    """(1, T) random tokens, always the same; 16 more than a window, so that
    its edge is seen."""
    g = torch.Generator().manual_seed(0)
    length = min(config.sliding_window + 16, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=g)


def _exact(path: Path, tokens: Tensor, dtype: torch.dtype) -> Trace:
    return trace_ours(GptOss.from_pretrained(path, torch.float64), tokens)


def _transformers(experts: str) -> Callable:
    return lambda path, tokens, dtype: trace_transformers(
        load_transformers(path, dtype, experts), tokens)


# name -> walk(path, tokens, dtype), whether it rounds inside
REFERENCES = {
    "transformers": (_transformers("eager"), True),
    "streamed": (lambda path, tokens, dtype: trace_transformers(
        stream_transformers(path, dtype), tokens), True),
    "grouped_mm": (_transformers("grouped_mm"), True),
    "openai": (lambda path, tokens, dtype: trace_openai(
        load_openai(path, dtype), tokens), True),
    "float64": (_exact, False)}


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
             else _exact(path, tokens, torch.float64))
    for trace in (ours, theirs):
        trace[None, "tokens"] = tokens[0]
    return {"ours": ours, "theirs": theirs, "exact": exact}


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


ONE_BY_ONE = 16  # tokens that a walk over kernels takes as decoding does


def taken(tokens: Tensor, written: int, contract: str) -> list[int]:
    """The parts of a walk: under "kernels" those that `generate` would take,
    the prompt at once and each token written after it alone; of a prompt
    after which nothing is written the last ONE_BY_ONE."""
    T = tokens.shape[1]
    alone = min(written or ONE_BY_ONE, T - 1)
    return ([T - alone] + [1] * alone if CONTRACTS[contract].kernels
            else [T])


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
    from gptoss import kernels

    kernels.make_compact(model)


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


__all__ = [
    "CLAMPS",
    "CONTRACTS",
    "Contract",
    "DEVIATIONS",
    "EXPONENTIAL",
    "FAULTS",
    "FLOOR",
    "Finding",
    "Formula",
    "HF_POINTS",
    "JUDGES",
    "Judge",
    "KEYS_AT_ONCE",
    "Key",
    "LARGEST",
    "LAYER_POINTS",
    "LOST",
    "ONE_BY_ONE",
    "OPENAI_POINTS",
    "PLAIN_CONTRACTS",
    "Pair",
    "ParityError",
    "Parts",
    "REFERENCES",
    "RIGHT",
    "Rounding",
    "SUSPECTS",
    "See",
    "Trace",
    "attention_fp32",
    "attention_hf",
    "attention_openai",
    "choose_stable",
    "choose_topk",
    "chosen_too",
    "compare",
    "compare_logits",
    "computing",
    "contract_for",
    "copying",
    "default_tokens",
    "dense_shares",
    "error_of",
    "excess",
    "expert_weights",
    "experts_fp32",
    "experts_hf",
    "experts_openai",
    "explain",
    "half_step",
    "hooked",
    "import_transformers",
    "in_parts",
    "judge_both",
    "judge_walk",
    "keeper",
    "load_openai",
    "load_transformers",
    "other_experts",
    "our_down",
    "own_layer",
    "parity_table",
    "plain_torch_layer",
    "points",
    "probe",
    "probe_experts",
    "replaced",
    "report",
    "shrink",
    "stream_transformers",
    "swapped_in",
    "table_rows",
    "taken",
    "their_tensors",
    "three_traces",
    "too_large",
    "trace_attention",
    "trace_block",
    "trace_faulty",
    "trace_openai",
    "trace_ours",
    "trace_transformers",
    "verdict",
    "written_on",
]
