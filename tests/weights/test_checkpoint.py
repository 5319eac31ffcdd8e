"""Reading, writing and converting checkpoints, whole and broken."""

import hashlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptoss.weights.checkpoint import Checkpoint, describe
from gptoss.weights.config import ConfigError, GptOssConfig
from gptoss.weights.convert import convert
from gptoss.weights.disk import drafted
from gptoss.weights.files import make_header, read_header
from gptoss.weights.layout import (
    DTYPES,
    LAYOUTS,
    CheckpointError,
    TensorSpec,
    places,
    tensor_table,
)
from gptoss.weights.mxfp4 import decode
from gptoss.weights.sizes import (
    active_parameters,
    bytes_read_per_token,
    checkpoint_bytes,
    parameter_counts,
    total_parameters,
)
from gptoss.weights.spellings import ENDS
from gptoss.weights.write import (
    Writer,
    plan_shards,
    random_tensors,
    write_checkpoint,
)

TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=101, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=6, num_key_value_heads=2, sliding_window=8)
INDEX = "model.safetensors.index.json"
SHARD = 30_000
ROUTER = "model.layers.1.mlp.router.weight"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"
SETTINGS = dict(deadline=None, database=None)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """The same random model in every layout; hf sharded, others not."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "hf", TINY, random_tensors(TINY),
                     max_shard_bytes=SHARD)
    for layout in ("original", "bf16"):
        tensors = random_tensors(TINY, layout=layout)
        write_checkpoint(folder / layout, TINY, tensors, layout)
    return {layout: folder / layout for layout in LAYOUTS}


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of the sharded one, to be broken."""
    target = tmp_path / "model"
    target.mkdir()
    for file in made["hf"].iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def read_all(path: Path) -> dict[str, torch.Tensor]:
    with Checkpoint.open(path) as checkpoint:
        return {n: checkpoint.read(n).clone() for n in checkpoint.names()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ---- The table

@pytest.mark.parametrize("config, total, hf, original, decoded", [
    (GptOssConfig.gpt_oss_20b(), 13_761_264_768, 459, 363, 41_829_514_368),
    (GptOssConfig.gpt_oss_120b(), 65_248_815_744, 687, 543,
     233_658_313_344)])
def test_published_totals(config, total, hf, original, decoded):
    tables = {layout: tensor_table(config, layout) for layout in LAYOUTS}
    sizes = {layout: sum(s.nbytes for s in table.values())
             for layout, table in tables.items()}
    assert sizes == {"hf": total, "original": total, "bf16": decoded}
    assert len(tables["hf"]) == hf and len(tables["original"]) == original
    assert checkpoint_bytes(config) == total
    count = sum(math.prod(s.shape) for s in tables["bf16"].values())
    assert count == total_parameters(config)
    assert all(name == spec.name for table in tables.values()
               for name, spec in table.items())


# from the released files: name, original name, shape, dtype
RELEASED = [
    ("model.embed_tokens.weight", "embedding.weight", (201088, 2880),
     "BF16"),
    ("lm_head.weight", "unembedding.weight", (201088, 2880), "BF16"),
    ("model.norm.weight", "norm.scale", (2880,), "BF16"),
    ("model.layers.7.input_layernorm.weight", "block.7.attn.norm.scale",
     (2880,), "BF16"),
    ("model.layers.7.post_attention_layernorm.weight",
     "block.7.mlp.norm.scale", (2880,), "BF16"),
    ("model.layers.7.self_attn.q_proj.weight", "block.7.attn.qkv.weight",
     (4096, 2880), "BF16"),
    ("model.layers.7.self_attn.k_proj.weight", "block.7.attn.qkv.weight",
     (512, 2880), "BF16"),
    ("model.layers.7.self_attn.v_proj.bias", "block.7.attn.qkv.bias",
     (512,), "BF16"),
    ("model.layers.7.self_attn.o_proj.weight", "block.7.attn.out.weight",
     (2880, 4096), "BF16"),
    ("model.layers.7.self_attn.o_proj.bias", "block.7.attn.out.bias",
     (2880,), "BF16"),
    ("model.layers.7.self_attn.sinks", "block.7.attn.sinks", (64,), "BF16"),
    ("model.layers.7.mlp.router.weight", "block.7.mlp.gate.weight",
     (32, 2880), "BF16"),
    ("model.layers.7.mlp.router.bias", "block.7.mlp.gate.bias", (32,),
     "BF16"),
    ("model.layers.7.mlp.experts.gate_up_proj_blocks",
     "block.7.mlp.mlp1_weight.blocks", (32, 5760, 90, 16), "U8"),
    ("model.layers.7.mlp.experts.gate_up_proj_scales",
     "block.7.mlp.mlp1_weight.scales", (32, 5760, 90), "U8"),
    ("model.layers.7.mlp.experts.gate_up_proj_bias",
     "block.7.mlp.mlp1_bias", (32, 5760), "BF16"),
    ("model.layers.7.mlp.experts.down_proj_blocks",
     "block.7.mlp.mlp2_weight.blocks", (32, 2880, 90, 16), "U8"),
    ("model.layers.7.mlp.experts.down_proj_scales",
     "block.7.mlp.mlp2_weight.scales", (32, 2880, 90), "U8"),
    ("model.layers.7.mlp.experts.down_proj_bias", "block.7.mlp.mlp2_bias",
     (32, 2880), "BF16"),
]


def test_released_names_and_shapes():
    config = GptOssConfig.gpt_oss_20b()
    table, where = tensor_table(config), places(config, "original")
    for name, original, shape, dtype in RELEASED:
        assert table[name] == TensorSpec(name, shape, dtype)
        assert where[name].stored == original
    fused = tensor_table(config, "original")
    assert fused["block.0.attn.qkv.weight"].shape == (5120, 2880)
    assert fused["block.0.attn.qkv.bias"].shape == (5120,)
    first = [where[f"model.layers.0.self_attn.{p}_proj.weight"].first
             for p in "qkv"]
    assert first == [0, 4096, 4608]
    dense = tensor_table(config, "bf16")
    stem = "model.layers.0.mlp.experts."
    assert dense[stem + "gate_up_proj"].shape == (32, 2880, 5760)
    assert dense[stem + "down_proj"].shape == (32, 2880, 2880)
    assert not any(n.endswith(("_blocks", "_scales")) for n in dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_places_tile_the_stored_tensors(layout):
    """Rows of the canonical tensors cover each stored one, once."""
    table = tensor_table(TINY, layout)
    covered = {name: 0 for name in table}
    for place in places(TINY, layout).values():
        assert place.first == covered[place.stored]
        covered[place.stored] += place.spec.shape[0]
        assert place.spec.shape[1:] == table[place.stored].shape[1:]
        assert place.spec.dtype == table[place.stored].dtype
    assert covered == {name: s.shape[0] for name, s in table.items()}


def test_a_width_without_blocks_and_an_unknown_layout():
    for key in ("hidden_size", "intermediate_size"):
        with pytest.raises(CheckpointError, match=f"{key}.*32.*found 48"):
            tensor_table(replace(TINY, **{key: 48}))
    for call in (tensor_table, places):
        with pytest.raises(CheckpointError, match="layout.*gguf"):
            call(TINY, "gguf")
    with pytest.raises(CheckpointError, match="layout.*gguf"):
        next(random_tensors(TINY, layout="gguf"))


# ---- Headers

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
KINDS = st.sampled_from([torch.bfloat16, torch.uint8, torch.float32])


@settings(max_examples=60, **SETTINGS)
@given(st.lists(st.tuples(SHAPES, KINDS), min_size=1, max_size=5))
def test_our_header_in_their_reader_and_theirs_in_ours(rows):
    import tempfile

    tensors = {f"t{i}": torch.randint(0, 9, shape).to(dtype)
               for i, (shape, dtype) in enumerate(rows)}
    names = {torch.bfloat16: "BF16", torch.uint8: "U8",
             torch.float32: "F32"}
    specs = [TensorSpec(n, tuple(t.shape), names[t.dtype])
             for n, t in tensors.items()]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        ours.write_bytes(make_header(specs) + b"".join(
            bytes(t.contiguous().view(-1).view(torch.uint8).tolist())
            for t in tensors.values()))
        found = load_file(ours)
        assert same(found, tensors)
        with safe_open(ours, "pt") as f:
            assert f.metadata() == {"format": "pt"}
        save_file(tensors, theirs)
        stored = read_header(theirs)
        assert {n: s.spec for n, s in stored.items()} == {
            s.name: s for s in specs}
        raw = theirs.read_bytes()
        for name, s in stored.items():
            again = torch.frombuffer(bytearray(
                raw[s.offset:s.offset + s.nbytes]) or bytearray(1),
                dtype=torch.uint8)[:s.nbytes]
            assert torch.equal(again, tensors[name].contiguous().view(
                -1).view(torch.uint8))


def test_numbers_start_aligned():
    for n in range(1, 20):
        header = make_header([TensorSpec("x" * n, (1,), "F32")])
        assert len(header) % 8 == 0
        assert struct.unpack("<Q", header[:8])[0] == len(header) - 8


@pytest.mark.parametrize("entries", [
    '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 5]}}',
    '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
    '{"a": {"dtype": "U8", "shape": [-2, -2], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0.0, 4]}}',
    '{"a": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}',
    '{"a": {"dtype": "U8", "shape": [4], "data_offsets": null}}',
    '{"a": {"shape": [4], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},'
    ' "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}',
    '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
    ' "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}',
    '{"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}',
    '{"a": []}', '{"a": 1}', "[]", "3", "{", "", "\xff",
    "[" * 100_000, '{"a": {"dtype": [], "shape": [4], '
    '"data_offsets": [0, 4]}}'])
def test_headers_that_lie(tmp_path, entries):
    file = tmp_path / "x.safetensors"
    text = entries.encode("latin-1")
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(CheckpointError, match="x.safetensors"):
        read_header(file)


@pytest.mark.parametrize("raw, text", [
    (b"", "found 0 bytes"), (b"\1\0\0", "found 3 bytes"),
    (b"\xff" * 64, "cut off, or another format"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
     "git-lfs pointer"),
    (b"PK\3\4" * 99, "another format")])
def test_files_of_another_kind(tmp_path, raw, text):
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=text):
        read_header(file)


def test_a_header_of_no_end_is_not_read(tmp_path):
    """A length of 200 MB in a sparse file of 300 MB: refused unread."""
    file = tmp_path / "x.safetensors"
    file.write_bytes((200_000_000).to_bytes(8, "little"))
    os.truncate(file, 300_000_000)
    with pytest.raises(CheckpointError, match="200000000"):
        read_header(file)


@settings(max_examples=150, **SETTINGS)
@given(data=st.data())
def test_a_damaged_header_never_crashes(made, data):
    import tempfile

    shard = sorted(made["hf"].glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    length = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, length - 1))
        raw[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        for file in made["hf"].iterdir():
            target = Path(folder, file.name)
            if file == shard:
                target.write_bytes(raw)
            else:
                target.symlink_to(file)
        try:
            with Checkpoint.open(folder) as checkpoint:
                found = checkpoint.nbytes
        except CheckpointError as error:
            assert shard.name in str(error) or "expected" in str(error)
        else:  # the damage hit white space or the metadata
            assert found == checkpoint_bytes(TINY)


@settings(max_examples=60, **SETTINGS)
@given(data=st.data())
def test_cut_anywhere_is_noticed(made, data):
    import tempfile

    shard = sorted(made["hf"].glob("*.safetensors"))[0]
    raw = shard.read_bytes()
    cut = data.draw(st.integers(0, len(raw) - 1))
    with tempfile.TemporaryDirectory() as folder:
        for file in made["hf"].iterdir():
            target = Path(folder, file.name)
            if file == shard:
                target.write_bytes(raw[:cut])
            else:
                target.symlink_to(file)
        with pytest.raises(CheckpointError, match=shard.name) as caught:
            Checkpoint.open(folder)
        if cut >= 8 + int.from_bytes(raw[:8], "little"):
            named = [s for s in read_header(shard).values()
                     if s.offset + s.nbytes > cut]
            first = min(named, key=lambda s: s.offset).spec.name
            assert first in str(caught.value)


# ---- Reading

@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_written_is_read(made, layout):
    wanted = dict(random_tensors(TINY, layout=layout))
    assert same(read_all(made[layout]), wanted)
    with Checkpoint.open(made[layout]) as checkpoint:
        assert checkpoint.layout == layout
        assert checkpoint.names() == list(wanted)
        assert checkpoint.config == TINY
        assert checkpoint.nbytes == sum(
            t.nbytes for t in wanted.values())
        for name, tensor in wanted.items():
            spec = checkpoint.spec(name)
            assert spec.shape == tuple(tensor.shape)
            assert spec.nbytes == tensor.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_safetensors_reads_the_same(made, layout):
    files = sorted(made[layout].glob("*.safetensors"))
    found = {}
    for file in files:
        found |= load_file(file)
    table = tensor_table(TINY, layout)
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.items()} == {
        n: (s.shape, DTYPES[s.dtype]) for n, s in table.items()}
    ours = read_all(made[layout])
    for name, place in places(TINY, layout).items():
        rows = found[place.stored][place.first:][:place.spec.shape[0]]
        assert torch.equal(rows, ours[name])


