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
#     module: turn
#     public: [ChatEvent, Turn, Usage]
# ---

# %% [markdown]
# # What happens in a turn?
#
# ## Question
#
# Between a question and its answer the model may write four messages, one of
# them a call that somebody must run. A reader wants to see it as it comes and
# to leave at any moment, and the next prompt should find its tokens in
# [the cache](memory.ipynb). After the call below 17 tokens are fed, and not
# the prompt again. And if the model is spread over eight processes, how does
# a mail get sent once?

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: a sequence diagram with four lifelines: user, turn, model, tool. The
# question goes to the model as a prompt; the model writes a thought and a
# call; the tool runs and its result is fed; the model writes the answer.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
WHO = ("user", "turn", "model", "tool")
STEPS = [  # from, to, what is said, colour
    (0, 1, "What is 347 + 285?", "C0"),
    (1, 2, "prompt, as tokens", "C1"),
    (2, 1, "analysis: Add them.", "0.45"),
    (2, 1, 'call: {"expression": "347+285"}', "C2"),
    (1, 3, "calculator(expression=...)", "C3"),
    (3, 1, "632", "C3"),
    (1, 2, "only the result, as tokens", "C1"),
    (2, 1, "final: It is 632.", "C2"),
    (1, 0, "It is 632.", "C0")]
fig, ax = plt.subplots(figsize=(7, 3.9))
X = (0, 2, 5, 7)
for x, name in zip(X, WHO, strict=True):
    ax.plot([x, x], [0.45, -len(STEPS) + 0.4], color="0.8", lw=1, zorder=0)
    ax.text(x, 0.5, name, ha="center", va="bottom", weight="bold")
for n, (a, b, text, colour) in enumerate(STEPS):
    ax.annotate("", (X[b], -n), (X[a], -n), arrowprops={
        "arrowstyle": "->", "color": colour, "lw": 1.5})
    at = (X[a] + X[b]) / 2 if {a, b} != {1, 3} else 3.5
    ax.text(at, -n + 0.1, text, ha="center", va="bottom", fontsize=8)
for top, low, name in ((-0.8, -3.2, "round 1"), (-5.8, -7.2, "round 2")):
    ax.plot([7.6, 7.75, 7.75, 7.6], [top, top, low, low], color="0.3", lw=1)
    ax.text(7.85, (top + low) / 2, name, va="center", fontsize=8)
ax.set(xlim=(-0.8, 8.8), ylim=(-len(STEPS) + 0.3, 1.1))
ax.set_axis_off()
plt.show()

# %% [markdown]
# What to see: time runs downwards. The model writes twice, in two *rounds*,
# and between them a tool runs. All three stretches together are one *turn*.
# The second arrow to the model (orange) carries the tool's result and nothing
# else: what was written before is still in the cache.

# %% [markdown]
# ## The twenty lines
#
# Write until a stop token; if what was written is a call, run it, put its
# result behind it, and write on. [The parser](../text/parsing.ipynb) says what
# was written.
#
# What a model calls, and with what, is its own choice. To see the same turn on
# every run, a sampler says here what was written beforehand, whatever the
# logits are: `dictated`.

# %%
import os
import re
from collections.abc import Callable
from importlib.resources import files

os.environ["GPTOSS_KERNELS"] = "torch"  # the same words on every processor
import torch

from gptoss.chat.calculator import calculator
from gptoss.chat.tools import function_tool, read_tools
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.harmony import Message, render
from gptoss.text.parser import StreamParser, ToolCall
from gptoss.text.stops import stop_ids
from gptoss.text.tokenizer import Tokenizer

torch.manual_seed(0)
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
tokenizer = Tokenizer.from_pretrained(POCKET)
THOUGHT = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant"
CALL = ("<|channel|>commentary to=functions.calculator <|constrain|>json"
        "<|message|>{}<|call|>")
FINAL = "<|channel|>final<|message|>{}<|return|>"
SCRIPT = (THOUGHT.format("Add them."),
          CALL.format('{"expression": "347+285"}'),
          FINAL.format("It is 632."))


