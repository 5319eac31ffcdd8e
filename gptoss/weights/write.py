"""How does a checkpoint come to be, whole or not at all?

Generated from book/weights/writing.py; edit the chapter, not this file.
"""

import ctypes
import hashlib
import json
import math
import os
import secrets
import shutil
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from glob import escape
from pathlib import Path

import torch
from torch import Tensor

from gptoss.weights.config import GptOssConfig
from gptoss.weights.disk import to_disk
from gptoss.weights.files import Stored, make_header, read_header
from gptoss.weights.layout import (
    DTYPES,
    FLOATS,
    LAYOUTS,
    PACKED,
    CheckpointError,
    TensorSpec,
    faulty,
    places,
    tensor_table,
)
from gptoss.weights.mxfp4 import decode

# --- How can a file be written before its tensors are there? -----------------

MAX_SHARD_BYTES = 5 * 10 ** 9


def plan_shards(table: dict[str, TensorSpec], max_shard_bytes: int
                ) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in order; a shard is closed before it would
    pass max_shard_bytes (one tensor may be longer alone)."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in table.values():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": specs
            for i, specs in enumerate(shards, 1)}


OUR_FILES = ("config.json", "manifest.json", "model.safetensors.index.json")


class Writer:
    """Files of full length with headers; rows are put where they belong.

    `put` every canonical tensor once, in any order and a few rows at a time,
    then `finish`. dtype: of what is not packed.
    """

    def __init__(self, folder: Path, config: GptOssConfig, layout: str,
                 max_shard_bytes: int, dtype: torch.dtype = torch.bfloat16
                 ) -> None:
        self.folder, self.layout = folder, layout
        floats = next((name for name in FLOATS if DTYPES[name] == dtype), "")
        if not floats:
            raise faulty("dtype", f"one of {FLOATS}", dtype)
        table = tensor_table(config, layout, floats)
        self.places = places(config, layout, floats)
        self.hashes = {name: hashlib.sha256() for name in self.places}
        self.rows = dict.fromkeys(self.places, 0)  # written so far
        config = replace(config, tie_word_embeddings=False)  # it has both
        self.config = (config.to_original_dict() if layout == "original"
                       else config.to_hf_dict())
        if layout == "bf16":
            del self.config["quantization_config"]
        if dtype != torch.bfloat16:
            self.config["dtype"] = str(dtype).removeprefix("torch.")
        self.shards = plan_shards(table, max_shard_bytes)
        need = sum(spec.nbytes for spec in table.values())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise faulty(folder.parent, f"{need:,} bytes free", f"{free:,}")
        self.stored: dict[str, Stored] = {}
        for name, specs in self.shards.items():
            header = make_header(specs)
            file = folder / name
            with open(file, "wb") as f:
                f.write(header)
                f.truncate(len(header) + sum(s.nbytes for s in specs))
            self.stored |= read_header(file)

    def put(self, name: str, tensor: Tensor, start: int | None = None
            ) -> None:
        """Write rows from `start` on; None: the whole tensor at once."""
        if name not in self.places:
            raise faulty(name, f"a canonical name of layout {self.layout}",
                         "this")
        place, shape = self.places[name], tuple(tensor.shape)
        spec = place.spec
        good = (shape == spec.shape if start is None
                else shape[1:] == spec.shape[1:])
        if not good or tensor.dtype != DTYPES[spec.dtype]:
            raise faulty(name, spec, f"{tensor.dtype} {list(shape)}")
        if self.rows[name] != (start or 0):
            raise faulty(name, "once", "again")
        stored = self.stored[place.stored]
        width = stored.nbytes // stored.spec.shape[0]
        data = tensor.detach().cpu().contiguous()
        # numpy is no dependency of ours: the bytes straight from memory
        raw = memoryview((ctypes.c_ubyte * data.nbytes).from_address(
            data.data_ptr()))
        with open(stored.file, "r+b") as f:
            f.seek(stored.offset + (place.first + (start or 0)) * width)
            f.write(raw)
        self.hashes[name].update(raw)
        self.rows[name] += shape[0]

    def finish(self, extra_files: Iterable[Path]) -> dict[str, str]:
        """Check that nothing is missing, write the JSON; return the hashes."""
        for name, place in self.places.items():
            rows = self.rows[name]
            if rows != place.spec.shape[0]:
                raise faulty(name, place.spec, f"{rows} rows" if rows
                             else "nothing")
        for file in map(Path, extra_files):
            if (self.folder / file.name).exists() or file.name in OUR_FILES:
                raise CheckpointError(f"{file}: expected another name")
            shutil.copyfile(file, self.folder / file.name)
        json_file(self.folder / "config.json", self.config)
        if len(self.shards) > 1:
            total = sum(stored.nbytes for stored in self.stored.values())
            json_file(self.folder / "model.safetensors.index.json", {
                "metadata": {"total_size": total},
                "weight_map": {name: stored.file.name for name, stored
                               in sorted(self.stored.items())}})
        return {name: each.hexdigest() for name, each in self.hashes.items()}


def json_file(file: Path, value: object) -> None:
    """Write JSON, indented, with a line's end."""
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


# --- What can still go wrong? ------------------------------------------------

