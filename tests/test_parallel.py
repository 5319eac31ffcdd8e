"""Chapter 15: a split model is the model, whoever carries the messages.

Three kinds of proof, from cheap to dear: tables alone; threads of this
process (`rehearse`); processes that talk over gloo, started once for each
size of the world and by torchrun.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss import __main__ as cli
from gptoss import parallel
from gptoss.cache import Cache
from gptoss.chat import Chat, ChatError, function_tool
from gptoss.checkpoint import (
    LAYOUTS,
    Checkpoint,
    random_tensors,
    tensor_table,
    write_checkpoint,
)
from gptoss.config import (
    GptOssConfig,
    bytes_read_per_token,
    checkpoint_bytes,
)
from gptoss.generate import Sampler, generate
from gptoss.harmony import Tokenizer
from gptoss.model import GptOss
from gptoss.parallel import (
    Link,
    ParallelError,
    Seat,
    Shard,
    SplitGptOss,
    Tally,
    cut,
    fits,
    on_stage,
    rehearse,
    seat_cache,
    seat_config,
    shard_rule,
    stage_layers,
    take_seat,
    traffic,
)
from gptoss.plan import (
    CARDS,
    expected_most,
    plan,
    plan_table,
    seat_bytes,
    setup,
    token_seconds,
)

pytestmark = pytest.mark.xdist_group("parallel")  # one set of processes

POCKET = Path(str(files("gptoss") / "pocket"))
RELEASED = {"20b": GptOssConfig.gpt_oss_20b(),
            "120b": GptOssConfig.gpt_oss_120b()}
GREEDY = Sampler(temperature=0.0)
# more key/value heads, and an F of 6 blocks: slices and groups of experts
TINY = GptOssConfig(
    num_hidden_layers=5, num_local_experts=8, num_experts_per_tok=3,
    vocab_size=96, hidden_size=64, intermediate_size=192, head_dim=8,
    num_attention_heads=16, num_key_value_heads=8, sliding_window=6,
    max_position_embeddings=256, initial_context_length=32,
    eos_token_id=1, pad_token_id=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """TINY in each layout, the same numbers."""
    folder = tmp_path_factory.mktemp("tiny")
    original = replace(TINY, layer_types=None, max_position_embeddings=131072,
                       initial_context_length=4096)
    for layout in LAYOUTS:
        config = original if layout == "original" else TINY
        write_checkpoint(folder / layout, config,
                         random_tensors(config, 3, layout), layout)
    return {layout: folder / layout for layout in LAYOUTS}


def whole(path: Path) -> GptOss:
    return GptOss.from_pretrained(path, dtype=torch.float32)


def near(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Within 1e-5 of the spread of the logits."""
    return float((found - wanted).abs().max() / wanted.std()) < 1e-5


# --- Tables ------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_has_a_rule(layout) -> None:
    for name, spec in tensor_table(TINY, layout).items():
        if layout != "original":  # read under the names of "hf"
            assert len(shard_rule(name)[0]) == len(spec.shape), name
    with pytest.raises(ParallelError, match="rotary"):
        shard_rule("model.rotary")


def seats(config: GptOssConfig, world: int, stages: int = 1) -> list[Seat]:
    return [take_seat(config, rank, world, stages) for rank in range(world)]


@pytest.mark.parametrize(("world", "stages"), [
    (1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (4, 2), (8, 4), (5, 5), (10, 5)])
def test_parts_cover_every_number_once(world, stages) -> None:
    """Each element of each tensor is read by somebody; twice only where the
    table says copies, or where heads of a group are on several ranks."""
    for name, spec in tensor_table(TINY).items():
        times = torch.zeros(spec.shape)
        for seat in seats(TINY, world, stages):
            if on_stage(TINY, seat, name):
                index, shape, held = cut(TINY, seat, spec)
                assert times[index].shape == shape
                times[index] += held
        letters, holder = shard_rule(name)
        copies = 1
        if set(letters) == {"-"} and not holder:
            copies = world // stages
        if letters[0] == "KV":
            copies = max(1, world // stages // TINY.num_key_value_heads)
        assert (times == copies).all(), name


def test_gate_and_up_stay_together() -> None:
    """A slice begins at a gate row, at a border of blocks of F."""
    assert not fits(TINY, 3)
    config = replace(TINY, num_attention_heads=24, num_key_value_heads=3,
                     vocab_size=99)
    for seat in seats(config, 3):
        mine = parallel.owned(config, seat)
        assert seat.slices == 3 and seat.groups == 1
        assert mine["2F"].start == 64 * mine["F/32"].start
        assert mine["2F"].stop == 2 * mine["F"].stop


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_bytes_of_a_rank(name, world) -> None:
    """The sharded part within 5 % of total / world, on every rank."""
    config = RELEASED[name]
    copied = sum(
        spec.nbytes for spec in tensor_table(config).values()
        if set(shard_rule(spec.name)[0]) == {"-"})
    even = (checkpoint_bytes(config) - copied) / world
    for seat in seats(config, world):
        mine = 0
        for spec in tensor_table(config).values():
            _, shape, held = cut(config, seat, spec)
            if set(shard_rule(spec.name)[0]) != {"-"} and held:
                mine += math.prod(shape) * spec.nbytes // math.prod(
                    spec.shape)
        assert abs(mine / even - 1) < 0.05
        total = sum(seat_bytes(config, seat).values())
        assert total < 1.01 * (even + copied)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8, 24])
