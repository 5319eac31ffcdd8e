"""gptoss.harmony, conversations: against openai-harmony on the real o200k,
and against whatever a model may write.
"""

import json
import math
import os
import random
import re
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import harmony as official
from oracles import o200k

from gptoss import harmony
from gptoss.text.harmony import (
    CHANNELS,
    EFFORTS,
    IDENTITY,
    ROLES,
    Message,
    developer_message,
    render,
    render_message,
    render_training,
    system_message,
)
from gptoss.text.parser import (
    Delta,
    Done,
    Malformed,
    Opened,
    StreamParser,
    ToolCall,
    parse,
)
from gptoss.text.tokenizer import HarmonyError, Tokenizer, tokenizer_json
from gptoss.text.typescript import Tool, typescript

pytestmark = pytest.mark.xdist_group("o200k")
FUZZ = int(os.environ.get("GPTOSS_FUZZ", "1"))  # times as many cases
POCKET = Path(harmony.__file__).parent / "pocket"
CORPUS = json.loads((Path(__file__).parent / "harmony_malformed.json")
                    .read_text("utf-8"))
CONTROLS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>",
            "<|constrain|>", "<|call|>", "<|return|>"]


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return Tokenizer(tokenizer_json(o200k.ranks()), vocab_size=201_088)


def build(tokenizer: Tokenizer, parts: list) -> list[int]:
    """Ids: a string's control tokens by name; {"text": ...} as text only;
    {"bytes": hex} as single bytes; an integer as it is."""
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, dict) and "text" in part:
            ids += tokenizer.encode(part["text"])
        elif isinstance(part, dict):
            for byte in bytes.fromhex(part["bytes"]):
                ids.append(next(i for i in range(256)
                                if tokenizer.token_bytes(i) == bytes([byte])))
        else:
            for piece in re.split(r"(<\|\w+\|>)", part):
                ids += ([tokenizer.special[piece]]
                        if piece in tokenizer.special
                        else tokenizer.encode(piece))
    return ids


def stream(tokenizer: Tokenizer, ids: list[int], role: str | None
           ) -> tuple[list, list[Message]]:
    """All events and messages of a parser; what must hold of any is held."""
    parser, events = StreamParser(tokenizer, role), []
    for token in ids:
        events += parser.feed(token)
    events += parser.close()
    assert parser.close() == []
    opened, text, calls = None, "", []
    for event in events:
        if isinstance(event, Opened):
            assert opened is None and event.message.content == ""
            opened, text = event.message, ""
        elif isinstance(event, Delta):
            assert event.text and event.channel == opened.channel
            text += event.text
        elif isinstance(event, ToolCall):
            calls.append(event)
        elif isinstance(event, Done):
            assert event.message == replace(opened, content=text)
            assert calls in ([], [ToolCall(opened.recipient,
                                           opened.content_type, text)])
            assert event.stop in ("end", "return", "call", None)
            assert not (calls and event.stop is None)
            opened, calls = None, []
        else:
            assert event.reason
    assert opened is None and not calls
    done = [event.message for event in events if isinstance(event, Done)]
    assert done == parser.messages
    return events, done


# -- generated conversations -------------------------------------------------

WORDS = ["hello", " the", "\n", "\n\n", "naïve", "日本語", "🙂", "e\u0301",
         "\u200b", "  ", "\t", "\r\n", "\r", "don't", "12345", "{}", '"', "\\",
         "to=functions.f", "assistant", "analysis", " json", *CONTROLS,
         "<|endoftext|>", "<|reserved_200013|>", "<|", "|>"]


def some_text(rng: random.Random, most: int = 8) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(0, most)))


def some_value(rng: random.Random) -> object:
    number = some_number(rng)
    return rng.choice([0, -1, 7, 1.5, True, False, None, "c", "a \"b\" é", "",
                       [], [1, "x"], {"k": [1, None]}, {},
                       "\x00\x1b\x7f\u2028",
                       number, [number, {"z": [number], "b": number}]])


def some_number(rng: random.Random) -> int | float:
    """Numbers that Python and Rust spell differently, and others."""
    sign = rng.choice([1, -1])
    while True:
        number = sign * rng.choice([
            rng.choice([0.0, 5e-324, 1e-4, 1e-5, 9.999999999999999e-6, 1e16,
                        9999999999999998.0, 2 ** 63, 2 ** 63 + 1, 2 ** 64,
                        2 ** 64 - 1, 1.7976931348623157e308, 1e22, 1e23]),
            rng.randint(1, 999) * 10.0 ** rng.randint(-12, 22),
            round(rng.random() * 10 ** rng.randint(-6, 16), rng.randint(0, 9)),
            rng.random() * 10 ** rng.randint(-9, 20),
            rng.getrandbits(rng.randint(1, 1000)),
            5e-324 * rng.getrandbits(rng.randint(1, 60)),
            struct.unpack("d", rng.randbytes(8))[0]])
        if isinstance(number, int) or math.isfinite(number):
            return number


