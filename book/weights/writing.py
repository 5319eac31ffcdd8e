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
#     public: [drafted, random_tensors, write_checkpoint]
# ---

# %% [markdown]
# # How does a checkpoint come to be, whole or not at all?
#
# ## Question
#
# The 120b in another layout is 65 GB to be written, on a machine with 16 GB of
# memory, and on the way the disk may be full or the process killed. How is it
# done with 64 MiB in memory, so that a folder that looks like a model is one?
# (This chapter may be skipped at first.)

# %% tags=["export"]
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

from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
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
    except ValueError as error:
        text = str(error).replace(f"{here}/", "").replace(str(here), ".")
        print(f"{type(error).__name__}: {text}")

# %% [markdown]
# ## Picture
#
# Two files of a checkpoint, at three moments. A box is a tensor, the dark
# piece in front is the header, and the number says as which it came.
#
# What to see: the files have their full length before a single tensor is
# there, so tensors may come in any order, and each goes straight to its
# place. Until all of them are there the folder has a hidden name that no
# program takes for a model. Then it is renamed, in one step.

# %% tags=["hide-input"]
# Figure: three panels with two files each, as rows of six boxes. First all
# boxes are empty; then four, numbered 1 to 4 in a mixed order, are filled;
# last all are filled, and the folder's name has changed from hidden to new.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
fig, axes = plt.subplots(1, 3, figsize=(7, 1.7))
order = (3, 8, 1, 10, 5, 12, 2, 7, 4, 11, 6, 9)
for ax, name, there in zip(axes, (".new.3f2a.partial/", ".new.3f2a.partial/",
                                  "new/"), (0, 4, 12), strict=True):
    for row in range(2):
        ax.barh(row, 0.5, color="black", height=0.6)
        for n in range(6):
            came = order[6 * row + n]
            ax.barh(row, 1, left=0.5 + n, height=0.6, ec="black", lw=0.6,
                    color="C0" if came <= there else "white")
            if came <= there:
                ax.text(1 + n, row, str(came), color="white", ha="center",
                        va="center", fontsize=8)
    ax.set(xlim=(-0.1, 6.6), ylim=(1.5, -0.5), xticks=[])
    ax.set_yticks([0, 1], ["…-00001", "…-00002"] if ax is axes[0] else [])
    ax.set_title(name, family="monospace", fontsize=9)
    ax.tick_params(length=0)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
for ax, word in zip(axes, ("laid out", "half-way", "finished"), strict=True):
    ax.set_xlabel(word)
plt.show()

# %% [markdown]
# ## The naive version
#
# Make all tensors, make the bytes of a file of them, write it. Here the disk
# is full half-way:

# %%
from safetensors.torch import save

