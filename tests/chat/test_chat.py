"""Chat: messages in, events out, tools run, turns that may be left."""

import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from itertools import groupby, zip_longest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    CONFIG,
    CONTROL,
    MODEL,
    TOKENIZER,
    Scripted,
    called,
    chat,
    fresh,
    ids,
    run,
    said,
    user,
)
from test_messages import ASKS, CALL, SAYS, TELLS
from test_tools import search

from gptoss.chat.calculator import calculator, today
from gptoss.chat.chat import Chat
from gptoss.chat.messages import ChatError, read_messages
from gptoss.chat.turn import Usage
from gptoss.text.sampling import GenerateError, Sampler
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import tokenizer_json

# -- turns ------------------------------------------------------------------

def test_reply_is_the_final_channel_as_it_comes():
    one = chat(said("héllo", "They greet."))
    pieces = list(one.reply([user("Hi")]))
    assert "".join(pieces) == "héllo" and len(pieces) == 5  # never half of é
    assert one.turn == [{"role": "assistant", "content": "héllo",
                         "reasoning": "They greet."}]
    assert one.usage.finish_reason == "stop"


def test_events_tell_everything_and_count():
    one = chat(called("calculator", '{"expression": "6*7"}'),
               said("It is 42.", "Good."), tools=[calculator])
    events = list(one.events([user("6*7?")]))
    kinds = [kind for kind, _ in groupby(event.kind for event in events)]
    assert kinds == ["call", "result", "analysis", "final", "done"]
    assert (events[0].name, events[0].text) == (
        "calculator", '{"expression": "6*7"}')
    assert (events[1].name, events[1].text) == ("calculator", "42")
    prompt = len(one.prompt([user("6*7?")]))
    answer = len(ids("<|start|>functions.calculator to=assistant<|channel|>"
                     "commentary<|message|>42<|end|><|start|>assistant"))
    written = len(one.session.prefix.tokens) - prompt - answer
    usage = events[-1].usage
    assert usage == one.usage == Usage("stop", prompt, prompt + answer + 1,
                                       written, usage.seconds)
    # all but the very last token went through the model, each once
    assert one.model.fed == len(one.session.prefix.tokens) - 1
    assert usage.seconds > 0


def test_within_a_turn_the_model_reads_its_own_words():
    """A header that no renderer would write stays as it is."""
    odd = ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant to="
           "functions.today<|channel|>commentary<|message|>{ }<|call|>")
    one = chat(odd, said("done"), tools=[today])
    found = run(one, [user("a")])
    text = TOKENIZER.decode(one.session.prefix.tokens)
    assert odd + "<|start|>functions.today to=assistant" in text
    assert "notice" not in found
    assert one.turn[0]["reasoning"] == "hm"


def test_old_analysis_is_dropped_and_the_turns_go_on():
    one = chat(said("one", "first thought"), called("today", "{}"),
               said("two", "second thought"), said("three", "third"),
               tools=[today], effort="high", instructions="Be kind.")
    talk = [{"role": "system", "content": "Be brief."}, user("a")]
    for _ in range(3):
        text = TOKENIZER.decode(one.prompt(talk))
        assert "thought" not in text and text.endswith("<|start|>assistant")
        assert "Reasoning: high" in text
        assert "# Instructions\n\nBe kind.\n\nBe brief.\n\n# Tools" in text
        assert text.count("<|call|>") == text.count("functions.today to=")
        list(one.events(talk))
        talk += [*one.turn, user("b")]
    assert [m["content"] for m in talk if m["role"] == "assistant"] == [
        "one", None, "two", "three"]
    assert len([m for m in talk if "reasoning" in m]) == 3


def test_a_callers_tool_ends_the_turn():
    clock = {"type": "function", "function": {
        "name": "clock", "description": "The time.", "parameters": {
            "type": "object", "properties": {"zone": {"type": "string"}}}}}
    preamble = "<|channel|>commentary<|message|>wait<|end|><|start|>assistant"
    one = chat(preamble + called("clock", '{"zone": "x"}'), said("noon"),
               tools=[clock, today])
    talk = [user("time?")]
    assert run(one, talk)["done"] == "tool_calls"
    assert one.turn == [{"role": "assistant", "content": "wait",
                         "tool_calls": [{"id": "call_1", "type": "function",
                                         "function": {
                                             "name": "clock", "arguments":
                                             '{"zone": "x"}'}}]}]
    talk += [*one.turn, {"role": "tool", "tool_call_id": "call_1",
                         "content": "12:00"}]
    assert run(one, talk) == {"final": "noon", "done": "stop"}
    assert one.usage.prefilled_tokens < 120  # the call was not fed again
    talk += [*one.turn, user("thanks")]
    assert one.prompt(talk)