def some_schema(rng: random.Random, depth: int = 0) -> object:
    """A JSON schema; now and then one that makes little sense."""
    kinds = ["string", "number", "integer", "boolean", "null", "oddity"]
    kind = rng.choice([*kinds, "enum", "list", "none", "bare"]
                      + ["object", "array", "oneOf", "anyOf"] * (depth < 3))
    made = {"enum": {"type": "string",
                     "enum": rng.choice([["c", "f"], ["x"], [], ["a", 1e-5]])},
            "list": {"type": rng.choice([["number", "string"], ["integer"],
                                         ["string", "null"], []])},
            "none": {}, "anyOf": {"anyOf": [{"type": "string"}]},
            "array": {"type": "array"}, "bare": rng.choice([True, None])}
    schema = made.get(kind, {"type": kind})
    if kind == "array" and rng.random() < 0.8:
        schema["items"] = some_schema(rng, depth + 1)
    if kind == "oneOf":
        schema = {"oneOf": rng.choice([[some_schema(rng, depth + 1) for _ in
                                        range(rng.randint(0, 3))], None])}
    if kind == "object":
        schema = some_object(rng, depth)
    if not isinstance(schema, dict):
        return schema
    for key, value in (("description", lambda: some_text(rng, 3)),
                       ("title", lambda: some_text(rng, 2)),
                       ("examples", lambda: rng.choice(
                           [["SF", 1], [], [1e-5]])),
                       ("default", lambda: some_value(rng)),
                       ("nullable", lambda: rng.random() < 0.7),
                       ("const", lambda: some_value(rng)),
                       ("minimum", lambda: 0)):
        if rng.random() < 0.25:
            schema[key] = value()
    if kind == "oneOf" and schema["oneOf"] and rng.random() < 0.3:
        first = schema["oneOf"][0]
        if isinstance(first, dict) and "description" in first:
            schema["description"] = first["description"]
    return schema


def some_object(rng: random.Random, depth: int = 0) -> dict:
    names = rng.sample(["a", "b", "city", "z_1", "with-dash", "é"],
                       rng.randint(0, 4))
    schema = {"type": "object"}
    if names or rng.random() < 0.7:
        schema["properties"] = {name: some_schema(rng, depth + 1)
                                for name in names}
    if rng.random() < 0.7:
        schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    return schema


def some_tools(rng: random.Random) -> list[Tool]:
    def parameters() -> dict | None:
        other = some_schema(rng)
        return rng.choice([None, some_object(rng), some_object(rng),
                           other if isinstance(other, dict) else {}])

    return [Tool(f"f_{n}", some_text(rng, 5), parameters())
            for n in range(rng.randint(1, 4))]


def some_turn(rng: random.Random, odd: bool) -> list[Message]:
    """A question and what follows; `odd`: with what only a renderer takes."""
    def said(channel: str | None, **more) -> Message:
        return Message("assistant", some_text(rng), channel, **more)

    name = rng.choice([None, "ada"]) if odd else None
    turn = [Message("user", some_text(rng), name=name)]
    for _ in range(rng.randint(0, 3)):
        if rng.random() < 0.7:
            turn.append(said("analysis"))
        if rng.random() < 0.3:
            turn.append(said("commentary"))
        channel, tool, kind = rng.choice([
            ("commentary", "functions.f_0", "<|constrain|>json"),
            ("commentary", "functions.f_1", "json"),
            ("commentary", "functions.with-dash", None),
            ("analysis", "python", "code"), ("analysis", "python", None),
            ("analysis", "browser.search", "<|constrain|>json")])
        turn.append(said(channel, recipient=tool, content_type=kind))
        if rng.random() < 0.9:
            turn.append(Message("tool", some_text(rng), channel, None if odd
                                and rng.random() < 0.5 else "assistant",
                                name=tool))
    if rng.random() < 0.6:
        turn.append(said("analysis"))
    if odd and rng.random() < 0.5:
        turn.append(rng.choice([
            said(None), said("final", content_type="<|constrain|>json"),
            said("final", content_type="json"), said("thoughts"),
            said("commentary", recipient="all"),
            said("commentary", recipient="functions.f_0",
                 content_type="<|constrain|>")]))
    if rng.random() < 0.8:
        turn.append(said("final"))
    return turn


