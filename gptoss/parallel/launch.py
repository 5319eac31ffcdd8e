"""What do ranks say to each other?

Generated from book/parallel/collectives.py; edit the chapter, not this file.
"""

import os
import re

# --- How does a process learn its number? ------------------------------------

def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "")
    started = "RANK" in os.environ and re.fullmatch("[0-9]{1,9}", size)
    return max(int(size), 1) if started else 1


def process_rank() -> int:
    """Which of them this is; 0 speaks for all, and is also alone."""
    rank = os.environ.get("RANK", "")
    several = launched() > 1 and re.fullmatch("[0-9]{1,9}", rank)
    return int(rank) if several else 0


__all__ = [
    "launched",
    "process_rank",
]