def test_openai_reads_the_original_layout(made):
    weights = pytest.importorskip("gpt_oss.torch.weights")
    theirs = weights.Checkpoint(str(made["original"]), torch.device("cpu"))
    ours = read_all(made["hf"])
    stem = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(
        theirs.get("block.1.mlp.mlp1_weight"),
        decode(ours[stem + "_blocks"], ours[stem + "_scales"]))
    assert torch.equal(
        theirs.get("block.0.attn.qkv.weight"),
        torch.cat([ours[f"model.layers.0.self_attn.{p}_proj.weight"]
                   for p in "qkv"]))


@pytest.mark.parametrize("layout", ["hf", "bf16"])
def test_transformers_reads_it(made, tmp_path, layout):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for file in made[layout].glob("model*"):
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((made[layout] / "config.json").read_text())
    config["pad_token_id"] = 0  # theirs must lie in the vocabulary
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {}
    if layout == "hf":
        options["quantization_config"] = transformers.Mxfp4Config(
            dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager",
        **options)
    theirs, ours = model.state_dict(), read_all(made["bf16"])
    assert same(dict(theirs), ours)


@settings(max_examples=60, **SETTINGS)
@given(data=st.data())
def test_rows(made, data):
    layout = data.draw(st.sampled_from(LAYOUTS))
    with Checkpoint.open(made[layout]) as checkpoint:
        name = data.draw(st.sampled_from(checkpoint.names()))
        size = checkpoint.spec(name).shape[0]
        number = st.none() | st.integers(-size - 2, size + 2)
        rows = slice(data.draw(number), data.draw(number))
        whole = checkpoint.read(name)
        found = checkpoint.read(name, rows)
        assert found.dtype == whole.dtype
        assert torch.equal(found, whole[rows])


