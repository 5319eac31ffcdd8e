"""text/template: transformers with the shipped template gives the same ids."""

import json
import os
import random
from pathlib import Path

import pytest

import gptoss
from gptoss.text.harmony import Message, render
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import HarmonyError

FUZZ = int(os.environ.get("GPTOSS_FUZZ", "1"))  # times as many cases
POCKET = Path(gptoss.__file__).parent / "pocket"
NAMES = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>",
         "<|call|>", "<|endoftext|>", "<|reserved_200013|>"]


SCHEMA = {"type": "object", "description": "what to do", "properties": {
    "place": {"type": "string", "description": "a city", "title": "Place",
              "examples": ["Rome", "Oslo"]},
    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
    "days": {"type": "array", "items": {"type": "integer"}},
    "deep": {"type": "object", "properties": {
        "flag": {"type": "boolean", "nullable": True, "default": True},
        "any": {}}},
    "either": {"description": "one of two", "default": 3, "oneOf": [
        {"type": "string", "description": "a name", "default": "x"},
        {"type": "number", "nullable": True}]},
    "both": {"type": ["string", "integer", "null"], "default": "x"}},
    "required": ["place", "deep"]}
WORDS = ["Hi", "né 🙂", '{"a": 1}', "'''", "\n\nTwo\n", "<|", "a|>b", "", " ",
         "\\n {{ x }} {% raw %}", "中文", "don't", "<|nothing|>"]


def conversation(rng: random.Random) -> tuple[list[dict], dict]:
    """OpenAI's dicts with a user or a tool at their end, and options."""
    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 4)))

    talk = [{"role": role, "content": text()} for role in
            rng.choice([[], ["system"], ["developer"],
                        ["system", "developer"]])]
    for turn in range(rng.randint(1, 4)):
        parts = [{"type": "text", "text": text()} for _ in range(2)]
        talk.append({"role": "user", "content": rng.choice([text(), parts])}
                    | rng.choice([{}, {"name": "ada"}]))
        for step in range(rng.randint(0, 2)):
            calls = [{"id": f"{turn}.{step}.{n}", "type": "function",
                      "function": {"name": rng.choice(["add", "see"]),
                                   "arguments": text()}}
                     for n in range(rng.randint(1, 3))]
            key = rng.choice(["reasoning", "reasoning_content", "thinking"])
            talk.append({"role": "assistant", "tool_calls": calls,
                         "content": rng.choice([None, text()]),
                         key: text()})
            talk += [{"role": "tool", "tool_call_id": call["id"],
                      "content": text()}
                     for call in rng.sample(calls, len(calls))]
        if turn and rng.random() < 0.2:
            talk.append({"role": "developer", "content": text()})
        if rng.random() < 0.8:
            talk.append({"role": "assistant", "content": text()}
                        | rng.choice([{}, {"thinking": text()}])
                        | rng.choice([{}, {}, {"phase": "commentary"}]))
    talk.append({"role": "user", "content": text()})
    plain = {"type": "object", "properties": {}}
    tools = [{"type": "function", "function": {
        "name": f"tool{n}", "description": text(),
        "parameters": rng.choice([SCHEMA, plain])}}
             for n in range(rng.choice([0, 0, 1, 3]))]
    return talk, {"tools": tools or None, "reasoning_effort": rng.choice(
        ["low", "medium", "high"]), "date": rng.choice(["", "2025-06-28"])}


@pytest.fixture(scope="module")
def theirs():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POCKET)


@pytest.mark.parametrize("seed", range(20 * FUZZ))
def test_the_template_gives_the_tokens_of_render(theirs, seed):
    ours = Tokenizer.from_pretrained(POCKET)
    for n in range(10):
        talk, options = conversation(random.Random(1000 * seed + n))
        text = theirs.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=True, **options)
        assert text == ours.apply_chat_template(talk, tokenize=False,
                                                **options)
        ids = theirs.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=False, **options)
        assert ids == ours.apply_chat_template(talk, **options)
        closed = ours.apply_chat_template(talk, add_generation_prompt=False,
                                          **options)
        assert closed == theirs.apply_chat_template(
            talk, add_generation_prompt=False, return_dict=False, **options)
        assert ids[:len(closed)] == closed


@pytest.mark.parametrize("name", NAMES)
def test_a_typed_control_token_is_text_here_and_refused_there(theirs, name):
    from jinja2 import TemplateError

    ours = Tokenizer.from_pretrained(POCKET)
    call = {"id": "1", "type": "function", "function": {
        "name": "f", "arguments": name}}
    user = {"role": "user", "content": "Hi"}
    for talk in ([{"role": "system", "content": name}, user],
                 [{"role": "user", "content": f"a{name}b"}],
                 [user, {"role": "assistant", "content": name}, user],
                 [user, {"role": "assistant", "tool_calls": [call]},
                  {"role": "tool", "tool_call_id": "1", "content": "x"}]):
        ids = ours.apply_chat_template(talk)
        safe = json.loads(json.dumps(talk).replace(name, "safe"))
        assert name in ours.decode(ids)
        assert sum(map(ours.is_special, ids)) == sum(map(
            ours.is_special, ours.apply_chat_template(safe)))
        theirs.apply_chat_template(safe)
        with pytest.raises(TemplateError, match="control token"):
            theirs.apply_chat_template(talk)


def test_a_template_of_messages_is_render():
    ours = Tokenizer.from_pretrained(POCKET)
    talk = [Message("user", "Q"),
            Message("assistant", "so", "analysis")]
    assert ours.apply_chat_template(talk) == render(ours, talk)
    assert ours.apply_chat_template(talk, add_generation_prompt=False) == (
        render(ours, talk, reply=False))
    with pytest.raises(HarmonyError, match="tools: expected none"):
        ours.apply_chat_template(talk, tools=[{}])
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        ours.apply_chat_template([{"role": "nobody"}])
    ended = [{"role": "user", "content": "Q"},
             {"role": "assistant", "content": "A"}]
    assert ours.apply_chat_template(
        ended, add_generation_prompt=False, tokenize=False).endswith(
            "<|channel|>final<|message|>A<|end|>")