def dictated(*rounds: str) -> Callable:
    """A sampler of `rounds`, control tokens spelled by their names."""
    parts = re.split(r"(<\|\w+\|>)", "".join(rounds))
    ids = iter([n for part in parts for n in (
        [tokenizer.special[part]] if part in tokenizer.special
        else tokenizer.encode(part))])
    return lambda logits, generator: torch.tensor([next(ids)])


def plainly(prompt: list[int], run: Callable[[str], str], sampler: Callable
            ) -> tuple[list[int], int]:
    """The tokens after a turn, and how many were fed."""
    tokens, fed = list(prompt), 0
    while True:
        parser, call = StreamParser(tokenizer, role="assistant"), None
        fed += len(tokens)
        for token in generate(model, list(tokens), sampler=sampler,
                              stop=stop_ids(POCKET), max_new_tokens=100):
            tokens.append(token)
            for event in parser.feed(token):
                if isinstance(event, ToolCall):
                    call = event
        if call is None:
            return tokens, fed
        answer = Message("tool", run(call.arguments), "commentary",
                         "assistant", name=call.recipient)
        tokens += render(tokenizer, [answer])


prompt = render(tokenizer, [Message("user", "What is 347 + 285?")])
tokens, fed = plainly(prompt, function_tool(calculator).run,
                      dictated(*SCRIPT))
print(tokenizer.decode(tokens[len(prompt):]))
print(f"prompt of {len(prompt)} tokens; fed {fed}")

# %% [markdown]
# The loop is right, and it is all that a turn is. What it lacks is what a user
# would notice. It reads everything again after the call. It says nothing until
# the end, and cannot be left before it. A model that calls for ever is never
# stopped; one that calls a tool that does not exist, or writes a header that
# is none, ends the program. And it knows of one process only. The rest of the
# chapter adds these, one at a time.

# %% [markdown]
# ## Code
#
# ### What is told, while it happens?
#
# A chat tells what happens as a stream of events; a user interface maps
# each kind to something it draws. The last one says what the turn took.

# %% tags=["export"]
import dataclasses
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from gptoss.chat.memory import Session
from gptoss.chat.messages import ChatError, possible_name, require
from gptoss.chat.settings import Settings
from gptoss.chat.tools import result_text
from gptoss.text.harmony import CHANNELS, Message, render
from gptoss.text.parser import (
    Delta,
    Event,
    Malformed,
    Opened,
    StreamParser,
    ToolCall,
)
from gptoss.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a turn took.

    finish_reason: "stop", "length" or "tool_calls"; "stopped" if it was
    left before its end. prompt_tokens: of the conversation before it.
    prefilled_tokens: how many of these, and of the answers of tools, had to
    be fed. generated_tokens: written by the model. seconds: wall time.
    """

    finish_reason: str
    prompt_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    seconds: float

# %% tags=["export"]
@dataclasses.dataclass(frozen=True)
class ChatEvent:
    """One thing that happened in a turn.

    kind "analysis", "commentary", "final": `text` is the next piece of what
    the model writes there. "call": it calls tool `name` with the JSON in
    `text`; "result": what that gave. "notice": something was wrong with
    its output. "done": the end; `usage` is set, `text` the finish reason.
    "progress", for who asks: a part of the prompt was read, `text` is how
    many tokens are left to read.
    """

    kind: str
    text: str = ""
    name: str = ""
    usage: Usage | None = None

# %% [markdown]
# ### What is a round?
#
# A turn with a call has two rounds of writing, before and after its result.
# A round ends with a call, with the answer, or where the tokens do. If the
# model begins to write the user's next message, that is not part of it, and a
# second call in the same round is not either.
#
# What it writes is kept message by message, in order. A message on a channel
# that does not exist (a mistyped `analyis`, say) is taken for analysis: a
# reader may miss something then, but never sees reasoning as the answer. A
# message without a channel is the answer. A second message on one channel
# comes after an empty line. Whatever was malformed becomes an event of kind
# "notice".

# %% tags=["export"]
class Round:
    """What the model writes after a prompt, up to a call or its answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._parser = StreamParser(tokenizer, role="assistant")
        self.said: list[list[str]] = []  # messages to no tool: channel, text
        self._to: str | None = None  # recipient of the message in progress
        self.call: ToolCall | None = None
        self.kept: list[dict] = []  # the call and its answer, for the history
        self.over = False  # what follows is not part of the round

    def feed(self, token: int) -> list[ChatEvent]:
        """The events that `token` causes."""
        return list(self._read(self._parser.feed(token)))

    def close(self) -> list[ChatEvent]:
        """The events that the end of the tokens causes."""
        return list(self._read(self._parser.close()))

    def text(self, channel: str) -> str:
        """All that was written in `channel` so far."""
        return "\n\n".join(text for where, text in self.said
                           if where == channel and text)

    def _read(self, events: Iterable[Event]) -> Iterator[ChatEvent]:
        for event in events:
            if isinstance(event, Opened):
                yield from self._opened(event.message)
            elif isinstance(event, Malformed):
                about = f": {event.text[:60]!r}" if event.text else ""
                yield ChatEvent("notice", event.reason + about)
            elif isinstance(event, ToolCall) and self.call is None:
                self.call, self.over = event, True
            elif isinstance(event, Delta) and self._to is None:
                self.said[-1][1] += event.text
                yield ChatEvent(self.said[-1][0], event.text)

    def _opened(self, message: Message) -> Iterator[ChatEvent]:
        self._to = message.recipient
        if message.role != "assistant":
            self._to, self.over = "nobody", True
            yield ChatEvent("notice", f"a message of {message.role!r}, "
                                      "written by the model")
        if self._to is None:
            kind = ("final" if message.channel is None else message.channel
                    if message.channel in CHANNELS else "analysis")
            if self.text(kind):  # a second one
                yield ChatEvent(kind, "\n\n")
            self.said.append([kind, ""])

