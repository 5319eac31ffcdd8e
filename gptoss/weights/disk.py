"""How does a checkpoint come to be, whole or not at all?

Generated from book/weights/writing.py; edit the chapter, not this file.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# --- How does something appear whole? ----------------------------------------

@contextmanager
def drafted(target: Path) -> Iterator[Path]:
    """A path beside `target`; what is made there, a file or a folder, takes
    the place of `target` when the block has ended, whole and in one step.

    A block that fails leaves `target` as it was and nothing beside it.
    """
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.draft")
    try:
        yield draft
        for path in [*(draft.iterdir() if draft.is_dir() else ()), draft]:
            to_disk(path)  # whole on the disk before it has its name
        os.replace(draft, target)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        raise


def to_disk(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


__all__ = [
    "drafted",
    "to_disk",
]
