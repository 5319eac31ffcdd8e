# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: chat
#     public: [Chat, load]
# ---

# %% [markdown]
# # How is a conversation held?
#
# ## Question
#
# Whoever builds on a model wants to say: here are the messages, what comes
# next? Behind that stand a prompt, a cache, tools, settings and a turn; and
# one model, too large to have twice, for many who talk to it. The second
# question of the conversation below makes a prompt of 122 tokens, of which 32
# are fed. What holds all this together?

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: on the left, shared by all: model, tokenizer, settings with tools. In
# the middle a prompt is made of messages. On the right two sessions, each with
# a cache, random numbers and its last turn, from which events come.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
BOXES = [  # x, y, wide, high, text, colour
    (0, 0.2, 27, 2.6, "shared by all\n\nmodel, tokenizer\nsettings: effort, "
     "tools,\ninstructions, date,\nsampling", "C0"),
    *((62, y, 38, 1.1, f"session {name}: its cache,\nits random numbers, its "
       "turn", "C2") for y, name in ((1.7, "A"), (0.2, "B"))),
    *((34, y, 21, 1.1, "messages\nbecome a prompt", "C1")
      for y in (1.7, 0.2))]
fig, ax = plt.subplots(figsize=(7, 2.3))
for x, y, wide, high, text, colour in BOXES:
    ax.barh(y + high / 2, wide, high, x, color=colour, alpha=0.2)
    ax.text(x + wide / 2, y + high / 2, text, ha="center", va="center",
            fontsize=8)
for y in (0.75, 2.25):
    for start, end in ((27, 34), (55, 62), (100, 107)):
        ax.annotate("", (end, y), (start, y), arrowprops={
            "arrowstyle": "->"})
    ax.text(108, y, "events", va="center", fontsize=8)
    ax.annotate("", (44.5, y + 0.55), (44.5, y + 0.8), arrowprops={
        "arrowstyle": "->"})
ax.set(xlim=(-1, 120), ylim=(0, 3.2))
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: what is large or the same for everybody (blue) exists once. What
# belongs to one conversation (green) is small and stands apart. A prompt
# (orange) is made anew in each turn from all messages; the session's cache
# knows which of its tokens need not be read.

# %% [markdown]
# ## The twenty lines
#
# Everything is there. The [messages](messages.ipynb) are read, the
# [settings](memory.ipynb) put their own before them, harmony
# [renders](../text/conversation.ipynb) them, and a [turn](turns.ipynb) runs on
# the [cache](memory.ipynb) of a session with the [tools](tools.ipynb) of the
# settings:

# %%
import itertools
import os
from importlib.resources import files

os.environ["GPTOSS_KERNELS"] = "torch"  # the same words on every processor
import torch

from gptoss.chat.memory import Session
from gptoss.chat.messages import read_messages
from gptoss.chat.settings import Settings
from gptoss.chat.turn import Turn
from gptoss.model.transformer import GptOss
from gptoss.text.harmony import render
from gptoss.text.sampling import SamplingOptions
from gptoss.text.tokenizer import Tokenizer

torch.manual_seed(0)
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
tokenizer = Tokenizer.from_pretrained(POCKET)
settings = Settings(date="2025-06-28", sampling=SamplingOptions(
    temperature=0, max_new_tokens=None))


def plainly(messages: list[dict], session: Session) -> Turn:
    """The turn of the model after `messages`, still to be run."""
    instructions, rest = read_messages(messages)
    prompt = render(tokenizer, [*settings.head(instructions), *rest],
                    drop="turns")
    ids = (f"call_{n}" for n in itertools.count(1))
    return Turn(tokenizer, settings, session, prompt, ids)


talk, session = [], Session(model)
for question in ("What is 347 + 285?", "Take 88 from 403."):
    talk.append({"role": "user", "content": question})
    turn = plainly(talk, session)
    print("".join(event.text for event in turn.events()
                  if event.kind == "final"), "|", turn.usage.prompt_tokens,
          "tokens of prompt,", turn.usage.prefilled_tokens, "fed")
    talk += turn.messages()

# %% [markdown]
# That is a conversation. `Chat` is these lines as an object, with what its
# users need besides: a model from a folder, ids of calls that the conversation
# has not used yet, a session of its own for those who bring none, a turn that
# ends when the next one begins, and one decision for several processes.