def test_ids_of_calls_are_new_in_the_conversation():
    one = chat(called("today", ""), said("x"), tools=[today])
    talk = [user("a"), ASKS | {"tool_calls": [CALL | {"id": "call_1"}]},
            TELLS | {"tool_call_id": "call_1"}]
    run(one, talk)
    assert one.turn[0]["tool_calls"][0]["id"] == "call_2"
    assert one.turn[1]["tool_call_id"] == "call_2"


@pytest.mark.parametrize("call, result", [
    (called("nothing", "{}"), "error: there is no tool nothing; there are: "
     "search, today"),
    (called("search", "{oops"), "error: JSONDecodeError"),
    (called("search", '{"query": "bad"}'), "error: KeyError"),
    (called("today", "{}", "<|end|>"), "20"),  # a call without <|call|>
    ("<|channel|>commentary to=today<|message|><|call|>", "20"),
    ("<|channel|>analysis to=functions.today<|message|>{}<|return|>", "20"),
    ("<|channel|>commentary to=python<|message|>1<|call|>",
     "error: there is no tool python"),
    (called("a<b>é", "{}"), "error: there is no tool a_b__"),
    (called("x" * 90, "{}"), "error: there is no tool xxx"),
])
def test_whatever_is_called_the_turn_goes_on(call, result):
    one = chat(call, said("ok"), tools=[search, today])
    talk = [user("a")]
    found = run(one, talk)
    assert found["result"].split(" ", 1)[1].startswith(result)
    assert found["final"] == "ok" and found["done"] == "stop"
    assert read_messages([*talk, *one.turn, user("b")])


def test_rounds_are_bounded():
    one = chat(*[called("today", "{}")] * 9, said("never"), tools=[today],
               rounds=3)
    found = run(one, [user("a")])
    assert found["result"].count("|") == 2 and found["done"] == "length"
    assert "not run: call 4 of at most 3" in found["notice"]
    assert len(one.turn) == 6
    assert read_messages([user("a"), *one.turn, user("b")])
    none = chat(called("today", "{}"), tools=[today], rounds=0)
    assert "result" not in run(none, [user("a")]) and none.turn == []


# -- malformed output -------------------------------------------------------

@pytest.mark.parametrize("text, final", [
    ("<|return|>", ""), ("<|end|><|return|>", ""), ("hello<|return|>",
                                                    "hello"),
    ("<|channel|><|return|>", ""), ("<|message|>hello<|return|>", "hello"),
    ("<|channel|>other<|message|>hello<|return|>", ""),
    ("<|channel|>analyis<|message|>x<|end|><|start|>assistant<|channel|>final"
     "<|message|>hello<|return|>", "hello"),
    ("<|channel|>final<|message|><|return|>", ""),
    ("<|channel|>final<|message|>a<|start|>assistant<|channel|>final"
     "<|message|>b<|return|>", "a\n\nb"),
    ("<|channel|>final<|message|>a<|call|>", "a"),
    ("<|channel|>final<|message|>a<|constrain|>b<|return|>", "ab"),
    ("<|channel|>final<|message|>a<|endoftext|>", "a"),
    ("<|channel|>final<|message|>a<|end|><|start|>user<|message|>b<|end|>"
     "<|start|>assistant<|channel|>final<|message|>c<|return|>", "a"),
    ("<|channel|>commentary to=assistant<|message|>a<|call|>", ""),
    ("<|channel|>final to=<|message|>a<|return|>", "a"),
])
def test_malformed_output_is_reported(text, final):
    one = chat(text)
    talk = [user("a")]
    found = run(one, talk)
    assert found.get("final", "") == final and found["done"] == "stop"
    assert found["notice"]
    assert read_messages([*talk, *one.turn, user("b")])