def conversation(seed: int, odd: bool = False) -> tuple[list, list, Counter]:
    """One conversation as ours and as official messages, and its features."""
    rng = random.Random(seed)
    ours, theirs, seen = [], [], Counter()
    tools = some_tools(rng) if rng.random() < 0.5 else []
    if rng.random() < 0.85:
        options = dict(
            effort=rng.choice([None, *EFFORTS]),
            date=rng.choice([None, "2026-11-24"]),
            cutoff=rng.choice([None, "2024-06"]),
            identity=rng.choice([IDENTITY, None, some_text(rng)]),
            channels=rng.choice([CHANNELS, ("final",), ()]),
            builtin=rng.choice([()] * 7 + [("browser",), ("python",),
                                           ("python", "browser")]))
        ours.append(system_message(**options, functions=bool(tools)))
        theirs.append(official.system(**options))
        seen.update(f"{key}={value}" for key, value in options.items()
                    if key != "identity")
    elif rng.random() < 0.5:
        ours.append(Message("system", some_text(rng)))
        theirs.append(official.message(ours[-1]))
    if tools or rng.random() < 0.5:
        options = dict(instructions=rng.choice(["", some_text(rng)]),
                       tools=tools)
        ours.append(developer_message(**options))
        theirs.append(official.developer(**options))
        seen["tools"] += bool(tools)
    for _ in range(rng.randint(0, 4)):
        ours += some_turn(rng, odd)
    if rng.random() < 0.3:
        ours.append(Message("user", some_text(rng)))
    theirs += map(official.message, ours[len(theirs):])
    seen["turns=" + str(sum(m.role == "user" for m in ours))] += 1
    seen.update(f"{m.role}/{m.channel}/{m.recipient}/{m.content_type}"
                for m in ours)
    return ours, theirs, seen


def render_alike(real: Tokenizer, ours: list, theirs: list) -> None:
    assert render(real, ours) == official.render(theirs, "for_completion")
    assert render_training(real, ours) == official.render(
        theirs, "for_training")
    assert render(real, ours, reply=False, drop="none") == official.render(
        theirs, drop=False)


def test_rendered_ids_and_parsed_messages_equal_openai_harmony(real):
    total, dropped = Counter(), 0
    for seed in range(520):
        ours, theirs, seen = conversation(seed)
        total += seen
        try:
            render_alike(real, ours, theirs)
            ids = render(real, ours, reply=False)
            assert render(real, ours)[:len(ids)] == ids
            assert ids[:-1] == render_training(real, ours)[:-1]
            dropped += len(parse(real, ids)) < len(ours)
            for ids in (render_training(real, ours, drop="none"),
                        render(real, ours, reply=False, drop="none")):
                events, messages = stream(real, ids, None)
                assert messages == ours
                assert not any(isinstance(event, Malformed)
                               for event in events)
            assert official.parse(ids) == ours
        except AssertionError as error:
            raise AssertionError(f"conversation {seed}") from error
    assert dropped > 100
    assert min(total.values()) > 10 and len(total) > 30, total


def test_other_conversations_render_alike(real):
    """As above, from other seeds; GPTOSS_FUZZ=50 makes it 2,000."""
    for seed in range(10_000, 10_000 + 40 * FUZZ):
        ours, theirs, _ = conversation(seed, odd=seed % 2 == 1)
        try:
            render_alike(real, ours, theirs)
        except AssertionError as error:
            raise AssertionError(f"conversation {seed}") from error


def test_odd_messages_render_alike_and_are_read_back(real):
    """What the official renderer writes and its parser refuses or misreads:
    names of users, a content type without a recipient, a tool's message
    without one. And what it takes, but is reported: no or other channels."""
    refused = reported = 0
    for seed in range(150):
        ours, theirs, _ = conversation(seed, odd=True)
        render_alike(real, ours, theirs)
        ids = render(real, ours, reply=False, drop="none")
        events, messages = stream(real, ids, None)
        assert messages == [replace(m, recipient=None) if m.recipient == "all"
                            else m for m in ours]
        reasons = {event.reason for event in events
                   if isinstance(event, Malformed)}
        assert reasons <= {"a message of the assistant without a channel",
                           "an unknown channel 'thoughts'",
                           "<|call|> without a recipient"}
        reported += bool(reasons)
        try:
            refused += official.parse(ids) != ours
        except official.library().HarmonyError:
            refused += 1
    assert refused > 50 and reported > 20


