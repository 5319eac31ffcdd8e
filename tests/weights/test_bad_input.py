"""Every broken file: one line that names the culprit, and exit 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import random_tensors
from safetensors.torch import load_file, save_file
from test_cli import CONFIG, ROOT, write_model

import gptoss
from gptoss.cli.commands import main
from gptoss.model.rows import CacheError
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import GenerateError
from gptoss.weights.write import write_checkpoint

INDEX = "model.safetensors.index.json"
SHARD = 20_000  # bytes: several shards


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A sharded checkpoint with nothing wrong."""
    path = tmp_path_factory.mktemp("bad") / "good"
    one = write_model(tmp_path_factory.mktemp("bad") / "one")
    write_checkpoint(path, CONFIG, random_tensors(CONFIG, 1).items(),
                     max_shard_bytes=SHARD)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(one / name, path)
    return path


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    assert len(found) > 2
    return found


def edit(folder: Path, name: str, change) -> None:
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))


def config(folder: Path, **changes) -> None:
    edit(folder, "config.json", lambda data: data.update(changes))


def holder(folder: Path, name: str) -> Path:
    """The shard that holds tensor ``name``."""
    return folder / json.loads(
        (folder / INDEX).read_text())["weight_map"][name]


def tensor(folder: Path, name: str, change) -> None:
    """Replaces a tensor in its shard by ``change`` of it (None: leave out)."""
    shard = holder(folder, name)
    tensors = load_file(shard)
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})


ROUTER = "model.layers.1.mlp.router.weight"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"


def missing_shard(folder):
    shards(folder)[1].unlink()
    return shards(folder)[1].name[:5]


def truncated_shard(folder):
    shard = shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard.name


def empty_shard(folder):
    shards(folder)[0].write_bytes(b"")
    return shards(folder)[0].name


def not_safetensors(folder):
    shards(folder)[0].write_bytes(b"PK\x03\x04" * 1000)
    return shards(folder)[0].name


def no_weights(folder):
    for shard in shards(folder):
        shard.unlink()
    (folder / INDEX).unlink()
    return "model"


def index_names_absent_file(folder):
    edit(folder, INDEX, lambda d: d["weight_map"].update(
        {ROUTER: "model-99999-of-00001.safetensors"}))
    return "model-99999-of-00001.safetensors"


def index_names_file_outside(folder):
    edit(folder, INDEX, lambda d: d["weight_map"].update(
        {ROUTER: "../one/model.safetensors"}))
    return "../one/model.safetensors"


def index_names_absolute_file(folder):
    edit(folder, INDEX, lambda d: d["weight_map"].update(
        {ROUTER: "/etc/hostname"}))
    return "/etc/hostname"


def index_names_extra_tensor(folder):
    edit(folder, INDEX, lambda d: d["weight_map"].update(
        {"model.layers.7.surplus": shards(folder)[0].name}))
    return "model.layers.7.surplus"


def index_lacks_tensor(folder):
    edit(folder, INDEX, lambda d: d["weight_map"].pop(ROUTER))
    return ROUTER


def index_in_wrong_shard(folder):
    other = next(s.name for s in shards(folder)
                 if s != holder(folder, ROUTER))
    edit(folder, INDEX, lambda d: d["weight_map"].update({ROUTER: other}))
    return ROUTER


def index_is_not_json(folder):
    (folder / INDEX).write_text("{")
    return INDEX


def index_without_map(folder):
    (folder / INDEX).write_text("{}")
    return INDEX


def wrong_shape(folder):
    tensor(folder, ROUTER, lambda t: t[:, :-1].contiguous())
    return ROUTER


def wrong_dtype(folder):
    tensor(folder, ROUTER, lambda t: t.to(torch.int64))
    return ROUTER


def blocks_of_wrong_dtype(folder):
    tensor(folder, BLOCKS, lambda t: t.to(torch.int8))
    return BLOCKS


def missing_scales(folder):
    tensor(folder, SCALES, lambda t: None)
    return SCALES


def scale_255(folder):
    def change(scales):
        scales[1, 2, 0] = 255
        return scales
    tensor(folder, SCALES, change)
    return SCALES


def unknown_rope_type(folder):
    def change(data):
        data.pop("rope_parameters", None)
        data["rope_scaling"] = {"rope_type": "longrope", "factor": 2.0}
        data["rope_theta"] = 10000.0
    edit(folder, "config.json", change)
    return "longrope"


def unknown_layer_type(folder):
    config(folder, layer_types=["sliding_attention", "linear_attention"])
    return "linear_attention"


def too_few_layer_types(folder):
    config(folder, layer_types=["sliding_attention"])
    return "layer_types"


def another_model(folder):
    config(folder, model_type="llama")
    return "llama"


def tied_embeddings(folder):
    config(folder, tie_word_embeddings="yes")
    return "tie_word_embeddings"


def config_key_of_wrong_type(folder):
    config(folder, hidden_size="large")
    return "hidden_size"


def config_does_not_fit(folder):
    config(folder, hidden_size=64)
    return "expected"


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def config_is_not_json(folder):
    (folder / "config.json").write_text("model_type: gpt_oss")
    return "config.json"


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")
    return "config.json"


