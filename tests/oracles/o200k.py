"""The real o200k vocabulary, out of the PyPI package bpe-openai."""

import base64
import gzip
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

RANKS_SHA256 = ("446a9538cb6c348e3516120d7c08b09f"
                "57c36495e2acfffe59a5bf8b0cfb1a2d")
RELEASED_SHA256 = ("0614fe83cadab421296e664e1f48f426"
                   "1fa8fef6e03e63bb75c20f38e37d07d3")
RELEASED_BYTES = 27_868_174


@cache
def tiktoken_file() -> bytes:
    """o200k_base.tiktoken: lines of base64(token), space, rank."""
    spec = importlib.util.find_spec("bpe_openai")
    folder = Path(spec.submodule_search_locations[0])
    raw = gzip.decompress(
        (folder / "data" / "o200k_base.tiktoken.gz").read_bytes())
    found = hashlib.sha256(raw).hexdigest()
    assert found == RANKS_SHA256, f"o200k_base.tiktoken: sha256 {found}"
    return raw


@cache
def ranks() -> dict[bytes, int]:
    """Token bytes -> rank, 199,998 of them."""
    return {base64.b64decode(token): int(rank) for token, rank in
            (line.split() for line in tiktoken_file().splitlines())}
