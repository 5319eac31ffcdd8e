"""text/parser: whatever a model may write, against openai-harmony."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import harmony as official
from streams import CONTROLS, build, stream

import gptoss
from gptoss.text.harmony import CHANNELS, Message, render_message
from gptoss.text.parser import (
    Delta,
    Malformed,
    StreamParser,
    ToolCall,
    parse,
)
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import HarmonyError

pytestmark = pytest.mark.xdist_group("o200k")
POCKET = Path(gptoss.__file__).parent / "pocket"
CORPUS = json.loads((Path(__file__).parent / "harmony_malformed.json")
                    .read_text("utf-8"))


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