def config_is_binary(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    return "config.json"


# what only generation uses
def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


def bad_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    return "tokenizer.json"


def bad_generation_config(folder):
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": "stop"}')
    return "generation_config.json"


FILES = [missing_shard, truncated_shard, empty_shard, not_safetensors,
         no_weights, index_names_absent_file, index_names_file_outside,
         index_names_absolute_file, index_names_extra_tensor,
         index_lacks_tensor, index_in_wrong_shard, index_is_not_json,
         index_without_map, wrong_shape, wrong_dtype, blocks_of_wrong_dtype,
         missing_scales, unknown_rope_type, unknown_layer_type,
         too_few_layer_types, another_model, tied_embeddings,
         config_key_of_wrong_type, config_does_not_fit, no_config,
         config_is_not_json, config_is_a_list, config_is_binary]
NAMES = dict(ids=lambda break_: break_.__name__)


def one_line(capsys, argv: list[str], *culprits: str) -> str:
    """Runs a command that must fail; its line, which names the culprits."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gptoss: error: ") and err.count("\n") == 1
    for culprit in culprits:
        assert culprit in err
    return err


def test_the_good_one_works(folder, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", "a",
                 "--max-new-tokens", "1", "--json"]) == 0
    assert main(["inspect", str(folder)]) == 0


@pytest.mark.parametrize("break_", [
    *FILES, scale_255, no_tokenizer, bad_tokenizer, bad_generation_config],
    **NAMES)
def test_generate_names_what_is_broken(folder, capsys, break_):
    culprit = break_(folder)
    one_line(capsys, ["generate", "--model", str(folder), "--prompt", "a",
                      "--max-new-tokens", "1"], culprit)


@pytest.mark.parametrize("break_", FILES, **NAMES)
def test_inspect_and_convert_name_it_too(folder, capsys, tmp_path, break_):
    culprit = break_(folder)
    one_line(capsys, ["inspect", str(folder)], culprit)
    before = sorted(tmp_path.iterdir())
    one_line(capsys, ["convert", str(folder), str(tmp_path / "new"),
                      "--layout", "original"], culprit)
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


def test_a_convert_that_fails_late_leaves_nothing(folder, capsys, tmp_path,
                                                  monkeypatch):
    """The disk fills up while the second half is being written."""
    from gptoss.weights.checkpoint import Checkpoint

    read, calls = Checkpoint.read, []

    def failing(self, name, *args, **options):
        calls.append(name)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return read(self, name, *args, **options)

    monkeypatch.setattr(Checkpoint, "read", failing)
    before = sorted(tmp_path.iterdir())
    one_line(capsys, ["convert", str(folder), str(tmp_path / "new"),
                      "--layout", "original"], "No space left")
    assert len(calls) == 21 and sorted(tmp_path.iterdir()) == before


def test_convert_does_not_overwrite(folder, capsys, tmp_path):
    target = tmp_path / "there"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    one_line(capsys, ["convert", str(folder), str(target), "--layout",
                      "original"], "there")
    assert [p.name for p in target.iterdir()] == ["mine.txt"]


def test_convert_onto_itself(folder, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    one_line(capsys, ["convert", str(folder), str(folder), "--layout",
                      "original"], str(folder))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("command", [
    ["inspect"], ["generate", "--prompt", "a", "--model"]])
def test_no_such_place(capsys, tmp_path, command):
    one_line(capsys, [*command, str(tmp_path / "nowhere")], "nowhere")
    file = tmp_path / "file.txt"
    file.write_text("")
    one_line(capsys, [*command, str(file)], "file.txt")
    (tmp_path / "empty").mkdir()
    one_line(capsys, [*command, str(tmp_path / "empty")], "config.json")


def test_token_beyond_the_vocabulary(folder, capsys):
    """A tokenizer of another model: its ids have no row."""
    edit(folder, "tokenizer.json", lambda data: data["model"][
        "vocab"].update({"a": 900}))
    one_line(capsys, ["generate", "--model", str(folder), "--prompt", "xa"],
             "tokenizer.json", "'a'", "900")
    shutil.copy(Path(gptoss.__file__).parent / "pocket" / "tokenizer.json",
                folder)
    one_line(capsys, ["generate", "--model", str(folder), "--prompt",
                      "x the tree"], "tokenizer.json", "288", "1535")


def test_prompt_beyond_the_positions(folder, capsys):
    one_line(capsys, ["generate", "--model", str(folder), "--prompt",
                      "x" * 4097], "4097", "max_position_embeddings")


def test_cache_too_small(folder):
    model = GptOss.from_pretrained(folder)
    cache = model.new_cache(max_tokens=4)
    with pytest.raises(GenerateError, match="at most 4 .*max_tokens is 4"):
        generate(model, [1, 2, 3, 4, 5], cache=cache)
    with pytest.raises(CacheError, match="max_tokens is 4"):
        model(torch.tensor([[1, 2, 3, 4, 5]]), cache=cache)
    assert cache.length == 0


# -- no network -------------------------------------------------------------

@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_network_is_one_line(tmp_path, offline):
    done = subprocess.run(
        [sys.executable, "-m", "gptoss", "inspect", "nobody/nothing"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9",
                          "HF_HOME": str(tmp_path),
                          "HF_HUB_OFFLINE": offline})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("gptoss: error: ")
    assert done.stderr.count("\n") == 1
    assert "nobody/nothing" in done.stderr


def test_broken_checkpoint_from_a_real_process(folder):
    culprit = truncated_shard(folder)
    done = subprocess.run(
        [sys.executable, "-m", "gptoss", "generate", "--model", str(folder),
         "--prompt", "a"], cwd=ROOT, capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and culprit in done.stderr
