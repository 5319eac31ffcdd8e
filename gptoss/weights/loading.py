"""How to read 13.8 GB without copying them?

Generated from book/weights/reading.py; edit the chapter, not this file.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss.weights.checkpoint import Checkpoint, check_scales
from gptoss.weights.mxfp4 import decode

# --- How are tensors handed to a model? --------------------------------------

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


__all__ = [
    "load_tensors",
]