def test_each_message_alone_and_the_reply_that_continues_a_prompt(real):
    encoding = official.encoding()
    for seed in range(40):
        ours, theirs, _ = conversation(seed)
        for mine, other in zip(ours, theirs, strict=True):
            ids = render_message(real, mine)
            if mine.role != "system":  # its text depends on the others
                assert ids == encoding.render(other)
            if mine.role == "assistant":
                rest = ids[2:]         # behind <|start|>assistant
                assert parse(real, rest, "assistant") == [mine]
                assert official.parse(rest, "assistant") == [mine]


def test_typescript_of_every_kind_of_property(real):
    """Not left to chance: each oddity of the official text, by name."""
    text = typescript([Tool("f", "One.\nTwo.", {
        "type": "object", "description": "Above.", "required": ["a", "o"],
        "properties": {
            "a": {"type": "string", "title": "T", "examples": ["x", 1]},
            "b": {"type": "string", "enum": ["p", "q"], "default": "p"},
            "c": {"type": "string", "default": "p"},
            "d": {"type": ["integer", "null"], "default": 3},
            "o": {"type": "object", "properties": {
                "n": {"type": "boolean", "nullable": True}}},
            "u": {"description": "U.", "oneOf": [
                {"type": "string", "description": "U."},
                {"type": "array", "items": {"type": "number"},
                 "description": "V.", "default": []}]}}}),
        Tool("g")], "ns")
    assert text.splitlines() == [
        "namespace ns {", "", "// One.", "// Two.", "type f = (_: // Above.",
        "{", "// T", "//", "// Examples:", '// - "x"', "a: string,",
        'b?: "p" | "q", // default: p', 'c?: string, // default: "p"',
        "d?: number | null, // default: 3", "o: {",
        "    n?: boolean | null,", "    },", "u?:", " | string",
        " | number[] // V. default: []", ",", "}) => any;", "",
        "type g = () => any;", "", "} // namespace ns"]


@pytest.mark.parametrize(("value", "spelt"), [
    (1e-4, "0.0001"), (3e-5, "0.00003"), (-1.25e-5, "-0.0000125"),
    (7e-6, "7e-6"), (-1.5e-7, "-1.5e-7"), (1e15, "1000000000000000.0"),
    (1e16, "1e16"), (-2.5e17, "-2.5e17"), (2 ** 64 - 1, str(2 ** 64 - 1)),
    (2 ** 64, "1.8446744073709552e19"), (-2 ** 63, str(-2 ** 63)),
    (-2 ** 63 - 1, "-9.223372036854776e18"), (-0.0, "-0.0"), (5.0, "5.0"),
    (1 / 11, "0.09090909090909093"), (10 ** 21, "1e21"),
    ([1e-5, {"k": (1e-6, 10 ** 20)}], '[0.00001,{"k":[1e-6,1e20]}]')])
def test_numbers_as_serde_json_spells_them(value, spelt):
    tool = Tool("f", "", {"type": "object", "properties": {
        "x": {"type": "number", "default": value}}})
    line = f"x?: number, // default: {spelt}"
    assert line in typescript([tool]).splitlines()
    theirs = official.encoding().render(official.developer(tools=[tool]))
    assert line in official.encoding().decode(theirs).splitlines()


def test_many_numbers_are_spelt_as_the_official_renderer_spells_them():
    for seed in range(40 * FUZZ):
        rng = random.Random(f"numbers {seed}")
        tool = Tool("f", "", {"type": "object", "properties": {
            f"x{n}": {"type": "number", "default": some_number(rng)}
            for n in range(30)}})
        theirs = official.encoding().decode(official.encoding().render(
            official.developer(tools=[tool])))
        assert typescript([tool]) in theirs