# %%
wrote = [Message("assistant", "Six sevens.", "analysis"),
         Message("assistant", "Multiplied:", "commentary"),
         Message("assistant", "Check.", "analyis"),
         Message("assistant", "42", "final")]
reply = Round(tokenizer)
for n in render(tokenizer, wrote, reply=False, drop="none")[2:]:
    for event in reply.feed(n):
        print(event.kind, repr(event.text), end="; ")
print(reply.text("final"))

# %% [markdown]
# ### What stays for the next prompt?
#
# For the history a round becomes dicts as [messages](messages.ipynb) reads
# them, in the same order and with the same borders between messages. So the
# next prompt has the tokens that are in the cache, except for what it drops.
# A thought opens a new dict, and so does a second text; a call goes into the
# dict before it, unless that holds an answer. A round without an answer gives
# no content: what came of the thinking stays, and an empty answer is not made
# up.

# %% tags=["export"]
def round_messages(round_: Round) -> list[dict]:
    """A round as OpenAI's dicts: what the assistant thought, said (marked
    `phase: "commentary"` if that was not the answer) and called, and the
    tool's answer if there is one. [] if nothing was written."""
    calls, answers = round_.kept[:1], round_.kept[1:]
    out: list[dict[str, Any]] = []
    open_: dict[str, Any] | None = None  # may still get a content, or calls
    for channel, text in round_.said:
        if not text:
            continue
        if channel == "analysis" or open_ is None or open_["content"]:
            open_ = {"role": "assistant", "content": None}
            out.append(open_)
        if channel == "analysis":
            open_["reasoning"] = text
        else:
            open_["content"] = text
        if channel == "commentary":
            open_["phase"] = channel
    if calls:
        if open_ is None or (open_["content"] and "phase" not in open_):
            open_ = {"role": "assistant", "content": None}
            out.append(open_)
        open_.pop("phase", None)  # before a call it goes without saying
        open_["tool_calls"] = calls
    return out + answers

# %%
for message in round_messages(reply):
    print(message)