def test_thinking_only_is_reported():
    one = chat("<|channel|>analysis<|message|>hm<|return|>")
    assert "without an answer" in run(one, [user("a")])["notice"]
    assert one.turn == [{"role": "assistant", "content": None,
                         "reasoning": "hm"}]


SOUP = st.lists(st.sampled_from([
    *CONTROL, "assistant", "user", "final", "analysis", "commentary",
    " to=functions.today", " to=x", "json", "{}", "a", "\xff"]), max_size=14)


@settings(deadline=None, max_examples=20)
@given(st.lists(SOUP, min_size=1, max_size=3))
def test_any_output_ends_in_done(soups):
    script = ["".join(soup) + "<|return|>" for soup in soups]
    one = chat(*script, tools=[today], rounds=2, max_new_tokens=60)
    talk = [user("a")]
    found = run(one, talk)
    assert found["done"] in ("stop", "length")
    assert read_messages([*talk, *one.turn, user("b")])
    prefix = one.session.prefix
    assert prefix.cache.length == len(prefix.tokens) - 1


# -- limits and options -----------------------------------------------------

def test_max_new_tokens_is_for_the_whole_turn():
    one = chat(called("today", "{}"), said("hello!"), tools=[today],
               max_new_tokens=len(ids(called("today", "{}"))) + 10)
    assert run(one, [user("a")])["done"] == "length"
    assert one.usage.generated_tokens == len(ids(
        called("today", "{}"))) + 10
    assert one.turn[-1]["content"] == "hel"


def test_a_full_context_ends_in_length_and_a_fuller_one_is_refused():
    one = chat(said("b" * 200))
    room = CONFIG.max_position_embeddings - len(one.prompt([user("")]))
    found = run(one, [user("a" * (room - 30))])
    assert found["done"] == "length"
    assert found["notice"] == "the context of 2048 tokens is full"
    assert len(one.session.prefix.tokens) == CONFIG.max_position_embeddings + 1
    assert one.turn[0]["content"].startswith("b")
    with pytest.raises(ChatError, match="messages: expected at most 2048 "
                                        "tokens .* found 2049"):
        one.events([user("a" * (room + 1))])
    assert run(one, [user("a")])["done"] == "stop"  # and still works


def test_a_result_that_does_not_fit_ends_in_length():
    def much() -> str:
        return "x" * 5000

    one = chat(called("much", ""), said("never"), tools=[much])
    found = run(one, [user("a")])
    assert found["done"] == "length" and "final" not in found
    assert "context of 2048 tokens is full" in found["notice"]
    assert run(one, [user("a")])["final"] == "never"


@pytest.mark.parametrize("options, why", [
    ({"effort": "huge"}, "effort: expected one of low, medium, high"),
    ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1"),
    ({"seed": -1}, r"seed: expected an integer from 0 to 2\*\*63 - 1"),
    ({"prefill_chunk": 0}, "prefill_chunk: expected an integer >= 1"),
    ({"rounds": True}, "rounds: expected"), ({"slack": 1.5}, "slack: "),
    ({"instructions": 3}, "instructions: expected a string"),
    ({"tools": [3]}, "tools: expected"),
])
def test_wrong_options_are_named(options, why):
    sampling = {"max_new_tokens", "seed", "prefill_chunk"} & options.keys()
    with pytest.raises(GenerateError if sampling else ChatError, match=why):
        chat("", **options)


def test_sampler_options_and_a_tokenizer_without_harmony():
    with pytest.raises(GenerateError, match="top_p"):
        chat("", top_p=0)
    plain = Tokenizer(tokenizer_json({bytes([b]): b for b in range(256)},
                                     {256: "<|endoftext|>"}))
    with pytest.raises(ChatError, match="control tokens"):
        Chat((Scripted(), plain))


def test_a_seed_repeats_and_reset_begins_it_anew():
    def texts(one: Chat) -> list[dict]:
        return [run(one, [user(text)]) for text in "ab"]

    first, other = (chat(seed=seed, temperature=1.0, max_new_tokens=30)
                    for seed in (1, 2))
    wanted = texts(first)
    assert wanted != texts(other)
    assert texts(first) != wanted
    first.reset()
    assert first.session.prefix.tokens == [] and first.turn == []
    assert texts(first) == wanted


