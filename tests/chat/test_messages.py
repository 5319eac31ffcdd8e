"""Messages in: what clients send is read whole, or refused by its place."""

import json
import os
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import TOKENIZER, chat, run, said, user

from gptoss.chat.messages import ChatError, read_messages
from gptoss.chat.tools import read_tools
from gptoss.text.harmony import Message, render

# -- messages ---------------------------------------------------------------

CALL = {"id": "c1", "type": "function",
        "function": {"name": "f", "arguments": "{}"}}
ASKS = {"role": "assistant", "tool_calls": [CALL]}
TELLS = {"role": "tool", "tool_call_id": "c1", "content": "x"}


def changed(base: dict, **new: object) -> dict:
    return base | {"function": base["function"] | new}


@pytest.mark.parametrize("messages, why", [
    ([], "messages: expected a list of at least one"),
    ("hello", "messages: expected a list"),
    (["hello"], "messages[0]: expected a dict, found 'hello'"),
    ([{}], "messages[0].role: expected one of system, developer"),
    ([{"role": "bot", "content": ""}], "found 'bot'"),
    ([{"role": ["user"], "content": ""}], "messages[0].role"),
    ([user("a"), {"role": "user"}],
     "messages[1].content: expected a string or a list of text parts, "
     "found nothing"),
    ([user(3)], "messages[0].content: expected a string"),
    ([user([{"type": "image_url", "image_url": "x"}])],
     "messages[0].content[0]: expected {'type': 'text'"),
    ([user([{"type": "text"}])], "messages[0].content[0]"),
    ([user("a\ud800")], "messages[0].content: expected Unicode"),
    ([user("a"), {"role": "assistant"}],
     "messages[1].role: expected the user or a tool to speak last"),
    ([user("a") | {"text": "b"}],
     "messages[0].text: expected no keys but role, content, name, found 'b'"),
    ([user("a") | {"name": "a b"}], "messages[0].name: expected 1 to 64"),
    ([{"role": "system", "content": "a", "name": "b"}], "messages[0].name"),
    ([user([{"type": "text", "text": "a", "style": "b"}])],
     "messages[0].content[0].style"),
    ([user("a"), ASKS | {"function_call": {"name": "f"}}, TELLS],
     "messages[1].function_call"),
    ([user("a"), {"role": "assistant", "audio": {"id": "x"}}, user("b")],
     "messages[1].audio"),
    ([user("a"), {"role": "assistant", "content": "b", "prefix": True},
      user("b")], "messages[1].prefix"),
    ([user("a"), {"role": "assistant", "content": "b", "phase": "final"},
      user("b")], "messages[1].phase: expected one of commentary, "),
    ([user("a"), {"role": "assistant", "reasoning": "b", "thinking": "c"},
      user("b")], "messages[1].thinking: expected the same as reasoning"),
    ([user("a"), {"role": "assistant", "reasoning_details": [
        {"type": "reasoning.encrypted", "data": "x"}]}, user("b")],
     "messages[1].reasoning_details[0].type: expected one of"),
    ([user("a"), ASKS, TELLS | {"name": "g"}],
     "messages[2].name: expected functions.f, which was called, found 'g'"),
    ([user("a"), ASKS, TELLS | {"is_error": True}], "messages[2].is_error"),
    ([{"role": "function", "name": "f", "content": "a"}], "'function'"),
    ([{"type": "reasoning", "encrypted_content": "x"}, user("a")],
     "messages[0].encrypted_content"),
    ([{"type": "web_search_call"}, user("a")], "messages[0].type"),
    ([{"type": "reasoning", "content": 3}, user("a")],
     "messages[0]: expected lists"),
    ([{"type": "function_call", "name": "f", "arguments": ""}, user("a")],
     "messages[0].tool_calls[0].id"),
    ([user("a"), {"role": "assistant", "content": "b"}],
     "messages[1].role: expected the user or a tool to speak last"),
    ([{"role": "system", "content": "a"}], "speak last, found 'system'"),
    ([user("a"), ASKS], "speak last (not answered: c1)"),
    ([user("a"), ASKS, user("b")],
     "messages[2].role: expected 'tool', to answer c1, found 'user'"),
    ([user("a"), TELLS], "messages[1].tool_call_id: expected the id of an "
     "open call (there is none), found 'c1'"),
    ([user("a"), ASKS, TELLS | {"tool_call_id": "c2"}], "open call (c1)"),
    ([user("a"), ASKS, {"role": "tool", "tool_call_id": "c1"}],
     "messages[2].content"),
    ([user("a"), ASKS, TELLS, TELLS], "messages[3].tool_call_id"),
    ([user("a"), {"role": "assistant", "tool_calls": "f"}],
     "messages[1].tool_calls: expected a list"),
    ([user("a"), {"role": "assistant", "tool_calls": [CALL, CALL]}],
     "messages[1].tool_calls: expected ids that differ"),
    *(([user("a"), {"role": "assistant", "tool_calls": [call]}],
       f"messages[1].tool_calls[0].{key}: expected {what}")
      for call, key, what in (
          ({}, "id", "a string"), (CALL | {"id": 1}, "id", "a string"),
          (CALL | {"type": "custom"}, "type", "'function'"),
          (CALL | {"function": "f"}, "function", "a dict"),
          (changed(CALL, name="a b"), "function.name", "1 to 64 letters"),
          (changed(CALL, name="f\n"), "function.name", "1 to 64 letters"),
          (changed(CALL, arguments={}), "function.arguments", "a string"))),
    ([user("a"), {"role": "assistant", "content": "b", "reasoning": 1},
      user("c")], "messages[1].reasoning"),
])
def test_wrong_messages_are_named(messages, why):
    with pytest.raises(ChatError) as error:
        read_messages(messages)
    assert why in str(error.value)