# %% [markdown]
# ## Code
#
# ### A model from anywhere
#
# Model and tokenizer come from a folder, shipped or released, with no special
# case for either.

# %% tags=["export"]
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from gptoss.chat.agreement import SingleProcess
from gptoss.chat.calculator import today
from gptoss.chat.memory import SLACK, Session
from gptoss.chat.messages import ChatError, call_ids, read_messages, require
from gptoss.chat.settings import Settings
from gptoss.chat.tools import read_tools
from gptoss.chat.turn import ChatEvent, Turn, Usage, stop_tokens
from gptoss.model.transformer import GptOss
from gptoss.text.harmony import render
from gptoss.text.sampling import SamplingOptions
from gptoss.text.tokenizer import Tokenizer
from gptoss.weights.hub import resolve


def load(model: str | Path | tuple[GptOss, Tokenizer] | None = None,
         dtype: torch.dtype = torch.bfloat16, device="cpu"
         ) -> tuple[GptOss, Tokenizer]:
    """Model and tokenizer of a folder or hub id; None: the shipped one."""
    if isinstance(model, tuple):
        return model
    pocket = Path(str(files("gptoss") / "pocket"))
    folder = resolve(pocket if model is None else model)
    tokenizer = Tokenizer.from_pretrained(folder)  # the quick one first
    return (GptOss.from_pretrained(folder, dtype=dtype, device=device),
            tokenizer)

# %% [markdown]
# ### The chat
#
# `prompt` and `events` are the twenty lines. `_begin` reads the messages in
# the first process only and gives what came of it to all, a mistake included:
# so each of them raises the same ChatError. A prompt longer than the model's
# context is such a mistake. `date=None` is today, asked once, when the chat is
# made; an empty date is none.