def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or the process
    dies; None if another one holds it, or if this system has no locks."""
    try:
        import fcntl

        held = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return held
    except OSError:
        os.close(held)
        return None


def _sweep(home: Path, name: str) -> None:
    """Remove the drafts of `name` in `home` whose writers have died. An
    empty one is left: its writer may be about to lock it."""
    for old in home.glob(f".{escape(name)}.*.partial"):
        held = None if old.is_symlink() else _lock(old)
        if held is not None:
            if any(old.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
            os.close(held)


@contextmanager
def _draft(home: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `home`, gone at the end."""
    draft = home / f".{name}.{secrets.token_hex(4)}.partial"
    draft.mkdir()
    held = _lock(draft)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the process by SystemExit, as long as
    nobody else has a say in that: what was begun is undone on the way."""
    def end(number: int, frame: object) -> None:
        for each in mine:  # a second one does not stop the undoing
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    mine: list[int] = []
    if threading.current_thread() is threading.main_thread():
        names = ("SIGTERM", "SIGHUP")
        mine += [number for name in names
                 if (number := getattr(signal, name, None)) is not None
                 and signal.getsignal(number) == signal.SIG_DFL]
    for each in mine:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in mine:
            signal.signal(each, signal.SIG_DFL)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target`, or all that is in it.

    Whatever fails before leaves nothing behind. CheckpointError if `target`
    is there already, unless it is an empty folder.
    """
    target = Path(os.path.abspath(target))
    inside = target.is_dir() and not target.is_symlink()
    home = target if inside else target.parent
    above = [path for path in (home, *home.parents) if not path.exists()]
    try:
        _sweep(home, target.name)
        there = [file for file in target.iterdir()
                 if file.name != "lost+found"] if inside else []
        if there or os.path.lexists(target) and not inside:
            raise faulty(target, "a new or empty folder", "something there")
        home.mkdir(parents=True, exist_ok=True)
        with _told_to_end(), _draft(home, target.name) as draft:
            yield draft
            for file in draft.iterdir():
                to_disk(file)  # whole on disk before it has its name
            _appear(draft, target, inside)
    except BaseException as error:
        for path in above:
            with suppress(OSError):
                path.rmdir()  # unless somebody has put something there
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: {error.strerror or error}"
                                  ) from error
        raise


def _appear(draft: Path, target: Path, inside: bool) -> None:
    """Give the draft its name, or its files their places; all or none."""
    if not inside:
        os.replace(draft, target)
        return
    names = sorted((file.name for file in draft.iterdir()),
                   key=lambda name: (name == "config.json", name))
    try:
        for name in names:
            os.replace(draft / name, target / name)
    except BaseException:
        for name in names:
            (target / name).unlink(missing_ok=True)
        raise


def write_checkpoint(path: str | Path, config: GptOssConfig,
                     tensors: Iterable[tuple[str, Tensor]],
                     layout: str = "hf",
                     max_shard_bytes: int = MAX_SHARD_BYTES,
                     extra_files: Iterable[str | Path] = (),
                     dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Write a checkpoint; returns canonical name -> sha256 of its bytes.

    tensors: (canonical name, tensor) in any order, one held at a time; with
    layout "original" q, k and v still come apart. Shapes and dtypes must be
    those of `tensor_table`; `dtype` is that of what is not packed.
    extra_files are copied along. The folder appears whole or not at all.
    CheckpointError names the tensor or the file.
    """
    with new_folder(Path(path)) as draft:
        writer = Writer(draft, config, layout, max_shard_bytes, dtype)
        for name, tensor in tensors:
            writer.put(name, tensor)
        return writer.finish(map(Path, extra_files))


def random_tensors(config: GptOssConfig, seed: int = 0, layout: str = "hf"
                   ) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, random tensor) for `write_checkpoint`, one by one.

    A tensor depends on seed and name alone. Weights have a spread of about
    1/sqrt(in), so that activations stay of order one; norms vary around 1;
    biases and sinks are not zero; scales are never 255. "bf16" gives the
    decoded experts of the same model; "original" is the same as "hf".
    """
    if layout not in LAYOUTS:
        raise faulty("layout", f"one of {LAYOUTS}", repr(layout))
    table = tensor_table(config)
    for name, spec in table.items():
        if layout != "bf16" or not name.endswith(PACKED):
            yield name, _random_tensor(spec, seed)
        elif name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            blocks, scales = (_random_tensor(table[name + part], seed)
                              for part in PACKED)
            yield name, decode(blocks, scales).transpose(1, 2)


def _random_tensor(spec: TensorSpec, seed: int) -> Tensor:
    key = zlib.crc32(f"{seed} {spec.name}".encode())
    g = torch.Generator().manual_seed(key)
    if spec.name.endswith("_blocks"):
        return torch.randint(256, spec.shape, generator=g, dtype=torch.uint8)
    if spec.name.endswith("_scales"):
        # the 16 codes have a spread of 2.9; three scales around the middle
        middle = 127 - round(math.log2(2.9 * math.sqrt(32 * spec.shape[-1])))
        return torch.randint(middle - 1, middle + 2, spec.shape, generator=g,
                             dtype=torch.uint8)
    mean, spread = 0.0, 1 / math.sqrt(spec.shape[-1])
    if spec.name.endswith("norm.weight"):
        mean, spread = 1.0, 0.2
    elif spec.name.endswith(("bias", "sinks", "embed_tokens.weight")):
        spread = 2.0 if spec.name.endswith("sinks") else 0.5
    out = torch.empty(spec.shape, dtype=torch.bfloat16)
    return out.normal_(mean, spread, generator=g)


__all__ = [
    "MAX_SHARD_BYTES",
    "OUR_FILES",
    "Writer",
    "json_file",
    "new_folder",
    "plan_shards",
    "random_tensors",
    "write_checkpoint",
]