@pytest.mark.parametrize(("value", "found"), [
    (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"),
    (10 ** 400, "an integer of 1329 bits"), (-10 ** 5000, "16610 bits"),
    ({1, 2}, "expected JSON, found {1, 2}"), (b"x", "found b'x'")],
    ids=lambda value: value if isinstance(value, str) else "value")
def test_what_json_cannot_say_is_named(value, found):
    for schema in ({"default": value}, {"enum": [1, value]},
                   {"items": {"maximum": (0, value)}}):
        tool = Tool("far_off", "", {"properties": {"x": schema}})
        with pytest.raises(HarmonyError, match=re.escape(found)) as caught:
            developer_message(tools=[tool])
        assert str(caught.value).startswith(
            "tool 'far_off': parameters.properties.x.")


def test_a_schema_without_end_is_named():
    schema = {"type": "object"}
    schema["properties"] = {"self": schema}
    with pytest.raises(HarmonyError, match="tool 'f': .*too deeply"):
        typescript([Tool("f", "", schema)])


@pytest.mark.parametrize("about", ["a\r", "a\r\nb\r", "\r", "\r\n", "a\n\r",
                                   "a\r\r\nb\n\n", "\n", "", "a\rb"])
def test_only_a_newline_ends_a_line(real, about):
    tools = [Tool("f", about)]
    ids = official.encoding().render(official.developer(tools=tools))
    assert render_message(real, developer_message(tools=tools)) == ids


# -- which reasoning is kept --------------------------------------------------

def test_dropping_by_turns(real):
    for seed in range(60):
        ours, _, _ = conversation(seed)
        kept = parse(real, render(real, ours, reply=False, drop="turns"))
        last = max((n for n, m in enumerate(ours)
                    if m.channel == "final" and m.content), default=0)
        assert kept == [m for n, m in enumerate(ours)
                        if n >= last or m.channel != "analysis"]


def test_reasoning_of_a_turn_that_goes_on_is_kept(real):
    """Steering, a thought cut short, a stored empty answer, preambles."""
    def kept(*messages: Message) -> list[str]:
        talk = parse(real, render(real, messages, reply=False, drop="turns"))
        return [m.content for m in talk if m.channel == "analysis"]

    ask, go_on = Message("user", "q"), Message("user", "be short")
    plan = Message("assistant", "PLAN", "analysis")
    preamble = Message("assistant", "First I look.", "commentary")
    call = Message("assistant", "{}", "commentary", "functions.f")
    late_call = replace(call, channel="final")
    result = Message("tool", "1", "commentary", "assistant",
                     name="functions.f")
    empty = Message("assistant", "", "final")
    answer = Message("assistant", "A", "final")
    for middle in ((call, result, go_on), (go_on,), (empty, go_on), (),
                   (preamble, go_on), (call, result, go_on, go_on),
                   (late_call, result), (empty, go_on, empty, go_on)):
        assert kept(ask, plan, *middle) == ["PLAN"], middle
        assert kept(ask, plan, answer, ask, plan, *middle) == ["PLAN"]
        assert kept(ask, plan, *middle, answer, ask) == []
        assert kept(ask, plan, *middle, plan) == ["PLAN", "PLAN"]


def test_reasoning_against_the_official_rule(real):
    """The official rule shows more in two places, ours in one: where the
    final message is empty, which ends no turn."""
    places = Counter()
    for seed in range(60 * FUZZ):
        rng = random.Random(f"reasoning {seed}")
        ours, theirs, _ = conversation(seed + 20_000)
        ours = [replace(m, content="") if m.channel == "final"
                and rng.random() < 0.1 else m for m in ours]
        theirs = [official.message(m) if m.role == "assistant" else other
                  for m, other in zip(ours, theirs, strict=True)]
        ends = [n for n, m in enumerate(ours) if m.role in ("user", "tool")]
        if not ends:
            continue
        end = rng.choice(ends) + 1
        some = ours[:end]
        kept = {drop: harmony._forgotten(some, drop)
                for drop in ("turns", "official")}
        assert render(real, some) == official.render(theirs[:end],
                                                     "for_completion")
        answers = [n for n, m in enumerate(some)
                   if m.channel == "final" and m.content]
        finals = [n for n, m in enumerate(some) if m.channel == "final"]
        assert kept["turns"] == max(answers, default=0)
        if kept["turns"] < kept["official"]:  # ours shows more
            assert not some[finals[0]].content
            places["an empty answer"] += 1
        elif kept["turns"] > kept["official"]:
            last = [m for m in some if m.role == "assistant"][-1]
            places["in a tool loop" if last.channel != "final" else
                   "from the third turn on"] += 1
    assert min(places.values()) >= 1 and len(places) == 3, places


def test_a_turn_only_appends_to_its_prompt(real):
    turn = [Message("user", "Q"), Message("assistant", "t", "analysis"),
            Message("assistant", "{}", "commentary", "functions.f"),
            Message("tool", "1", "commentary", "assistant", None,
                    "functions.f"),
            Message("assistant", "u", "analysis"),
            Message("assistant", "A", "final")]
    talk, before = turn * 3, []
    cuts = Counter()
    for drop in ("turns", "official"):
        for n in range(1, len(talk) + 1):
            if talk[n - 1].role == "assistant":
                continue
            prompt = render(real, talk[:n], reply=False, drop=drop)
            cuts[drop, n] = prompt[:len(before)] != before
            before = prompt
    # the index of a user's message, or of what comes after a call
    assert [n - 1 for (drop, n), cut in cuts.items()
            if cut and drop == "turns"] == [6, 12]
    assert len([n for (drop, n), cut in cuts.items()
                if cut and drop == "official"]) > 2


# -- nothing but text ---------------------------------------------------------

FIELD = st.text(max_size=6) | st.sampled_from([*CONTROLS, "<|endoftext|>", ""])


@settings(deadline=None, derandomize=True, max_examples=150)
@given(role=st.sampled_from(ROLES), fields=st.lists(FIELD, min_size=4,
                                                    max_size=4),
       has=st.lists(st.booleans(), min_size=3, max_size=3),
       constrain=st.booleans())
def test_no_field_of_a_message_makes_a_control_token(role, fields, has,
                                                     constrain):
    tokenizer = Tokenizer.from_pretrained(POCKET)
    content, *rest = fields
    channel, recipient, kind = (value if given else None for value, given
                                in zip(rest, has, strict=True))
    kind = kind and (constrain * "<|constrain|>" + "x" + kind)
    ids = render_message(tokenizer, Message(role, content, channel, recipient,
                                            kind, "n"))
    called = role == "assistant" and recipient is not None
    wanted = ["<|start|>", "<|channel|>" * (channel is not None),
              "<|constrain|>" * bool(kind and constrain), "<|message|>",
              "<|call|>" if called else "<|end|>"]
    assert [tokenizer.decode([i]) for i in ids if tokenizer.is_special(i)
            ] == list(filter(None, wanted))


# -- malformed replies --------------------------------------------------------

def as_messages(found: list[dict]) -> list[Message]:
    return [Message(**fields) for fields in found]


def test_corpus_is_told_apart():
    assert len({case["name"] for case in CORPUS}) == len(CORPUS) >= 50
    assert sum(isinstance(case["official"], str) for case in CORPUS) > 20
    assert sum(bool(case["thread"]) for case in CORPUS) > 25


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["name"])
def test_malformed_reply(real, case):
    ids = build(real, case["tokens"])
    try:
        wanted = official.parse(ids, case["role"])
    except Exception as error:  # a HarmonyError or an OverflowError
        wanted = f"{type(error).__name__}: {error}"
        assert wanted == case["official"]
    else:
        assert wanted == as_messages(case["official"])
    events, messages = stream(real, ids, case["role"])
    assert messages == (wanted if case["messages"] == "the same"
                        else as_messages(case["messages"]))
    assert [event.reason for event in events
            if isinstance(event, Malformed)] == case["reported"]
    assert [event.recipient for event in events
            if isinstance(event, ToolCall)] == case["calls"]
    if case["reported"]:
        with pytest.raises(HarmonyError, match=r"^token \d+: .*"
                           + re.escape(case["reported"][0])):
            parse(real, ids, case["role"])
    else:
        assert parse(real, ids, case["role"]) == messages