# %% [markdown]
# ### Several processes, one decision
#
# A large model may be spread over several processes, each of which runs the
# whole program with its part of the weights
# ([collectives](../parallel/collectives.ipynb)). Then they must do the same
# forwards, in the same order, with the same tokens. Arithmetic sees to it
# that all have the same logits. Nothing sees to the rest: a tool that sends a
# mail would send one from each process; its answer may differ, as the clock
# does; one process may be left by its user while the others wait for its part
# of a sum, for ever.
#
# So whatever is not arithmetic is found out by the first process, and told to
# the others: the date, the prompt, the seed of a round, the answer of a tool,
# and before every forward whether the turn goes on. The model's `group` says
# how. A model in one process has none, and every question is its own answer.

# %% tags=["export:agreement"]
from collections.abc import Callable
from typing import Any


class SingleProcess:
    """The group of a process by itself; parallel/collectives has others."""

    first = True

    def same(self, make: Callable[[], Any]) -> Any:
        """make() of the first process, as JSON has it, for all."""
        return make()


class Stopped(Exception):
    """The first process goes no further with this turn."""


class Agreement:
    """What the processes of a model ask the first while a turn lasts."""

    def __init__(self, group: SingleProcess) -> None:
        self._group, self.open = group, True

    def ask(self, make: Callable[[], Any]) -> Any:
        """make() of the first process. What it raises ends the turn: that
        is raised there, and Stopped by the others."""
        failed: list[BaseException] = []

        def word() -> list:
            try:
                return [make()]
            except BaseException as error:
                failed.append(error)
                return []

        told = self._group.same(word)
        self.open = bool(told)
        if failed:
            raise failed[0]
        if not told:
            raise Stopped
        return told[0]

    def leave(self) -> None:
        """The first process leaves, and the others at their next question;
        they cannot leave first."""
        if self.open and self._group.first:
            self.open = False
            self._group.same(list)

# %% [markdown]
# Two threads for two processes, each with its own idea; the second one learns
# what the first has found, and that it has left:

# %%
import queue
import threading


class Told:
    """A group of two threads."""

    def __init__(self, first: bool, wire: queue.SimpleQueue) -> None:
        self.first, self.wire = first, wire

    def same(self, make):
        if not self.first:
            return self.wire.get()
        self.wire.put(word := make())
        return word


def decide(first: bool, idea: str) -> None:
    agreement = Agreement(Told(first, wire))
    told[idea] = agreement.ask(lambda: idea)
    try:
        agreement.leave()
        told[idea] += ", " + agreement.ask(lambda: "more")
    except Stopped:
        told[idea] += ", stopped"


wire, told = queue.SimpleQueue(), {}
other = threading.Thread(target=decide, args=(False, "stay"))
other.start()
agreement = Agreement(Told(True, wire))
told["go"] = agreement.ask(lambda: "go")
agreement.leave()
other.join()
print(told)

# %% [markdown]
# ### The turn itself
#
# `_run` is the loop of the twenty lines: write a round; if it ended with a
# call, run it, append the answer and go on; else the turn is over. The three
# stop tokens are found by name. `_tokens` feeds through the cache of the
# session, so after a call only the result is fed. `_answer` runs a call, or
# says why not: a tool that the caller runs ends the turn with "tool_calls",
# one call too many ends it with "length", and a tool that does not exist is
# told to the model. It is a generator that also *returns* something, the
# reason: `yield from` hands its events on and gives what it returned.
#
# A turn can be left between any two events: whoever reads them stops reading.
# It can also be stopped where no event comes, while a long prompt is read: a
# function `stop` is asked before every forward. In the processes that are not
# the first, a turn that is left must go on unseen until the first one ends
# it, or the others would wait for its part.