def test_rows_with_a_step_and_unknown_names(made):
    with Checkpoint.open(made["hf"]) as checkpoint:
        with pytest.raises(CheckpointError, match=f"{ROUTER}.*step 1"):
            checkpoint.read(ROUTER, slice(0, 4, 2))
        for call in (checkpoint.read, checkpoint.spec, checkpoint.file):
            with pytest.raises(CheckpointError, match="no.such.tensor"):
                call("no.such.tensor")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_is_a_view_of_the_file(made, layout):
    with Checkpoint.open(made[layout]) as checkpoint:
        for name in checkpoint.names():
            tensor = checkpoint.read(name)
            mapped = checkpoint._map(checkpoint.file(name))
            assert mapped.nbytes == checkpoint.file(name).stat().st_size
            at = tensor.untyped_storage().data_ptr() - mapped.data_ptr()
            assert 0 <= at <= mapped.nbytes - tensor.nbytes
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert tensor.is_contiguous()
        file = checkpoint.file(name)
        before = file.read_bytes()
        tensor.zero_()  # private: the file does not change
    assert file.read_bytes() == before
    assert tensor.sum() == 0  # and the tensor outlives close()


def test_unaligned_tensors_are_copied(made, tmp_path):
    """A header whose length is odd: no file of ours, but a legal one."""
    wanted = read_all(made["original"])
    source = made["original"] / "model.safetensors"
    raw = source.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8:8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    assert len(header) % 2 == 1
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + raw[8 + length:])
    (tmp_path / "config.json").write_bytes(
        (made["original"] / "config.json").read_bytes())
    assert same(read_all(tmp_path), wanted)


RESIDENT = """
import sys
from gptoss.weights.checkpoint import Checkpoint

def resident(name):
    kib, inside = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ")[0]:
            inside = line.rstrip().endswith(name)
        elif inside and line.startswith("Rss:"):
            kib += int(line.split()[1])
    return kib * 1024

with Checkpoint.open(sys.argv[1]) as checkpoint:
    whole = checkpoint.read("model.embed_tokens.weight")
    print(resident("model.safetensors"))
    rows = checkpoint.read("model.embed_tokens.weight", slice(5000, 5004))
    rows.float().sum()
    print(resident("model.safetensors"))
    whole.float().sum()
    print(resident("model.safetensors"), whole.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_rows_asked_for_are_read(tmp_path):
    config = replace(TINY, vocab_size=100_000)
    write_checkpoint(tmp_path / "m", config, random_tensors(config))
    out = subprocess.run(
        [sys.executable, "-c", RESIDENT, tmp_path / "m"], check=True,
        capture_output=True, text=True).stdout.split()
    opened, some, everything, size = map(int, out)
    assert opened < 2 ** 18
    assert some < opened + 2 ** 21  # four rows and what the kernel adds
    assert everything > 0.9 * size > 10_000_000


# ---- Where the weights are

def test_original_below_and_hf_first(made, tmp_path):
    root = tmp_path / "repository"
    (root / "original").mkdir(parents=True)
    for file in made["original"].iterdir():
        (root / "original" / file.name).write_bytes(file.read_bytes())
    for path in (root, root / "original"):
        with Checkpoint.open(path) as checkpoint:
            assert checkpoint.layout == "original"
            assert checkpoint.path == path
            assert checkpoint.folder == root / "original"
            assert checkpoint.config == TINY
    # the root's config says more, so it is taken
    config = TINY.to_hf_dict() | {"eos_token_id": 7}
    (root / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(root) as checkpoint:
        assert checkpoint.config.eos_token_id == 7
    for file in made["hf"].iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    with Checkpoint.open(root) as checkpoint:
        assert checkpoint.layout == "hf" and checkpoint.folder == root


def test_a_config_of_ones_own(made):
    with Checkpoint.open(made["hf"], replace(TINY, rms_norm_eps=1e-6)) as c:
        assert c.config.rms_norm_eps == 1e-6
    with pytest.raises(CheckpointError, match="router.*8, 64.*4, 64"):
        Checkpoint.open(made["hf"], replace(TINY, num_local_experts=8))


def test_pickles_are_never_opened(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "model.pth"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(TINY.to_hf_dict()))

        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "sprung"),)

        torch.save(Trap(), folder / name)
        with pytest.raises(CheckpointError, match=f"{name}: a pickle"):
            Checkpoint.open(folder)
    assert not (tmp_path / "sprung").exists()


def test_folders_with_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"\*.safetensors, found none"):
        Checkpoint.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="a directory, found a file"):
        Checkpoint.open(tmp_path / "file")


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="config.json"):
        Checkpoint.open(folder)


# ---- Broken files: the error names the file and the tensor

def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / INDEX).read_text())
    return folder / index["weight_map"][name]


def edit(folder: Path, name: str, change) -> str:
    """Rewrite the shard of a tensor after change(tensors)."""
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return shard.name


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_wrong_shape(folder):
    def change(t):
        t[ROUTER] = t[ROUTER][:, :-1].contiguous()
    refused(folder, edit(folder, ROUTER, change), ROUTER, "[4, 64]",
            "[4, 63]")


@pytest.mark.parametrize("dtype, found", [
    (torch.int8, "I8"), (torch.uint8, "U8"), (torch.complex64, "C64"),
    (torch.float8_e4m3fn, "F8_E4M3")])
def test_wrong_dtype(folder, dtype, found):
    def change(t):
        t[ROUTER] = t[ROUTER].to(dtype)
    refused(folder, edit(folder, ROUTER, change), ROUTER, "BF16", found)


def test_missing_scales(folder):
    edit(folder, SCALES, lambda t: t.pop(SCALES))
    edit_index(folder, lambda m: m.pop(SCALES))
    refused(folder, SCALES, "U8 [4, 64, 3]", "no such tensor")


def test_an_extra_tensor(folder):
    def change(t):
        t["more"] = torch.zeros(3)
    name = edit(folder, ROUTER, change)
    refused(folder, name, "more", INDEX)  # not in the index
    edit_index(folder, lambda m: m.update(more=name))
    refused(folder, name, "more", "no such tensor")  # nor in the model


def test_floats_under_packed_names(folder):
    """What transformers' save_pretrained wrote after a decoded load."""
    def change(t):
        t[BLOCKS] = torch.zeros(4, 64, 192, dtype=torch.bfloat16)
    refused(folder, edit(folder, BLOCKS, change), BLOCKS, "U8", "BF16")


