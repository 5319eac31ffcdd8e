"""How does a processor multiply bf16 that cannot?

Generated from book/kernels/dense.py; edit the chapter, not this file.
"""

import json
import os
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from timeit import timeit

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from gptoss.kernels.build import library_path
from gptoss.model.ops import has_kernel
from gptoss.weights.disk import drafted

# --- When is torch's own product quicker? ------------------------------------

TOKENS = (8, 16, 32, 128, 512)
NEVER = 2 ** 62


def torch_is_quicker(ours: Sequence[float], torchs: Sequence[float]) -> int:
    """From how many tokens on, by the seconds for each of TOKENS.

    For that many and all more, by a twentieth at least; NEVER if for none.
    """
    found = NEVER
    for count, mine, other in zip(reversed(TOKENS), reversed(ours),
                                  reversed(torchs), strict=True):
        if other > 0.95 * mine:
            break
        found = count
    return found


@torch.inference_mode()
def measure_products(repeats: int = 4) -> tuple[list[float], list[float]]:
    """Seconds of our product and of torch's for each of TOKENS, in turns.

    1024 x 2880, the best of `repeats`; a few tenths of a second in all.
    """
    # 142 MB in turns: a model's weights come from memory, not from a cache
    weights = torch.full((24, 1024, 2880), 0.5, dtype=torch.bfloat16,
                         device="cpu")  # whatever the caller's default is
    turn = cycle(weights.unbind())
    ours, torchs = [], []
    for count in TOKENS:
        x = weights[0, :count].clone()
        pairs = [(timeit(partial(torch.ops.gptoss.linear, x, next(turn),
                                 None), number=1),
                  timeit(partial(F.linear, x, next(turn)), number=1))
                 for _ in range(repeats)]
        ours.append(min(pair[0] for pair in pairs))
        torchs.append(min(pair[1] for pair in pairs))
    return ours, torchs


def choose_product() -> int:
    """From how many tokens on `linear` asks torch, by measuring once.

    Kept beside the compiled kernels, for each number of threads; NEVER
    without kernels. A file that cannot be read or written is measured again.
    """
    choice = os.environ.get("GPTOSS_KERNELS", "auto")
    if not has_kernel("linear") or choice == "torch":
        return NEVER
    with _disable_current_modes():  # nobody else counts or fakes these calls
        return _choose(library_path(choice).with_suffix(".json"))


def _choose(path: Path) -> int:
    """`choose_product` with the file that keeps the answers."""
    torch.ops.gptoss.torch_from(NEVER)
    threads = str(torch.get_num_threads())
    try:
        known = {str(key): int(value) for key, value
                 in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        known = {}
    if threads not in known:
        known[threads] = torch_is_quicker(*measure_products())
        try:
            with drafted(path) as draft:
                draft.write_text(json.dumps(known), "utf-8")
        except OSError:
            pass  # a folder that is read only: the next process measures
    torch.ops.gptoss.torch_from(known[threads])
    return known[threads]


__all__ = [
    "NEVER",
    "TOKENS",
    "choose_product",
    "measure_products",
    "torch_is_quicker",
]