@pytest.mark.parametrize("header", [
    "assistant json to=functions.f<|channel|>commentary",
    "assistant<|channel|>commentary json to=functions.f",
    "assistant json<|channel|>commentary to=functions.f",
    "functions.f code to=assistant<|channel|>commentary",
    "assistant<|channel|> final", "assistant<|channel|>\ncommentary"])
def test_what_the_official_parser_refuses_is_reported(real, header):
    ids = build(real, [f"<|start|>{header}<|message|>{{}}<|end|>"])
    with pytest.raises(official.library().HarmonyError):
        official.parse(ids)
    with pytest.raises(HarmonyError, match="format before to=|white space"):
        parse(real, ids)
    _, messages = stream(real, ids, None)  # and read all the same
    assert len(messages) == 1 and messages[0].content == "{}"


def test_a_recipient_behind_a_space_is_found(real):
    ids = build(real, ["<|channel|>commentary to= functions.look_up "
                       "<|constrain|>json<|message|>{}<|call|>"])
    events, _ = stream(real, ids, "assistant")
    assert [event.recipient for event in events
            if isinstance(event, ToolCall)] == ["functions.look_up"]
    assert "white space behind to=" in [
        event.reason for event in events if isinstance(event, Malformed)]


# -- no channel but final is an answer ----------------------------------------

