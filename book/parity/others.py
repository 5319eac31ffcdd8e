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
#     module: walk_others
#     public: [REFERENCES]
# ---

# %% [markdown]
# # How is somebody else's model walked?

# %% [markdown]
# ## Question
#
# [Our walk](walk.ipynb) calls the modules of our model itself. Hugging Face's
# and OpenAI's models call theirs: how are the same results recorded there,
# without a line changed in somebody else's package, and with a 20b that takes
# 41.8 GB once it is decoded?
#
# With the three traces side by side, an implementation can be held to another
# in the strictest way there is: at the end of this chapter our weights give
# transformers' numbers at 54 points of 54, to the last bit, in fp32 and in
# bf16.

# %% tags=["export"]
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

# %% [markdown]
# ## Picture
#
# Our model and transformers' on the same random weights in bf16, drawn by the
# finished package: of the numbers recorded at each point, how many have the
# same bits. Above, ours as it rounds by itself; below, ours told to round
# where transformers does, under the [contract](rounding.ipynb) `hf-eager`.

# %% tags=["hide-input", "picture"]
# Figure: two rows of seventeen cells for layer 0. Above, the first six are
# full, at "weights" the share drops to 60 percent and stays between a fifth
# and all. Below, all seventeen are 100 percent.
import os

import matplotlib.pyplot as plt

from gptoss.parity.walk import LAYER_POINTS, points
from gptoss.parity.walk_others import load_transformers, trace_transformers
from gptoss.weights.config import GptOssConfig
from gptoss.weights.write import random_tensors, write_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
os.environ["GPTOSS_KERNELS"] = "torch"  # the same on every processor
plt.style.use("../_static/book.mplstyle")
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


tokens = prompt(0)
theirs = trace_transformers(load_transformers(path, torch.bfloat16), tokens)
model, equal = GptOss.from_pretrained(path), []
for contract in ("fp32", "hf-eager"):
    ours = trace_ours(model, tokens, contract)
    equal.append([(ours[0, p] == theirs[0, p]).double().mean().item()
                  for p in LAYER_POINTS])