# %% tags=["export"]
STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of STOPS; ChatError for a tokenizer without them."""
    missing = [name for name in STOPS if name not in tokenizer.special]
    require(not missing, "tokenizer", f"the control tokens {STOPS}",
            f"none for {missing}")
    return frozenset(tokenizer.special[name] for name in STOPS)


def _followed(turn: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
    """`turn`, and all the rest of it when its reader leaves."""
    try:
        for event in turn:  # noqa: UP028  `yield from` would close it
            yield event
    finally:
        for _ in turn:
            pass

# %%
print([tokenizer.decode([n]) for n in sorted(stop_tokens(tokenizer))])
assert stop_tokens(tokenizer) == set(stop_ids(POCKET))

# %% tags=["export"]
class Turn:
    """One turn of the model: rounds of writing, and calls between them.

    prompt: the tokens before it. ids: of its calls. rounds: what was
    written so far. usage: what it took; None while it lasts. stop,
    progress: see `Chat.events`.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings,
                 session: Session, prompt: list[int], ids: Iterator[str], *,
                 stop: Callable[[], object] | None = None,
                 progress: bool = False) -> None:
        self.rounds: list[Round] = []
        self.usage: Usage | None = None
        self._tokenizer, self._settings = tokenizer, settings
        self._session, self._prefix = session, session.prefix
        self._prompt, self._ids = prompt, ids
        self._stop_asked, self._progress = stop, progress
        self._stop = stop_tokens(tokenizer)
        model = session.prefix.model
        self._most = model.config.max_position_embeddings
        self._group = getattr(model, "group", None) or SingleProcess()
        self._agreement = Agreement(self._group)
        self._events: Callable[[], Any] = lambda: None
        self._behind: Iterable[ChatEvent] = ()

    def events(self) -> Iterator[ChatEvent]:
        """What happens, as it happens; to be asked for once."""
        run = self._run()
        events = run if self._group.first else _followed(run)
        self._events = weakref.ref(events)
        self._behind = () if self._group.first else run
        return events

    def leave(self) -> None:
        """End the turn here, if it is still under way."""
        try:
            if (running := self._events()) is not None:
                running.close()
        except ValueError as error:  # the generator is running right now
            raise ChatError("chat: in the middle of a turn") from error
        self._agreement.leave()
        for _ in self._behind:
            pass
        self._events, self._behind = lambda: None, ()

    def messages(self) -> list[dict]:
        """What the turn has added to the conversation."""
        return [message for round_ in self.rounds
                for message in round_messages(round_)]

    def _run(self) -> Iterator[ChatEvent]:
        prefix, agreement = self._prefix, self._agreement
        began, fed, made = time.perf_counter(), prefix.fed, 0
        prompt, reason = self._prompt, ""

        def used() -> Usage:
            return Usage(reason or "stopped", len(self._prompt),
                         prefix.fed - fed, made, time.perf_counter() - began)

        try:
            while not reason:
                round_, token = Round(self._tokenizer), None
                self.rounds.append(round_)
                for token in self._tokens(prompt, made):
                    if token is not None:
                        made += 1
                        yield from round_.feed(token)
                    elif self._progress:
                        yield ChatEvent("progress", str(prefix.left))
                    if round_.over:
                        break
                yield from round_.close()
                if round_.call is not None:
                    reason = yield from self._answer(round_, round_.call)
                    prompt = self._after(round_)
                else:
                    reason = ("stop" if round_.over or token in self._stop
                              else "length")
            agreement.ask(bool)  # here the last chance to leave ends
            agreement.open = False
        except Stopped:
            reason = "stopped"
        except BaseException:
            reason = "stopped"
            self.usage = used()
            agreement.leave()
            raise
        yield from self._complaints(reason, len(prompt))
        self.usage = used()
        yield ChatEvent("done", reason, usage=self.usage)

    def _tokens(self, prompt: list[int], made: int) -> Iterator[int | None]:
        """What the model writes after `prompt`, having written `made`; None
        after a part of the prompt."""
        sampling = self._settings.sampling
        left = (sampling.max_new_tokens or self._most + made) - made
        if left <= 0 or len(prompt) > self._most:
            return
        drawn = self._session.next_seed()
        steps = self._prefix.write(
            prompt, sampling, max_new_tokens=left, stop=self._stop,
            seed=self._agreement.ask(lambda: drawn))
        while self._agreement.ask(self._goes_on):
            try:
                step = next(steps)
            except StopIteration:
                return
            yield step

    def _goes_on(self) -> bool:
        if self._stop_asked is not None and self._stop_asked():
            raise Stopped
        return True

    def _complaints(self, reason: str, length: int) -> Iterator[ChatEvent]:
        if reason == "stop" and not self.rounds[-1].text("final"):
            yield ChatEvent("notice", "the model ended without an answer")
        if max(length, len(self._prefix.tokens)) > self._most:
            yield ChatEvent("notice", f"the context of {self._most} tokens "
                                      "is full")

    def _answer(self, round_: Round, called: ToolCall
                ) -> Generator[ChatEvent, None, str]:
        """Runs the call of a round; returns why the turn ends, or ""."""
        id_, arguments = next(self._ids), called.arguments
        name = possible_name(called.recipient.removeprefix("functions."))
        yield ChatEvent("call", arguments, name)
        reason: str
        reason, result = self._agreement.ask(
            lambda: self._result(name, arguments))
        call = {"id": id_, "type": "function",
                "function": {"name": name, "arguments": arguments}}
        if reason == "length":
            yield ChatEvent("notice", f"not run: call {len(self.rounds)} of "
                            f"at most {self._settings.rounds} in a turn")
        elif reason:
            round_.kept = [call]
        else:
            round_.kept = [call, {"role": "tool", "tool_call_id": id_,
                                  "name": name, "content": result}]
            yield ChatEvent("result", result, name)
        return reason

    def _result(self, name: str, arguments: str) -> tuple[str, str]:
        """Why the turn ends with this call, or "", and what the call gave.
        Of several processes only the first runs it."""
        tools = self._settings.tools
        tool, known = tools.get(name), ", ".join(tools)
        run = None if tool is None else tool.run
        if tool is not None and run is None:
            return "tool_calls", ""
        if len(self.rounds) > self._settings.rounds:
            return "length", ""
        if run is None:
            return "", (f"error: there is no tool {name}; there are: "
                        f"{known or 'none'}")
        return "", result_text(run(arguments))

    def _after(self, round_: Round) -> list[int]:
        """The tokens so far, word for word, and the tool's answer."""
        if not round_.kept[1:]:
            return []
        answer = round_.kept[1]
        message = Message("tool", answer["content"], "commentary",
                          "assistant", name=f"functions.{answer['name']}")
        return self._prefix.tokens + render(self._tokenizer, [message])

