"""Twenty-four times the same block

Generated from book/model/transformer.py; edit the chapter, not this file.
"""

import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from gptoss.attention.masks import positions_from_mask
from gptoss.attention.rope import rope_parameters, rope_tables
from gptoss.model.answers import load_answers
from gptoss.model.cache import Cache, CacheView
from gptoss.model.layers import Block, Embedding, Linear, RMSNorm, initialise
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.convert import companions
from gptoss.weights.errors import Error, mismatch
from gptoss.weights.hub import resolve
from gptoss.weights.layout import DTYPES, FLOATS, PACKED
from gptoss.weights.loading import load_tensors
from gptoss.weights.write import MAX_SHARD_BYTES, write_checkpoint

# --- What runs? --------------------------------------------------------------

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


# --- Where does each token stand? --------------------------------------------

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


# --- Which names do people expect? -------------------------------------------

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
    if tokens is not None and input_ids is None:
        return tokens
    if input_ids is not None and tokens is None:
        return input_ids
    raise mismatch(ModelError, "tokens", "either tokens or input_ids",
                   "neither" if tokens is None else "both")


# --- What is refused? --------------------------------------------------------

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


# --- What stands around the stack? -------------------------------------------

class GptOss(Stack):
    """gpt-oss: token ids in, logits out.

    With packed=True the experts hold MXFP4 (zeros until loaded); with
    packed=False they are dense and, like the rest, drawn at random with
    biases and sinks 0 and norms 1: ready to train.

    `state_dict` has the names and orientations of a Hugging Face file, and
    `load_state_dict` takes them, with or without "model." before them: dense
    experts are (E, in, out) there, and parameters of (E, out, in) here.
    """

    source: Path | None = None  # the folder of the checkpoint, if from one
    sources: tuple[Path, ...] = ()  # small files beside the weights

    def __init__(self, config: GptOssConfig,
                 dtype: torch.dtype = torch.bfloat16, device=None,
                 packed: bool = True) -> None:
        if config.tie_word_embeddings:  # weights/files reads them untied
            raise mismatch(ModelError, "tie_word_embeddings",
                           "false (embedding and lm_head are two matrices "
                           "here)", "true")
        super().__init__(config, dtype, device, packed)
        initialise(self)
        load_answers()  # kernels, before threads share the model
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

        input_ids: another name for tokens. cache: the tokens continue what
        it holds, and enter it.
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

    def generate(self, input_ids, **options) -> Tensor | list[int]:
        """input_ids (B, T) -> (B, T + new): prompts and continuations.

        The options are those of `continue_ids` in text/generate, as far as
        they go those of transformers: attention_mask (padding on the left),
        max_new_tokens, do_sample, temperature, top_k, top_p, seed,
        eos_token_id, pad_token_id. TypeError for an unknown one.
        """
        from gptoss.text.generate import continue_ids

        return continue_ids(self, input_ids, **options)

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
            model.source = checkpoint.folder
            model.sources = tuple(companions(checkpoint))
        model.load_state_dict(tensors, assign=True)
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
    "FLOATING",
    "GptOss",
    "ModelError",
    "Stack",
    "check_tokens",
    "file_name",
    "file_tensor",
    "one_of",
    "pick_dtype",
    "token_positions",
]
