# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: write
#     public: [random_tensors, resolve, write_checkpoint]
# ---

# %% [markdown]
# # How does a checkpoint come to be, whole or not at all?
#
# ## Question
#
# The 120b in another layout is 65 GB to be written, on a machine with 16 GB of
# memory, and on the way the disk may be full or the process killed. How is it
# done with 64 MB in memory, so that a folder that looks like a model is one?
# (This chapter may be skipped at first.)
#
# ## Derivation
#
# **Writing before the numbers are there.** The configuration decides every
# $b_t$, hence every header and, by {eq}`checkpoint-offset`, every $o_t$. So
# all files can be laid out empty; then tensors may come in any order, a few
# rows at a time. Memory is bounded by the rows in flight, not by a tensor, a
# shard or the model.
#
# ## Code
#
# ### Laying out files before writing them
#
# A header needs the table and no tensor.

# %% tags=["export"]
import ctypes
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from glob import escape
from pathlib import Path

import torch
from torch import Tensor

from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.encoding import encode
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
from gptoss.weights.mxfp4 import MXFP4Error, decode

# %%
import tempfile

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
SMALL, LARGE = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=256, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=6, num_key_value_heads=2, sliding_window=8)


def report(call, *args, **options):
    """Print the error that a call ends in, without the folder's name."""
    try:
        call(*args, **options)
    except (CheckpointError, ValueError) as error:
        text = str(error).replace(f"{here}/", "").replace(str(here), ".")
        print(f"{type(error).__name__}: {text}")
    else:
        raise AssertionError("no error")

# %% tags=["export"]
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

# %%
for config in (SMALL, LARGE):
    shards = plan_shards(tensor_table(config), MAX_SHARD_BYTES)
    headers = sum(len(make_header(specs)) for specs in shards.values())
    print(f"{len(shards)} shards, {headers:,} bytes of headers,",
          list(shards)[-1])

# %% [markdown]
# Three and fifteen, as many as were released.
#
# ### Writing tensors in any order
#
# A writer makes all files at full length, puts rows where they belong, and
# counts and hashes them as they pass.

# %% tags=["export"]
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
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")

# %% [markdown]
# The three biases go into one joined vector, v first, and come to lie in
# order; what is still missing is named:

# %%
(here / "draft").mkdir()
writer = Writer(here / "draft", TINY, "original", MAX_SHARD_BYTES)
for part in "vqk":
    name = f"model.layers.0.self_attn.{part}_proj.bias"
    writer.put(name, torch.full(writer.places[name].spec.shape,
                                float("qkv".index(part)),
                                dtype=torch.bfloat16))
stored = writer.stored["block.0.attn.qkv.bias"]
data = stored.file.read_bytes()[stored.offset:][:stored.nbytes]
values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
print([x.tolist() for x in values.unique_consecutive(return_counts=True)])
report(writer.finish, [])

# %% [markdown]
# ### All or nothing
#
# Renaming a folder is atomic. So everything is written to a hidden folder
# beside the target and flushed to the disk, and then the folder gets its
# name. Whatever fails before, a full disk or a killed process included,
# leaves nothing under that name.
#
# Three cases need more. An empty folder that is there already may be a disk,
# mounted at this place: what is written beside it lands on another disk, and
# no rename goes from one to the other. So there the draft is made inside, and
# its files get their places one by one, `config.json` last: without it no
# program takes the folder for a model. A process that is told to end
# (SIGTERM; SIGHUP, when the line to the terminal breaks) removes its draft
# first. One that is killed cannot; so a draft is locked as long as its
# writer lives, and the next one to write under that name removes those that
# nobody holds.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
(here / ".new.1234.partial").mkdir()
(here / ".new.1234.partial" / "model.safetensors").touch()
with _draft(here, "new") as draft:
    (draft / "model.safetensors").touch()
    _sweep(here, "new")
    print(len(list(here.glob(".new.*"))), draft.exists())
print(len(list(here.glob(".new.*"))))

# %% tags=["export"]
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


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)

# %% tags=["export"]
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
                _sync(file)  # whole on disk before it has its name
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

# %% tags=["export"]
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

# %% [markdown]
# ### Random checkpoints
#
# Something to try it on, of the right shapes and sensible sizes. Nothing is
# zero, so that a tensor that goes missing, or a bias that is not added,
# shows.

# %% tags=["export"]
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
            pair = (_random_tensor(table[name + p], seed) for p in PACKED)
            yield name, decode(*pair).transpose(1, 2)


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

# %%
manifest = write_checkpoint(here / "hf", TINY, random_tensors(TINY),
                            max_shard_bytes=50_000)
print(*sorted(file.name for file in (here / "hf").iterdir()), sep="\n")
print(len(manifest), "hashes of", len(manifest["lm_head.weight"]), "digits")

# %% [markdown]
# A writer that fails half-way leaves nothing, in an empty folder neither, and
# a folder that has something in it is not touched:

# %%
def half():
    yield from list(random_tensors(TINY))[:20]