@pytest.mark.parametrize("written", [
    "comment", "analyis", "fina", "f", "Final", "FINAL", "final.", "finally",
    "finalfinal", "final__X", "final:", "\u200bfinal", "fin al", "анализ",
    "thoughts", "assistant", "analysis_final", "functions.f"])
def test_an_unknown_channel_is_reported_and_keeps_its_name(real, written):
    for ids in (build(real, [f"<|channel|>{written}<|message|>secret<|end|>"]),
                build(real, [f"<|channel|>analysis<|message|>x<|end|><|start|>"
                             f"assistant<|channel|>{written} to=functions.f"
                             f"<|message|>secret<|call|>"])):
        events, _ = stream(real, ids, "assistant")
        at = next(n for n, event in enumerate(events) if isinstance(
            event, Malformed) and event.reason.startswith("an unknown chan"))
        after = [event for event in events[at:] if isinstance(event, Delta)]
        assert "".join(event.text for event in after) == "secret"
        assert {event.channel for event in after} == {written.split()[0]}


def test_text_without_a_channel_has_none(real):
    for ids in (["<|start|>assistant<|message|>x<|end|>"], ["x<|return|>"]):
        events, _ = stream(real, build(real, ids), "assistant")
        assert {event.channel for event in events
                if isinstance(event, Delta)} == {None}
        assert any(isinstance(event, Malformed) for event in events)


@pytest.mark.parametrize(("rest", "channel"), [
    ("final__X__", "final"), ("finalHello.", "final"), ("analysisWe", "analys"
                                                        "is"),
    ("finally, the user", None), ("analysises", None), ("fina", None)])
def test_a_header_that_is_cut_is_final_only_if_it_says_so(real, rest,
                                                          channel):
    events, messages = stream(real, build(
        real, [f"<|channel|>{rest}<|return|>"]), "assistant")
    assert [m.channel for m in messages] == [channel] * (channel is not None)
    assert isinstance(events[0], Malformed) and rest in events[0].text


# -- token soup ---------------------------------------------------------------

HEADERS = ["assistant", "user", "functions.f", "tool", "python", "user:ada",
           " to=functions.f", " to=python", " to=assistant", "analysis",
           "commentary", "final", "thoughts", " json", " code", "to=", " ",
           "\n", "??", "hi", "🙂", "<|end|>", "commentary to=functions.f "]
GOOD = ["<|start|>assistant<|channel|>analysis<|message|>so<|end|>",
        "<|start|>assistant<|channel|>commentary to=functions.f "
        "<|constrain|>json<|message|>{}<|call|>",
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>1"
        "<|end|>", "<|start|>user<|message|>🙂<|end|>",
        "<|start|>assistant<|channel|>final<|message|>ok<|return|>"]
PARTS = st.one_of(
    st.sampled_from(CONTROLS), st.sampled_from(CONTROLS),
    st.sampled_from(GOOD), st.sampled_from(HEADERS).map(
        lambda text: {"text": text}),
    st.sampled_from([-1, 199_999, 200_013, 201_087, 201_088, 10 ** 9]),
    st.binary(min_size=1, max_size=2).map(lambda b: {"bytes": b.hex()}),
    st.integers(0, 201_100))
MUTATED = st.tuples(
    st.lists(st.sampled_from(GOOD), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 60), st.booleans(), PARTS),
             max_size=2))


def why_excused(real: Tokenizer, ids: list[int], found: list[Message]
                ) -> str | None:
    """Why the official parser's messages are wrong, if they are."""
    if max(ids) > 201_088:  # its decoder stops at one and loses the rest
        return "a token outside of the vocabulary"
    spelt = "".join(map(official_spelling, ids))
    if set(re.findall(r"\s", spelt)) - set(" \t\n\r\f"):
        return "white space that only one of the two splits at"
    names = {official_spelling(i) for i in ids
             if i >= 201_088 or real.is_special(i)}
    for message in found:
        kind = message.content_type
        if kind is not None:
            kind = kind.removeprefix("<|constrain|>")
        for value in (message.content, message.channel, message.recipient,
                      kind, message.name):
            if value and any(name in value for name in names):
                return "a control token in the place of text"
        if message.recipient is not None and (
                f"to={message.recipient}" not in spelt):
            return "a recipient without to="
        if message.recipient == "":
            return "an empty recipient"
        if message.name and "<" in message.name and message.channel:
            rest = message.name[message.name.index("<"):]
            if f"<|channel|>{message.channel}{rest}" in spelt:
                return "a channel cut at a < that is text"
        if message.name and re.match(r"(\w+:|to=)", message.name):
            return "a name or a recipient taken for a tool"
        if {message.name, message.content_type} & {*CHANNELS}:
            return "a channel taken for a tool or a content type"
    if "<|channel|>" in real.decode([i for i in ids if 0 <= i < 199_998]):
        return "a control token spelt with letters"
    return None