def test_messages_become_harmony():
    head, found = read_messages([
        {"role": "system", "content": "one"},
        {"role": "developer", "content": [{"type": "text", "text": "t"},
                                          {"type": "text", "text": "wo"}]},
        user("ask"),
        {"role": "assistant", "content": "wait", "reasoning": "hm",
         "tool_calls": [CALL]}, TELLS,
        {"role": "assistant", "content": "", "reasoning": "so"},
        {"role": "developer", "content": "later"},
        user("") | {"name": "Ann"}])
    assert head == "one\n\ntwo"
    assert found == [
        Message("user", "ask"), Message("assistant", "hm", "analysis"),
        Message("assistant", "wait", "commentary"),
        Message("assistant", "{}", "commentary", "functions.f",
                "<|constrain|>json"),
        Message("tool", "x", "commentary", "assistant", name="functions.f"),
        Message("assistant", "so", "analysis"),
        Message("developer", "# Instructions\n\nlater"),
        Message("user", "", name="Ann")]


def heard(message: object) -> list[tuple[str | None, str]]:
    """What a message of the assistant becomes: channel and text."""
    return [(each.channel, each.content) for each in
            read_messages([user("a"), message, user("b")])[1][1:-1]]


SAYS = {"role": "assistant"}
TEXT = {"type": "reasoning.text", "text": "hm", "index": 0, "format": "x",
        "signature": None}


@pytest.mark.parametrize("message, wanted", [
    ({}, []), ({"content": None}, []), ({"content": "", "reasoning": ""}, []),
    *(({key: "hm", "content": None}, [("analysis", "hm")])
      for key in ("reasoning", "reasoning_content", "thinking")),
    ({"reasoning_details": [TEXT, TEXT | {"text": "m"}], "reasoning": "hmm"},
     [("analysis", "hmm")]),
    ({"reasoning_details": [{"type": "reasoning.summary", "summary": "s"}]},
     [("analysis", "s")]),
    ({"thinking_blocks": [{"type": "thinking", "thinking": "hm",
                           "signature": "x"}], "reasoning_content": "hm"},
     [("analysis", "hm")]),
    ({"refusal": "No.", "content": None}, [("final", "No.")]),
    ({"refusal": "No.", "content": "Well."}, [("final", "Well.\n\nNo.")]),
    ({"content": [{"type": "refusal", "refusal": "No."}]},
     [("final", "No.")]),
    ({"content": [{"type": "output_text", "text": "a", "annotations": []},
                  {"type": "input_text", "text": "b"}]}, [("final", "ab")]),
    ({"content": "a", "phase": "commentary"}, [("commentary", "a")]),
    ({"content": "a", "phase": "final_answer", "reasoning": "b"},
     [("analysis", "b"), ("final", "a")]),
    ({"content": "a", "tool_calls": None, "function_call": None, "audio": {},
      "annotations": [], "id": "m1", "usage": {"x": 1}}, [("final", "a")]),
    ({"type": "message", "status": "completed", "content": "a"},
     [("final", "a")]),
])
def test_what_an_assistant_said_under_any_key(message, wanted):
    assert heard(SAYS | message) == wanted


class Dumped:
    """An object of a client's library."""

    def __init__(self, **fields: object) -> None:
        self.fields = fields

    def model_dump(self) -> dict:
        return {key: value.model_dump() if isinstance(value, Dumped)
                else value for key, value in self.fields.items()}


def test_objects_of_clients_are_messages_and_tools():
    function = Dumped(name="f", arguments="{}")
    call = Dumped(id="c1", type="function", function=function)
    message = Dumped(role="assistant", content=None, refusal=None,
                     tool_calls=[call.model_dump()], audio=None)
    mixed = SAYS | {"tool_calls": [call]}
    for asks in (message, mixed):
        found = read_messages([user("a"), asks, TELLS])[1]
        assert [each.recipient for each in found] == [
            None, "functions.f", "assistant"]
    with pytest.raises(ChatError, match="expected a dict"):
        read_messages([Dumped])
    tools = read_tools([Dumped(type="function", function=function.fields | {
        "arguments": None})])
    assert tools["f"].run is None
    one = chat(said("ok"))
    assert run(one, [user("a"), mixed, TELLS])["final"] == "ok"