# %% [markdown]
# The dictated turn again, with events, a cache, and the settings' own messages
# at the head of the prompt:

# %%
from gptoss.text.sampling import SamplingOptions


def begin(session: Session, sampler: Callable | None = None,
          rounds: int = 8, **more) -> Turn:
    """A turn after "What is 347 + 285?"."""
    settings = Settings(
        date="2025-06-28", tools=read_tools([calculator]), rounds=rounds,
        sampling=SamplingOptions(sampler=sampler, **more))
    said = [*settings.head(), Message("user", "What is 347 + 285?")]
    prompt = render(tokenizer, said, drop="turns")
    return Turn(tokenizer, settings, session, prompt,
                (f"call_{n}" for n in range(1, 99)))


session = Session(model)
turn = begin(session, dictated(*SCRIPT), max_new_tokens=None)
shown: dict = {}
for event in turn.events():
    shown[event.kind] = shown.get(event.kind, "") + event.text
for kind, text in shown.items():
    print(f"[{kind}] {text}")
used = turn.usage
print(f"prompt of {used.prompt_tokens} tokens, fed {used.prefilled_tokens}, "
      f"wrote {used.generated_tokens}")
print("fed after the call:", used.prefilled_tokens - used.prompt_tokens)
for message in turn.messages():
    print(message["role"], message.get("reasoning"), message["content"])

# %% [markdown]
# More was fed than the prompt has: after the call its last token, the result
# and `<|start|>assistant`. Nothing else was read again.

# %% [markdown]
# ## What is refused
#
# A tokenizer without harmony's stop tokens could never end a turn. And a turn
# that is writing cannot be begun again, by a tool that uses the chat that
# called it, say. Both are a `ChatError`:

# %%
import logging


class Bare:
    """Stands for a tokenizer without harmony."""

    special = {"<|endoftext|>": 0}


def again(expression: str) -> str:
    """A calculator that ends the turn that called it."""
    turn.leave()
    return "never"