def official_spelling(token: int) -> str:
    return official.encoding().decode([token])


def compare(real: Tokenizer, ids: list[int], role: str | None) -> str:
    """Parses both ways; holds what has to hold; says what happened."""
    events, messages = stream(real, ids, role)
    reported = [e for e in events if isinstance(e, Malformed)]
    try:
        strict = parse(real, ids, role)
    except HarmonyError:
        assert reported
    else:
        assert not reported and strict == messages
    try:
        wanted = official.parse(ids, role)
    except (official.library().HarmonyError, OverflowError):
        return "refused"
    if wanted == messages:
        return "same"
    reason = why_excused(real, ids, wanted)
    assert reason, (ids, wanted, messages)
    return reason


def test_a_channel_is_not_cut_at_text(real):
    """The official parser makes a tool named assistant<|end|>ary of it."""
    ids = build(real, ["<|start|>assistant<|channel|>comment",
                       {"text": "<|end|>"}, "ary to=functions.f"
                       "<|message|>{}<|call|>"])
    assert compare(real, ids, None) == "a channel cut at a < that is text"
    with pytest.raises(HarmonyError, match=r"unknown channel 'comment<\|end"):
        parse(real, ids)


@pytest.mark.parametrize("role", [None, "assistant"])
def test_soup(real, role):
    happened = Counter()

    @settings(deadline=None, derandomize=True, max_examples=400)
    @given(st.lists(PARTS, max_size=9))
    def mixed(parts):
        happened[compare(real, build(real, parts), role)] += 1

    @settings(deadline=None, derandomize=True, max_examples=400)
    @given(MUTATED)
    def mutated(drawn):
        good, changes = drawn
        ids = build(real, good)[2 * (role is not None):]
        for at, remove, part in changes:
            at %= len(ids) + 1
            ids[at:at + remove] = build(real, [part])
        happened[compare(real, ids, role)] += 1

    mixed()
    mutated()
    assert happened["same"] > 50 and happened["refused"] > 50, happened


@pytest.mark.parametrize("token", [None, "x", 1.5, -1, 10 ** 30, [], b""])
def test_a_token_that_is_none_is_reported(real, token):
    ids = build(real, ["<|channel|>final<|message|>o"])
    parser = StreamParser(real)
    for known in ids:
        parser.feed(known)
    (event,) = parser.feed(token)
    assert isinstance(event, Malformed) and repr(token).strip("'") in (
        event.text)
    parser.feed(real.special["<|return|>"])
    assert parser.messages == [Message("assistant", "o", "final")]


# -- a character at a time ----------------------------------------------------

@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.text(max_size=20))
def test_deltas_are_whole_characters(text):
    tokenizer = Tokenizer.from_pretrained(POCKET)
    ids = render_message(tokenizer, Message("assistant", text, "final"))
    events, messages = stream(tokenizer, ids, None)
    deltas = [event.text for event in events if isinstance(event, Delta)]
    assert "".join(deltas) == text == messages[0].content
    assert all(delta in text for delta in deltas)


# -- errors that are ours -----------------------------------------------------

@pytest.mark.parametrize(("call", "message"), [
    (lambda t: render_message(t, Message("bot")), "role: expected .* 'bot'"),
    (lambda t: render_message(t, Message("tool", "x")), "expected a name"),
    (lambda t: render(t, [], drop="all"), "drop: expected .* 'all'"),
    (lambda t: system_message("huge"), "expected one of .* 'huge'"),
    (lambda t: system_message(builtin=["shell"]), "expected .* 'shell'"),
    (lambda t: StreamParser(t, "bot"), "role: expected .* 'bot'"),
    (lambda t: render_message(t, Message("user", "\ud800")), "surrogate"),
    (lambda t: parse(t, t.encode("hi")), "^token 1: text outside"),
])
def test_errors(real, call, message):
    with pytest.raises(HarmonyError, match=message):
        call(real)


def test_a_tokenizer_without_harmony():
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = Tokenizer(tokenizer_json(ranks, {256: "<|endoftext|>"}))
    with pytest.raises(HarmonyError, match=r"<\|start\|>, found"):
        render(tokenizer, [])