def test_date_and_effort_are_in_the_prompt():
    one = chat(date="2031-01-02")
    assert "Current date: 2031-01-02\n" in TOKENIZER.decode(
        one.prompt([user("a")]))
    one.settings = one.settings.with_changes(effort="low")
    assert "Reasoning: low" in TOKENIZER.decode(one.prompt([user("a")]))
    with pytest.raises(ChatError, match="effort"):
        one.settings.with_changes(effort="none")
    assert "Current date" not in TOKENIZER.decode(
        chat(date="").prompt([user("a")]))
    assert today() in TOKENIZER.decode(chat(date=None).prompt([user("a")]))


# -- the order of what was said ---------------------------------------------

START = "<|start|>assistant"


def wrote(channel: str, text: str) -> str:
    return f"<|channel|>{channel}<|message|>{text}<|end|>{START}"


@pytest.mark.parametrize("script, turn", [
    ([("analysis", "A1"), ("commentary", "C1"), ("analysis", "A2"),
      ("commentary", "C2"), ("final", "F")],
     [{"reasoning": "A1", "content": "C1", "phase": "commentary"},
      {"reasoning": "A2", "content": "C2", "phase": "commentary"},
      {"content": "F"}]),
    ([("commentary", "C1"), ("final", "F")],
     [{"content": "C1", "phase": "commentary"}, {"content": "F"}]),
    ([("commentary", "C1"), ("commentary", "C2")],
     [{"content": c, "phase": "commentary"} for c in ("C1", "C2")]),
    ([("analysis", "A1"), ("analysis", "A2"), ("final", "F")],
     [{"reasoning": "A1", "content": None},
      {"reasoning": "A2", "content": "F"}]),
    ([("final", "F1"), ("analysis", "A"), ("final", "F2")],
     [{"content": "F1"}, {"reasoning": "A", "content": "F2"}]),
    ([("analysis", "A")], [{"reasoning": "A", "content": None}]),
])
def test_a_turn_keeps_its_messages_in_order(script, turn):
    text = "".join(wrote(*each) for each in script).removesuffix(
        "<|end|>" + START) + "<|return|>"
    one = chat(text)
    found = run(one, [user("a")])
    assert one.turn == [SAYS | each for each in turn]
    for channel in ("analysis", "commentary", "final"):
        assert found.get(channel, "") == "\n\n".join(
            said for where, said in script if where == channel)
    again = read_messages([user("a"), *one.turn, user("b")])[1][1:-1]
    assert [(each.channel, each.content) for each in again] == script


@pytest.mark.parametrize("before", [
    [("analysis", "A")], [("commentary", "C")],
    [("analysis", "A1"), ("commentary", "C1"), ("analysis", "A2"),
     ("commentary", "C2")], [("analysis", "A1"), ("analysis", "A2")], []])
def test_what_comes_before_a_call_stays_in_the_cache(before):
    """The next prompt begins with the very tokens that the model wrote."""
    clock = {"type": "function", "name": "clock"}
    text = "".join(wrote(*each) for each in before)
    text += ("<|channel|>commentary to=functions.clock <|constrain|>json"
             "<|message|>{}<|call|>").replace("<|channel|>commentary to="
                                              "functions.clock", " to="
                                              "functions.clock<|channel|>"
                                              "commentary")
    one = chat(text, said("noon"), tools=[clock])
    talk = [user("time?")]
    assert run(one, talk)["done"] == "tool_calls"
    held = list(one.session.prefix.tokens)
    talk += [*one.turn, TELLS | {"tool_call_id": "call_1"}]
    assert one.prompt(talk)[:len(held)] == held
    assert run(one, talk)["final"] == "noon"
    assert one.usage.prefilled_tokens == len(
        ids("<|start|>functions.clock to=assistant<|channel|>commentary"
            "<|message|>x<|end|><|start|>assistant")) + 1


def test_an_answer_before_a_call_stays_an_answer():
    one = chat(wrote("final", "F") + called("today", "{}"), said("G"),
               tools=[today])
    run(one, [user("a")])
    assert [(m.get("content"), "tool_calls" in m) for m in one.turn] == [
        ("F", False), (None, True), (one.turn[2]["content"], False),
        ("G", False)]