made = here / "naive"
made.mkdir()
tensors = {"a": torch.zeros(1000, 100), "b": torch.zeros(1000, 100)}
data = save(tensors)                              # everything, twice
(made / "config.json").write_text("{}")
(made / "model.safetensors").write_bytes(data[:len(data) // 2])
for file in sorted(made.iterdir()):
    print(file.name, f"{file.stat().st_size:,} bytes")
print(f"in memory: {(len(data) + 2 * 4 * 10 ** 5) / len(data):.0f} times the",
      "file's numbers")

# %% [markdown]
# Two things are wrong. Everything is in memory at once, twice. And what is
# left on the disk looks like a model: it has the right names, and nobody sees
# that half of it is missing until it is read.
#
# ## How does something appear whole?
#
# By its name. Giving a file or a folder another name is one step for the
# operating system: it has the old name or the new one, nothing between. So
# whatever must appear whole is written *beside* its place, waited for until it
# is on the disk (`fsync`), and then renamed:

# %% tags=["export:disk"]
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

# %%
note = here / "note.txt"
note.write_text("old")
for failing in (True, False):
    try:
        with drafted(note) as draft:
            draft.write_text("new, half of it" if failing else "new")
            if failing:
                raise OSError("no space left")
    except OSError as error:
        print("failed:", error)
    print(f"{note.read_text()!r};", len(list(here.glob(".note*"))), "drafts")

# %% [markdown]
# It serves everything that this package writes: a saved conversation, a set
# of test vectors, a trained model. A checkpoint of 65 GB needs a little more
# care, to which we come below.
#
# ## How can a file be written before its tensors are there?
#
# The configuration decides each tensor's bytes $b_t$, hence every header and,
# by {eq}`layout-offset`, where every tensor begins. So all files can be laid
# out empty, and then tensors may come in any order, a few rows at a time.
# Memory is bounded by the rows in flight, not by a tensor, a file or the
# model. First, which tensor goes into which file? They keep their order, and
# a file is closed before it would become longer than `max_shard_bytes`.

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
# As many as were released, three and fifteen. Now the writer. It makes all
# files at full length, puts rows where they belong, and counts and hashes
# them as they pass. It refuses
#
# - a disk with less room than the tensors need, before it writes anything;
# - a `dtype` that is no float of safetensors, a name that is not canonical, a
#   tensor of another shape or dtype than the table's;
# - a tensor that comes twice, or rows that do not follow those before;
# - in `finish`, a tensor that is missing or has rows missing, and an extra
#   file with the name of one of its own.
#
# `finish` writes `config.json`, in the spelling of the layout, and the index
# if there are several files, and returns a hash for each canonical tensor.
# Decoded experts have no `quantization_config`; what is not bf16 says its
# `dtype`; and both matrices at the ends are written even if they were tied.

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
    """Write JSON, indented, with a line's end."""
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
# ## What can still go wrong?
#
# For a folder that takes an hour to write, three cases need more than a
# rename.
#
# 1. *The process is killed.* Then it cannot clean up. So a draft is locked as
#    long as its writer lives, and the next one to write under the same name
#    removes drafts that nobody holds. (An empty one is left: its writer may
#    be about to lock it.)
# 2. *The process is told to end*, by SIGTERM, or by SIGHUP when the line to
#    the terminal breaks. It removes its draft and ends with 128 plus the
#    signal's number. If the program has a handler of its own, that one is
#    left alone.
# 3. *The target is an empty folder.* It may be a disk that is mounted there:
#    what is written beside it lands on another disk, and no rename goes from
#    one to the other. So the draft is made inside, and its files get their
#    places one by one, `config.json` last, without which no program takes the
#    folder for a model. (`lost+found`, which a new disk has, does not count.)

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
    print("before:", len(list(here.glob(".new.*"))), "drafts", end=", ")
    _sweep(here, "new")
    print("swept:", len(list(here.glob(".new.*"))), end=", ")
print("at the end:", len(list(here.glob(".new.*"))))

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

# %% [markdown]
# `new_folder` puts it together. A target that is there already is refused,
# except an empty folder. Folders that were made on the way to it are removed
# again if the writing fails, and an error of the system becomes a
# `CheckpointError` that names the target.

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
# Something to try it on: random tensors of the right shapes and sensible
# sizes. Nothing is zero, so that a tensor that goes missing, or a bias that is
# not added, shows. A tensor depends on the seed and its name alone.

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
for place in ("new/one", "empty", "hf"):
    report(write_checkpoint, here / place, TINY, half())
assert sorted(here.rglob("*")) == before
write_checkpoint(here / "empty", TINY, random_tensors(TINY))
print(*sorted(file.name for file in (here / "empty").iterdir()))

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
print(len(LAYOUTS) * 4, "checkpoints, all tensors equal")

# %% [markdown]
# **The safetensors library** reads what we write; q, k and v of OpenAI's
# joined matrix are the rows of our three:

# %%
from safetensors.torch import load_file

write_checkpoint(here / "original", TINY, random_tensors(TINY), "original")
theirs = load_file(here / "original" / "model.safetensors")
equal = 0
for name, tensor in random_tensors(TINY):
    place = places(TINY, "original")[name]
    rows = theirs[place.stored][place.first:]
    equal += torch.equal(rows[:len(tensor)], tensor)
assert equal == len(manifest)
print(equal, "of", len(manifest), "tensors")

# %% [markdown]
# ## Takeaways
#
# - What must appear whole is written beside its place, flushed, and renamed.
# - The configuration determines a file but for its numbers, so it can be laid
#   out before a number is there, and filled in any order.
# - A draft is locked while its writer lives, so a dead writer's is known and
#   swept; a process that is told to end removes its own.
#
# ## Exercises
#
# ### Exercise 1
#
# How many files has the 20b with at most 1 GB a file? Which is the longest,
# and why is it longer than 1 GB?

# %% tags=["hide-cell"]
shards = plan_shards(tensor_table(SMALL), 10 ** 9)
longest = max(shards, key=lambda name: sum(t.nbytes for t in shards[name]))
print(len(shards), "files; the longest", longest, "has",
      ", ".join(f"{t.name}: {t.nbytes:,} bytes" for t in shards[longest]))

# %% [markdown]
# ### Exercise 2
#
# A machine has room for half of each layer's experts. Write a checkpoint that
# keeps the first half: a legal gpt-oss with fewer experts, made without ever
# reading the other half.

# %% tags=["hide-cell"]
with Checkpoint.open(here / "hf") as old:
    fewer = replace(old.config, num_local_experts=2)
    write_checkpoint(here / "half", fewer, (
        (name, old.read(name, slice(spec.shape[0])))
        for name, spec in tensor_table(fewer).items()))
    with Checkpoint.open(here / "half") as new:
        print(f"{new.nbytes / old.nbytes:.2f} of the bytes;",
              new.spec("model.layers.0.mlp.router.weight"))

# %% [markdown]
# ### Exercise 3
#
# Why is `config.json` the last file that gets its place in an empty folder?
# Stop just before it, and look at what a reader says.

# %% tags=["hide-cell"]
(here / "empty" / "config.json").unlink()
report(Checkpoint.open, here / "empty")
print("what lies there:", *sorted(f.name for f in (here / "empty").iterdir()))
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - safetensors 0.8: the format, `README.md` of huggingface/safetensors.
# - huggingface/transformers 5.23, `modeling_utils.py`, `save_pretrained` (the
#   names of shards and of the index).
