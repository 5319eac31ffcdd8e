"""What happens in a turn?

Generated from book/chat/turns.py; edit the chapter, not this file.
"""

import dataclasses
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from gptoss.chat.agreement import Agreement, SingleProcess, Stopped
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

# --- What is told, while it happens? -----------------------------------------

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


# --- What is a round? --------------------------------------------------------

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


# --- What stays for the next prompt? -----------------------------------------

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


# --- The turn itself ---------------------------------------------------------

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


__all__ = [
    "ChatEvent",
    "Round",
    "STOPS",
    "Turn",
    "Usage",
    "round_messages",
    "stop_tokens",
]