def test_stages_are_of_one_size(stages) -> None:
    config = RELEASED["20b"]
    layers = stage_layers(config, stages)
    assert list(itertools.chain(*layers)) == list(range(24))
    assert all(layers)
    sizes = [sum(seat_bytes(config, seat).values())
             for seat in seats(config, stages, stages)]
    layer = (checkpoint_bytes(config) - 2 * 2 * 201088 * 2880) / 24
    slack = max(layer, 2 * 201088 * 2880 - layer)  # a layer, or the head
    assert sum(sizes) == checkpoint_bytes(config)
    assert max(sizes) <= max(checkpoint_bytes(config) / stages + slack,
                             2 * 201088 * 2880 + layer + 10_000)


@pytest.mark.parametrize(("world", "stages", "said"), [
    (3, 1, "expected one of 1, 2, 4, 8, found 3"),
    (16, 1, "expected one of 1, 2, 4, 8, found 16"),
    (6, 2, "in 2 stages: expected one of 2, 4, 8, 16, found 6"),
    (3, 2, "in 2 stages: expected one of 2, 4, 8, 16, found 3"),
    (4, 0, "--stages: expected 1 to 4 .* found 0"),
    (8, 5, "--stages: expected 1 to 4 .* found 5")])
def test_sizes_that_do_not_divide(world, stages, said) -> None:
    config = GptOssConfig.from_pretrained(POCKET)
    with pytest.raises(ParallelError, match=said):
        take_seat(config, 0, world, stages)


def test_bytes_read_are_counted(tiny) -> None:
    with Checkpoint.open(tiny["hf"]) as checkpoint:
        total = 0
        for seat in seats(TINY, 4, 2):
            shard = Shard(checkpoint, seat)
            for name in shard.names():
                assert shard.read(name).is_contiguous()
            total += shard.bytes_read
        copied = sum(spec.nbytes for spec in tensor_table(TINY).values()
                     if set(shard_rule(spec.name)[0]) == {"-"}
                     and not shard_rule(spec.name)[1])
        assert total == checkpoint.nbytes + copied


# --- The plan ----------------------------------------------------------------

@given(st.sampled_from([(1, 4), (2, 2), (4, 2), (4, 1), (3, 3)]),
       st.integers(1, 4))
