"""Twenty-four times the same block

Generated from book/10_model.py; edit the chapter, not this file.
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from gptoss.cache import Cache, CacheView
from gptoss.checkpoint import (
    DTYPES,
    FLOATS,
    MAX_SHARD_BYTES,
    PACKED,
    Checkpoint,
    check_scales,
    companions,
    resolve,
    write_checkpoint,
)
from gptoss.config import GptOssConfig
from gptoss.errors import Error, mismatch
from gptoss.experts import Experts
from gptoss.masks import positions_from_mask, visible
from gptoss.mxfp4 import decode, define_operator, prepare
from gptoss.rope import apply_rope, rope_parameters, rope_tables
from gptoss.routing import Router, route
from gptoss.sinks import attention_concat, attention_flash

# --- RMSNorm -----------------------------------------------------------------

def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / rms(x) * weight over the last dimension: (…, D) -> (…, D).

    Computed in fp32 (float64 for float64) and rounded ONCE, at the end, to
    x.dtype: the weight is multiplied before the rounding. The order is that
    of transformers' GptOssRMSNorm.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * wide).to(x.dtype)


define_operator(
    "gptoss::rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    rms_norm)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight (D,), at first all ones."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype,
                 device=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gptoss.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


# --- Attention as an operator ------------------------------------------------

SCORES_AT_ONCE = 2 ** 23  # entries of (B, H, T, S) that exist at a time


def attention_in_tiles(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
                       q_pos: Tensor, k_pos: Tensor, window: int,
                       scale: float) -> Tensor:
    """`attention_concat` over the visible keys, some queries at a time.

    q (B, T, H, C); k, v (B, S, G, C); sinks (H,); q_pos (B, T) and
    k_pos (B, S) int64, -1 for padding; window 0 means none. Returns
    (B, T, H, C). A query's row of scores depends on no other query, so the
    tiles change the memory, not the result.
    """
    B, T, H, _ = q.shape
    rows = max(1, SCORES_AT_ONCE // max(1, B * H * k.shape[1]))
    # training on a CPU: torch's kernel keeps no scores for the way back
    trains = q.requires_grad and q.device.type == "cpu"
    form = attention_flash if trains else attention_concat
    tiles = [
        form(
            q[:, t:t + rows], k, v, sinks,
            visible(q_pos[:, t:t + rows], k_pos, window or None), scale)
        for t in range(0, max(T, 1), rows)]
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)


def _attention_flops(q, k, *_, out_shape=None, **__) -> int:
    B, T, H, C = q  # shapes
    return 4 * B * T * k[1] * H * C


define_operator(
    "gptoss::sink_attention(Tensor q, Tensor k, Tensor v, Tensor sinks,"
    " Tensor q_pos, Tensor k_pos, int window, float scale) -> Tensor",
    attention_in_tiles, lambda q, *_: torch.empty_like(q),
    flops=_attention_flops)


def _linear_flops(x, weight, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x) * weight[0]


define_operator(
    "gptoss::linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    F.linear, flops=_linear_flops)
define_operator(
    "gptoss::rope(Tensor x, Tensor cos, Tensor sin) -> Tensor", apply_rope)
define_operator(
    "gptoss::route(Tensor logits, int k) -> (Tensor, Tensor)", route)


class Linear(nn.Linear):
    """torch's linear layer, computed by the operator gptoss::linear."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.gptoss.linear(x, self.weight, self.bias)


class _Router(Router, Linear):
    """Chapter 7's router, whose product and choice are operators, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.gptoss.route(Linear.forward(self, x), self.k)


# --- The attention layer -----------------------------------------------------

class Attention(nn.Module):
    """Grouped-query attention with RoPE, sinks and, perhaps, a window."""

    def __init__(self, config: GptOssConfig, layer: int,
                 dtype: torch.dtype, device=None) -> None:
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, C
        sliding = config.layer_types[layer] == "sliding_attention"
        self.window = config.sliding_window if sliding else 0
        like = {"dtype": dtype, "device": device}
        self.q_proj = Linear(D, H * C, **like)
        self.k_proj = Linear(D, G * C, **like)
        self.v_proj = Linear(D, G * C, **like)
        self.o_proj = Linear(H * C, D, **like)
        self.sinks = nn.Parameter(torch.zeros(H, **like))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                positions: Tensor, plan: CacheView | None = None) -> Tensor:
        """x (B, T, D), tables (B, T, C/2), positions (B, T) -> (B, T, D)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = torch.ops.gptoss.rope(self.q_proj(x).view(heads), cos, sin)
        k = torch.ops.gptoss.rope(self.k_proj(x).view(heads), cos, sin)
        v, k_pos = self.v_proj(x).view(heads), positions
        if plan is not None:
            k, v, k_pos = plan.update(self.layer, k, v)
        out = torch.ops.gptoss.sink_attention(
            q, k, v, self.sinks, positions, k_pos, self.window,
            self.head_dim ** -0.5)
        return self.o_proj(out.flatten(2))

    def extra_repr(self) -> str:
        return (f"layer={self.layer}, heads={len(self.sinks)}, "
                f"head_dim={self.head_dim}, window={self.window or None}")