fig, ax = plt.subplots(figsize=(7.4, 1.9))
fig.tolerance = 0.05  # the last bits depend on the processor
ax.imshow(equal, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
for y, row in enumerate(equal):
    for x, share in enumerate(row):
        ax.text(x, y, f"{round(share, 1):.0%}" if share < 1 else "all",
                ha="center", va="center", fontsize=7.5)
ax.set_yticks((0, 1), ("fp32", "hf-eager"))
ax.set_xticks(range(len(LAYER_POINTS)), LAYER_POINTS, rotation=45,
              ha="right")
ax.tick_params(length=0)
ax.grid(visible=False)
plt.show()

# %% [markdown]
# What to see: up to the rotation both round alike. At the attention weights
# transformers rounds scores, their difference to the maximum and the softmax,
# and ours rounds none of these; from there on the models are different by
# rounding alone. Told to round where theirs does, ours is theirs, bit by bit.
# But for that somebody else's intermediate results must be seen first.

# %%
from gptoss.weights.sizes import bf16_bytes

# %% [markdown]
# ## Walking transformers
#
# Their model calls its own modules, so we cannot call them one after the
# other as [ours](walk.ipynb). Two things help. A *hook* is a function that
# torch calls after a module's forward, with its inputs and its output: nine
# of the points are outputs of modules, and one, `middle`, is the input of a
# norm. And what happens inside attention is a function of their package,
# `eager_attention_forward`, which has the turned queries and keys and returns
# the weights: while the walk runs, ours stands in its place, calls theirs and
# keeps what passes by. Both are undone when the walk ends, also when it fails.

# %% tags=["export"]
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

# %%
model = GptOss.from_pretrained(path)
calls = []
with hooked(model, {"norm": lambda inputs, out: calls.append(out.shape)}):
    model(tokens)
model(tokens)
print(f"{len(calls)} call seen: the second one came after the hook was gone")

# %% [markdown]
# The package is asked for when it is needed. Decoded weights, since its own
# four-bit kernels want a GPU; eager attention, the only kind that runs on a
# CPU.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
theirs = trace_transformers(load_transformers(path, torch.bfloat16), tokens)
ours = trace_ours(model, tokens, "hf-eager")
assert set(theirs) == set(ours)
equal = sum(torch.equal(ours[key], theirs[key]) for key in ours)
print(equal, "of", len(ours), "points equal bit for bit under hf-eager")

# %% [markdown]
# ## One layer at a time
#
# Decoded, the 20b does not fit into many machines. A walk needs one layer at
# a time: a model whose layers fill themselves when they are called, and are
# empty afterwards.

# %%
config = GptOssConfig.gpt_oss_20b()
decoded = bf16_bytes(config)
layer = 2 * config.num_local_experts * 3 * (
    config.hidden_size * config.intermediate_size)
print(f"{decoded / 1e9:.1f} GB decoded; the experts of one layer "
      f"{layer / 1e9:.1f} GB")
assert round(decoded / 1e9, 1) == 41.8

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
streamed = stream_transformers(path)
again = trace_transformers(streamed, tokens)
assert all(torch.equal(again[key], theirs[key]) for key in theirs)
empty = {p.device.type for p in streamed.model.layers.parameters()}
print("equal bit for bit; afterwards its layers are on", *empty)

# %% [markdown]
# ## Walking OpenAI's code
#
# OpenAI's MLP is one module that calls `topk`, `softmax` and `einsum`; no hook
# sees between them. A `TorchFunctionMode` does: inside it every call of torch
# comes to us first. Which of the calls is which we tell by the function and,
# for the two products, by their subscripts, "beck,bek->bec" and "bec,be->bc".
# That is **brittle**: another version of their code may write the same product
# in other letters, and then the point is missing from the trace. The version
# is therefore pinned (gpt-oss 0.0.9), and a test holds that all points are
# there.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
import importlib.util

have_openai = importlib.util.find_spec("gpt_oss") is not None
if have_openai:
    theirs = trace_openai(load_openai(path), tokens)
    assert set(theirs) == set(points(TINY))

# %% [markdown]
# ## The references
#
# All of them by name, and our own model in float64, which rounds so little
# that it stands for exact arithmetic.

# %% tags=["export"]
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

# %%
exact = trace_exact(path, tokens, torch.float64)
assert list(exact) == points(TINY)
print(*REFERENCES)

# %% [markdown]
# ## What is refused
#
# A reference whose package is not installed, in one line that names the
# package:

# %%
import sys

held = sys.modules.get("transformers")
sys.modules["transformers"] = None  # as if it were not there
try:
    load_transformers(path)
except ParityError as error:
    print(str(error).partition(" (")[0])
sys.modules["transformers"] = held

# %% [markdown]
# ## Against the others
#
# **Bit for bit.** Under the [contract](rounding.ipynb) `hf-eager` our model
# gives transformers' numbers to the last bit, at every point of the table, in
# fp32 and in bf16, equal router logits included. Under `openai-torch` it
# gives OpenAI's numbers in bf16, where their package is installed.

# %%
equal = {}
for dtype in (torch.float32, torch.bfloat16):
    model = GptOss.from_pretrained(path, dtype)
    for against, contract in (("transformers", "hf-eager"),
                              ("openai", "openai-torch")):
        if against == "openai" and not have_openai:
            continue
        walk, _ = REFERENCES[against]
        a, b = walk(path, prompt(1), dtype), trace_ours(
            model, prompt(1), contract)
        equal[against, dtype] = all(
            torch.equal(a[key], b[key]) for key in points(TINY)
            if against != "openai" or key[1] != "hidden")  # one is probed
assert equal["transformers", torch.float32]
assert equal["transformers", torch.bfloat16]
assert equal.get(("openai", torch.bfloat16), True)
print("transformers, fp32 and bf16:", len(points(TINY)), "points equal")

# %% [markdown]
# Where it cannot be:
#
# - Ties. `torch.topk` does not say which of two equal logits it takes; our
#   own [router](../moe/routing.ipynb) does (the lower index). So the contract
#   `fp32` may go another way at exact ties, and no tolerance on logits covers
#   that.
# - Other matrix products. Equal bits need equal sums, and a product of
#   another shape or memory layout may be summed in another order. OpenAI
#   multiplies by q, k and v as one matrix; for some shapes fp32 then differs
#   in the last bit. In bf16 the rounding usually hides it.
# - `grouped_mm` weights and adds the experts in its own order: the contract
#   `hf-eager` is that of the loop.
# - The decoded weights must lie as transformers lays them ($[E, in, out]$,
#   contiguous). `experts_hf` copies each expert for that, so this contract
#   is for comparing, not for speed.
# - Kernels. Ours round in other places than plain torch, so in bf16 no bit
#   need be equal. [Judged](judge.ipynb) as if they were plain torch they do
#   not even pass: `hidden` is several times beyond that bound, at entries that
#   are small beside their block's largest. That is what the contract `kernels`
#   is for; with its bound every point is within
#   (`tests/parity/test_judge.py`).

# %% [markdown]
# ## Takeaways
#
# 1. Hooks see what modules return; what a module computes inside is seen by
#    wrapping one function, or by listening to torch's own.
# 2. A layer that fills itself when it is called lets a machine walk over a
#    model that it could never hold.
# 3. Under the right contract two implementations agree to the last bit, and
#    what then differs is a mistake, not rounding.
# 4. To recognise somebody's operations by how they are written is brittle: pin
#    the version, and test that nothing is missed.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# At how many of the 54 points does our model under its own contract, `fp32`,
# give transformers' bits in bf16? Which is the first point that differs, and
# why that one?

# %% tags=["hide-cell"]
ours = trace_ours(model, tokens)
theirs = trace_transformers(load_transformers(path, torch.bfloat16), tokens)
differ = [key for key in points(TINY)
          if not torch.equal(ours[key], theirs[key])]
print(f"first: {differ[0]}; {len(points(TINY)) - len(differ)} of "
      f"{len(points(TINY))} are equal")
assert differ[0] == (0, "weights")
# theirs rounds scores and softmax, ours does not

# %% [markdown]
# ### Exercise 2
#
# A walk must leave nothing behind. Count the hooks of transformers' model and
# compare its attention function before and after a walk, also after one that
# fails on the way.

# %% tags=["hide-cell"]
from transformers.models.gpt_oss import modeling_gpt_oss as package

before, walked = package.eager_attention_forward, load_transformers(path)
for given in (tokens, tokens + 10 ** 6):  # ids that do not exist
    try:
        trace_transformers(walked, given)
        what = "done"
    except IndexError:
        what = "failed"
    hooks = sum(len(m._forward_hooks) for m in walked.modules())
    print(f"{what}: {hooks} hooks left, the function is",
          "theirs" if package.eager_attention_forward is before else "ours")

# %% [markdown]
# ### Exercise 3
#
# How much memory does a streamed walk over the 20b need for weights, beside a
# model that is decoded at once? Count embedding, head and one layer.

# %% tags=["hide-cell"]
config = GptOssConfig.gpt_oss_20b()
outside = 2 * 2 * config.vocab_size * config.hidden_size
one = (bf16_bytes(config) - outside) / config.num_hidden_layers
print(f"streamed {(outside + one) / 1e9:.1f} GB, at once "
      f"{bf16_bytes(config) / 1e9:.1f} GB")
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`:
#   `eager_attention_forward`, `GptOssExperts.forward`;
#   `integrations/moe.py`: `grouped_mm`.
# - openai/gpt-oss 0.0.9, `gpt_oss/torch/model.py`: `sdpa`, `swiglu`,
#   `MLPBlock.forward`.