def test_a_turn_that_did_not_end_is_no_answer():
    """Cut off while thinking; "go on" finds the thought, and no answer."""
    one = chat(said("never", "a long thought"), said("done"),
               max_new_tokens=22)
    talk = [user("q")]
    assert run(one, talk)["done"] == "length"
    thought = one.turn[0]["reasoning"]
    assert one.turn == [SAYS | {"content": None, "reasoning": thought}]
    assert thought and "a long thought".startswith(thought)
    talk += [*one.turn, user("go on")]
    assert "final" not in TOKENIZER.decode(one.prompt(talk)).partition(
        "<|start|>user")[2]
    assert thought in [each.content for each in read_messages(talk)[1]]


# -- left and stopped -------------------------------------------------------

def test_usage_is_of_this_turn():
    one = chat(said("first"), said("second, longer"))
    run(one, [user("a")])
    first = one.usage
    events = one.events([user("b")])
    assert one.usage is None
    assert next(events).kind == "final" and one.usage is None
    events.close()
    assert one.usage.finish_reason == "stopped"
    assert 0 < one.usage.generated_tokens < first.generated_tokens
    one.model.script, one.model.at = [ids(said("third"))], 0
    for event in one.events([user("c")]):
        if event.kind == "final":
            break
    del event
    assert one.usage is None or one.usage.finish_reason == "stopped"
    one.reset()
    assert one.usage is None


def test_a_long_prompt_can_be_stopped_between_its_chunks():
    text = "x" * 300
    for slack in (0, 1024):
        one = chat(said("ok"), said("ok"), said("ok"), said("ok"),
                   prefill_chunk=32, slack=slack)
        size = len(one.prompt([user(text)]))
        for asked in (1, 2, 5):
            count = iter(range(asked))
            events = list(one.events([user(text)], progress=True,
                                     stop=lambda count=count: next(
                                         count, None) is None))
            assert [event.kind for event in events] == (
                ["progress"] * asked + ["done"])
            assert events[-1].text == "stopped" == one.usage.finish_reason
            assert one.turn == [] and one.usage.generated_tokens == 0
            assert one.usage.prefilled_tokens <= asked * 32
            assert one.session.prefix.cache.length >= 32 * asked
        one.model.script, one.model.at = [ids(said("ok"))], 0
        fed = one.model.fed
        assert run(one, [user(text)])["final"] == "ok"
        assert one.usage.prefilled_tokens < size - 32  # what was fed is kept
        assert one.model.fed - fed == one.usage.prefilled_tokens + len(
            ids(said("ok"))) - 1
        torch.testing.assert_close(
            one.model.last, fresh(one.model, one.session.prefix.tokens[:-1]),
            atol=1e-5, rtol=0)


def test_progress_counts_down_and_only_if_asked():
    one = chat(said("ok"), said("ok"), prefill_chunk=64)
    talk = [user("x" * 200)]
    size = len(one.prompt(talk))
    events = list(one.events(talk, progress=True))
    assert [event.text for event in events if event.kind == "progress"] == [
        str(size - n) for n in range(64, size, 64)]
    assert one.usage.prefilled_tokens == size
    one.reset()
    assert "progress" not in {event.kind for event in one.events(talk)}


@pytest.mark.parametrize("at", range(0, 30, 3))
def test_stop_is_asked_before_every_forward(at):
    one = chat(said("abcdef", "thinking"), called("today", "{}"),
               tools=[today])
    count = 0

    def stop() -> bool:
        nonlocal count
        count += 1
        return count > at

    events = list(one.events([user("a")], stop=stop))
    assert events[-1].kind == "done"
    assert events[-1].text == "stopped" and count == at + 1
    assert one.usage.generated_tokens == at
    with pytest.raises(ZeroDivisionError):
        list(one.events([user("a")], stop=lambda: 1 / 0))
    assert list(one.reply([user("a")], stop=lambda: True)) == []


# -- the shipped model ------------------------------------------------------

def test_kept_cache_and_fresh_cache_answer_alike():
    """Three greedy turns of the shipped model in float32."""
    options = {"temperature": 0, "date": "2025-06-28", "max_new_tokens": 30,
               "effort": "low"}
    fresh = Chat(dtype=torch.float32, **options)
    pair, wanted, talk = (fresh.model, fresh.tokenizer), [], []
    for question in ("Tell me a story.", "What is 2 + 3?", "Thanks!"):
        talk = [*talk, user(question)]
        fresh.reset()
        wanted.append((talk, run(fresh, talk), fresh.session.prefix.tokens))
        talk = talk + fresh.turn
    for slack in (0, 1024):
        kept = Chat(pair, **options, slack=slack)
        for talk, events, tokens in wanted:
            assert run(kept, talk) == events
            assert kept.session.prefix.tokens == tokens
    assert kept.usage.prefilled_tokens < fresh.usage.prefilled_tokens


