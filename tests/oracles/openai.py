"""OpenAI's own torch model (PyPI gpt-oss 0.0.9) as an oracle.

Reads the original layout on a CPU. Its code fixes bfloat16 for the
parameters it creates; `load` converts them after loading with `.to(dtype)`,
which is exact towards fp32. Nothing else is patched: its norms compute in
fp32, and everything else in the dtype of the parameters. It has no cache.
"""

from pathlib import Path

import torch
from gpt_oss.torch.model import Transformer
from torch import Tensor


def load(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """OpenAI's model from a folder in the original layout."""
    model = Transformer.from_checkpoint(str(path), device="cpu").to(dtype)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()  # as released: scales in fp32
    return model


@torch.inference_mode()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """(1, T) -> (1, T, V)."""
    return model(tokens[0])[None]
