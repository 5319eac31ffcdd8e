"""parallel/split: a split model is the model, whoever carries the messages.

Two kinds of proof: threads of this process (`rehearse`); processes that talk
over gloo, started once for each size of the world and by torchrun.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from splits import (
    GREEDY,
    ODD,
    POCKET,
    PROMPT,
    TINY,
    exercise,
    free_ports,
    meet,
    near,
    whole,
    write_tiny,
)

from gptoss.chat.chat import Chat
from gptoss.chat.messages import ChatError
from gptoss.chat.tools import function_tool
from gptoss.cli import commands as cli
from gptoss.kernels import step
from gptoss.model.transformer import GptOss
from gptoss.parallel.collectives import Group, join, leave, rehearse
from gptoss.parallel.plan import Tally, traffic
from gptoss.parallel.shards import cut, mesh_rank
from gptoss.parallel.split import (
    Partition,
    SplitGptOss,
    load_split,
    replacements,
)
from gptoss.text.generate import generate
from gptoss.text.tokenizer import Tokenizer
from gptoss.weights.config import GptOssConfig
from gptoss.weights.layout import tensor_table
from gptoss.weights.sizes import checkpoint_bytes
from gptoss.weights.write import random_tensors, write_checkpoint

pytestmark = pytest.mark.xdist_group("split")  # one set of processes


# --- Threads -----------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("layout", "world", "stages"), [
    ("hf", 2, 1), ("hf", 4, 2), ("hf", 8, 1), ("hf", 5, 5),
    ("original", 2, 1), ("bf16", 4, 2)])
def test_threads_give_the_whole_model(tiny, layout, world, stages) -> None:
    model = whole(tiny[layout])
    wanted = exercise(model)
    found = rehearse(model.config, world, stages, lambda mesh, group: exercise(
        SplitGptOss.part(tiny[layout], mesh, group, torch.float32)))
    for rank in found:
        assert all(map(near, rank[:4], wanted[:4]))
        assert torch.equal(rank[4], wanted[4])
        assert all(map(torch.equal, rank, found[0]))  # bit for bit


def test_unpacked_experts_are_split_too(tiny) -> None:
    wanted = exercise(whole(tiny["hf"]))[0]
    for found in rehearse(TINY, 2, 1, lambda mesh, group: exercise(
            SplitGptOss.part(tiny["hf"], mesh, group, torch.float32,
                             packed=False))[0]):
        assert near(found, wanted)


# --- A vocabulary of any size ------------------------------------------------

@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "model"
    write_checkpoint(folder, ODD, random_tensors(ODD))
    return folder


@pytest.mark.parametrize(("world", "stages"), [(2, 1), (3, 1), (6, 1),
                                               (6, 2), (4, 4)])
def test_threads_share_a_vocabulary_of_any_size(odd, world, stages) -> None:
    model = whole(odd)
    wanted = exercise(model)
    text = list(generate(model, PROMPT[1].tolist(), sampler=GREEDY,
                         max_new_tokens=24))

    def work(mesh, group):
        part = SplitGptOss.part(odd, mesh, group, torch.float32)
        return exercise(part), list(generate(
            part, PROMPT[1].tolist(), sampler=GREEDY, max_new_tokens=24))

    for logits, tokens in rehearse(ODD, world, stages, work):
        assert logits[0].shape[-1] == 101 and tokens == text
        assert all(map(near, logits[:4], wanted[:4]))


def attend_odd(rank: int, world: int, port: int, odd: Path, folder: Path
               ) -> None:
    meet(rank, world, port)
    model = load_split(odd, "float32")
    tokens = list(generate(model, PROMPT[1].tolist(), sampler=GREEDY,
                           max_new_tokens=24))
    with Tally() as tally, torch.inference_mode():
        logits = model(PROMPT[:1])
    torch.save((tokens, logits, dict(tally.counts), model.mesh),
               folder / f"{world}-{rank}.pt")
    torch.distributed.barrier()
    leave()


def test_processes_share_a_vocabulary_of_any_size(odd, tmp_path) -> None:
    model, context = whole(odd), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gptoss.parallel.split", "pytest",
                                    "hypothesis", "gptoss.chat.chat"])
    text = list(generate(model, PROMPT[1].tolist(), sampler=GREEDY,
                         max_new_tokens=24))
    for world, port in zip((2, 3), free_ports(2), strict=True):
        made = [context.Process(target=attend_odd, args=(
            rank, world, port, odd, tmp_path)) for rank in range(world)]
        for process in made:
            process.start()
        for process in made:
            process.join(300)
            process.kill()
        assert [process.exitcode for process in made] == [0] * world
        for rank in range(world):
            tokens, logits, counts, mesh = torch.load(
                tmp_path / f"{world}-{rank}.pt", weights_only=False)
            assert tokens == text and near(logits, model(PROMPT[:1]))
            assert counts == {(name, size): calls for name, (calls, size)
                              in traffic(ODD, mesh, 40, 40, 4).items()}


# --- Processes over gloo -----------------------------------------------------

STAGES = {1: [1], 2: [1, 2], 4: [2, 1], 8: [1]}
COMMANDS = (
    (["generate", "--prompt", "-", "--temperature", "0", "--dtype",
      "float32", "--max-new-tokens", "30"], b"Once upon a time"),
    (["chat", "--temperature", "0.7", "--seed", "3", "--dtype", "float32",
      "--max-new-tokens", "24", "--transcript", "--date", "2025-06-28"],
     b"Hello!\nWhat is 3 + 4?\n"),
    (["chat", "--stages", "2", "--max-new-tokens", "8"], b"Hello!\n"),
    (["bench", "--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1",
      "--json"], b""),
    (["inspect"], b""),
)
# --- A chat on several ranks -------------------------------------------------

CALL = ("<|channel|>commentary to=functions.{} <|constrain|>json<|message|>"
        "{}<|call|>")
SAID = ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        "<|channel|>final<|message|>{}<|return|>")


def dictate(one: Chat, text: str) -> None:
    """Have `one` write `text`, control tokens by name, then greedily."""
    special = one.tokenizer.special
    ids = iter([n for part in re.split(r"(<\|\w+\|>)", text) for n in (
        [special[part]] if part in special else one.tokenizer.encode(part))])
    one.settings = one.settings.with_changes(
        temperature=1.0, sampler=lambda logits, generator: torch.tensor(
            [next(ids)]) if ids.__length_hint__() else GREEDY(logits))


def agent(model: GptOss, rank: int, note: Callable[[str], None],
          seconds: float) -> list[dict]:
    """Turns of which each rank has its own idea: what came of each."""
    def mail(to: str) -> str:
        note(f"mail to {to} by {rank}")
        return "sent" + " again" * rank * 9

    def broken() -> str:
        note(f"broken by {rank}")
        if rank == 0:
            raise OSError("no line")
        return "fine here"

    def slow() -> str:
        note(f"slow by {rank}")
        time.sleep(seconds)
        return "at last"

    def late() -> str:
        note(f"late by {rank}")
        time.sleep(9 * (rank == 0))
        return "never told"

    one = Chat((model, Tokenizer.from_pretrained(POCKET)), temperature=0.9,
               tools=[mail, broken, slow,
                      function_tool(late, timeout=0.1)])
    found = []

    def turn(text: str, leave: int = -1, count: int = 0, **options) -> None:
        dictate(one, text)
        asked = [{"role": "user", "content": f"Question of rank {rank}."}]
        kinds = []
        for event in one.events(asked, **options):
            kinds.append(event.kind)
            if rank == leave and len(kinds) == count:
                break
        found.append({"turn": one.turn, "tokens": one.session.prefix.tokens,
                      "date": one.settings.date, "kinds": kinds,
                      "usage": one.usage and replace(one.usage, seconds=0)})

    turn(CALL.format("mail", '{"to": "Ann"}') + CALL.format("broken", "")
         + CALL.format("slow", "") + CALL.format("late", "{}")
         + SAID.format("Done."))
    for left in (0, 1):  # the first is left, and the other follows
        turn(SAID.format("A long answer, left or not."), left, 9)
    turn(CALL.format("mail", '{"to": "Eve"}'), 0, 1)  # before the tool runs
    nine = iter(range(9))
    turn(SAID.format("Stopped."),
         stop=lambda: rank == 0 and next(nine, None) is None)
    dictate(one, SAID.format("Unread."))
    one.events([{"role": "user", "content": "?"}])  # nobody reads this one
    one.settings = one.settings.with_changes(
        sampler=None, temperature=0.9, max_new_tokens=20)
    asked = [{"role": "user", "content": f"Hello from {rank}!"}]
    list(one.events(asked))
    found.append({"turn": one.turn, "tokens": one.session.prefix.tokens})
    try:
        one.reply([] if rank == 0 else asked)
    except ChatError as error:
        found.append(str(error))
    return found


def check_agent(ranks: list[list], noted: list[str]) -> None:
    """All ranks say the same, which is what the first found."""
    assert sorted(noted) == sorted(
        f"{name} by 0" for name in ("mail to Ann", "broken", "slow", "late"))
    for other in ranks:
        for here, first in zip(other, ranks[0], strict=True):
            if isinstance(first, dict):
                assert here["turn"] == first["turn"]
                assert here["tokens"] == first["tokens"]
        assert other[0]["date"] == "2025-01-01"
        for n in (0, 4, 5):  # turns that nobody left
            assert other[n] == ranks[0][n]
        assert other[6].startswith("messages: expected a list of at least")
    first = ranks[0]
    assert [m["content"] for m in first[0]["turn"] if m["role"] == "tool"
            ] == ["sent", "error: OSError: no line", "at last",
                  "error: timed out after 0.1 s"]
    assert first[1]["usage"].finish_reason == "stopped"
    assert first[1]["turn"][0]["content"] and "left or not" not in str(
        first[1]["turn"])
    assert "left or not." in str(ranks[1][2]["turn"])  # only it was left
    assert len(ranks[1][2]["kinds"]) == 9
    assert first[3]["turn"] == [] and "call" in first[3]["kinds"]
    assert first[4]["usage"].finish_reason == "stopped"
    assert first[4]["usage"].generated_tokens == 9


@pytest.fixture
def own_dates(monkeypatch) -> None:
    """A calendar that goes on whenever it is looked at."""
    days = iter(range(1, 9))
    monkeypatch.setattr("gptoss.chat.chat.today",
                        lambda: f"2025-01-0{next(days)}")


@pytest.mark.parametrize("world, stages", [(2, 1), (2, 2), (4, 2)])
def test_a_chat_of_threads(world, stages, own_dates) -> None:
    noted: list[str] = []

    def work(mesh, group):
        model = SplitGptOss.part(POCKET, mesh, group, torch.float32)
        return agent(model, mesh.tp_rank + mesh.pp_rank * mesh.tp_size,
                     noted.append, 0.1)

    found = rehearse(GptOssConfig.from_pretrained(POCKET), world, stages,
                     work)
    check_agent(found, noted)


def work_as_agent(rank: int, port: int, folder: Path) -> list:
    """In one of two processes; a collective may take four seconds."""
    from gptoss.chat import chat

    os.environ["MASTER_PORT"] = str(port)
    joined = join(timeout=timedelta(seconds=4))
    chat.today = lambda: f"2025-01-0{rank + 1}"
    mesh = mesh_rank(GptOssConfig.from_pretrained(POCKET), rank, 2)
    model = SplitGptOss.part(POCKET, mesh, joined.group(mesh), torch.float32)

    def note(text: str) -> None:
        with open(folder / "noted.txt", "a") as file:
            file.write(text + "\n")

    found = agent(model, rank, note, 6)
    torch.rand(rank)  # as a tool may do; seeds are told all the same
    found.append({"turn": list(generate(model, [1, 2], max_new_tokens=9)),
                  "tokens": []})
    torch.distributed.barrier()
    leave()
    return found


def test_a_chat_of_processes(worlds) -> None:
    ranks = [rank["agent"] for rank in worlds[2]]
    check_agent(ranks, worlds[2][0]["noted"])


def attend(rank: int, world: int, ports: list[int], folder: Path) -> None:
    """One process: all that a world is asked for, into a file."""
    meet(rank, world, ports[0])
    joined, found = join(), {}
    config = GptOssConfig.from_pretrained(POCKET)
    for stages in STAGES[world]:
        mesh = mesh_rank(config, rank, world, stages)
        # decoded experts in the largest world: the same numbers, sooner
        model = SplitGptOss.part(POCKET, mesh, joined.group(mesh),
                                 torch.float32, packed=world < 8)
        cache = model.new_cache()
        count = 128 if stages == STAGES[world][0] else 32
        tokens = list(generate(model, PROMPT[1].tolist(), sampler=GREEDY,
                               max_new_tokens=count, cache=cache))
        with Tally() as tally, torch.inference_mode():
            model(PROMPT[:1, :1], cache)
        found[stages] = {
            "tokens": tokens, "logits": exercise(model), "mesh": mesh,
            "tally": dict(tally.counts), "bytes": model.bytes_read,
            "random": torch.rand(1), "same": joined.same(lambda: rank)}
    torch.distributed.barrier()  # rank 0 takes the store with it
    leave()
    if world == 2:
        found["commands"] = [run(rank, port, *command) for port, command
                             in zip(ports[1:], COMMANDS, strict=False)]
        found["agent"] = work_as_agent(rank, ports[-1], folder)
        found["noted"] = (folder / "noted.txt").read_text().splitlines()
    torch.save(found, folder / f"{world}-{rank}.pt")


def run(rank: int, port: int, argv: list[str], said: bytes
        ) -> tuple[int, str, str]:
    """A command in one of several processes; only the first has a stdin."""
    os.environ["MASTER_PORT"] = str(port)
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(said if rank == 0 else b""))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(argv)
        except BaseException:
            traceback.print_exc()
            code = -1
    leave()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict]]:
    """Size of the world -> what each of its ranks found."""
    folder = tmp_path_factory.mktemp("worlds")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gptoss.parallel.split", "pytest",
                                    "hypothesis", "gptoss.chat.chat"])
    found = {}
    for world in STAGES:
        ports = free_ports(2 + len(COMMANDS))
        made = [context.Process(target=attend,
                                args=(rank, world, ports, folder))
                for rank in range(world)]
        for process in made:
            process.start()
        for process in made:
            process.join(900)  # on a machine that is busy otherwise
            process.kill()
        assert [process.exitcode for process in made] == [0] * world
        found[world] = [torch.load(folder / f"{world}-{rank}.pt",
                                   weights_only=False)
                        for rank in range(world)]
    return found


@pytest.fixture(scope="module")
def alone() -> tuple[list[int], list[torch.Tensor]]:
    model = whole(POCKET)
    tokens = list(generate(model, PROMPT[1].tolist(), sampler=GREEDY,
                           max_new_tokens=128))
    return tokens, exercise(model)


SPLITS = [(world, stages) for world in STAGES for stages in STAGES[world]]


@pytest.mark.parametrize(("world", "stages"), SPLITS)
def test_processes_give_the_whole_model(worlds, alone, world, stages) -> None:
    tokens, logits = alone
    ranks = [rank[stages] for rank in worlds[world]]
    for rank in ranks:
        count = 128 if stages == STAGES[world][0] else 32
        assert rank["tokens"] == tokens[:count] and len(tokens) == 128
        assert all(map(near, rank["logits"][:4], logits[:4]))
        assert torch.equal(rank["logits"][4], logits[4])
        assert all(map(torch.equal, rank["logits"], ranks[0]["logits"]))
        assert torch.equal(rank["random"], ranks[0]["random"])
        assert rank["same"] == 0


@pytest.mark.parametrize(("world", "stages"), SPLITS)
def test_what_was_said_is_what_is_counted(worlds, world, stages) -> None:
    config = GptOssConfig.from_pretrained(POCKET)
    for rank in worlds[world]:
        found = rank[stages]
        wanted = traffic(config, found["mesh"], width=4)
        assert found["tally"] == {
            (name, size): calls for name, (calls, size) in wanted.items()}


def test_bytes_read_by_processes(worlds) -> None:
    size = checkpoint_bytes(GptOssConfig.from_pretrained(POCKET))
    for world in (1, 2, 4):
        for rank in worlds[world]:
            assert abs(rank[1]["bytes"] / (size / world) - 1) < 0.09


# --- The command line --------------------------------------------------------

def test_commands_of_two_processes(worlds, capsys, monkeypatch) -> None:
    first, second = (rank["commands"] for rank in worlds[2])
    assert [code for code, _, _ in first] == [0, 0, 0, 0, 2]
    assert [code for code, _, _ in second] == [0, 0, 0, 0, 2]
    assert all(out == "" for _, out, _ in second)
    assert [err for _, _, err in first[:4]] == [""] * 4
    for (argv, said), (_, out, _) in zip(COMMANDS[:2], first, strict=False):
        monkeypatch.setattr("sys.stdin",
                            io.TextIOWrapper(io.BytesIO(said)))
        assert cli.main(argv) == 0
        assert capsys.readouterr().out == out
    assert json.loads(first[3][1])["processes"] == 2
    assert first[4][2] == ("gptoss: error: torchrun is for generate, chat "
                           "and bench\n")
    assert second[4][2].startswith("gptoss: error: process 1: ")


def test_a_size_that_does_not_divide_is_one_line(monkeypatch, capsys) -> None:
    """Before anybody is waited for."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["generate"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == ("gptoss: error: number of processes: "
                                 "expected one of 1, 2, 4, 8, found 3\n")
    monkeypatch.delenv("WORLD_SIZE")
    assert cli.main(["generate", "--stages", "2"]) == 2
    assert "in 2 stages: expected one of 2, 4" in capsys.readouterr().err


