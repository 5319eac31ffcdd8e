"""How is somebody else's model walked?

Generated from book/parity/others.py; edit the chapter, not this file.
"""

import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss.model.transformer import GptOss
from gptoss.parity.contracts import ParityError
from gptoss.parity.walk import (
    Trace,
    dense_shares,
    probe,
    probe_experts,
    trace_ours,
)
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.convert import convert
from gptoss.weights.mxfp4 import decode

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

    their: Any = model  # classes that are not ours to describe
    trace: Trace = {}
    c, eager = their.config, theirs.eager_attention_forward

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
            m, ordered = their.model.layers[layer].mlp.experts, ids.sort(-1)[0]
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


# --- One layer at a time -----------------------------------------------------

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
        from gpt_oss.torch.model import (  # type: ignore  # has no types
            Transformer,
        )
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
    from gpt_oss.torch import model as theirs  # type: ignore  # has no types

    trace: Trace = {}
    blocks: Any = model.block
    sdpa, layers = theirs.sdpa, len(blocks)
    hooks = {f"block.{n}.{name}": keeper(trace, n, *two)
             for n in range(layers) for name, two in OPENAI_POINTS.items()}
    for n, block in enumerate(blocks):
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


# --- The references ----------------------------------------------------------

def trace_exact(path: Path, tokens: Tensor, dtype: torch.dtype) -> Trace:
    return trace_ours(GptOss.from_pretrained(path, torch.float64), tokens)


def _transformers(experts: str) -> Callable:
    return lambda path, tokens, dtype: trace_transformers(
        load_transformers(path, dtype, experts), tokens)


# name -> walk(path, tokens, dtype), whether it rounds inside
REFERENCES: dict[str, tuple[Callable[..., Trace], bool]] = {
    "transformers": (_transformers("eager"), True),
    "streamed": (lambda path, tokens, dtype: trace_transformers(
        stream_transformers(path, dtype), tokens), True),
    "grouped_mm": (_transformers("grouped_mm"), True),
    "openai": (lambda path, tokens, dtype: trace_openai(
        load_openai(path, dtype), tokens), True),
    "float64": (trace_exact, False)}


__all__ = [
    "HF_POINTS",
    "OPENAI_POINTS",
    "REFERENCES",
    "hooked",
    "import_transformers",
    "keeper",
    "load_openai",
    "load_transformers",
    "replaced",
    "stream_transformers",
    "their_tensors",
    "trace_exact",
    "trace_openai",
    "trace_transformers",
]
