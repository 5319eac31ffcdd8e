"""Hugging Face transformers as an oracle, on a CPU and offline."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, Mxfp4Config  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model from a folder in the released HF layout.

    The four-bit experts are decoded; attention is eager, the only kind
    that works for gpt-oss on a CPU, and experts are summed in a loop.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True))
    return model.eval()


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, T, V)."""
    return model(tokens, use_cache=False).logits


@torch.inference_mode()
def greedy(model: torch.nn.Module, tokens: Tensor, count: int) -> list[int]:
    """The `count` likeliest tokens after tokens (1, T), with its cache.

    Except for a window of 1, where transformers 5.23 keeps every key
    (cache_utils.py, DynamicSlidingWindowLayer.update: the slice
    [-sliding_window + 1:] is [0:]): there, whole forwards.
    """
    past, out, feed = None, [], tokens
    if model.config.sliding_window == 1:
        for _ in range(count):
            best = logits(model, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, best], 1)
        return tokens[0, -count:].tolist()
    while True:
        step = model(feed, past_key_values=past, use_cache=True,
                     logits_to_keep=1)
        past, feed = step.past_key_values, step.logits[:, -1:].argmax(-1)
        out.append(feed.item())
        if len(out) == count:
            return out