@settings(deadline=None, max_examples=15)
def test_busiest_group(shape, chosen) -> None:
    """Against all ways to choose."""
    groups, size = shape
    experts = groups * size
    chosen = min(chosen, experts)
    every = [max(sum(e // size == g for e in ids) for g in range(groups))
             for ids in itertools.combinations(range(experts), chosen)]
    assert math.isclose(expected_most(experts, chosen, groups),
                        sum(every) / len(every))


def test_plan() -> None:
    rows = plan(RELEASED["120b"], 8192)
    assert len(rows) == 4 * len(CARDS)
    fitting = {(row.gpus, row.card[:2]) for row in rows if row.fits}
    assert fitting == {(4, "24"), (8, "24"), (2, "40"), (4, "40"), (8, "40"),
                       (1, "80"), (2, "80"), (4, "80"), (8, "80")}
    for name, config in RELEASED.items():
        one = token_seconds(config, take_seat(config, 0, 1), CARDS[2], 1)
        assert one * 3350e9 == pytest.approx(bytes_read_per_token(config),
                                             rel=2e-3)
        text = plan_table(name, config, 4096)
        assert max(map(len, text.splitlines())) <= 79


def test_a_plan_that_does_not_divide() -> None:
    """Neither 4 nor 8 cards can share it, nor give a layer to each."""
    config = replace(TINY, num_hidden_layers=3, num_attention_heads=6,
                     num_key_value_heads=2, layer_types=None)
    rows = [row for row in plan(config) if row.gpus in (4, 8)]
    assert rows and not any(row.fits or row.weights or row.tensor
                            or row.pipeline for row in rows)
    text = plan_table("odd", config)
    assert text.count("not divisible") == len(rows)


@pytest.mark.parametrize("context", [0, -5, 2 ** 30 + 1, 10 ** 400])
def test_a_context_that_nothing_has(context, capsys) -> None:
    assert cli.main(["inspect", "20b", "--plan", "--context",
                     str(context)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--context: expected 1 to" in err


def test_plan_of_a_folder_with_original_alone(tiny, tmp_path, capsys) -> None:
    (tmp_path / "original").symlink_to(tiny["original"])
    assert cli.main(["inspect", "--plan", str(tmp_path)]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(RELEASED))
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_meetings_take_the_steps_of_a_ring(name: str, ranks: int) -> None:
    """What a step costs is paid 2(R - 1) times a sum, R - 1 a gathering;
    what beginning costs, once."""
    config = RELEASED[name]
    seat = take_seat(config, 0, ranks)
    free = replace(CARDS[2], link=math.inf, latency=0.0, step=0.0)
    sums = 2 * config.num_hidden_layers + 1
    least = token_seconds(config, seat, free, 100)

    def more(**costs: float) -> float:
        card = replace(free, **costs)
        return token_seconds(config, seat, card, 100) - least

    assert more(step=1.0) == pytest.approx(
        sums * 2 * (ranks - 1) + ranks - 1)
    assert more(latency=1.0) == pytest.approx(sums + 1)
    sent = sums * 2 * (ranks - 1) / ranks * 2 * config.hidden_size
    sent += (ranks - 1) * 2 * config.vocab_size / ranks
    assert more(link=1.0) == pytest.approx(sent)


def test_more_cards_can_be_slower() -> None:
    """Reading shrinks with the ranks, meetings grow."""
    for config in RELEASED.values():
        four, eight = (setup(config, n, CARDS[2], 8192).tensor for n in (4, 8))
        assert eight < four
        speeds = [1 / token_seconds(config, take_seat(config, 0, n),
                                    replace(CARDS[2], step=1e-3),
                                    8192) for n in (1, 2, 4, 8)]
        assert speeds == sorted(speeds, reverse=True)


def test_plan_command(capsys) -> None:
    assert cli.main(["inspect", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "120b" in shown and "20b" in shown and "does not fit" in shown
    assert cli.main(["inspect", "120b", "--plan", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["120b"]
    assert rows[0]["fits"] is False and rows[-1]["tensor"] > 0
    assert cli.main(["inspect", "120b", "--plan", "--context", "0"]) == 2
    assert "--context" in capsys.readouterr().err


# --- Threads -----------------------------------------------------------------

PROMPT = torch.randint(2, 96, (2, 40),
                       generator=torch.Generator().manual_seed(5))
MASK = torch.ones(2, 40, dtype=torch.bool)
MASK[0, :7] = False


def exercise(model: GptOss) -> list[torch.Tensor]:
    """Logits of a padded batch: at once, in pieces, after a rollback."""
    with torch.inference_mode():
        at_once = model(PROMPT, attention_mask=MASK)[MASK]
        cache = model.new_cache(2, slack=2)
        pieces = [model(PROMPT[:, part], cache, MASK[:, part])
                  for part in (slice(0, 13), slice(13, 14), slice(14, 40))]
        one = model.new_cache(max_tokens=60)
        model(PROMPT[1:], one)
        start = one.rollback(20)
        again = model(PROMPT[1:, start:], one)[:, 20 - start:]
        last = model(PROMPT[1:, :3], one, logits_to_keep=1)
    return [at_once, torch.cat(pieces, 1)[MASK], again, last,
            torch.tensor([start])]


@pytest.mark.parametrize(("layout", "world", "stages"), [
    ("hf", 2, 1), ("hf", 4, 2), ("hf", 8, 1), ("hf", 5, 5),
    ("original", 2, 1), ("bf16", 4, 2)])
def test_threads_give_the_whole_model(tiny, layout, world, stages) -> None:
    model = whole(tiny[layout])
    wanted = exercise(model)
    found = rehearse(model.config, world, stages, lambda seat, link: exercise(
        SplitGptOss.part(tiny[layout], seat, link, torch.float32)))
    for rank in found:
        assert all(map(near, rank[:4], wanted[:4]))
        assert torch.equal(rank[4], wanted[4])
        assert all(map(torch.equal, rank, found[0]))  # bit for bit


def test_unpacked_experts_are_split_too(tiny) -> None:
    wanted = exercise(whole(tiny["hf"]))[0]
    for found in rehearse(TINY, 2, 1, lambda seat, link: exercise(
            SplitGptOss.part(tiny["hf"], seat, link, torch.float32,
                             packed=False))[0]):
        assert near(found, wanted)


def test_a_failing_thread_ends_the_rehearsal() -> None:
    def work(seat, link):
        if seat.tensor == 1:
            raise ZeroDivisionError("planted")
        return link.sum(torch.ones(1))

    with pytest.raises(ZeroDivisionError, match="planted"):
        rehearse(TINY, 2, 1, work)


def test_cache_of_a_seat() -> None:
    mine = seat_config(TINY, take_seat(TINY, 3, 4, 2))
    assert mine.num_key_value_heads == 4
    assert mine.num_hidden_layers == len(mine.layer_types) == len(
        stage_layers(TINY, 2)[1])
    # a stage has fewer sliding layers; all replay as the whole model does
    caches = [seat_cache(TINY, take_seat(TINY, rank, 4, 2), 1, 20)
              for rank in range(4)]
    assert {cache.replay for cache in caches} == {Cache(TINY).replay}
    assert Cache(mine).replay < Cache(TINY).replay


def test_alone_nothing_is_said() -> None:
    x, link = torch.ones(2), Link()
    assert link.sum(x) is link.gather(x) is link.from_last(x) is x


# --- A vocabulary of any size ------------------------------------------------

ODD = replace(TINY, num_attention_heads=12, num_key_value_heads=6,
              vocab_size=101)  # by nothing; 2, 3 and 6 share the heads


@pytest.mark.parametrize("tensors", [1, 2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("size", [201_088, 201_089, 200_019, 101, 65])
def test_rows_cover_a_vocabulary_of_any_size(size, tensors) -> None:
    config = replace(RELEASED["20b"], vocab_size=size)
    rows = [len(range(size)[parallel.owned(config, parallel.Seat(
        n, tensors))["V"]]) for n in range(tensors)]
    assert sum(rows) == size and max(rows) == rows[0] == -(-size // tensors)
    assert rows == sorted(rows, reverse=True)
    divides = not 64 % tensors and not min(8 % tensors, tensors % 8)
    assert fits(config, tensors) == (divides and rows[-1] > 0)


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

    def work(seat, link):
        part = SplitGptOss.part(odd, seat, link, torch.float32)
        return exercise(part), list(generate(
            part, PROMPT[1].tolist(), sampler=GREEDY, max_new_tokens=24))

    for logits, tokens in rehearse(ODD, world, stages, work):
        assert logits[0].shape[-1] == 101 and tokens == text
        assert all(map(near, logits[:4], wanted[:4]))


def attend_odd(rank: int, world: int, port: int, odd: Path, folder: Path
               ) -> None:
    meet(rank, world, port)
    model = parallel.load_split(odd, "float32")
    tokens = list(generate(model, PROMPT[1].tolist(), sampler=GREEDY,
                           max_new_tokens=24))
    with Tally() as tally, torch.inference_mode():
        logits = model(PROMPT[:1])
    torch.save((tokens, logits, dict(tally.counts), model.seat),
               folder / f"{world}-{rank}.pt")
    torch.distributed.barrier()
    parallel.leave()


def test_processes_share_a_vocabulary_of_any_size(odd, tmp_path) -> None:
    model, context = whole(odd), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gptoss.parallel", "pytest",
                                    "hypothesis", "gptoss.chat"])
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
            tokens, logits, counts, seat = torch.load(
                tmp_path / f"{world}-{rank}.pt", weights_only=False)
            assert tokens == text and near(logits, model(PROMPT[:1]))
            assert counts == {(name, size): calls for name, (calls, size)
                              in traffic(ODD, seat, 40, 40, 4).items()}


# --- Processes over gloo -----------------------------------------------------

def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


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


def meet(rank: int, world: int, port: int) -> None:
    """What torchrun would have set."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world),
                      LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)


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
    one.sampler = lambda logits, generator: torch.tensor(
        [next(ids)]) if ids.__length_hint__() else GREEDY(logits)


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
        found.append({"turn": one.turn, "tokens": one.memory.tokens,
                      "date": one.date, "kinds": kinds,
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
    one.sampler, one.max_new_tokens = Sampler(0.9), 20
    asked = [{"role": "user", "content": f"Hello from {rank}!"}]
    list(one.events(asked))
    found.append({"turn": one.turn, "tokens": one.memory.tokens})
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
    monkeypatch.setattr("gptoss.chat.today",
                        lambda: f"2025-01-0{next(days)}")


@pytest.mark.parametrize("world, stages", [(2, 1), (2, 2), (4, 2)])
def test_a_chat_of_threads(world, stages, own_dates) -> None:
    noted: list[str] = []

    def work(seat, link):
        model = SplitGptOss.part(POCKET, seat, link, torch.float32)
        return agent(model, seat.tensor + seat.stage * seat.tensors,
                     noted.append, 0.1)

    found = rehearse(GptOssConfig.from_pretrained(POCKET), world, stages,
                     work)
    check_agent(found, noted)


def work_as_agent(rank: int, port: int, folder: Path) -> list:
    """In one of two processes; a collective may take four seconds."""
    from gptoss import chat

    os.environ["MASTER_PORT"] = str(port)
    joined = parallel.join(timeout=timedelta(seconds=4))
    chat.today = lambda: f"2025-01-0{rank + 1}"
    seat = take_seat(GptOssConfig.from_pretrained(POCKET), rank, 2)
    model = SplitGptOss.part(POCKET, seat, joined.link(seat), torch.float32)

    def note(text: str) -> None:
        with open(folder / "noted.txt", "a") as file:
            file.write(text + "\n")

    found = agent(model, rank, note, 6)
    torch.rand(rank)  # as a tool may do; seeds are told all the same
    found.append({"turn": list(generate(model, [1, 2], max_new_tokens=9)),
                  "tokens": []})
    torch.distributed.barrier()
    parallel.leave()
    return found


def test_a_chat_of_processes(worlds) -> None:
    ranks = [rank["agent"] for rank in worlds[2]]
    check_agent(ranks, worlds[2][0]["noted"])


def attend(rank: int, world: int, ports: list[int], folder: Path) -> None:
    """One process: all that a world is asked for, into a file."""
    meet(rank, world, ports[0])
    joined, found = parallel.join(), {}
    config = GptOssConfig.from_pretrained(POCKET)
    for stages in STAGES[world]:
        seat = take_seat(config, rank, world, stages)
        # decoded experts in the largest world: the same numbers, sooner
        model = SplitGptOss.part(POCKET, seat, joined.link(seat),
                                 torch.float32, packed=world < 8)
        cache = model.new_cache()
        count = 128 if stages == STAGES[world][0] else 32
        tokens = list(generate(model, PROMPT[1].tolist(), sampler=GREEDY,
                               max_new_tokens=count, cache=cache))
        with Tally() as tally, torch.inference_mode():
            model(PROMPT[:1, :1], cache)
        found[stages] = {
            "tokens": tokens, "logits": exercise(model), "seat": seat,
            "tally": dict(tally.counts), "bytes": model.bytes_read,
            "random": torch.rand(1), "same": joined.same(lambda: rank)}
    torch.distributed.barrier()  # rank 0 takes the store with it
    parallel.leave()
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
    parallel.leave()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[int, list[dict]]:
    """Size of the world -> what each of its ranks found."""
    folder = tmp_path_factory.mktemp("worlds")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gptoss.parallel", "pytest",
                                    "hypothesis", "gptoss.chat"])
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
        wanted = traffic(config, found["seat"], width=4)
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
from gptoss import __main__ as cli
from gptoss.parallel import SplitGptOss

if os.environ["RANK"] == "1":
    forward = SplitGptOss.forward
    def dying(self, tokens, cache=None, *args, **options):
        if cache.length > 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, tokens, cache, *args, **options)
    SplitGptOss.forward = dying
sys.exit(cli.main(["generate", "--max-new-tokens", "400"]))
"""


def test_one_dies_and_all_end(tmp_path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    code, _, err = ended(torchrun("--standalone", "--nproc-per-node", "2",
                                  str(tmp_path / "dies.py")))
    assert code == 1
    assert "lost the others" in err or "SIGKILL" in err, err[-2000:]
    assert "gptoss/parallel.py" not in err  # no traceback of ours
