"""Checkpoints damaged at random: one line and exit 2, or the same answer.

A case is a seed. GPTOSS_FUZZ=40 makes forty times as many.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import random_tensors
from safetensors.torch import load_file, save_file
from test_checkpoint import SPELLINGS
from test_cli import CONFIG, write_model

from gptoss.cli.commands import main
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.convert import convert
from gptoss.weights.layout import LAYOUTS
from gptoss.weights.write import write_checkpoint

CASES = 12 * int(os.environ.get("GPTOSS_FUZZ", "1"))  # a layout
KINDS = (*LAYOUTS, "blocks", "each expert")
INDEX = "model.safetensors.index.json"

# what a damaged case may end in, if it is taken: the same answer, or (the
# damage makes another model that nothing can tell from a sound one) any,
# which is the lesser of the two
ANY, SAME = "any", "same"

NASTY = (None, True, False, 0, 1, -1, 2, 3, 1.5, -0.0, 1e308, 1e-320, 10 ** 19,
         10 ** 400, 2 ** 31, 2 ** 63, "", "x", "16", "\0", "\x1b[2J", [], {},
         [1], [None], [[]], {"a": 1}, ["x"] * 40, float("inf"), float("nan"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """One model in every layout and under two other spellings."""
    root = tmp_path_factory.mktemp("sound")
    small = write_model(root / "small")
    write_checkpoint(root / "hf", CONFIG, random_tensors(CONFIG, 1).items(),
                     max_shard_bytes=20_000)
    for layout in ("original", "bf16"):
        convert(root / "hf", root / layout, layout)
        (root / layout / "manifest.json").unlink()
    with Checkpoint.open(root / "bf16") as checkpoint:
        decoded = {n: checkpoint.read(n).clone() for n in checkpoint.names()}
    for spelling in KINDS[3:]:
        shutil.copytree(root / "bf16", root / spelling)
        save_file({n: t.contiguous().clone() for n, t in SPELLINGS[spelling](
            decoded).items()}, root / spelling / "model.safetensors")
    for kind in KINDS:
        for name in ("tokenizer.json", "generation_config.json"):
            shutil.copy(small / name, root / kind)
    return {kind: root / kind for kind in KINDS}


# --- One damage --------------------------------------------------------------

def weights(chance: random.Random, folder: Path) -> Path | None:
    files = sorted(folder.glob("model*.safetensors"))
    return chance.choice(files) if files else None


def header(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + n]), raw[8 + n:]


def entry_of_a_header(chance: random.Random, folder: Path) -> str:
    """A shape, a dtype, an offset or a name that is another."""
    file = weights(chance, folder)
    said, data = header(file)
    name = chance.choice([n for n in said if n != "__metadata__"])
    key = chance.choice(("shape", "dtype", "data_offsets", "name", "gone",
                         "all"))
    entry, ends = said[name], SAME
    if key == "name":
        said[chance.choice((name + "x", "", "lm_head.weight", name[6:],
                            "model." + name))] = said.pop(name)
    elif key == "gone":
        del said[name]
    elif key == "all":
        said[name] = chance.choice(NASTY)
    elif key == "dtype":
        entry[key] = chance.choice(("F32", "F16", "BF16", "F64", "U8", "I8",
                                    "F8_E4M3", "BOOL", 3, None, []))
        ends = ANY  # F16 has as many bytes as BF16
    else:
        at = chance.randrange(len(entry[key]))
        entry[key][at] = chance.choice((*NASTY, entry[key][at] + 1,
                                        entry[key][at] * 2))
        if chance.random() < 0.3:
            entry[key] = entry[key][::-1]
    text = json.dumps(said).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return ends


def bytes_of_a_header(chance: random.Random, folder: Path) -> str:
    file = weights(chance, folder)
    raw = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(chance.choice((1, 1, 2, 8))):
        raw[chance.randrange(end)] = chance.randrange(256)
    file.write_bytes(raw)
    return ANY if b"F16" in raw[:end].replace(b"BF16", b"") else SAME


def length_of_a_file(chance: random.Random, folder: Path) -> str:
    file = weights(chance, folder)
    raw = file.read_bytes()
    cut = chance.randrange(len(raw))
    file.write_bytes(chance.choice((
        raw[:cut], raw + raw[:cut + 1], b"", raw[:8], raw[:7], raw[8:],
        b"\0" * len(raw), b"version https://git-lfs", raw[cut:])))
    return SAME


def numbers_of_a_file(chance: random.Random, folder: Path) -> str:
    file = weights(chance, folder)
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(chance.choice((1, 4, 64))):
        raw[chance.randrange(start, len(raw))] = chance.choice((0, 127, 255))
    file.write_bytes(raw)
    return ANY


def floats_of_a_file(chance: random.Random, folder: Path) -> str:
    """Wider floats are the same numbers; narrower and others are not."""
    file = weights(chance, folder)
    dtype = chance.choice((torch.float32, torch.float64, torch.float16,
                           torch.int16, torch.float8_e4m3fn))
    tensors = {n: t.to(dtype) if t.is_floating_point()
               and chance.random() < 0.6 else t
               for n, t in load_file(file).items()}
    save_file(tensors, file)
    return SAME if dtype in (torch.float32, torch.float64) else ANY


def tensors_of_a_file(chance: random.Random, folder: Path) -> str:
    file = weights(chance, folder)
    tensors = load_file(file)
    name = chance.choice(sorted(tensors))
    kind = chance.randrange(5)
    if kind == 0:
        tensors[name] = tensors[name][:-1].contiguous()
    elif kind == 1:
        tensors[name] = tensors[name][None].contiguous()
    elif kind == 2:
        tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    elif kind == 3:
        tensors[f"{name}.lora_A.weight"] = torch.ones(4)
    else:
        tensors = {n.replace(chance.choice(("layers.1", "mlp", "_")), "y", 1)
                   if n == name else n: t for n, t in tensors.items()}
    save_file(tensors, file)
    return SAME


def file_of_a_kind(chance: random.Random, folder: Path) -> str:
    """Something else in the place of a file, or beside the files."""
    there = [p for p in folder.iterdir() if p.name != "tokenizer.json"]
    file = chance.choice((*there, folder / INDEX,
                          folder / "model-00009-of-00009.safetensors",
                          folder / "adapter_model.safetensors",
                          folder / "model.safetensors"))
    file.unlink(missing_ok=True)
    kind = chance.randrange(7)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.symlink_to(chance.choice(("/dev/zero", "/dev/null", "/proc/self/"
                                       "mem", file.name, "nowhere", "..")))
    elif kind == 3:
        file.write_bytes(chance.randbytes(chance.choice((0, 9, 500))))
    elif kind == 4:
        file.write_bytes(b"[" * 10 ** 5)
    elif kind == 5:
        shutil.copy(there[0], file) if there[0] != file else None
    return SAME if kind != 6 or "config" not in file.name else ANY


def index_of_the_files(chance: random.Random, folder: Path) -> str:
    file = folder / INDEX
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if not file.exists():
        tensors = [n for name in names for n in header(folder / name)[0]
                   if n != "__metadata__"]
        said = {"weight_map": dict.fromkeys(tensors, names[0])}
    else:
        said = json.loads(file.read_text())
    named = said["weight_map"]
    name = chance.choice(sorted(named))
    kind = chance.randrange(5)
    if kind == 0:
        del named[name]
    elif kind == 1:
        named[name] = chance.choice((*names, *NASTY, "../x.safetensors"))
    elif kind == 2:
        named[name + "x"] = names[0]
    elif kind == 3:
        said["weight_map"] = chance.choice(NASTY)
    file.write_text(json.dumps(said))
    return SAME


def value_of_the_config(chance: random.Random, folder: Path) -> str:
    file = folder / "config.json"
    said = json.loads(file.read_text())
    where = said
    key = chance.choice(sorted(said))
    if key in ("rope_scaling", "layer_types") and chance.random() < 0.7:
        where = said[key]
        key = chance.choice(sorted(where) if isinstance(where, dict)
                            else range(len(where)))
    if chance.random() < 0.2 and isinstance(where, dict):
        del where[key]
    else:
        where[key] = chance.choice(NASTY)
    file.write_text(json.dumps(said))
    return ANY


def text_of_a_json(chance: random.Random, folder: Path) -> str:
    file = folder / chance.choice(("config.json", "generation_config.json"))
    raw = bytearray(file.read_bytes())
    kind = chance.randrange(4)
    if kind == 0:
        raw = raw[:chance.randrange(len(raw))]
    elif kind == 1:
        raw[chance.randrange(len(raw))] = chance.randrange(256)
    elif kind == 2:
        raw = json.dumps(chance.choice(NASTY)).encode()
    else:
        raw = raw.decode().encode(chance.choice(("utf-16", "utf-8-sig")))
    file.write_bytes(raw)
    return ANY


def stop_of_the_generation(chance: random.Random, folder: Path) -> str:
    (folder / "generation_config.json").write_text(json.dumps(chance.choice((
        {"eos_token_id": chance.choice(NASTY)}, {}, {"temperature": 0.7},
        {"eos_token_id": [1, chance.choice(NASTY)]}, chance.choice(NASTY)))))
    return ANY


DAMAGES: tuple[Callable[[random.Random, Path], str], ...] = (
    entry_of_a_header, bytes_of_a_header, length_of_a_file,
    numbers_of_a_file, floats_of_a_file, tensors_of_a_file, file_of_a_kind,
    index_of_the_files, value_of_the_config, text_of_a_json,
    stop_of_the_generation)


# --- What comes of it --------------------------------------------------------

def run(argv: list[str]) -> tuple[int, str, str]:
    """A command in this process, for at most 30 seconds."""
    def ring(*_) -> None:
        raise TimeoutError("30 s")

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, out.getvalue(), err.getvalue()


def commands(folder: Path, target: Path, layout: str) -> dict[str, list[str]]:
    return {"inspect": ["inspect", str(folder), "--json"],
            "generate": ["generate", "--model", str(folder), "--prompt", "ab",
                         "--temperature", "0", "--max-new-tokens", "3",
                         "--json"],
            "convert": ["convert", str(folder), str(target), "--layout",
                        layout]}


def answers(folder: Path, target: Path, layout: str
            ) -> dict[str, list | None]:
    """Command -> what it said of the model, None if it refused. Fails if it
    did anything else."""
    found: dict[str, list | None] = {}
    for command, argv in commands(folder, target, layout).items():
        code, out, err = run(argv)
        assert code in (0, 2), (command, code, err)
        found[command] = None
        if code == 2:
            assert out == "" and err.startswith("gptoss: error: "), err
            assert err.count("\n") == 1 and len(err) < 2000, err
            assert not re.search(r"\b[A-Z]\w+(Error|Exception)\b", err), err
            assert "\x1b" not in err
            assert command != "convert" or not target.exists()
        elif command == "inspect":
            said = json.loads(out)
            found[command] = [said["parameters_total"], said["config"]]
        elif command == "generate":
            found[command] = json.loads(out)["tokens"]
        else:
            with Checkpoint.open(target) as checkpoint:
                found[command] = [checkpoint.read(name).double().sum().item()
                                  for name in checkpoint.names()]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(sound, tmp_path, kind) -> None:
    counts: Counter[str] = Counter()
    faults: list[str] = []
    good = {layout: answers(sound[kind], tmp_path / f"good-{layout}", layout)
            for layout in LAYOUTS}
    assert all(found for each in good.values() for found in each.values())
    for seed in range(CASES):
        chance = random.Random(f"{kind} {seed} 2026")
        root = tmp_path / str(seed)
        folder = Path(shutil.copytree(sound[kind], root / "model",
                                      symlinks=True))
        damage = DAMAGES[seed % len(DAMAGES)]
        ends = damage(chance, folder)
        # and another one on top, unless there is now what must not be read
        if chance.random() < 0.15 and damage is not file_of_a_kind:
            with contextlib.suppress(Exception):  # the first left nothing
                ends = min(chance.choice(DAMAGES)(chance, folder), ends)  # any
        layout = chance.choice(LAYOUTS)
        try:
            found = answers(folder, root / "new", layout)
            if damage is not stop_of_the_generation:
                assert found["generate"] is None or found["inspect"], found
            for command, said in found.items():
                counts["refused" if said is None else ends] += 1
                assert said is None or ends == ANY or (
                    said == good[layout][command]), command
            left = {p.name for p in root.iterdir()} - {"model", "new"}
            assert not left, left
        except (Exception, SystemExit) as error:
            faults.append(f"{kind}, seed {seed}, {damage.__name__}: "
                          f"{type(error).__name__} {error}"[:900])
            print(faults[-1], flush=True)
        shutil.rmtree(root)
    print(kind, CASES, dict(counts))
    assert not faults
    assert counts["refused"] and counts[SAME] and counts[ANY]
