"""Twenty-four times the same block

Generated from book/10_model.py; edit the chapter, not this file.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gptoss.answers import load_answers
from gptoss.cache import Cache
from gptoss.checkpoint import DTYPES, FLOATS, Checkpoint, check_scales, resolve
from gptoss.config import GptOssConfig
from gptoss.layers import Block, Embedding, Linear, RMSNorm, initialise
from gptoss.masks import positions_from_mask
from gptoss.mxfp4 import decode
from gptoss.rope import rope_parameters, rope_tables

# --- The stack ---------------------------------------------------------------

@lru_cache(maxsize=64)
def _frequencies(config: GptOssConfig, device: torch.device,
                 dtype: torch.dtype) -> tuple[Tensor, float]:
    """`rope_parameters` for activations of dtype: fp32, or float64."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        inv_freq, concentration = rope_parameters(config, "cpu")
        wide = torch.promote_types(dtype, torch.float32)
        return inv_freq.to(device, wide), concentration


class Stack(nn.Module):
    """Embedding, L blocks, norm and head: arithmetic, and no checks."""

    def __init__(self, config: GptOssConfig, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        like = {"dtype": dtype, "device": device}
        self.embed_tokens = Embedding(V, D, **like)
        self.layers = nn.ModuleList(
            Block(config, n, dtype, device, packed)
            for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps, dtype, device)
        self.lm_head = Linear(D, V, bias=False, **like)

    def run(self, tokens: Tensor, positions: Tensor,
            cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """tokens, positions (B, T), -1 = padding -> logits (B, T, V)."""
        x = self.embed_tokens(tokens)
        cos, sin = rope_tables(
            positions, *_frequencies(self.config, x.device, x.dtype),
            x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, positions, cache)
        return self.lm_head(self.norm(x[:, -logits_to_keep:]))


# --- Checks and positions ----------------------------------------------------

class ModelError(ValueError):
    """Tokens or a mask that the model cannot take."""


def check_tokens(tokens: Tensor, attention_mask: Tensor | None,
                 config: GptOssConfig) -> None:
    """Raise ModelError unless tokens (B, T) and the mask can be run."""
    shape, most = tuple(tokens.shape), config.max_position_embeddings
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ModelError("tokens: expected int64 of shape (B, T), found "
                         f"{tokens.dtype} of shape {shape}")
    if tokens.numel() == 0:
        raise ModelError("tokens: expected at least one, found an empty "
                         f"prompt of shape {shape}")
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise ModelError(f"attention_mask: expected shape {shape} as tokens "
                         f"has, found {tuple(attention_mask.shape)}")
    if tokens.shape[1] > most:
        raise ModelError(f"tokens: expected at most {most} "
                         f"(max_position_embeddings), found {shape[1]}")
    for token in torch.stack(tokens.aminmax()).tolist():
        if not 0 <= token < config.vocab_size:
            raise ModelError(f"token id: expected 0 to "
                             f"{config.vocab_size - 1}, found {token}")


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

class GptOss(Stack):
    """gpt-oss: token ids in, logits out.

    With packed=True the experts hold MXFP4 (zeros until loaded); with
    packed=False they are dense and, like the rest, drawn at random with
    biases and sinks 0 and norms 1: ready to train.
    """

    source: Path | None = None  # the folder of the checkpoint, if from one

    def __init__(self, config: GptOssConfig,
                 dtype: torch.dtype = torch.bfloat16, device=None,
                 packed: bool = True) -> None:
        if config.tie_word_embeddings:  # chapter 3 reads such files untied
            raise ModelError("tie_word_embeddings: expected false (embedding "
                             "and lm_head are two matrices here), found true")
        super().__init__(config, dtype, device, packed)
        initialise(self)
        load_answers()  # chapter 13's kernels, before threads share the model

    def forward(self, tokens: Tensor, cache: Cache | None = None,
                attention_mask: Tensor | None = None,
                logits_to_keep: int = 0) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) in the model's dtype.

        cache: the tokens continue what it holds, and enter it.
        attention_mask (B, T): false = padding, anywhere; its logits mean
        nothing. logits_to_keep: only the last so many columns (0: all).
        ModelError: ids out of range, no tokens, wrong rank, too many.
        CacheError: no room; the cache is then unchanged.
        """
        check_tokens(tokens, attention_mask, self.config)
        positions = token_positions(tokens, attention_mask, cache)
        if cache is None:
            return self.run(tokens, positions, None, logits_to_keep)
        cache.check(positions)
        cache.begin(positions)
        logits = self.run(tokens, positions, cache, logits_to_keep)
        cache.advance(positions)
        return logits

    def generate(self, input_ids, **options) -> Tensor | list[int]:
        """input_ids (B, T) -> (B, T + new): prompts and continuations.

        The options are those of chapter 12's `continue_ids`, as far as they
        go those of transformers: attention_mask (padding on the left),
        max_new_tokens, do_sample, temperature, top_k, top_p, seed,
        eos_token_id, pad_token_id. TypeError for an unknown one.
        """
        from gptoss.generate import continue_ids  # a later chapter's

        return continue_ids(self, input_ids, **options)

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None,
                  slack: int = 0) -> Cache:
        """A `Cache` of this model's configuration, dtype and device."""
        weight = self.embed_tokens.weight
        return Cache(self.config, batch_size, max_tokens, slack=slack,
                     dtype=weight.dtype, device=weight.device)

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
            tensors = dict(load_tensors(checkpoint, dtype, device, packed))
            model.source = checkpoint.folder
        model.load_state_dict(tensors, assign=True)
        return model.eval()


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
        raise ModelError(f"dtype: expected auto, {', '.join(FLOATING)}, "
                         f"found {dtype!r:.100}")
    return found


__all__ = [
    "FLOATING",
    "GptOss",
    "ModelError",
    "Stack",
    "check_tokens",
    "load_tensors",
    "pick_dtype",
    "token_positions",
]