def test_package_face():
    import gptoss

    assert gptoss.Chat is Chat
    code = Sampler(0)
    one = Chat((MODEL, TOKENIZER), "low", temperature=0)
    assert one.settings.sampling.draws == code
    assert sys.modules["gptoss.chat.calculator"].TOOLS == {
        "calculator": calculator, "today": today}
    assert sys.modules["gptoss.chat"].Chat is Chat


# -- what is shared, and what is not -----------------------------------------

def test_sessions_share_a_model_and_nothing_else():
    """Two conversations, an event of each in turn, are what each is alone:
    texts, tokens, seeds, the ids of calls."""
    options = {"temperature": 1.0, "seed": 4, "max_new_tokens": 25,
               "date": "2025-06-28"}
    pair, alone = (MODEL, TOKENIZER), []
    for text in "ab":
        one = Chat(pair, **options)
        events = [event.text for event in one.events([user(text)])]
        alone.append((events[:-1], one.turn, one.session.prefix.tokens))
    assert alone[0] != alone[1]
    one = Chat(pair, **options)
    sessions = [one.new_session(), one.new_session()]
    streams = [one.events([user(text)], session=session)
               for text, session in zip("ab", sessions, strict=True)]
    found: list[list[str]] = [[], []]
    for pieces in zip_longest(*streams):
        for heard, event in zip(found, pieces, strict=True):
            if event is not None and event.kind != "done":
                heard.append(event.text)
    assert [(heard, session.turn.messages(), session.prefix.tokens)
            for heard, session in zip(found, sessions, strict=True)] == alone
    assert one.turn == [] and one.usage is None  # its own is untouched
    assert one.session.prefix.tokens == []


def test_a_turn_that_is_left_ends_for_its_session_alone():
    one = chat(said("abc", "x" * 30))
    first, other = one.new_session(), one.new_session()
    events = one.events([user("a")], session=first)
    next(events)
    one.model.script, one.model.at = [ids(said("second"))], 0
    assert "".join(one.reply([user("b")], session=other)) == "second"
    assert first.turn.usage is None  # it still lasts
    one.events([user("c")], session=first)
    assert list(events) == []  # now it has ended


def test_settings_are_changed_as_a_whole_and_checked_again():
    one = chat(tools=[today], seed=3)
    before = one.settings
    after = before.with_changes(effort="low", temperature=0.5, rounds=2)
    assert (after.effort, after.rounds, after.sampling.temperature,
            after.sampling.seed) == ("low", 2, 0.5, 3)
    assert after.tools is before.tools and before.effort == "medium"
    with pytest.raises(GenerateError, match="top_k"):
        before.with_changes(top_k=-1)
    with pytest.raises(TypeError, match="loudness"):
        before.with_changes(loudness=11)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.effort = "low"


def test_a_chat_says_what_it_is():
    one = chat(said("ab"), tools=[today])
    assert repr(one) == ("Chat(2 layers, effort='medium', tools=['today'], "
                         "0 of 2,048 tokens)")
    run(one, [user("a")])
    held = len(one.session.prefix.tokens)
    assert f"{held} of 2,048" in repr(one) and held > 9
    assert repr(one.session) == f"Session({held} tokens)"
    assert repr(one.session.prefix) == f"PrefixCache({held} tokens)"


# -- the command, in a process of its own -----------------------------------

def child() -> None:
    """`python -m gptoss`, with a scripted model for the shipped one."""
    from gptoss.cli import commands

    script = json.loads(os.environ["SCRIPT"])
    commands.load_pair = lambda *_: (Scripted(*script), TOKENIZER)
    sys.exit(commands.main(sys.argv[1:]))


ROOT = Path(__file__).parents[2]
CHILD = [sys.executable, "-c", "import sys; "
         "sys.path[:0] = ['tests', 'tests/chat']; "
         "import test_chat; test_chat.child()", "chat"]


def environment(*script: str, **more: str) -> dict[str, str]:
    return os.environ | {"SCRIPT": json.dumps(script), "TERM": "xterm",
                         "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
                         } | more


