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


def mypy(*arguments: str, cache: Path) -> tuple[int, str]:
    """With its defaults; the package is the one under test."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.xdist_group("mypy")  # they share a cache
def test_the_package_is_typed(cache):
    assert Path(gptoss.__file__).parent == ROOT / "gptoss"
    code, said = mypy("-p", "gptoss", cache=cache)
    assert code == 0, said


@pytest.mark.xdist_group("mypy")
def test_a_program_of_a_user(cache, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    code, said = mypy(str(tmp_path / "program.py"), cache=cache)
    assert code == 0, said


@pytest.mark.xdist_group("mypy")
def test_a_wrong_program_of_a_user(cache, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    code, said = mypy(str(tmp_path / "wrong.py"), cache=cache)
    assert code == 1 and said.count("error:") == 2, said


def test_the_stubs_name_what_is_gathered():
    for name, homes in gptoss._SUBJECTS.items():
        text = (ROOT / "gptoss" / f"{name}.pyi").read_text()
        told = [line for line in text.splitlines()
                if line and not line.startswith("#")]
        assert told == [f"from gptoss.{home} import *" for home in homes]