def torchrun(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def test_two_machines(capsys) -> None:
    """Two agents of torchrun, as on two machines; sampled text."""
    argv = ["generate", "--seed", "7", "--max-new-tokens", "24", "--dtype",
            "float32"]
    port = str(free_ports(1)[0])
    agents = [torchrun("--nnodes", "2", "--node-rank", str(node),
                       "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
                       "--master-port", port, "-m", "gptoss", *argv)
              for node in range(2)]
    (code, out, err), (other, nothing, _) = map(ended, agents)
    assert (code, other) == (0, 0), err
    assert cli.main(argv) == 0
    assert out == capsys.readouterr().out and nothing == ""


DIES = """
import os, signal, sys
from gptoss.cli import commands as cli
from gptoss.parallel.split import SplitGptOss

if os.environ["RANK"] == "1":
    forward = SplitGptOss.forward
    def dying(self, tokens, cache=None, *args, **options):
        if cache.length > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, tokens, cache, *args, **options)
    SplitGptOss.forward = dying
sys.exit(cli.main(["generate", "--max-new-tokens", "400", "--seed", "0"]))
"""


def test_one_dies_and_all_end(tmp_path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    code, _, err = ended(torchrun("--standalone", "--nproc-per-node", "2",
                                  str(tmp_path / "dies.py")))
    assert code == 1
    assert "lost the others" in err or "SIGKILL" in err, err[-2000:]
    for module in ("split", "collectives"):
        # no traceback of ours
        assert f"gptoss/parallel/{module}.py" not in err


# --- Modules -----------------------------------------------------------------

def test_parts_are_modules_of_their_own() -> None:
    """Made for the shapes that a rank has; the whole model stays whole."""
    part = Partition(TINY, mesh_rank(TINY, 3, 4, 2), Group(), torch.float32,
                     torch.device("cpu"))
    model = GptOss(TINY, torch.float32, "meta")
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    made = dict(replacements(model, part))
    assert {name: x.shape for name, x in model.state_dict().items()} == shapes
    assert not {id(x) for x in model.modules()} & {
        id(x) for module in made.values() for x in module.modules()}
    for name, module in made.items():
        for leaf, tensor in module.state_dict().items():
            spec = tensor_table(TINY)[f"model.{name}.{leaf}" if "lm_head"
                                      not in name else f"{name}.{leaf}"]
            assert tensor.shape == cut(TINY, part.mesh, spec)[1], name


def test_a_split_model_is_never_recorded_and_needs_no_word(caplog) -> None:
    """Nobody is told why a part of a model has no recorded step."""
    alone = torch.nn.Linear(1, 1)
    part = SplitGptOss(TINY, mesh_rank(TINY, 0, 2), Group())
    for model in (part, alone, alone):
        step._told_why(model, "planted")
    assert [record.getMessage().endswith("planted")
            for record in caplog.records] == [True]