def test_piped_lines_are_answered_and_nothing_else_is_written():
    done = subprocess.run(
        [*CHILD, "--temperature", "0"], cwd=ROOT, capture_output=True,
        input=b"what\n\n /six times seven \nlast", timeout=120,
        env=environment(said("né\x1b", "thought"),
                        called("calculator", '{"expression": "6*7"}'),
                        said("42"), "<|return|>", PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, b"")
    # raw bytes to a pipe; an empty line for an answer that did not come
    assert done.stdout == b"n\\xe9\x1b\n42\n\n"


class Typist:
    """Somebody at a terminal in front of the command."""

    def __init__(self, env: dict[str, str], *options: str) -> None:
        import pty

        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.chdir(ROOT)
            os.execve(CHILD[0], [*CHILD, *options], env)
        self.log = b""

    def until(self, text: str, seconds: float = 120) -> str:
        """What was shown up to `text`, from the last such call on."""
        end, shown = time.monotonic() + seconds, b""
        while text.encode() not in shown:
            assert time.monotonic() < end, (text, shown)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    shown += os.read(self.fd, 1)
                except OSError:  # the program has left
                    break
        self.log += shown
        return re.sub(r"\x1b\[[\d;]*m", "", shown.decode("utf-8", "replace"))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self, text: str) -> str:
        """Ctrl-C at the prompt, until `text`. Python's readline misses a
        signal in the moment between the prompt and its waiting for a key:
        then a second one is as good as the first."""
        for _ in range(9):
            time.sleep(0.2)
            self.type("\x03")
            try:
                return self.until(text, 10)
            except AssertionError:
                continue
        raise AssertionError("Ctrl-C has no effect")

    def code(self) -> int:
        """The exit code of the program, which must be leaving."""
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def __enter__(self) -> "Typist":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_a_terminal_session(tmp_path):
    """Answers, a tool, Ctrl-C in an answer and at the prompt, commands."""
    env = environment(
        said("he\x1b[2Jllo", "bell\x07"),
        called("calculator", '{"expression": "6*7\u202e"}'), said("failed"),
        said("x" * 1200))
    options = "--system", "Be brief.", "--temperature", "0"
    with Typist(env, *options) as tty:
        tty.until("> ")
        answer_and_stop(tty)
        obey_commands(tty, tmp_path / "talk.json")
        assert "again" in tty.interrupt("> ")
        tty.interrupt("\0")  # to the end
        assert tty.code() == 0
    # nothing but what rich and readline write themselves
    for bad in (b"\x1b[2J", b"\x07", b"\xe2\x80\xae", b"Traceback"):
        assert bad not in tty.log


def answer_and_stop(tty: Typist) -> None:
    tty.type("first\n")
    shown = tty.until("> ")
    assert "[analysis] bell\u2407" in shown
    assert "he\u241b[2Jllo" in shown and "read anew]" in shown
    tty.type("second\n")
    shown = tty.until("> ")
    assert "[calculator] {" in shown and "[result] error: inv" in shown
    assert "failed" in shown
    for _ in range(2):  # stopped, and usable afterwards
        tty.type("third\n")
        tty.until("xxxx")
        tty.type("\x03")
        assert "[stopped]" in tty.until("> ")


def obey_commands(tty: Typist, file: Path) -> None:
    def says(line: str, answer: str) -> None:
        tty.type(line + "\n")
        assert answer in tty.until("> ")

    says(f"/save {file}", "11 messages saved")
    talk = json.loads(file.read_text("utf-8"))
    assert [m["role"] for m in talk] == [
        "system", "user", "assistant", "user", "assistant", "tool",
        "assistant", "user", "assistant", "user", "assistant"]
    assert talk[2]["content"] == "he\x1b[2Jllo"
    assert set(talk[8]["content"]) == set(talk[10]["content"]) == {"x"}
    says(f"/save {file}", "exists; /save!")
    says("/effort high", "effort: high")
    says("/nonsense", "[error] /nonsense: no such command")
    says("/help", "Ctrl-C stops an answer")
    says("/reset", "forgotten")
    says(f"/save! {file}", "1 message saved")
    assert json.loads(file.read_text("utf-8")) == [
        {"role": "system", "content": "Be brief."}]
