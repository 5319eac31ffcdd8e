"""What is the speed limit?

Generated from book/kernels/roofline.py; edit the chapter, not this file.
"""

import time

import torch

# --- How fast is this machine's memory? --------------------------------------

def read_speed(size: int = 2 ** 30, repeats: int = 5) -> float:
    """Bytes a second that all threads together read from memory, best of."""
    numbers = torch.ones(size // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


__all__ = [
    "read_speed",
]