# %% tags=["export"]
class Chat:
    """Conversations with a gpt-oss model, in OpenAI's message dicts.

    model: a folder, a hub id, a pair (GptOss, Tokenizer), or None for the
    shipped one. effort: low, medium, high. tools: typed Python functions,
    which are called when the model asks, or dicts of OpenAI's shape, which
    end the turn with a call for the caller. instructions: come before those
    of a system message. date: "2025-06-28", "" for none, None for today.
    temperature, top_k, top_p, seed, prefill_chunk: as for `SamplingOptions`.
    max_new_tokens: in a turn, all rounds together (None: until the context
    is full). rounds: calls run in one turn. slack: see `PrefixCache`.
    tool_timeout: seconds for a call, see `function_tool`. draft: who guesses
    tokens, so that several are run at once, as for `generate`.

    One cache is kept from turn to turn; what a new prompt shares with it is
    not fed again. It is that of `session`; for several conversations with
    one model, give each its own, from `new_session`. A turn may be left at
    any point. Not for several threads. With a model that is spread over
    processes, all of them make the same calls; what the first is given
    counts, and its tools alone are run.

    Attributes: model, tokenizer, settings (set a new one to change
    something, `chat.settings.with_changes(effort="low")`), session.
    """

    def __init__(self, model: str | Path | tuple[GptOss, Tokenizer] |
                 None = None, effort: str = "medium",
                 tools: Iterable[Callable | Mapping] = (), *,
                 instructions: str = "", date: str | None = None,
                 temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, seed: int | None = None,
                 max_new_tokens: int | None = None, rounds: int = 8,
                 slack: int = SLACK, dtype: torch.dtype = torch.bfloat16,
                 device="cpu", tool_timeout: float | None = None,
                 prefill_chunk: int = 512, draft: Any = None) -> None:
        require(tool_timeout is None or type(tool_timeout) in (int, float)
                and 0 < tool_timeout < 1e6, "tool_timeout",
                "seconds > 0", tool_timeout)
        self.settings = Settings(
            effort=effort, tools=read_tools(tools, tool_timeout),
            instructions=instructions, date=date, rounds=rounds, slack=slack,
            sampling=SamplingOptions(
                temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                max_new_tokens=max_new_tokens, prefill_chunk=prefill_chunk))
        self.model, self.tokenizer = load(model, dtype, device)
        self._draft = draft
        stop_tokens(self.tokenizer)
        self._group = getattr(self.model, "group", None) or SingleProcess()
        if date is None:
            self.settings = self.settings.with_changes(
                date=self._group.same(today))
        self.session = self.new_session()

    def __repr__(self) -> str:
        config, settings = self.model.config, self.settings
        return (f"Chat({config.num_hidden_layers} layers, "
                f"effort={settings.effort!r}, tools={[*settings.tools]}, "
                f"{len(self.session.prefix.tokens):,} of "
                f"{config.max_position_embeddings:,} tokens)")

    def new_session(self) -> Session:
        """The memory of one more conversation with this model."""
        return Session(self.model, self.settings.slack,
                       self.settings.sampling.seed, self._draft)

    def prompt(self, messages: Sequence[object]) -> list[int]:
        """The tokens that `messages` become, up to the model's turn."""
        instructions, rest = read_messages(messages)
        prompt = render(self.tokenizer,
                        [*self.settings.head(instructions), *rest],
                        drop="turns")
        most = self.model.config.max_position_embeddings
        require(len(prompt) <= most, "messages", f"at most {most} tokens "
                "(max_position_embeddings)", len(prompt))
        return prompt

    def events(self, messages: Sequence[object], *,
               session: Session | None = None,
               stop: Callable[[], object] | None = None,
               progress: bool = False) -> Iterator[ChatEvent]:
        """The turn of the model after `messages`, as it happens.

        session: whose cache is used, and where the turn is noted; None: the
        chat's own. stop: asked before every forward; if what it returns is
        true, the turn ends there with the finish reason "stopped".
        progress: whether there are events of that kind. Raises ChatError at
        the call, for messages that are not right or do not fit. A turn of
        the session that is still under way ends here.
        """
        session = self.session if session is None else session
        if session.turn is not None:
            session.turn.leave()
        begin = self._group.same(functools.partial(self._begin, messages))
        if "error" in begin:
            raise ChatError(begin["error"])
        ids = (f"call_{n}" for n in itertools.count(1)
               if f"call_{n}" not in begin["used"])
        session.turn = Turn(self.tokenizer, self.settings, session,
                            begin["prompt"], ids, stop=stop,
                            progress=progress)
        return session.turn.events()

    def _begin(self, messages: Sequence[object]) -> dict:
        """The prompt and the ids of calls that are taken, or an error."""
        try:
            return {"prompt": self.prompt(messages),
                    "used": call_ids(messages)}
        except ChatError as error:
            return {"error": str(error)}

    def reply(self, messages: Sequence[object], *,
              session: Session | None = None,
              stop: Callable[[], object] | None = None) -> Iterator[str]:
        """The text of the final channel, piece by piece; see `events`."""
        return (event.text for event in self.events(
                    messages, session=session, stop=stop)
                if event.kind == "final")

    @property
    def turn(self) -> list[dict]:
        """The messages that the turn has added, to go on with: what was
        thought, said and called, in order, with the answers of the calls,
        then the answer as far as it came."""
        turn = self.session.turn
        return [] if turn is None else turn.messages()

    @property
    def usage(self) -> Usage | None:
        """What the last turn took; None while it lasts."""
        turn = self.session.turn
        return None if turn is None else turn.usage

    def reset(self) -> None:
        """Forget the turn and the cache; a seed begins anew."""
        if self.session.turn is not None:
            self.session.turn.leave()
        self.session = self.new_session()

# %%
def weather(city: str) -> dict:
    """The weather in a city now.

    Args:
        city: its name, in English
    """
    return {"city": city, "temperature": 21}


torch.manual_seed(0)
model, tokenizer = load(dtype=torch.float32)
talk = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Six times seven?"},
        {"role": "assistant", "reasoning": "Multiply.", "content": "42"},
        {"role": "user", "content": "And eight?"}]
chat = Chat((model, tokenizer), effort="high", tools=[weather],
            date="2025-06-28", instructions="Be kind.")
print(chat)
print(tokenizer.decode(chat.prompt(talk)))

# %% [markdown]
# A conversation with the shipped model, greedy so that it can be repeated. In
# the second turn it reads its first answer again, without the working, and
# the new question:

# %%
def show(chat: Chat, messages: list[dict]) -> None:
    """Prints a turn, a line for each kind of event, and its cost."""
    for kind, events in itertools.groupby(chat.events(messages),
                                          lambda event: event.kind):
        print(f"[{kind}]", "".join(event.text for event in events))
    used = chat.usage
    print(f"prompt of {used.prompt_tokens} tokens, fed "
          f"{used.prefilled_tokens}, wrote {used.generated_tokens}")


fixed = {"temperature": 0, "date": "2025-06-28"}
chat, talk = Chat((model, tokenizer), **fixed), []
for question in ("What is 347 + 285?", "Take 88 from 403."):
    talk.append({"role": "user", "content": question})
    show(chat, talk)
    talk += chat.turn

# %% [markdown]
# What a model calls, and with what, is its own choice. To see a call go wrong
# and be mended, let a sampler say what was written beforehand, whatever the
# logits are:

# %%
import re


def dictated(*rounds: str, **more) -> Chat:
    """A chat that writes `rounds`, control tokens spelled by their names."""
    parts = re.split(r"(<\|\w+\|>)", "".join(rounds))
    ids = iter([n for part in parts for n in (
        [tokenizer.special[part]] if part in tokenizer.special
        else tokenizer.encode(part))])
    chat = Chat((model, tokenizer), **fixed | more)
    chat.settings = chat.settings.with_changes(
        temperature=1.0,
        sampler=lambda logits, generator: torch.tensor([next(ids)]))
    return chat


CALL = ("<|channel|>commentary to=functions.weather <|constrain|>json"
        "<|message|>{}<|call|>")
FINAL = "<|channel|>final<|message|>{}<|return|>"
chat = dictated(CALL.format('{"town": "Oslo"}'),
                CALL.format('{"city": "Oslo"}'),
                FINAL.format("It is 21 degrees."), tools=[weather])
talk = [{"role": "user", "content": "How warm is it in Oslo?"}]
show(chat, talk)

# %% [markdown]
# The first call had a wrong argument, the model was told so, and the second
# one was right. More was fed than the prompt has: after each call its last
# token, the result and `<|start|>assistant`. `turn` holds the messages for
# the next prompt:

# %%
for message in chat.turn:
    print(message["role"], message["content"],
          [call["id"] for call in message.get("tool_calls", ())])

# %% [markdown]
# ## It holds
#
# **Greedy answers do not depend on what is kept**, turn after turn:

# %%
asked = ["Tell me a story about a fox.", "What is its name?", "Thank you!"]
kept, talk = Chat((model, tokenizer), max_new_tokens=30, **fixed), []
for question in asked:
    talk.append({"role": "user", "content": question})
    answer = "".join(kept.reply(talk))
    fresh = Chat((model, tokenizer), max_new_tokens=30, **fixed)
    assert "".join(fresh.reply(talk)) == answer
    assert fresh.session.prefix.tokens == kept.session.prefix.tokens
    talk += kept.turn
assert kept.usage.prefilled_tokens < fresh.usage.prefilled_tokens

# %% [markdown]
# **Conversations that share a model do not hear each other.** Two of them,
# a piece of each in turn, give what each gives by itself:

# %%
def alone(question: str) -> str:
    chat = Chat((model, tokenizer), **brief)
    return "".join(event.text for event in chat.events(
        [{"role": "user", "content": question}]))


brief = {"seed": 5, "max_new_tokens": 20, "date": "2025-06-28"}
shared = Chat((model, tokenizer), **brief)
both = [shared.events([{"role": "user", "content": question}],
                      session=shared.new_session()) for question in asked[:2]]
heard = ["".join(event.text for event in events if event is not None)
         for events in zip(*itertools.zip_longest(*both), strict=True)]
assert heard == [alone(question) for question in asked[:2]]
for text in heard:
    print(repr(text[:60]))

# %% [markdown]
# **No output of the model is an exception.** Whatever it writes, a turn ends
# in "done", what was wrong is an event, and the messages of the turn can be
# sent on.

# %%
import collections
import random

rng = random.Random(0)
soup = [*tokenizer.special.values()] + tokenizer.encode(
    "assistant user final analysis commentary to=functions.weather json {}")
notices = collections.Counter()
chat = Chat((model, tokenizer), tools=[weather], max_new_tokens=30, rounds=2,
            **fixed)
chat.settings = chat.settings.with_changes(
    temperature=1.0, sampler=lambda *_: torch.tensor([rng.choice(soup)]))