# --- The block ---------------------------------------------------------------

class MLP(nn.Module):
    """The router and the experts it chooses from."""

    def __init__(self, config: GptOssConfig, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        self.router = _Router(config, dtype=dtype, device=device)
        self.experts = Experts(config, packed, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each token on its own."""
        tokens = x.flatten(0, 1)
        weights, ids = self.router(tokens)
        return self.experts(tokens, ids, weights).view_as(x)

    def extra_repr(self) -> str:
        return f"experts_per_token={self.router.k}"


class Block(nn.Module):
    """One layer: attention and experts, each added to the stream."""

    def __init__(self, config: GptOssConfig, layer: int, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps, dtype, device)
        self.self_attn = Attention(config, layer, dtype, device)
        self.post_attention_layernorm = RMSNorm(D, eps, dtype, device)
        self.mlp = MLP(config, dtype, device, packed)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor,
                positions: Tensor, plan: CacheView | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); the rest as in `Attention.forward`."""
        h = x + self.self_attn(self.input_layernorm(x), cos, sin, positions,
                               plan)
        return h + self.mlp(self.post_attention_layernorm(h))


# --- The stack ---------------------------------------------------------------

@lru_cache(maxsize=64)
def _frequencies(config: GptOssConfig, device: torch.device,
                 dtype: torch.dtype) -> tuple[Tensor, float]:
    """`rope_parameters` for activations of dtype: fp32, or float64."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        inv_freq, concentration = rope_parameters(config, "cpu")
        wide = torch.promote_types(dtype, torch.float32)
        return inv_freq.to(device, wide), concentration


class _Embedding(nn.Embedding):
    """torch's embedding; on the meta device there is nothing to draw."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Stack(nn.Module):
    """Embedding, L blocks, norm and head: arithmetic, and no checks."""

    def __init__(self, config: GptOssConfig, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        like = {"dtype": dtype, "device": device}
        self.embed_tokens = _Embedding(V, D, **like)
        self.layers = nn.ModuleList(
            Block(config, n, dtype, device, packed)
            for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps, dtype, device)
        self.lm_head = Linear(D, V, bias=False, **like)

    def run(self, tokens: Tensor, positions: Tensor,
            plan: CacheView | None = None, logits_to_keep: int = 0
            ) -> Tensor:
        """tokens, positions (B, T), -1 = padding -> logits (B, T, V).

        plan: of a cache, for these positions (`Cache.begin`).
        """
        x = self.embed_tokens(tokens)
        cos, sin = rope_tables(
            positions, *_frequencies(self.config, x.device, x.dtype),
            x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, positions, plan)
        return self.lm_head(self.norm(x[:, -logits_to_keep:]))


def initialise(model: nn.Module) -> None:
    """Linear and embedding weights normal(0, 0.02), biases 0, in place."""
    for module in model.modules():
        if (isinstance(module, nn.Linear | nn.Embedding)
                and not module.weight.is_meta):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


# --- Checks and positions ----------------------------------------------------

class ModelError(Error):
    """Tokens or a mask that the model cannot take."""


def check_tokens(tokens: Tensor, attention_mask: Tensor | None,
                 config: GptOssConfig) -> None:
    """Raise ModelError unless tokens (B, T) and the mask can be run."""
    shape, most = tuple(tokens.shape), config.max_position_embeddings
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise mismatch(ModelError, "tokens", "int64 of shape (B, T)",
                       f"{tokens.dtype} of shape {shape}")
    if tokens.numel() == 0:
        raise mismatch(ModelError, "tokens", "at least one",
                       f"an empty prompt of shape {shape}")
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise mismatch(ModelError, "attention_mask",
                       f"shape {shape} as tokens has",
                       tuple(attention_mask.shape))
    if tokens.shape[1] > most:
        raise mismatch(ModelError, "tokens",
                       f"at most {most} (max_position_embeddings)", shape[1])
    for token in torch.stack(tokens.aminmax()).tolist():
        if not 0 <= token < config.vocab_size:
            raise mismatch(ModelError, "token id",
                           f"0 to {config.vocab_size - 1}", token)


def token_positions(tokens: Tensor, attention_mask: Tensor | None = None,
                    cache: Cache | None = None) -> Tensor:
    """Positions (B, T) int64 of tokens after those in the cache."""
    start = None if cache is None else cache.lengths.to(tokens.device)
    if attention_mask is not None:
        return positions_from_mask(attention_mask, start)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    if start is None:
        return steps.expand(tokens.shape)
    return start[:, None] + steps


# --- The front door ----------------------------------------------------------

_DENSE = re.compile(r".*\.experts\.(parametrizations\.)?"
                    r"(gate_up|down)_proj(\.original)?")
_OURS = re.compile(r"(embed_tokens|layers|norm)\.")


def file_name(name: str) -> str:
    """What a file calls a tensor of `GptOss`."""
    return f"model.{name}" if _OURS.match(name) else name


def file_tensor(name: str, tensor: Tensor) -> Tensor:
    """Dense experts (E, out, in) <-> (E, in, out); others as they are."""
    turned = _DENSE.fullmatch(name) and tensor.ndim == 3
    return tensor.transpose(1, 2) if turned else tensor


def _name_as_file(model: nn.Module, state: dict[str, Tensor], prefix: str,
                  metadata: object) -> None:
    """After `state_dict`: the names and orientations of a file."""
    for name in [name for name in state if name.startswith(prefix)]:
        tensor = file_tensor(name, state.pop(name))
        state[prefix + file_name(name.removeprefix(prefix))] = tensor


def _name_as_module(model: nn.Module, state: dict[str, Tensor], prefix: str,
                    *_: object) -> None:
    """Before `load_state_dict`: the names and orientations of ours."""
    for name in [name for name in state if name.startswith(prefix)]:
        tensor = file_tensor(name, state.pop(name))
        ours = name.removeprefix(prefix).removeprefix("model.")
        state[prefix + ours] = tensor


def _say_as_file(model: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """After `load_state_dict`: what it missed, by the names of a file."""
    for names in incompatible:
        names[:] = map(file_name, names)


def one_of(tokens: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """The one that is given; ModelError for both or none."""
    if (tokens is None) == (input_ids is None):
        raise mismatch(ModelError, "tokens", "either tokens or input_ids",
                       "neither" if tokens is None else "both")
    return input_ids if tokens is None else tokens


class GptOss(Stack):
    """gpt-oss: token ids in, logits out.

    With packed=True the experts hold MXFP4 (zeros until loaded); with
    packed=False they are dense and, like the rest, drawn at random with
    biases and sinks 0 and norms 1: ready to train.

    `state_dict` has the names and orientations of a Hugging Face file, and
    `load_state_dict` takes them, with or without "model." before them: dense
    experts are (E, in, out) there, and parameters of (E, out, in) here.
    """

    sources: tuple[Path, ...] = ()  # small files beside the weights

    def __init__(self, config: GptOssConfig,
                 dtype: torch.dtype = torch.bfloat16, device=None,
                 packed: bool = True) -> None:
        if config.tie_word_embeddings:  # chapter 3 reads such files untied
            raise mismatch(ModelError, "tie_word_embeddings",
                           "false (embedding and lm_head are two matrices "
                           "here)", "true")
        super().__init__(config, dtype, device, packed)
        initialise(self)
        self.register_state_dict_post_hook(_name_as_file)
        self.register_load_state_dict_pre_hook(_name_as_module)
        self.register_load_state_dict_post_hook(_say_as_file)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the tokens have to be."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits, and of all weights that are not packed."""
        return self.embed_tokens.weight.dtype

    def forward(self, tokens: Tensor | None = None,
                cache: Cache | None = None,
                attention_mask: Tensor | None = None,
                logits_to_keep: int = 0, *,
                input_ids: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) in the model's dtype.

        input_ids: another name for tokens. cache: the tokens continue what it holds, and enter it.
        attention_mask (B, T): false = padding, anywhere; its logits mean
        nothing. logits_to_keep: only the last so many columns (0: all).
        ModelError: ids out of range, no tokens, wrong rank, too many.
        CacheError: no room; the cache is then unchanged.
        """
        tokens = one_of(tokens, input_ids)
        check_tokens(tokens, attention_mask, self.config)
        positions = token_positions(tokens, attention_mask, cache)
        if cache is None:
            return self.run(tokens, positions, None, logits_to_keep)
        plan = cache.begin(positions)
        logits = self.run(tokens, positions, plan, logits_to_keep)
        cache.commit(plan)
        return logits

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None,
                  slack: int = 0) -> Cache:
        """A `Cache` of this model's configuration, dtype and device."""
        return Cache(self.config, batch_size, max_tokens, slack=slack,
                     dtype=self.dtype, device=self.device)

    @classmethod
    def from_pretrained(cls, path: str | Path,
                        dtype: torch.dtype | str = torch.bfloat16,
                        device="cpu", packed: bool = True,
                        revision: str | None = None) -> "GptOss":
        """The model in a folder or a hub repository, in any layout.

        dtype: of everything but packed experts; one of torch's, its name, or
        "auto", the one that the checkpoint was saved in. packed: keep MXFP4
        experts packed (a bf16 checkpoint has none and loads dense); False
        decodes them to dtype. Parameters are frozen; call requires_grad_()
        to train. Tensors on the CPU whose dtype agrees stay memory-mapped.
        Raises CheckpointError or ConfigError naming the file and the tensor;
        ModelError for a dtype that none can have.
        """
        with Checkpoint.open(resolve(path, revision)) as checkpoint:
            dtype = pick_dtype(dtype, checkpoint)
            packed = packed and checkpoint.layout != "bf16"
            model = cls(checkpoint.config, dtype, "meta", packed)
            model.requires_grad_(False)
            tensors = {file_name(name): file_tensor(name, tensor)
                       for name, tensor in load_tensors(
                           checkpoint, dtype, device, packed)}
            model.sources = tuple(companions(checkpoint))
        model.load_state_dict(tensors, assign=True)
        prepare()  # chapter 13's kernels, before threads share the model
        return model.eval()

    def save_pretrained(self, path: str | Path,
                        max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write a folder that `from_pretrained` and transformers read.

        config.json, safetensors in shards, and the tokenizer and generation
        config that lay beside the weights when they were read. Packed experts
        are written packed, byte for byte; dense ones dense, in Hugging Face's
        orientation. A dtype other than bf16 is named in config.json, and
        from_pretrained(path, dtype="auto") reads it back. The folder must be
        new or empty, and appears whole or not at all. CheckpointError names
        the tensor or the file.
        """
        state = self.state_dict()
        packed = any(name.endswith(PACKED) for name in state)
        write_checkpoint(
            path, self.config, state.items(), "hf" if packed else "bf16",
            max_shard_bytes, [file for file in self.sources if file.exists()
                              and file.name != "README.md"], self.dtype)


# --- Loading -----------------------------------------------------------------

def load_tensors(checkpoint: Checkpoint, dtype: torch.dtype, device,
                 packed: bool) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors under this model's names, one at a time.

    Where dtype and device agree with the file, a tensor is a view of the
    mapped file and costs no memory; otherwise one at a time is converted.
    """
    for name in checkpoint.names():
        target, tensor = name.removeprefix("model."), checkpoint.read(name)
        if name.endswith("_scales"):
            check_scales(f"{checkpoint.path}: {name}", tensor)
            if not packed:
                continue
        elif name.endswith("_blocks") and not packed:
            target = target.removesuffix("_blocks")
            scales = checkpoint.read(name.removesuffix("blocks") + "scales")
            tensor = decode(tensor.to(device), scales.to(device), dtype)
        elif target.endswith(("gate_up_proj", "down_proj")):
            tensor = tensor.transpose(1, 2)  # HF: (E, in, out)
        wanted = tensor.dtype if tensor.dtype == torch.uint8 else dtype
        yield target, tensor.to(device, wanted)


FLOATING = {str(dtype).removeprefix("torch."): dtype
            for dtype in map(DTYPES.get, FLOATS)}


def pick_dtype(dtype: torch.dtype | str, checkpoint: Checkpoint
               ) -> torch.dtype:
    """A dtype of torch from itself, its name or "auto"; ModelError."""
    if dtype == "auto":
        return checkpoint.dtype
    found = FLOATING.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise mismatch(ModelError, "dtype", f"auto, {', '.join(FLOATING)}",
                       f"{dtype!r:.100}")
    return found


__all__ = [
    "Attention",
    "Block",
    "FLOATING",
    "GptOss",
    "Linear",
    "MLP",
    "ModelError",
    "RMSNorm",
    "SCORES_AT_ONCE",
    "Stack",
    "attention_in_tiles",
    "check_tokens",
    "file_name",
    "file_tensor",
    "initialise",
    "load_tensors",
    "one_of",
    "pick_dtype",
    "rms_norm",
    "token_positions",
]