def test_results_are_rendered_in_the_order_of_the_calls():
    asks = SAYS | {"tool_calls": [CALL | {"id": n} for n in "abc"]}
    tells = [TELLS | {"tool_call_id": n, "content": n.upper()} for n in "bca"]
    found = read_messages([user("a"), asks, *tells, user("b")])[1]
    assert [each.content for each in found[4:]] == ["A", "B", "C", "b"]
    with pytest.raises(ChatError, match=r"open call \(b\)"):
        read_messages([user("a"), asks, *tells[1:], tells[1]])
    with pytest.raises(ChatError, match="not answered: c"):
        read_messages([user("a"), asks, tells[0], tells[2]])
    with pytest.raises(ChatError, match="to answer c, found 'assistant'"):
        read_messages([user("a"), asks, tells[0], tells[2], SAYS])


def test_items_of_responses_are_messages():
    def calls(id_):
        return {"type": "function_call", "id": "x", "call_id": id_,
                "name": "f", "arguments": id_, "status": "completed"}

    def gives(id_):
        return {"type": "function_call_output", "call_id": id_,
                "output": id_ * 2}

    talk = [{"type": "message", "role": "user", "content": [
        {"type": "input_text", "text": "ask"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [
            {"type": "reasoning_text", "text": "hm"}]},
        calls("1"), calls("2"), gives("2"), gives("1"),
        {"type": "message", "role": "assistant", "phase": "commentary",
         "content": [{"type": "output_text", "text": "so"}]}, user("b")]
    assert [each.content for each in read_messages(talk)[1]] == [
        "ask", "hm", "1", "2", "11", "22", "so", "b"]
    for wrong in ([*talk[:5], calls("3"), gives("1"), gives("3")],
                  [*talk[:4], calls("1"), *talk[4:]]):
        with pytest.raises(ChatError, match="call_id|to answer 1"):
            read_messages(wrong)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(
        ["user", "assistant", "tool", "system", "c1", "text", "function",
         "f", "{}", "", "reasoning", "function_call", "commentary",
         "function_call_output", "reasoning.text", "input_text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "id", "type",
                         "text", "function", "name", "arguments",
                         "tool_call_id", "reasoning", "thinking", "phase",
                         "reasoning_details", "refusal", "output", "call_id",
                         "summary", "odd"]), inner, max_size=5),
    max_leaves=25)


@settings(deadline=None, max_examples=150)
@given(st.lists(JSON, max_size=4) | JSON)
def test_any_messages_are_read_or_refused(messages):
    try:
        head, found = read_messages(messages)
    except ChatError as error:
        assert str(error).startswith("messages")
    else:
        assert render(TOKENIZER, found)
        assert found[-1].role in ("user", "tool")


# -- odd conversations, from seeds ------------------------------------------

FUZZ = int(os.environ.get("GPTOSS_FUZZ", "1"))  # times as many cases
ODD = ("name", "refusal", "audio", "function_call", "metadata", "phase",
       "thinking", "reasoning", "reasoning_content", "reasoning_details",
       "tool_calls", "tool_call_id", "content", "prefix", "text", "role")


def odd_talk(rng: random.Random) -> list[dict]:
    """A conversation as some client might send it, with odd keys; every
    text in it is a word of its own."""
    def word() -> str:
        return f"w{rng.randrange(10 ** 9)}w"

    def text() -> object:
        return rng.choice([word(), [{"type": rng.choice(
            ["text", "input_text", "output_text", "image"]),
            "text": word()}], None, ""][:rng.choice((2, 2, 4))])

    talk = []
    for _ in range(rng.randint(1, 4)):
        talk.append({"role": rng.choice(["user", "system", "developer"]),
                     "content": text()})
        calls = [{"id": word(), "type": "function", "function": {
            "name": "f", "arguments": word()}}
            for _ in range(rng.randint(0, 3))]
        said = SAYS | {"content": text(), "tool_calls": calls}
        said[rng.choice(ODD[6:9])] = word()
        tells = [TELLS | {"tool_call_id": call["id"], "content": word()}
                 for call in calls]
        rng.shuffle(tells)
        talk += [said, *tells[:rng.choice((9, 9, 9, 1))]]
    talk.append(user(word()))
    for _ in range(rng.choice((0, 0, 1))):
        rng.choice(talk)[rng.choice(ODD)] = rng.choice(
            [word(), [word()], {word(): word()}, None, 7, True, [{}]])
    return talk


@pytest.mark.parametrize("seed", range(300 * FUZZ))
def test_odd_conversations_are_rendered_whole_or_refused(seed):
    talk = odd_talk(random.Random(seed))
    try:
        head, found = read_messages(talk)
    except ChatError as error:
        assert re.match(r"messages\[\d+\]", str(error))
        return
    shown = head + "".join(f"{each.content} {each.name}" for each in found)
    asked = {call["id"] for each in talk
             for call in each.get("tool_calls") or ()}
    for lost in re.findall(r"w\d+w", json.dumps(talk)):
        assert lost in shown or lost in asked, (lost, talk)