talk = [{"role": "user", "content": "Hello"}]
for _ in range(15):
    *events, last = chat.events(talk)
    assert last.kind == "done"
    assert chat.prompt([*talk, *chat.turn, *talk])
    notices.update(event.text.split(":")[0].split("'")[0] for event in events
                   if event.kind == "notice")
print(len(notices), "kinds of complaint")

# %% [markdown]
# ## What is refused
#
# Options that are none, messages that are not right, and a prompt that does
# not fit, each before anything is computed. (What the sampler refuses is its
# own GenerateError: see [sampling](../text/sampling.ipynb).)

# %%
for options in ({"effort": "utmost"}, {"rounds": -1}, {"tool_timeout": 0},
                {"tools": [weather, weather]}):
    try:
        Chat((model, tokenizer), **options)
    except ChatError as error:
        print(error)
chat = Chat((model, tokenizer), **fixed)
for messages in ([], [{"role": "user", "content": "again " * 5000}]):
    try:
        chat.events(messages)
    except ChatError as error:
        print(error)

# %% [markdown]
# ## Takeaways
#
# - A conversation is a list of messages; each turn adds some, and they can be
#   sent on as they are.
# - What is kept from turn to turn changes the cost, never the answer.
# - One model serves many conversations, each with a session of its own.
# - Whatever a model writes, a turn ends in "done", and what was wrong is an
#   event.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A server writes the time of day into the system message. What does each turn
# cost then? Measure it, and say where the time should stand instead. (A
# dictated answer will do.)

# %% tags=["hide-cell"]
chat = dictated(*[FINAL.format("Yes.")] * 6)
talk, costs = [], []
for minute in ("12:00", "12:00", "12:00", "12:01", "12:02", "12:03"):
    chat.settings = chat.settings.with_changes(date=f"2025-06-28 {minute}")
    talk.append({"role": "user", "content": "And now?"})
    list(chat.events(talk))
    talk += chat.turn
    costs.append(chat.usage.prefilled_tokens)
print(costs)
# The message stands before everything, so all behind it is new each minute,
# and more with every turn. In the last user message, or as the answer of a
# tool, the time costs its own few tokens.
assert costs[1] == costs[2] < costs[3] < costs[4] < costs[5]

# %% [markdown]
# ### Exercise 2
#
# Two people talk to one model, in turn, two questions each. A careless server
# uses one session for both. What is fed then, and with a session for each? Are
# the answers different?

# %% tags=["hide-cell"]
short = {"max_new_tokens": 8} | fixed
for name in ("one session", "two sessions"):
    chat, fed, said = Chat((model, tokenizer), **short), [], []
    sessions = ([chat.session] * 2 if name == "one session"
                else [chat.new_session(), chat.new_session()])
    talks = [[], []]
    for question in ("Tell me a story.", "Go on."):
        for n in (0, 1):
            talks[n].append({"role": "user", "content": f"{question} {n}"})
            said.append("".join(event.text for event in chat.events(
                talks[n], session=sessions[n])))
            used = sessions[n].turn.usage
            fed.append(used.prefilled_tokens)
            talks[n] += sessions[n].turn.messages()
    print(f"{name}: fed {fed}, said {sum(map(len, said))} characters")
# The answers are the same. One session reads the head of the prompt once for
# both, which is why the second turn is so cheap; but from then on each turn
# reads its whole conversation again, the more the longer it is. A session for
# each reads only what is new.

# %% [markdown]
# ### Exercise 3
#
# A user wants another answer to the same question. How many tokens are fed?
# And why is one the least that it can be?

# %% tags=["hide-cell"]
chat = Chat((model, tokenizer), seed=1, max_new_tokens=12,
            date="2025-06-28")
talk = [{"role": "user", "content": "Tell me a story about a fox."}]
for _ in range(3):
    text = "".join(event.text for event in chat.events(talk)
                   if event.kind in ("analysis", "final"))
    print(chat.usage.prefilled_tokens, repr(text))
# The cache holds keys and values, no logits. Those after the last token of the
# prompt are needed once more, so that token is fed.

# %% [markdown]
# ## Sources
#
# - OpenAI, `docs/format.md` in openai/harmony.
# - openai/openai-python, `src/openai/types/chat`: the messages.
