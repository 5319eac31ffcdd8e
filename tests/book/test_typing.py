"""The package, and a program that uses its public names, under mypy."""

import subprocess
import sys
from pathlib import Path

import pytest

import gptoss

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = '''
import torch

import gptoss
from gptoss import Chat, GptOss, GptOssConfig, Tokenizer
from gptoss.harmony import Message, StreamParser, Tool, parse, render

config: GptOssConfig = GptOssConfig.gpt_oss_20b()
model: GptOss = GptOss.from_pretrained("x", dtype=torch.bfloat16)
logits: torch.Tensor = model(torch.tensor([[1, 2]]))
cache = model.new_cache(batch_size=1, max_tokens=4096)
logits = model(torch.tensor([[3]]), cache=cache)
where: torch.device = model.device
blocks, scales = gptoss.mxfp4.encode(torch.zeros(2, 32))
values: torch.Tensor = gptoss.mxfp4.decode(blocks, scales, torch.float32)

tokenizer: Tokenizer = Tokenizer.from_pretrained("x")
ids: list[int] = render(tokenizer, [Message("user", "Hello")])
messages: list[Message] = parse(tokenizer, ids)
parser = StreamParser(tokenizer)
for token in ids:
    parser.feed(token)
tool = Tool("add", "Adds.", {"type": "object"})

chat = Chat(None, effort="medium", tools=())
for text in chat.reply([{"role": "user", "content": "Hello"}]):
    print(text.upper())
for event in chat.events([{"role": "user", "content": "Hello"}]):
    print(event.kind, event.text)
'''
WRONG = PROGRAM + "count: int = model.device\nchat.reply(3)\n"


# one run for all tests, so that the types of torch are read once
pytestmark = pytest.mark.xdist_group("mypy")


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, list[str]]:
    """What mypy finds, with its defaults (but what pyproject.toml leaves out):
    in the package under test, in a program that uses it and in one that uses
    it wrongly."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "gptoss",
         *map(str, folder.glob("*.py"))],
        cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    assert lines[-1].startswith("Found ") and "checked" in lines[-1], lines
    found = {"gptoss": [], "program.py": [], "wrong.py": []}
    for line in (line for line in lines if ": error:" in line):
        file = Path(line.partition(":")[0])
        found[file.name if file.name in found else "gptoss"].append(line)
    return found


def test_a_group_is_one_process(request):
    """xdist tells a group by the ids of its tests; if it cannot, fixtures
    that take minutes are made once for each process."""
    assert request.node.nodeid.endswith("@mypy") == (
        getattr(request.config.option, "loadgroup", False))


def test_the_package_is_typed(errors):
    assert Path(gptoss.__file__).parent == ROOT / "gptoss"
    assert errors["gptoss"] == []


def test_a_program_of_a_user(errors):
    assert errors["program.py"] == []


def test_a_wrong_program_of_a_user(errors):
    assert len(errors["wrong.py"]) == 2


def test_the_stubs_name_what_is_gathered():
    for name, homes in gptoss._SUBJECTS.items():
        text = (ROOT / "gptoss" / f"{name}.pyi").read_text()
        told = [line for line in text.splitlines()
                if line and not line.startswith("#")]
        assert told == [f"from gptoss.{home} import *" for home in homes]