(here / "empty").mkdir()
before = sorted(here.rglob("*"))
report(write_checkpoint, here / "new" / "one", TINY, half())
report(write_checkpoint, here / "empty", TINY, half())
report(write_checkpoint, here / "hf", TINY, random_tensors(TINY))
assert sorted(here.rglob("*")) == before
write_checkpoint(here / "empty", TINY, random_tensors(TINY))
print(*sorted(file.name for file in (here / "empty").iterdir()))

# %% [markdown]
# ### Converting
#
# Between the two released layouts rows are copied; to and from bf16 each
# expert is [decoded](mxfp4.ipynb) or [encoded](encoding.ipynb) alone. The
# hashes are those of
# canonical tensors, so one model has the same in both released layouts.

# %% tags=["export:convert"]
import logging

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

# %% tags=["export:convert"]
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

# %% [markdown]
# A new folder should be one that other programs can use, so the small files
# beside the weights come along: those on a list, by their names. A pattern
# such as `*.json` would be shorter, and would publish whatever else lies
# there. For the same reason a link is followed only to where its folder
# leads anyway: the folder itself, or the store of the hub's cache, whose
# folders are links throughout.

# %% tags=["export:convert"]
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

# %% tags=["export:convert"]
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

# %%
for name in ("README.md", "secrets.json"):
    (here / "hf" / name).write_text("{}")
(here / "hf" / "LICENSE").symlink_to("/etc/hostname")
logging.disable()  # it would say that the link was not copied
with Checkpoint.open(here / "hf") as checkpoint:
    print([file.name for file in companions(checkpoint)])
logging.disable(logging.NOTSET)
(here / "hf" / "LICENSE").unlink()

# %% [markdown]
# OpenAI's spelling of the configuration has no token ids; the released
# `generation_config.json` has them.

# %% tags=["export:convert"]
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

# %% tags=["export:convert"]
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

# %%
there = convert(here / "hf", here / "original", "original")
back = convert(here / "original", here / "again", "hf", 50_000)
print("the same bytes:", manifest == there == back)
convert(here / "hf", here / "bf16", "bf16")
for layout in LAYOUTS:
    size = (here / ("again" if layout == "hf" else layout)).glob("model*")
    print(f"{layout:8} {sum(f.stat().st_size for f in size):,} bytes")

# %% [markdown]
# ### From the hub
#
# A name like `openai/gpt-oss-20b` is a folder if there is one and otherwise
# a repository, which `huggingface_hub` fetches into the cache that HF_HOME
# names, or not at all if HF_HUB_OFFLINE is set. A broken download goes on
# where it stopped; after the process has died, whole files are kept and the
# others begin anew. What is not of the form owner/name can only be a path,
# and a mistyped path must not travel over the network.

# %% tags=["export:hub"]
def is_repo_id(text: str) -> bool:
    """Whether `text` can be a hub id, owner/name, and not a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; a hub id (owner/name) as its downloaded one.

    Only a string of exactly that form, with no such file or folder here, is
    asked for at the hub: JSON and safetensors of the repository's root, at
    `revision` (branch, tag or commit), resumed and cached as HF_HOME and
    HF_HUB_OFFLINE say. CheckpointError, in one line, if that fails.
    """
    try:
        local = Path(path).expanduser()
        if local.exists():
            return local
    except RuntimeError:
        raise CheckpointError(f"{path}: no such user") from None
    if isinstance(path, Path) or not is_repo_id(path):
        raise CheckpointError(f"{path}: no such directory"
                              " (and a hub id is owner/name)")
    return _fetch(path, revision)

