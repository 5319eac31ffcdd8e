"""How is one layout turned into another?

Generated from book/weights/converting.py; edit the chapter, not this file.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.encoding import encode
from gptoss.weights.layout import PACKED, CheckpointError, faulty
from gptoss.weights.mxfp4 import MXFP4Error, decode
from gptoss.weights.write import MAX_SHARD_BYTES, Writer, json_file, new_folder

# --- What becomes of one tensor? ---------------------------------------------

_log = logging.getLogger("gptoss")

CHUNK = 2 ** 26  # bytes copied at a time
Piece = tuple[str, int, Tensor]  # canonical name, first row, rows


def _pieces(old: Checkpoint, name: str, layout: str) -> Iterator[Piece]:
    """What `layout` makes of one tensor of `old`, a few rows at a time."""
    dense = name.endswith(("gate_up_proj", "down_proj"))
    if name.endswith("_scales"):
        old.check_scales(name)
    if layout == "bf16" and name.endswith(PACKED):
        if name.endswith("_blocks"):
            yield from _unpacked(old, name.removesuffix("_blocks"))
    elif layout != "bf16" and dense:
        yield from _packed(old, name)
    else:
        yield from _copied(old, name)


def _copied(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Rows as they are; floats of another dtype are rounded to bf16."""
    spec = old.spec(name)
    step = max(1, CHUNK * spec.shape[0] // spec.nbytes)
    for start in range(0, spec.shape[0], step):
        rows = old.read(name, slice(start, start + step))
        yield name, start, rows if spec.dtype == "U8" else rows.bfloat16()


def _unpacked(old: Checkpoint, name: str) -> Iterator[Piece]:
    """MXFP4 -> bf16, one expert at a time, transposed to (in, out)."""
    for e in range(old.config.num_local_experts):
        blocks, scales = (old.read(name + part, slice(e, e + 1))
                          for part in PACKED)
        yield name, e, decode(blocks, scales).transpose(1, 2)


def _packed(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Floats (in, out) -> MXFP4 (out, in), one expert at a time."""
    for e in range(old.config.num_local_experts):
        values = old.read(name, slice(e, e + 1)).transpose(1, 2)
        try:
            pair = encode(values)
        except MXFP4Error as error:
            raise CheckpointError(f"{old.file(name)}: {name}, expert {e}: "
                                  f"{error}") from error
        for part, rows in zip(PACKED, pair, strict=True):
            yield name + part, e, rows


# --- Which files come along? -------------------------------------------------

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template.jinja",
    "chat_template.json", "README.md", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE", "USAGE_POLICY", "USAGE_POLICY.md")


def home_file(folder: Path, name: str) -> Path | None:
    """A small file of a model: in its folder or, for original/ alone, in
    the folder above, where the released ones lie."""
    places = [folder]
    if folder.resolve().name == "original":
        places.append(folder.resolve().parent)
    return next((place / name for place in places
                 if (place / name).is_file()), None)


def companions(old: Checkpoint) -> list[Path]:
    """Tokenizer, generation_config and the like beside the weights."""
    found = [home_file(old.folder, name) for name in COMPANIONS]
    return [file for file in found if file and _stays(file)]


def _stays(file: Path) -> bool:
    """Whether a file is where its folder says; if not, one line of log."""
    folder, real = file.parent.resolve(), file.resolve().parent
    store = folder.parent.parent / "blobs"
    if real == folder or (folder.parent.name, real) == ("snapshots", store):
        return True
    _log.warning("%s: a link that leaves its folder is not copied", file)
    return False


# --- The whole conversion ----------------------------------------------------

def _config_for(old: Checkpoint, extra: list[Path]) -> GptOssConfig:
    """The configuration to write, with the ids that only
    generation_config.json says."""
    files = [f for f in extra if f.name == "generation_config.json"]
    if old.layout != "original" or not files:
        return old.config
    said = read_json(files[0])
    if not isinstance(said, dict):
        raise faulty(files[0], "a JSON object", type(said).__name__)
    ids = {key: said[key] for key in ("eos_token_id", "pad_token_id")
           if said.get(key) is not None}
    return GptOssConfig.from_dict(old.config.to_hf_dict() | ids,
                                  str(files[0]))


def convert(source: str | Path, target: str | Path, layout: str,
            max_shard_bytes: int = MAX_SHARD_BYTES,
            progress: Callable[[str], None] | None = None
            ) -> dict[str, str]:
    """Rewrite a checkpoint in another layout (or the same, resharded).

    hf <-> original keeps every byte; to "bf16" decodes, which is exact as
    far as bf16 reaches; from "bf16" encodes, which rounds what is not on
    the MXFP4 grid. The new folder `target` also gets manifest.json, the
    returned canonical name -> sha256, and the tokenizer and other small
    files. progress(name) is called before each tensor of the source.
    Memory: 64 MiB of rows, and one mapped tensor of the source at a time.
    CheckpointError; nothing half-written.
    """
    with Checkpoint.open(source) as old, new_folder(Path(target)) as draft:
        extra = companions(old)
        writer = Writer(draft, _config_for(old, extra), layout,
                        max_shard_bytes)
        for source_name in old.names():
            if progress:
                progress(source_name)
            for name, start, rows in _pieces(old, source_name, layout):
                writer.put(name, rows, start)
            old.close()  # unmap: pages read so far count as memory in use
        manifest = writer.finish(extra)
        json_file(draft / "manifest.json", manifest)
    return manifest


__all__ = [
    "CHUNK",
    "COMPANIONS",
    "Piece",
    "companions",
    "convert",
    "home_file",
]