@pytest.mark.parametrize("file", [
    "../model.safetensors", "/etc/passwd", "a/../../x.safetensors",
    "sub/model.safetensors", "..\\model.safetensors", "c:x.safetensors",
    "config.json", "", "..", None, 3, ["x.safetensors"],
    "model\0.safetensors"])
def test_an_index_that_leaves_the_folder(folder, file):
    (folder.parent / "model.safetensors").write_bytes(b"")
    edit_index(folder, lambda m: m.update({ROUTER: file}))
    refused(folder, INDEX, ROUTER, repr(file))


def test_index_and_files_must_agree(folder):
    good = (folder / INDEX).read_text()
    shard = shard_of(folder, ROUTER)
    other = next(s for s in sorted(folder.glob("*.safetensors"))
                 if s != shard)
    for change, parts in (
            (lambda m: m.update({ROUTER: "model-9.safetensors"}),
             ("model-9.safetensors", ROUTER)),
            (lambda m: m.update({ROUTER: other.name}),
             (other.name, shard.name, ROUTER)),
            (lambda m: m.pop(ROUTER), (shard.name, ROUTER)),
            (lambda m: m.update({"extra": shard.name}), ("extra",))):
        edit_index(folder, change)
        refused(folder, INDEX, *parts)
        (folder / INDEX).write_text(good)
    moved = other.read_bytes()
    other.unlink()
    refused(folder, INDEX, other.name)
    other.write_bytes(moved)
    for left in ("model-00099-of-00099", "adapter_model", "optimizer"):
        (folder / f"{left}.safetensors").write_bytes(b"not even read")
    Checkpoint.open(folder)  # the index decides
    (folder / "model.safetensors").write_bytes(moved)  # too close to call
    refused(folder, "model.safetensors", INDEX, "which of the two")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '"x"',
                                  '{"weight_map": 3}', "\xff", "[" * 10 ** 5])
def test_an_index_that_is_none(folder, text):
    (folder / INDEX).write_bytes(text.encode("latin-1"))
    refused(folder, INDEX)