# %% tags=["export:hub"]
def _fetch(path: str, revision: str | None) -> Path:
    at = f"{path} at revision {revision}" if revision else path
    try:
        import huggingface_hub.constants  # noqa: F401  it reads HF_...
    except ValueError as error:
        raise CheckpointError(f"{at}: no such directory, and a setting HF_... "
                              f"of the environment: {error}") from error
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(
            path, revision=revision, ignore_patterns=["*/*"],
            allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the client has many kinds, and so its own
        raise CheckpointError(f"{at}: no such directory, and "
                              f"{_why(error)}") from error


def _why(error: Exception) -> str:
    """What went wrong at the hub, in a line."""
    from huggingface_hub import constants, errors

    known = {errors.GatedRepoError:
             "the hub wants a token with access (hf auth login)",
             errors.RepositoryNotFoundError:
             "the hub knows no such repository",
             errors.RevisionNotFoundError: "the hub knows no such revision",
             errors.LocalEntryNotFoundError: "the hub cannot be reached"}
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache has none"
    for kind, why in known.items():
        if isinstance(error, kind):
            return why
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{constants.ENDPOINT} cannot be asked: {line}"

# %%
for text in ("openai/gpt-oss-20b", "./gpt-oss-20b", "gpt-oss-20b",
             "models/openai/gpt-oss-20b", "~/gpt-oss-20b"):
    print(f"{text:26}", "hub" if is_repo_id(text) else "path")
report(resolve, "./gpt-oss-20b")
assert resolve(here / "hf") == here / "hf"

# %% [markdown]
# ## It holds
#
# What is written is what is read, in every layout, whole and by rows,
# whatever the order of writing and the size of the shards:

# %%
import random

chance = random.Random(0)
for layout in LAYOUTS:
    wanted = dict(random_tensors(TINY, layout=layout))
    for trial in range(4):
        pairs = list(wanted.items())
        chance.shuffle(pairs)
        path = here / f"trial-{layout}-{trial}"
        write_checkpoint(path, TINY, pairs, layout,
                         max_shard_bytes=10 ** chance.randint(0, 6))
        with Checkpoint.open(path) as checkpoint:
            for name, tensor in wanted.items():
                a, b = sorted(chance.choices(range(len(tensor) + 1), k=2))
                assert torch.equal(checkpoint.read(name), tensor)
                assert torch.equal(checkpoint.read(name, slice(a, b)),
                                   tensor[a:b])
print("every tensor, every layout")

# %% [markdown]
# Decoding to bf16 and encoding again gives equal values, and here even equal
# bytes, because each of these random blocks contains a 4 or a 6 (see
# [encoding](encoding.ipynb)):

# %%
back = convert(here / "bf16", here / "packed-again", "hf")
print(sum(back[name] == manifest[name] for name in manifest), "of",
      len(manifest), "tensors have the same hash")

# %% [markdown]
# ## Against the others
#
# The safetensors library reads what we write, and we read what it writes:

# %%
from safetensors import safe_open
from safetensors.torch import load_file, save_file

theirs = load_file(here / "original" / "model.safetensors")
with Checkpoint.open(here / "hf") as checkpoint:
    for name, place in places(TINY, "original").items():
        rows = theirs[place.stored][place.first:]
        assert torch.equal(rows[:place.spec.shape[0]], checkpoint.read(name))
(here / "saved").mkdir()
save_file(theirs, here / "saved" / "model.safetensors")
(here / "saved" / "config.json").write_bytes(
    (here / "original" / "config.json").read_bytes())
print("as theirs:", convert(here / "saved", here / "x", "hf") == manifest)
with safe_open(here / "original" / "model.safetensors", "pt") as f:
    print(f.metadata())

# %% [markdown]
# The rows of q, k and v that OpenAI's `AttentionBlock` cuts out of its
# product with the joined matrix are thus the rows of our three products.
#
# ## Cost
#
# Let $b$ be the bytes of the numbers and $P$ the parameters.
#
# | operation | reads | writes | memory of its own |
# |---|---|---|---|
# | hf to original, or back | $b$ | $b$ | 64 MiB of rows |
# | to bf16 | $b$ | $2P$ | one expert |
#
# `tests/weights/test_checkpoint.py` holds the memory of converting below the
# bytes of the file.
#
# ## Takeaways
#
# - The configuration determines a file but for its numbers, so it can be laid
#   out before a number is there, and filled in any order.
# - A new folder appears whole or not at all: hidden, flushed, renamed.
# - One model has the same hashes in both released layouts, so a conversion
#   can be checked.
#
# ## Exercises
#
# ### Exercise 1
#
# Write `verify(path)`, which names the tensors that do not have the hash in
# `manifest.json`. Flip one bit of a file: the header is whole and
# `Checkpoint.open` is content, but `verify` is not.

# %% tags=["hide-cell"]
def verify(path):
    wanted = json.loads((path / "manifest.json").read_text())
    with Checkpoint.open(path) as checkpoint:
        for name, digest in wanted.items():
            data = checkpoint.read(name).flatten().view(torch.uint8)
            if hashlib.sha256(memoryview(data.numpy())).hexdigest() != digest:
                yield name


shard = sorted((here / "again").glob("*.safetensors"))[1]
assert list(verify(here / "again")) == []
data = bytearray(shard.read_bytes())
data[-1] ^= 1
shard.write_bytes(data)
print(*verify(here / "again"))
assert len(list(verify(here / "again"))) == 1

# %% [markdown]
# ### Exercise 2
#
# A machine has room for half of each layer's experts. Write a checkpoint that
# keeps the first half: a legal gpt-oss with fewer experts, made without ever
# reading the other half.

# %% tags=["hide-cell"]
def keep_experts(source, target, count):
    with Checkpoint.open(source) as checkpoint:
        config = replace(checkpoint.config, num_local_experts=count)
        tensors = ((name, checkpoint.read(name, slice(
            spec.shape[0]))) for name, spec in tensor_table(config).items())
        return write_checkpoint(target, config, tensors)


keep_experts(here / "hf", here / "half", 2)
with Checkpoint.open(here / "hf") as old, \
        Checkpoint.open(here / "half") as new:
    print(f"{new.nbytes / old.nbytes:.2f} of the bytes")
    for name in new.names():
        rows = new.spec(name).shape[0]
        assert torch.equal(new.read(name), old.read(name)[:rows])

# %% [markdown]
# ## Sources
#
# - safetensors 0.8: the format, `README.md` of huggingface/safetensors.
# - openai/gpt-oss, `gpt_oss/torch/model.py`, `AttentionBlock`.
# - transformers 5.23, `models/gpt_oss/convert_gpt_oss_weights_to_hf.py`
#   (q, k and v taken apart).