try:
    stop_tokens(Bare())
except ChatError as error:
    print(error)
turn = begin(Session(model), dictated(*SCRIPT), max_new_tokens=None)
logging.getLogger("gptoss").setLevel(logging.CRITICAL)  # no traceback here
turn._settings = turn._settings.with_changes(
    tools=read_tools([function_tool(again, name="calculator")]))
print([event.text for event in turn.events() if event.kind == "result"])

# %% [markdown]
# ## It holds
#
# **What is in the cache is what was said**: the prompt, the model's own
# words, token by token, and the result between them.

# %%
answer = render(tokenizer, [Message("tool", "632", "commentary", "assistant",
                                    name="functions.calculator")])
held = session.prefix.tokens
assert held[:used.prompt_tokens] == turn._prompt
assert len(held) == (used.prompt_tokens + used.generated_tokens
                     + len(answer))
assert used.prefilled_tokens == used.prompt_tokens + 1 + len(answer)
print(f"{len(held)} tokens, of them {len(answer)} of the tool's answer")

# %% [markdown]
# **A turn may be left at any event.** Wherever the reader stops, the next
# turn of the same session says what a fresh one would say, word for word.

# %%
greedy = {"temperature": 0, "max_new_tokens": 12}
fresh = [(event.kind, event.text)
         for event in begin(Session(model), **greedy).events()]
for count in range(1, len(fresh)):
    session = Session(model)
    left = begin(session, **greedy)
    events = left.events()
    for _ in range(count):
        next(events)
    left.leave()
    assert left.usage.finish_reason == "stopped"
    again = begin(session, **greedy)
    assert [(event.kind, event.text) for event in again.events()] == fresh
    assert again.usage.prefilled_tokens == 1  # the rest was kept
print("left after each of", len(fresh) - 1, "events")

# %% [markdown]
# ## Takeaways
#
# - A turn is rounds of writing with calls between them; after a call only its
#   answer is read.
# - A turn can be left between any two events and stopped before any forward;
#   the cache stays right.
# - What is not arithmetic is decided by one process and told to the others.
# - A message on a channel that does not exist is taken for thinking, never
#   for the answer.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# The model calls a tool that does not exist. Dictate it. What does it read,
# what does the reader see, and how does the turn end?

# %% tags=["hide-cell"]
turn = begin(Session(model), dictated(
    CALL.replace("calculator", "clock").format("{}"),
    FINAL.format("I have no clock.")), max_new_tokens=None)
for event in turn.events():
    if event.kind in ("call", "result", "done"):
        print(event.kind, event.name, event.text)
# It is told, as of any mistake, and goes on; the turn is like any other.
assert turn.usage.finish_reason == "stop"

# %% [markdown]
# ### Exercise 2
#
# Let the model call the calculator four times in a row, with `rounds=2`. How
# does the turn end, and which calls are in its messages?

# %% tags=["hide-cell"]
turn = begin(Session(model), dictated(*[CALL.format(
    f'{{"expression": "{n}+{n}"}}') for n in range(4)]), rounds=2,
    max_new_tokens=None)
for event in turn.events():
    if event.kind in ("result", "notice", "done"):
        print(event.kind, event.text)
print([message.get("content") for message in turn.messages()])
# The third call is not run and not kept: a call without an answer could not be
# sent on.

# %% [markdown]
# ### Exercise 3
#
# The reader of the dictated turn leaves after the twelfth event. What did the
# model write until then, and what do the turn's messages hold of it?

# %% tags=["hide-cell"]
turn = begin(Session(model), dictated(*SCRIPT), max_new_tokens=None)
events = turn.events()
seen = [next(events) for _ in range(12)]
turn.leave()
print("".join(event.text for event in seen if event.kind == "final"))
print(turn.messages()[-1], turn.usage.finish_reason)
# What was said so far, as a message that can be sent on.

# %% [markdown]
# ## Sources
#
# - OpenAI, `docs/format.md` in openai/harmony: preambles, calls and their
#   answers.
# - openai/gpt-oss, `gpt_oss/chat.py`: the same loop, for its own tools.