def test_two_files_with_the_same_tensor(made, tmp_path):
    source = made["original"]
    data = (source / "model.safetensors").read_bytes()
    for name in ("one.safetensors", "again.safetensors"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_bytes(
        (source / "config.json").read_bytes())
    refused(tmp_path, "again.safetensors", "one.safetensors", "once")
    (tmp_path / "model.safetensors").write_bytes(data)
    assert Checkpoint.open(tmp_path).files == [tmp_path / "model.safetensors"]


# ---- Files of other programs

def write_as(folder: Path, tensors: dict, config: dict) -> Path:
    folder.mkdir()
    save_file({n: t.contiguous().clone() for n, t in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def decoded() -> dict[str, torch.Tensor]:
    return dict(random_tensors(TINY, layout="bf16"))


def for_each_expert(tensors: dict) -> dict:
    """As unsloth names them: linear layers, one for each expert."""
    out = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            out[name.replace(".router.", ".router.linear.")] = tensor
            continue
        end = "bias" if name.endswith("_bias") else "weight"
        for e, row in enumerate(tensor):
            out[f"{name.removesuffix('_bias')}s.{e}.{end}"] = row.t()
    return out


def spell(pattern: str, put: str):
    return lambda tensors: {re.sub(pattern, put, name): tensor
                            for name, tensor in tensors.items()}


SPELLINGS = {
    "plain": spell("^$", ""),
    "blocks": spell("_proj$", "_proj_blocks"),
    "no prefix": spell(r"^model\.", ""),
    "peft": spell("^", "base_model.model."),
    "data parallel": spell("^", "module."),
    "compiled": spell("^", "_orig_mod."),
    "compiled layers": spell(r"(layers\.\d+\.)", r"\1_orig_mod."),
    "fsdp": spell(r"(layers\.\d+\.)",
                  r"_fsdp_wrapped_module.\1_checkpoint_wrapped_module."),
    "each expert": for_each_expert,
    "frequencies": lambda tensors: tensors | {
        f"model.{where}rotary_emb.{which}inv_freq": torch.ones(8)
        for where in ("", "layers.0.self_attn.")
        for which in ("", "original_")},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32,
                                   torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_one_model(tmp_path, name, dtype):
    wanted = {n: t.to(dtype) for n, t in decoded().items()}
    folder = write_as(tmp_path / "m", SPELLINGS[name](wanted),
                      TINY.to_hf_dict())
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.layout == "bf16"
        assert same(read_all(folder), wanted)
        for each in (ROUTER, "model.layers.1.mlp.experts.down_proj"):
            assert torch.equal(checkpoint.read(each, slice(1, 3)),
                               wanted[each][1:3])
            assert checkpoint.read(each, slice(2, 2)).shape[0] == 0
        assert checkpoint.nbytes == sum(t.nbytes for t in wanted.values())
    hashes = [convert(folder, tmp_path / layout, layout)
              for layout in ("hf", "original")]
    assert hashes[0] == hashes[1]
    head = wanted["lm_head.weight"].bfloat16().view(torch.uint8)
    assert hashes[0]["lm_head.weight"] == hashlib.sha256(
        head.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("which", ["norm", "router", "sinks", "attn", "mlp1",
                                   "embedding", ""])
def test_any_float_beside_packed_experts(made, tmp_path, dtype, layout,
                                         which):
    if layout == "hf":
        which = {"attn": "self_attn", "mlp1": "gate_up_proj_bias",
                 "embedding": "lm_head"}.get(which, which)
    if which == "router" and layout == "original":
        which = "mlp.gate"
    tensors = {}
    for file in made[layout].glob("*.safetensors"):
        tensors |= load_file(file)
    wide = {n: t.to(DTYPES[dtype])
            if which in n and t.dtype is torch.bfloat16 else t
            for n, t in tensors.items()}
    assert any(t.dtype is DTYPES[dtype] for t in wide.values())
    folder = write_as(tmp_path / "m", wide, json.loads(
        (made[layout] / "config.json").read_text()))
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.layout == layout
        for name, tensor in read_all(made[layout]).items():
            read = checkpoint.read(name)
            assert torch.equal(read, tensor.to(read.dtype))
            assert (name.endswith(("_blocks", "_scales"))
                    == (read.dtype is torch.uint8))


FOREIGN = {
    "lora": ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge it"),
    "lora of experts": ("base_model.model.model.layers.0.mlp.experts."
                        "base_layer.lora_B.weight", "LoRA"),
    "base layer": ("model.layers.0.self_attn.q_proj.base_layer.weight",
                   "LoRA"),
    "bnb": ("model.layers.0.self_attn.q_proj.weight.quant_state."
            "bitsandbytes__nf4", "bitsandbytes"),
    "bnb 8": ("model.layers.0.self_attn.q_proj.SCB", "bitsandbytes"),
    "absmax": ("model.layers.0.mlp.experts.down_projs.3.weight.absmax",
               "bitsandbytes"),
    "gptq": ("model.layers.0.self_attn.q_proj.qweight", "GPTQ"),
    "fp8": ("model.layers.0.self_attn.q_proj.weight_scale", "FP8"),
    "int4": ("model.layers.0.mlp.experts.0.down_proj.weight_packed", "FP8"),
    "mlx": ("model.layers.0.mlp.experts.gate_proj.scales", "MLX"),
    "mixtral": ("model.layers.0.mlp.experts.0.up_proj.weight", "MLX"),
    "classifier": ("score.weight", "another head"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_another_kind_are_named(tmp_path, kind):
    name, said = FOREIGN[kind]
    folder = write_as(tmp_path / "m", decoded() | {name: torch.ones(4)},
                      TINY.to_hf_dict())
    refused(folder, "model.safetensors", name, said)


@pytest.mark.parametrize("names", [
    ("adapter_config.json", "adapter_model.safetensors"),
    ("adapter_config.json", "adapter_model.bin"),
    ("adapter_model.safetensors", "config.json")])
def test_an_adapter_is_no_model(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    refused(tmp_path, "LoRA adapter", "merge it first")


def test_an_adapter_beside_a_model(made, tmp_path, caplog):
    folder = write_as(tmp_path / "m", decoded(), TINY.to_hf_dict())
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("not read")
    Checkpoint.open(folder)
    (record,) = caplog.records
    assert "not applied" in record.getMessage()


def test_square_experts_are_turned_too(tmp_path):
    """No shape tells, as in the released models."""
    config = replace(TINY, intermediate_size=64)
    tensors = dict(random_tensors(config, layout="bf16"))
    folder = write_as(tmp_path / "m", for_each_expert(tensors),
                      config.to_hf_dict())
    assert same(read_all(folder), tensors)


def test_one_tensor_an_expert_and_one_missing(tmp_path):
    names = for_each_expert(decoded())
    gone = "model.layers.1.mlp.experts.gate_up_projs.2.weight"
    for n, (change, parts) in enumerate((
            ({gone: None}, ("gate_up_proj, expert 2",)),
            ({gone: names[gone][:-1]}, (gone, "[192, 64]", "[191, 64]")),
            ({gone: names[gone].float()}, (gone, "F32")),
            ({gone.replace("2.weight", "02.weight"): names[gone]},
             ("02.weight", "no such tensor")),
            ({gone.replace("2.weight", "9.weight"): names[gone]},
             ("expert 4",)),
            ({gone.replace("projs.2.weight", "proj"): decoded()[
                gone.replace("projs.2.weight", "proj")]}, ("once",)),
            ({"_orig_mod." + gone: names[gone]}, ("two names",)))):
        tensors = {k: t for k, t in (names | change).items()
                   if t is not None}
        refused(write_as(tmp_path / str(n), tensors, TINY.to_hf_dict()),
                *parts)


@pytest.mark.parametrize("missing", ["lm_head.weight",
                                     "model.embed_tokens.weight", None])
@pytest.mark.parametrize("layout", ["hf", "bf16"])
def test_tied_matrices(made, tmp_path, missing, layout):
    tensors = read_all(made[layout])
    one = {n: t for n, t in tensors.items() if n != missing}
    values = TINY.to_hf_dict()
    folder = write_as(tmp_path / "m", one, values | {
        "tie_word_embeddings": True})
    ends = list(ENDS)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.config == TINY
        for name in ends:
            there = name if name != missing else (set(ends) - {name}).pop()
            assert torch.equal(checkpoint.read(name), tensors[there])
        assert checkpoint.nbytes == sum(t.nbytes for t in one.values())
    convert(folder, tmp_path / "new", layout)  # has both, and says so
    with Checkpoint.open(tmp_path / "new") as checkpoint:
        assert len(load_file(tmp_path / "new" / "model.safetensors")) == len(
            tensors)
    if missing:
        folder = write_as(tmp_path / "untied", one, values)
        refused(folder, missing, "tie_word_embeddings", "no such tensor")


@pytest.mark.parametrize("layout, said, wanted", [
    ("hf", {}, "bfloat16"), ("hf", {"dtype": "float32"}, "float32"),
    ("hf", {"torch_dtype": "float16"}, "float16"),
    ("hf", {"dtype": None, "torch_dtype": "float64"}, "float64"),
    ("hf", {"dtype": "float8"}, "bfloat16"), ("hf", {"dtype": [1]},
                                              "bfloat16"),
    ("bf16", {}, "float16"), ("bf16", {"dtype": "bfloat16"}, "bfloat16")])
def test_the_dtype_of_a_checkpoint(made, tmp_path, layout, said, wanted):
    tensors = {n: t.half() if layout == "bf16" else t
               for n, t in read_all(made[layout]).items()}
    folder = write_as(tmp_path / "m", tensors, TINY.to_hf_dict() | said)
    assert str(Checkpoint.open(folder).dtype) == f"torch.{wanted}"


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(made, tmp_path, name, kind):
    folder = write_as(tmp_path / "m", decoded(), TINY.to_hf_dict())
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises((CheckpointError, ConfigError), match=name):
        Checkpoint.open(folder)


def test_scale_255(folder):
    def change(t):
        t[SCALES][1, 2, 0] = t[SCALES][3, 0, 1] = 255
    name = edit(folder, SCALES, change)
    with Checkpoint.open(folder) as checkpoint:  # cheap: headers only
        checkpoint.check_scales(BLOCKS)
        checkpoint.check_scales(SCALES.replace(".1.", ".0."))
        for which in (SCALES, None):
            with pytest.raises(CheckpointError) as caught:
                checkpoint.check_scales(which)
            for part in (name, SCALES, "2 of 255"):
                assert part in str(caught.value)
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match=SCALES):
            convert(folder, folder.parent / "new", layout)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


# ---- Writing

@settings(max_examples=40, **SETTINGS)
@given(st.integers(1, 200_000))
def test_shards(limit):
    table = tensor_table(TINY)
    shards = plan_shards(table, limit)
    flat = [spec for specs in shards.values() for spec in specs]
    assert flat == list(table.values())
    sizes = [sum(s.nbytes for s in specs) for specs in shards.values()]
    assert all(size <= limit or len(specs) == 1
               for size, specs in zip(sizes, shards.values(), strict=True))
    firsts = [specs[0].nbytes for specs in shards.values()]
    assert all(a + b > limit for a, b in zip(sizes, firsts[1:],
                                             strict=False))
    count = len(shards)
    assert list(shards) == (["model.safetensors"] if count == 1 else [
        f"model-{i:05}-of-{count:05}.safetensors"
        for i in range(1, count + 1)])


def test_the_index_is_the_released_kind(made):
    index = json.loads((made["hf"] / INDEX).read_text())
    assert index["metadata"] == {"total_size": checkpoint_bytes(TINY)}
    assert index["weight_map"].keys() == tensor_table(TINY).keys()
    shards = sorted(made["hf"].glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == {
        s.name for s in shards}
    assert not (made["original"] / INDEX).exists()


def test_configs_as_written(made):
    configs = {layout: json.loads((path / "config.json").read_text())
               for layout, path in made.items()}
    assert configs["hf"] == TINY.to_hf_dict()
    assert configs["original"] == TINY.to_original_dict()
    packed = configs["hf"].pop("quantization_config")
    assert packed["quant_method"] == "mxfp4"
    assert configs["bf16"] == configs["hf"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_order_gives_the_same_files(made, tmp_path, layout):
    tensors = list(random_tensors(TINY, layout=layout))
    shards = SHARD if layout == "hf" else 10 ** 9
    manifest = write_checkpoint(tmp_path / "new", TINY, reversed(tensors),
                                layout, shards)
    for file in made[layout].iterdir():
        assert (tmp_path / "new" / file.name).read_bytes() == (
            file.read_bytes())
    assert manifest == {
        name: hashlib.sha256(bytes(t.contiguous().view(-1).view(
            torch.uint8).tolist())).hexdigest() for name, t in tensors}


def test_views_and_strides_are_written_as_values(tmp_path):
    wanted = dict(random_tensors(TINY))
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = dict(wanted)
    tensors[name] = wanted[name].t().contiguous().t()
    assert not tensors[name].is_contiguous()
    tensors[ROUTER] = torch.nn.Parameter(wanted[ROUTER])
    write_checkpoint(tmp_path / "m", TINY, tensors.items())
    assert same(read_all(tmp_path / "m"), wanted)


def broken(change):
    tensors = dict(random_tensors(TINY))
    change(tensors)
    return tensors.items()


BIAS = "model.layers.0.self_attn.k_proj.bias"


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("tensors, parts", [
    (broken(lambda t: t.pop(ROUTER)), (ROUTER, "found nothing")),
    (broken(lambda t: t.pop(BIAS)), (BIAS, "found nothing")),
    (broken(lambda t: t.update(lora=torch.zeros(1))), ("lora",)),
    (broken(lambda t: t.update({ROUTER: t[ROUTER].float()})),
     (ROUTER, "BF16", "float32")),
    (broken(lambda t: t.update({ROUTER: t[ROUTER].t()})),
     (ROUTER, "[4, 64]", "[64, 4]")),
    (broken(lambda t: t.update({ROUTER: t[ROUTER][:2]})),
     (ROUTER, "[4, 64]", "[2, 64]")),
    (broken(lambda t: t.update({ROUTER: torch.zeros(())})), (ROUTER,)),
    ([*random_tensors(TINY), (ROUTER, dict(random_tensors(TINY))[ROUTER])],
     (ROUTER, "again")),
])
def test_tensors_that_do_not_fit(tmp_path, tensors, parts, layout):
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "m", TINY, tensors, layout)
    for part in parts:
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_missing(tmp_path):
    """What `convert` would notice if it lost the end of a tensor."""
    writer = Writer(tmp_path, TINY, "hf", 10 ** 9)
    for name, tensor in random_tensors(TINY):
        rows = tensor[:-1] if name == ROUTER else tensor
        writer.put(name, rows, 0)
    with pytest.raises(CheckpointError, match=f"{ROUTER}.*found 3 rows"):
        writer.finish([])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_nothing(tmp_path, error):
    def failing():
        for i, pair in enumerate(random_tensors(TINY)):
            if i == 30:
                assert any(tmp_path.iterdir())
                assert not (tmp_path / "m").exists()
                raise error
            yield pair

    with pytest.raises(error):
        write_checkpoint(tmp_path / "m", TINY, failing())
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from gptoss.weights.write import random_tensors, write_checkpoint
from gptoss.weights.config import GptOssConfig

config = GptOssConfig.from_pretrained(sys.argv[1])

def tensors():
    yield from random_tensors(config)
    os._exit(9)  # every tensor is written, nothing was closed

write_checkpoint(sys.argv[2], config, tensors())
"""


def test_a_process_that_dies_leaves_nothing_that_looks_whole(made, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, made["hf"],
                           tmp_path / "m"], check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".m.") and left.suffix == ".partial"
    with pytest.raises((CheckpointError, ConfigError)):
        Checkpoint.open(left)
    for name in ("n", "m.x", "m"):  # the last one sweeps what nobody holds
        write_checkpoint(tmp_path / name, TINY, random_tensors(TINY))
        assert left.exists() == (name != "m")
    assert {p.name for p in tmp_path.iterdir()} == {"n", "m.x", "m"}


def test_a_draft_of_a_living_process_is_not_swept(tmp_path):
    def tensors():
        yield from list(random_tensors(TINY))[:5]
        with pytest.raises(CheckpointError, match="nothing"):
            write_checkpoint(tmp_path / "m", TINY, half)
        assert len(list(tmp_path.iterdir())) == 1
        yield from list(random_tensors(TINY))[5:]

    half = list(random_tensors(TINY))[:5]
    write_checkpoint(tmp_path / "m", TINY, tensors())
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


TOLD = """
import os, signal, sys, threading
from gptoss.weights.write import random_tensors, write_checkpoint
from gptoss.weights.config import GptOssConfig

config = GptOssConfig.from_pretrained(sys.argv[1])

def tensors():
    for i, pair in enumerate(random_tensors(config)):
        yield pair
        if i == 20:
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))

write_checkpoint(sys.argv[2], config, tensors())
"""


@pytest.mark.parametrize("name, inside", [("SIGTERM", False),
                                          ("SIGHUP", True)])
def test_a_process_told_to_end_removes_its_draft(made, tmp_path, name,
                                                 inside):
    if inside:
        (tmp_path / "a" / "m").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", TOLD, made["hf"],
                           tmp_path / "a" / "m", name], check=False,
                          timeout=60)
    assert done.returncode == 128 + getattr(signal, name)
    assert sorted(tmp_path.rglob("*")) == before


def test_handlers_of_others_are_left_alone(tmp_path):
    mine = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        before = signal.getsignal(signal.SIGTERM)
        write_checkpoint(tmp_path / "m", TINY, random_tensors(TINY))
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, mine)


def test_an_empty_folder_is_filled_and_not_replaced(tmp_path, monkeypatch):
    """It may be a mounted disk: nothing may be written beside it, and
    config.json appears when all else is there."""
    target = tmp_path / "disk"
    target.mkdir()
    (target / "lost+found").mkdir()
    node, order = target.stat().st_ino, []

    def tensors():
        assert [p.name for p in tmp_path.iterdir()] == ["disk"]
        yield from random_tensors(TINY)

    replace_ = os.replace
    monkeypatch.setattr("gptoss.weights.write.os.replace", lambda a, b: (
        order.append(Path(b)), replace_(a, b)))
    write_checkpoint(target, TINY, tensors(), max_shard_bytes=SHARD)
    assert target.stat().st_ino == node and len(order) > 3
    assert order[-1] == target / "config.json"
    assert all(path.parent == target for path in order)
    assert not list(target.glob(".*"))
    assert len(Checkpoint.open(target).names()) == len(tensor_table(TINY))


def test_an_empty_folder_stays_empty_if_a_rename_fails(tmp_path, monkeypatch):
    target, replace_ = tmp_path / "disk", os.replace
    target.mkdir()

    def failing(a, b):
        if Path(b).name == "config.json":
            raise OSError(28, "No space left on device")
        replace_(a, b)

    monkeypatch.setattr("gptoss.weights.write.os.replace", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(target, TINY, random_tensors(TINY))
    assert list(target.iterdir()) == []


def test_folders_made_on_the_way_are_removed(tmp_path):
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "a" / "b" / "c", TINY, [])
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("full", "file", "link"):
        with pytest.raises(CheckpointError, match=f"{name}: expected a new"):
            write_checkpoint(tmp_path / name, TINY, random_tensors(TINY))
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    write_checkpoint(tmp_path / "empty", TINY, random_tensors(TINY))
    write_checkpoint(tmp_path / "a" / "b" / "c", TINY, random_tensors(TINY))
    assert same(read_all(tmp_path / "empty"),
                read_all(tmp_path / "a" / "b" / "c"))


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr("gptoss.weights.write.shutil.disk_usage",
                        lambda path: type("Use", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="bytes free, found 1,000"):
        write_checkpoint(tmp_path / "m", TINY, random_tensors(TINY))
    assert list(tmp_path.iterdir()) == []


def test_extra_files(tmp_path):
    files = [tmp_path / "tokenizer.json", tmp_path / "notes.txt"]
    for file in files:
        file.write_text(file.name)
    write_checkpoint(tmp_path / "m", TINY, random_tensors(TINY),
                     extra_files=files)
    for file in files:
        assert (tmp_path / "m" / file.name).read_text() == file.name
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("")
        with pytest.raises(CheckpointError, match=name):
            write_checkpoint(tmp_path / "n", TINY, random_tensors(TINY),
                             extra_files=[tmp_path / name])
    with pytest.raises(CheckpointError, match="No such file"):
        write_checkpoint(tmp_path / "n", TINY, random_tensors(TINY),
                         extra_files=[tmp_path / "absent"])
    assert not (tmp_path / "n").exists()


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "m", TINY, random_tensors(TINY))
    finally:
        os.umask(old)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o750
    file = tmp_path / "m" / "model.safetensors"
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_config_that_the_original_spelling_cannot_say(tmp_path):
    config = replace(TINY, layer_types=("full_attention",) * 2)
    with pytest.raises(ConfigError, match="layer_types"):
        write_checkpoint(tmp_path / "m", config, random_tensors(config),
                         "original")
    assert list(tmp_path.iterdir()) == []


NO_NUMPY = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["numpy"] = None
from gptoss.weights.config import GptOssConfig
from gptoss.weights.convert import convert
from gptoss.weights.write import random_tensors, write_checkpoint
config = GptOssConfig.from_pretrained(sys.argv[1])
write_checkpoint(sys.argv[2], config, random_tensors(config))
print(convert(sys.argv[2], sys.argv[2] + "2", "original")
      == convert(sys.argv[1], sys.argv[2] + "3", "hf"))
"""


def test_without_numpy(made, tmp_path):
    """The package does not depend on it."""
    out = subprocess.run(
        [sys.executable, "-c", NO_NUMPY, made["hf"], tmp_path / "m"],
        check=True, capture_output=True, text=True).stdout
    assert out == "True\n"


# ---- Converting

@pytest.mark.parametrize("shard", [1, 20_000, 10 ** 9])
def test_there_and_back_is_the_same_bytes(made, tmp_path, shard):
    there = convert(made["hf"], tmp_path / "original", "original", shard)
    back = convert(tmp_path / "original", tmp_path / "hf", "hf", SHARD)
    assert there == back
    assert there.keys() == tensor_table(TINY).keys()
    for file in made["hf"].glob("model*"):
        assert (tmp_path / "hf" / file.name).read_bytes() == (
            file.read_bytes())
    for folder in ("original", "hf"):
        saved = (tmp_path / folder / "manifest.json").read_text()
        assert json.loads(saved) == there
    tensors = read_all(made["hf"])
    assert there[ROUTER] == hashlib.sha256(bytes(
        tensors[ROUTER].view(-1).view(torch.uint8).tolist())).hexdigest()


def test_decoded_and_encoded_again(made, tmp_path):
    for source in ("hf", "original"):
        convert(made[source], tmp_path / source, "bf16")
        assert same(read_all(tmp_path / source), read_all(made["bf16"]))
    for target in ("hf", "original"):
        convert(made["bf16"], tmp_path / "again" / target, target)
        found = read_all(tmp_path / "again" / target)
        wanted = read_all(made["hf"])
        for name in wanted:
            if name.endswith("_scales"):
                continue
            if name.endswith("_blocks"):
                scales = name.removesuffix("blocks") + "scales"
                values = [decode(t[name], t[scales], torch.float32)
                          for t in (found, wanted)]
                assert torch.equal(*values)
            else:
                assert torch.equal(found[name], wanted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dense_floats_of_other_dtypes(made, tmp_path, dtype):
    folder = tmp_path / "dense"
    folder.mkdir()
    source = load_file(made["bf16"] / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in source.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_bytes(
        (made["bf16"] / "config.json").read_bytes())
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.layout == "bf16"
        assert checkpoint.read(ROUTER).dtype == dtype
    convert(folder, tmp_path / "bf16", "bf16")
    wanted = {n: t.to(dtype).bfloat16() for n, t in source.items()}
    assert same(read_all(tmp_path / "bf16"), wanted)
    if dtype == torch.float32:
        convert(folder, tmp_path / "hf", "hf")
        convert(tmp_path / "hf", tmp_path / "back", "bf16")
        assert same(read_all(tmp_path / "back"), read_all(made["bf16"]))


def test_nan_in_dense_experts_names_the_tensor(made, tmp_path):
    tensors = read_all(made["bf16"])
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name][2, 0, 0] = math.nan
    write_checkpoint(tmp_path / "nan", TINY, tensors.items(), "bf16")
    with pytest.raises(CheckpointError, match=f"{name}, expert 2"):
        convert(tmp_path / "nan", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_companions_come_along(made, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for file in made["hf"].iterdir():
        (root / file.name).write_bytes(file.read_bytes())
    extra = {"tokenizer.json": "{}", "chat_template.jinja": "x",
             "generation_config.json":
             '{"eos_token_id": [9, 8], "pad_token_id": 5}',
             "LICENSE": "Apache"}
    for name, text in {**extra, "training_args.bin": "", "x.py": ""}.items():
        (root / name).write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("of somebody else")
    convert(root, root / "original", "original")
    names = {p.name for p in (root / "original").iterdir()}
    assert names == {*extra, "config.json", "manifest.json",
                     "model.safetensors"}
    # the original spelling has no token ids: generation_config has
    convert(root / "original", tmp_path / "hf", "hf")
    with Checkpoint.open(tmp_path / "hf") as checkpoint:
        assert checkpoint.config == replace(TINY, eos_token_id=9,
                                            pad_token_id=5)
    # a released original/ has its companions one level up
    for name in extra:
        (root / "original" / name).unlink()
    convert(root / "original", tmp_path / "again", "hf")
    assert {p.name for p in (tmp_path / "again").iterdir()} >= set(extra)


def test_only_known_companions_come_along(made, tmp_path):
    """Not what else lies there, and nothing through a link that leaves."""
    folder, secret = tmp_path / "model", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("of somebody else")
    for file in made["hf"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("credentials.json", "secret.txt", "README", "LICENSE.pem",
                 "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "LICENSE").symlink_to(secret)
    (folder / "README.md").symlink_to("tokenizer.json")
    os.mkfifo(folder / "NOTICE")
    convert(folder, tmp_path / "new", "original")
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        "config.json", "manifest.json", "model.safetensors",
        "tokenizer.json", "README.md"}


def test_companions_of_a_snapshot_are_links_into_its_store(made, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    store = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    store.mkdir()
    (tmp_path / "elsewhere").write_text("{}")
    for file in made["hf"].iterdir():
        (store / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (store / "blob").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/blob")
    (snapshot / "LICENSE").symlink_to("../../../elsewhere")
    convert(snapshot, tmp_path / "new", "hf")
    names = {p.name for p in (tmp_path / "new").iterdir()}
    assert "tokenizer.json" in names and "LICENSE" not in names


@pytest.mark.parametrize("text", [
    "{", "[]", "[" * 10 ** 5, "3", '{"eos_token_id": "x"}',
    '{"eos_token_id": [null]}', '{"pad_token_id": -1}', "\xff"])
def test_a_damaged_generation_config_is_named(made, tmp_path, text):
    (tmp_path / "original").mkdir()
    for file in made["original"].iterdir():
        (tmp_path / "original" / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "generation_config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises((CheckpointError, ConfigError),
                       match="generation_config.json: ") as caught:
        convert(tmp_path / "original", tmp_path / "new", "hf")
    assert "\n" not in str(caught.value) and "Error" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_progress_and_refusals(made, tmp_path):
    seen = []
    convert(made["hf"], tmp_path / "m", "original", progress=seen.append)
    assert seen == list(tensor_table(TINY))
    with pytest.raises(CheckpointError, match="layout.*gguf"):
        convert(made["hf"], tmp_path / "n", "gguf")
    with pytest.raises(CheckpointError, match="expected a new"):
        convert(made["hf"], made["hf"], "original")
    with pytest.raises(CheckpointError, match="absent"):
        convert(tmp_path / "absent", tmp_path / "n", "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


MEMORY = """
import sys
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.convert import convert

def resident():
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return [1024 * int(fields[k].split()[0]) for k in ("RssAnon", "VmRSS")]

source, target, layout = sys.argv[1:]
convert(source, target + "-warm-up", layout)
before, most = resident(), [0, 0]

def note(name):
    global most
    most = [max(pair) for pair in zip(most, resident())]

convert(source, target, layout, progress=note)
print(*(m - b for m, b in zip(most, before)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["original", "bf16"])
def test_converting_takes_little_memory(tmp_path, layout):
    config = replace(TINY, vocab_size=20_000, num_local_experts=2048)
    write_checkpoint(tmp_path / "m", config, random_tensors(config))
    largest = max(s.nbytes for s in tensor_table(config).values())
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "m", tmp_path / "n",
         layout], check=True, capture_output=True, text=True).stdout
    private, resident = map(int, out.split())
    assert private < 5_000_000  # of its own: some rows
    assert resident < largest + 5_000_000  # with what is mapped
    assert checkpoint_bytes(config) > 2 * (largest + 5_000_000)


# ---- Random tensors and description

def test_random_tensors():
    one, two = (dict(random_tensors(TINY, seed)) for seed in (0, 1))
    assert same(one, dict(random_tensors(TINY)))
    assert same(one, dict(random_tensors(TINY, layout="original")))
    assert not any(torch.equal(one[n], two[n]) for n in one)
    deeper = dict(random_tensors(replace(
        TINY, num_hidden_layers=4, layer_types=None)))
    assert same(one, {n: deeper[n] for n in one})  # by name, not by order
    for name, t in one.items():
        assert t.float().abs().max() > 0
        if name.endswith("_scales"):
            assert t.max() < 255 and len(t.unique()) == 3
        if name.endswith("_blocks"):
            assert len(t.unique()) == 256
        if t.ndim == 2 and name.endswith("proj.weight"):
            assert 0.8 < t.float().std() * t.shape[1] ** 0.5 < 1.25
    for stem in ("gate_up_proj", "down_proj"):
        stem = f"model.layers.0.mlp.experts.{stem}"
        w = decode(one[stem + "_blocks"], one[stem + "_scales"])
        dense = dict(random_tensors(TINY, layout="bf16"))[stem]
        assert torch.equal(dense, w.transpose(1, 2))
        assert 0.5 < w.float().std() * w.shape[-1] ** 0.5 < 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_describe(made, layout, monkeypatch):
    monkeypatch.setattr(Checkpoint, "_map", None)  # no weight is read
    report = describe(made[layout])
    assert json.loads(json.dumps(report)) == report
    table = tensor_table(TINY, layout)
    total = sum(s.nbytes for s in table.values())
    assert report["layout"] == layout and report["bytes"] == total
    assert report["tensors"] == len(table)
    assert report["files"] == sorted(
        p.name for p in made[layout].glob("*.safetensors"))
    assert report["config"] == TINY.to_hf_dict()
    assert report["parameters"] == parameter_counts(TINY)
    assert report["parameters_total"] == total_parameters(TINY)
    assert report["parameters_active"] == active_parameters(TINY)
    assert sum(report["bytes_by_dtype"].values()) == total
    parts = report["bytes_by_component"]
    assert sum(parts.values()) == total
    for part, count in parameter_counts(TINY).items():
        if part != "experts" or layout == "bf16":
            assert parts[part] == 2 * count
    if layout == "bf16":
        assert report["bytes_by_dtype"] == {"BF16": total}
        assert report["bytes_read_per_token"] == 2 * (
            active_parameters(TINY) + TINY.hidden_size)
    else:
        assert report["bytes_read_per_token"] == bytes_read_per_token(TINY)


def test_a_packed_model_can_be_saved_by_torch(made, tmp_path):
    """Every tensor has a storage of its own, of its own size."""
    from gptoss.model.transformer import GptOss

    model = GptOss.from_pretrained(made["hf"])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    size = sum(t.nbytes for t in model.state_dict().values())
    assert (tmp_path / "state.pt").stat().st_size < 1.5 * size + 100_000
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    assert again.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name
    model.load_state_dict(again)


# ---- One file or folder, whole or not at all

def test_a_draft_takes_its_place_in_one_step(tmp_path):
    file, folder = tmp_path / "note", tmp_path / "set"
    for text in ("old", "new"):
        with drafted(file) as draft:
            assert draft.parent == tmp_path and draft.name.startswith(".note")
            draft.write_text(text)
            assert not file.exists() or file.read_text() == "old"
        assert file.read_text() == text
    with drafted(folder) as draft:
        draft.mkdir()
        (draft / "one").write_text("1")
        assert not folder.exists()
    assert (folder / "one").read_text() == "1"
    assert sorted(tmp_path.iterdir()) == [file, folder]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_draft_that_fails_leaves_what_was_there(tmp_path, kind, error):
    file = tmp_path / "note"
    file.write_text("old")
    with pytest.raises(error), drafted(file) as draft:
        if kind == "folder":
            draft.mkdir()
            (draft / "one").write_text("half")
        elif kind == "file":
            draft.write_text("half")
        raise error
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_draft_that_nobody_made_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), drafted(tmp_path / "note"):
        pass
    assert list(tmp_path.iterdir()) == []
