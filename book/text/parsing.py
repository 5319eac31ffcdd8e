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
#     module: parser
#     public: [Delta, Done, Event, Malformed, Opened, StreamParser, ToolCall,
#       parse]
# ---

# %% [markdown]
# # What if the model gets the form wrong?

# %% [markdown] tags=["given"]
# ## Question
#
# How do the integers that the model writes become
# [messages](conversation.ipynb) again, also when it gets the form wrong? It
# does: a log of llama.cpp with gpt-oss-20b counts 9 of 850 turns whose first
# header was garbled (ggml-org/llama.cpp#27720). The parser expected none, and
# each time the whole turn was lost.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: three states: between, header, content. Solid arrows, the expected
# way: start, message, then end, return or call. Dashed arrows: the same tokens
# in the wrong state, each leading to a state too.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
fig, ax = plt.subplots(figsize=(7, 3.0))
PLACES = {"between": (0, 0), "header": (4, 0), "content": (8, 0)}
for name, (x, y) in PLACES.items():
    ax.add_patch(plt.Circle((x, y), 0.62, fc="C0", alpha=0.3))
    ax.text(x, y, name, ha="center", va="center")
ARROWS = [  # from, to, bend, label, its height, expected
    ("between", "header", -0.25, "start", 0.72, True),
    ("header", "content", -0.25, "message", 0.72, True),
    ("content", "between", -0.52, "end, return, call: done", -2.32, True),
    ("header", "between", -0.25, "end, return, call", -0.78, False),
    ("content", "header", -0.25, "start, channel", -0.78, False),
    ("between", "content", -0.4, "message", 1.75, False)]
for one, other, bend, label, height, expected in ARROWS:
    (x0, _), (x1, _) = PLACES[one], PLACES[other]
    colour = "k" if expected else "C5"
    ax.annotate("", (x1, 0), (x0, 0), arrowprops={
        "arrowstyle": "-|>", "shrinkA": 34, "shrinkB": 34, "color": colour,
        "linestyle": "-" if expected else "--",
        "connectionstyle": f"arc3,rad={bend}"})
    ax.text((x0 + x1) / 2, height, label, ha="center", va="center",
            color=colour, fontsize=8)
ax.set(xlim=(-1, 9), ylim=(-2.55, 2.0), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# **What to see.** A reader of tokens is always in one of three states: between
# two messages, in a header, or in a content. Text leaves the state as it is; a
# control token moves along the arrows. The solid arrows are the form
# {eq}`harmony-message`: start, message, a stop token. The dashed arrows are
# the same tokens in the wrong place, which models write, too. Each of them
# leads to a state: there is a way on from everything.

# %% [markdown]
# ## The naive version
#
# For the right form the three solid arrows are all we need.

# %%
import re
from importlib.resources import files

from gptoss.text.tokenizer import Tokenizer

tokenizer = Tokenizer.from_pretrained(files("gptoss") / "pocket")


def tokens(text: str) -> list[int]:
    """Control tokens by name, the rest as text: for examples only."""
    ids = []
    for part in re.split(r"(<\|\w+\|>)", text):
        ids += ([tokenizer.special[part]] if part in tokenizer.special
                else tokenizer.encode(part))
    return ids


def naive(ids: list[int]) -> list[tuple[str, str]]:
    """(header, content) of each message of a reply."""
    state, header, content, found = "header", "", "", []
    for text in (tokenizer.decode([n]) for n in ids):
        if text == "<|start|>":
            state, header = "header", ""
        elif text == "<|message|>":
            state, content = "content", ""
        elif text in ("<|end|>", "<|return|>", "<|call|>"):
            state = "between"
            found.append((header, content))
        elif state == "header":
            header += text
        elif state == "content":
            content += text
    return found


good = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
answer = "<|channel|>final<|message|>42<|return|>"
print(naive(tokens(good + answer)))
slip = "<|channel|>??<|end|><|start|>assistant" + answer
for case in (slip, "I cannot help with that.<|return|>"):
    print(naive(tokens(case)))

# %% [markdown]
# The first reply is read well. In the second the model slips (`??` for a
# channel, then a fresh start), and a message appears that nobody wrote. The
# third is a refusal without any header: no content is left to show.

# %% [markdown] tags=["given"]
# ## What do models get wrong?
#
# A collection of what users of other engines reported, and what we do. "Said"
# means that the parser reports it and goes on.
#
# | what the model writes | reported in | what we do |
# |---|---|---|
# | bare text, then a stop | openai/harmony#80 | text of no channel; said |
# | channel, text, no `message` | frontend-crates#237 | text of it; said |
# | `??`, then a fresh start | llama.cpp#27720 | read the second; said |
# | no `start` after an end | vllm#22519 | read the header; said |
# | a channel twice | vllm#31677 | the later known one; said |
# | words too many | vllm#51977 | the call is made; said |
# | two recipients | | the first; said |
# | a role, or none, for a tool | llama.cpp#21286 | no call; said |
# | `end` behind a call | mlx-openai-server#156 | the call is made; said |
# | a call that is cut off | lmstudio-bug-tracker#942 | no call |
# | `start` in a content | openai/harmony#72 | ends the message; said |
# | `analyis` for a channel | frontend-crates#237 | keeps its name; said |
# | an id that does not exist | | skipped; said |
#
# Two principles decide the right column. *What is safe*: only text on the
# channel `final` is an answer that a user may see. The reasoning of a model
# that writes `analyis` must not be shown; so an unknown channel keeps its own
# name, and a call whose arguments may be cut short is not made. *What loses
# least*: an error costs at most the message it stands in, and is always said.

# %% [markdown]
# ## Code
#
# ### What a parser reports
#
# Five kinds of events. A message is `Opened` when its header is complete, its
# content comes in `Delta`s of whole characters, and it is `Done` when it ends,
# with its `stop`: "end", "call", "return", or None if it was cut off. Just
# before, a call to a tool is reported as a `ToolCall`. `Malformed` (a `reason`
# and the `text` that it was found in) may come anywhere; an unknown channel is
# reported before the text on it. None for a channel: the header named none.

# %% tags=["export"]
import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gptoss.text.harmony import (
    BUILTIN_TOOLS,
    CHANNELS,
    CONSTRAIN,
    ROLES,
    Message,
)
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import HarmonyError


@dataclass(frozen=True)
class Opened:
    """A header is complete; `message` has its fields and no content yet."""

    message: Message


@dataclass(frozen=True)
class Delta:
    """More content, in whole characters.

    `channel`: as the header wrote it, so that only "final" is an answer;
    None: it named none. Either is reported before if it is none of
    CHANNELS and the message is the assistant's.
    """

    text: str
    channel: str | None


@dataclass(frozen=True)
class ToolCall:
    """A message of the assistant to a tool has come to its stop token."""

    recipient: str
    content_type: str | None
    arguments: str


@dataclass(frozen=True)
class Done:
    """A message has ended; `stop`: end, call, return; None: cut off."""

    message: Message
    stop: str | None


@dataclass(frozen=True)
class Malformed:
    """What was wrong, and the text that it was found in."""

    reason: str
    text: str


Event = Opened | Delta | ToolCall | Done | Malformed

# %% [markdown]
# ### Reading a header
#
# A header is kept as *pieces*: the text before its first control token, then
# `<|channel|>` and `<|constrain|>`, each with the text behind it, as bytes.
# `assistant<|channel|>final` has two: ("", assistant) and (channel, final).
# `_fields` takes pieces apart into words.
#
# - The first word behind a control token is its value, whatever it says; all
#   others go into one list, in order.
# - A word `to=x` of the list is a recipient wherever it stands, so both of
#   harmony's orders are one case. `to= x` is mended before: "white space
#   behind to=", once a piece.
# - "white space behind <|channel|>", if a name follows it. (Behind
#   `<|constrain|>` OpenAI's own example has a space: nothing is said.)
# - "two <|channel|> in a header" (or `<|constrain|>`): the later one counts,
#   but an unknown channel never replaces a known one.
# - "a <|channel|> without a name": it does not count. A `<|constrain|>` that
#   names nothing counts, and nothing is said.

# %% tags=["export"]
_Pieces = list[tuple[str, bytearray]]  # control token or "", text behind it
_WORD = re.compile(r"[\w./+-]+")
_TORN_TO = re.compile(r"(?<!\S)to=\s+(?=\S)")


def _spell(pieces: _Pieces) -> str:
    """Pieces as one would write them."""
    return "".join(control + data.decode("utf-8", "replace")
                   for control, data in pieces)

# %% tags=["export"]
def _fields(pieces: _Pieces
            ) -> tuple[dict[str, str], list[str], list[str]]:
    """Channel and content type by control token, other words, complaints."""
    found: dict[str, str] = {}
    words: list[str] = []
    wrong: list[str] = []
    for control, data in pieces:
        text = data.decode("utf-8", "replace")
        if _TORN_TO.search(text):
            text = _TORN_TO.sub("to=", text)
            wrong.append("white space behind to=")
        parts = text.split()
        if control:
            value = parts.pop(0) if parts else ""
            if control == "<|channel|>" and value and data[:1].isspace():
                wrong.append("white space behind <|channel|>")
            if control in found:
                wrong.append(f"two {control} in a header")
            if control == "<|channel|>" and not value:
                wrong.append("a <|channel|> without a name")
            # the later of two, but no unknown channel after a known one
            elif (control == CONSTRAIN or value in CHANNELS
                  or found.get(control, "") not in CHANNELS):
                found[control] = value
        words += parts
    return found, words, wrong

# %% [markdown]
# **Who speaks?** The first word of the list should say so. `role` is known
# beforehand where the tokens continue a prompt's `<|start|>assistant`.
#
# | the first word | author | said |
# |---|---|---|
# | any, if the role is known | the role; the word goes if it is the role | |
# | a role but `tool`, or `user:ada` | the role, and the name `ada` | |
# | none, a channel, `to=...` | assistant | "a header without a role" |
# | `tool`, `browser`, `python` | the tool of that name | |
# | one with a dot, or any `to=...` behind it | the tool of that name | |
# | any other | assistant | "an unknown role 'asistant'" |
#
# The first line that fits decides. The third also fits every word of a header
# without `<|start|>`. There the word stays in the list; below, it goes.

# %% tags=["export"]
def _author(words: list[str], role: str | None, started: bool
            ) -> tuple[str, str | None, list[str]]:
    """Takes the author off `words`: role, name, complaints.

    `role`: known beforehand. `started`: whether there was a `<|start|>`.
    """
    first = words[0] if words else ""
    head, _, name = first.partition(":")
    if role is not None:
        del words[:first == role]
        return role, None, []
    if head in ROLES[:-1]:
        del words[0]
        return head, name or None, []
    if (not started or not first or first in CHANNELS
            or first.startswith("to=")):
        return "assistant", None, ["a header without a role"]
    del words[0]
    if (first in ("tool", *BUILTIN_TOOLS) or "." in first
            or any(word.startswith("to=") for word in words)):
        return "tool", first, []
    return "assistant", None, [f"an unknown role {first!r}"]

# %% [markdown]
# **The rest of the list.** Recipients are taken out; the first that is not
# empty counts. If there was no `<|channel|>` and the next word is one of the
# three channels, it is the channel. The format is what `<|constrain|>` names,
# with that prefix, else the word that is left, if it is only one. These are
# the complaints, in this order, behind those of the fields and of the author;
# each comes with the whole header, spelt out:
#
# | complaint | when |
# |---|---|
# | a channel without <\|channel\|> | the channel was a bare word |
# | unexpected text '...' in a header | words left, but for one format word |
# | a format before to=: 'json' | a bare format word before a recipient |
# | recipients [...] in a header | more than one, or an empty one |
# | an unknown channel '...' | of the assistant, none of the three |
# | a message of the assistant without a channel | |
# | a header that is not UTF-8 | it has U+FFFD |
#
# A format word is made of letters, digits and `_./+-`. Another single word is
# kept as the format all the same, and said. The third complaint: the official
# parser refuses such a header. (A `<|constrain|>` may stand anywhere.)

# %% tags=["export"]
def _read_header(pieces: _Pieces, role: str | None, started: bool
                 ) -> tuple[Message, list[Malformed]]:
    """The message that a header announces, and what is wrong with it."""
    found, words, wrong = _fields(pieces)
    role, name, complaints = _author(words, role, started)
    to = [word[3:] for word in words if word.startswith("to=")]
    early = not all(word.startswith("to=") for word in words[:len(to)])
    words = [word for word in words if not word.startswith("to=")]
    bare = "<|channel|>" not in found and words[:1] in [[c] for c in CHANNELS]
    channel = words.pop(0) if bare else found.get("<|channel|>")
    kind = (CONSTRAIN + found[CONSTRAIN] if CONSTRAIN in found
            else words[0] if len(words) == 1 else None)
    alone = kind is not None and (
        words == [kind] and bool(_WORD.fullmatch(kind)))
    lost = role == "assistant" and channel not in CHANNELS
    text = _spell(pieces)
    table = {  # complaint -> whether it holds
        "a channel without <|channel|>": bare,
        f"unexpected text {' '.join(words)!r} in a header":
            words and not alone,
        f"a format before to=: {kind!r}": alone and early,
        f"recipients {to} in a header": len(to) > 1 or "" in to,
        f"an unknown channel {channel!r}": lost and channel,
        "a message of the assistant without a channel": lost and not channel,
        "a header that is not UTF-8": "\ufffd" in text}
    wrong += complaints + [reason for reason, holds in table.items() if holds]
    recipient = next(filter(None, to), None)
    return (Message(role, "", channel, recipient, kind, name),
            [Malformed(reason, text) for reason in wrong])

# %%
message, wrong = _read_header(
    [("", bytearray()),
     ("<|channel|>", bytearray(b"commentary to=functions.bash")),
     ("<|channel|>", bytearray(b"commentary code"))], "assistant", True)
print(message)
print(wrong)

# %% [markdown]
# ### A header that never came to its message
#
# A header that a stop token ends may still hold an answer: refusals are bare
# text (openai/harmony#80), or `<|message|>` is forgotten behind the channel
# (ai-dynamo/frontend-crates#237). We rescue two forms. *Plain text*: without
# any control token; a leading `assistant` is dropped, and there is no channel.
# *A channel and text*: the only control token is `<|channel|>`, with at most
# `assistant` before it, and behind it one of the three names, which no small
# letter follows (`final: yes`, but not `finally`). White space before the text
# is dropped; a text that is empty or has `to=` in it is not rescued.

# %% tags=["export"]
def _rescue(pieces: _Pieces) -> Message | None:
    """The assistant's text in a header that never came to `<|message|>`.

    Plain text, or a channel's name and text; else there is none.
    """
    (_, before), *rest = pieces
    text, channel = before.decode("utf-8", "replace"), None
    text = text.removeprefix("assistant").lstrip()
    if rest:
        control, behind = rest[0]
        after = behind.decode("utf-8", "replace").lstrip()
        # not "finally": that may be any text
        channel = next((c for c in CHANNELS
                        if re.match(f"{c}(?![a-z])", after)), None)
        if text or channel is None or rest[1:] or control == CONSTRAIN:
            return None
        text = after.removeprefix(channel).lstrip()
    return (Message("assistant", text, channel)
            if text and "to=" not in text else None)

# %%
print(_rescue([("", bytearray(b"I cannot help with that."))]))
print(_rescue([("", bytearray()), ("<|channel|>", bytearray(b"??"))]))

# %% [markdown]
# ### One token at a time
#
# Now the arrows of the picture, as a table for a state and a token. "Between"
# is a header whose `<|start|>` has not been seen.
#
# In a header:
#
# | token | what happens |
# |---|---|
# | text | is collected |
# | channel, constrain | begin a new piece |
# | message | complaints, "a header without <\|start\|>" if so; `Opened` |
# | start | a new header begins; what was collected is abandoned |
# | end, return, call | the header is abandoned |
# | any other | "a control token in a header" |
#
# To *abandon* a header is to say "a header without <|message|>" (or "text
# outside of a message", if it had no `<|start|>`). If the parser reads a reply
# of the assistant, and it was not a start, what can be rescued is then opened
# and finished as a message. A stop token abandons an empty header, too. A
# start does not between two messages, where it belongs, nor where a reply
# repeats its `<|start|>assistant`. Behind a message that ended in `<|return|>`
# a start is "a message after <|return|>".
#
# In a content:
#
# | token | what happens |
# |---|---|
# | text | a `Delta` of the characters that are whole |
# | end, return, call | the message is finished |
# | start, channel | "<\|start\|> before the message has ended"; finished |
# | any other | "a control token in a text"; the text goes on |
#
# A start then begins a new header, and a channel one of the same role. At the
# end of a message, and before a control token that is skipped, half a
# character becomes U+FFFD. To *finish* a message: the last `Delta`; then, if
# the assistant addressed somebody, it is a call.
#
# | recipient | stop | what happens |
# |---|---|---|
# | a tool | call | `ToolCall` |
# | a tool | end, return | "a call without <\|call\|>", `ToolCall` |
# | a tool | none: cut off | no call |
# | a role | any | "a recipient that is no tool" |
# | none, or another's message | call | "<\|call\|> without a recipient" |
#
# Last comes `Done`, with the stop token's word, or None. `close` tells the
# parser that no token follows: it finishes or abandons what is open. An id
# that no vocabulary has, or something that is no number at all, counts as a
# control token by the name `<|unknown 7.5|>`: `feed` never raises.
#
# Which `text` does a complaint come with? A header's, with all of it; an
# abandoned one's, with that and the token; a skipped token's, with its name; a
# call's, with its recipient. With all others it is empty.
#
# `messages` holds those that are done. `role` says whose header the tokens go
# on with, by default the assistant's, as a reply does; None: they begin with
# `<|start|>`, and nothing is rescued. `_header` and `_content` are the tables.

# %% tags=["export"]
_STOPS = {"<|end|>": "end", "<|return|>": "return", "<|call|>": "call"}


class StreamParser:
    """Takes tokens one by one and reports events; never raises on a token.

    `role`: the author of the first message if the tokens continue
    `<|start|>role`, as a reply to `render` does; None: they begin with
    `<|start|>`. `messages`: those that are done. What is malformed is
    reported, and the parser goes on with the next header that it finds.
    A ToolCall comes only of a message with a stop token: without one its
    arguments may be cut short.
    """

    def __init__(self, tokenizer: Tokenizer,
                 role: str | None = "assistant") -> None:
        if role not in (None, *ROLES):
            raise HarmonyError(f"role: expected one of {', '.join(ROLES)} or "
                               f"None, found {role!r}")
        self.messages: list[Message] = []
        self._tokenizer = tokenizer
        self._replying = role == "assistant"
        self._stop: str | None = None  # of the message before
        self._begin(role, started=role is not None)

    def feed(self, token: int) -> list[Event]:
        """The events that `token` causes."""
        try:
            data = self._tokenizer.token_bytes(token)
            special = self._tokenizer.is_special(token)
        except (HarmonyError, TypeError):
            data, special = f"<|unknown {token}|>".encode(), True
        step = self._content if self._in_content else self._header
        return step(*((data.decode(), b"") if special else ("", data)))

    def close(self) -> list[Event]:
        """The events that the end of the tokens causes."""
        if self._in_content:
            return self._finish(None)
        blank = self._pieces == [("", b"")]
        return [] if blank and not self._started else self._abandon()

    def _header(self, control: str, data: bytes) -> list[Event]:
        """A token between messages or in a header."""
        if control in _STOPS:
            return self._abandon(control)
        if control == "<|start|>":
            fresh = self._pieces == [("", b"")] and (
                not self._started or self._role is not None)
            events = [] if fresh else self._abandon(control)
            if self._stop == "return":
                events.append(Malformed("a message after <|return|>", ""))
            self._stop = None
            self._begin(started=True)
            return events
        if control == "<|message|>":
            message, wrong = _read_header(self._pieces, self._role,
                                          self._started)
            if not self._started:
                wrong.append(Malformed("a header without <|start|>",
                                       _spell(self._pieces)))
            return [*wrong, *self._open(message)]
        if control not in ("", "<|channel|>", CONSTRAIN):
            return [Malformed("a control token in a header", control)]
        if control:
            self._pieces.append((control, bytearray()))
        self._pieces[-1][1].extend(data)
        return []

    def _content(self, control: str, data: bytes) -> list[Event]:
        """A token of a message's content."""
        if not control:
            return self._add(data)
        if control in _STOPS:
            return self._finish(_STOPS[control])
        if control not in ("<|start|>", "<|channel|>"):
            return [*self._add(b"", final=True),
                    Malformed("a control token in a text", control)]
        role = self._message.role if control == "<|channel|>" else None
        events = [Malformed(f"{control} before the message has ended", ""),
                  *self._finish(None)]
        self._begin(role, started=role is not None)
        return events + self._header(control, b"")

    def _begin(self, role: str | None = None, started: bool = False) -> None:
        """A new header; `started`: its `<|start|>` has been seen."""
        self._role, self._started = role, started
        self._pieces: _Pieces = [("", bytearray())]
        self._message = Message("assistant")  # its header, once read
        self._in_content = False              # whether it has been
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _open(self, message: Message) -> list[Event]:
        """A header is complete."""
        self._message, self._in_content = message, True
        return [Opened(message)]

    def _add(self, data: bytes, final: bool = False) -> list[Event]:
        """More content; at a `final` half a character becomes U+FFFD."""
        text = self._utf8.decode(data, final)
        self._text.append(text)
        return [Delta(text, self._message.channel)] if text else []

    def _finish(self, stop: str | None) -> list[Event]:
        """The message ends."""
        events = self._add(b"", final=True)
        message = replace(self._message, content="".join(self._text))
        to, call = message.recipient, None
        if message.role == "assistant" and to is not None:
            call = ToolCall(to, message.content_type, message.content)
        if stop == "call" and call is None:
            events.append(Malformed("<|call|> without a recipient", ""))
        if call and call.recipient in ROLES:
            events.append(Malformed("a recipient that is no tool",
                                    call.recipient))
        elif call and stop is not None:
            if stop != "call":
                events.append(Malformed("a call without <|call|>",
                                        call.recipient))
            events.append(call)
        self.messages.append(message)
        self._stop = stop
        self._begin()
        return [*events, Done(message, stop)]

    def _abandon(self, control: str = "") -> list[Event]:
        """`control` (or the end) instead of `<|message|>` after a header."""
        found = _spell(self._pieces) + control
        reason = ("a header without <|message|>" if self._started else
                  "text outside of a message")
        events: list[Event] = [Malformed(reason, found)]
        message = _rescue(self._pieces) if self._replying else None
        if message is None or control == "<|start|>":
            self._begin()
            return events
        events += self._open(replace(message, content=""))
        events += self._add(message.content.encode())
        return events + self._finish(_STOPS.get(control))

# %%
parser = StreamParser(tokenizer)
events = [event for token in tokens(slip) for event in parser.feed(token)]
print(*(event for event in events if not isinstance(event, Delta)),
      sep="\n")

# %% [markdown]
# The slip is reported, and the answer arrives on its own channel.
#
# ### All at once
#
# A program that reads its own conversations back wants an error instead.
# `parse` raises `HarmonyError` at the first complaint, with the token's index,
# the reason and the text. A last message without its stop token is no error.

# %% tags=["export"]
def parse(tokenizer: Tokenizer, ids: Iterable[int],
          role: str | None = None) -> list[Message]:
    """The messages in `ids`; raises HarmonyError if anything is malformed.

    `role`: as for StreamParser. The last message may lack its stop token.
    """
    parser = StreamParser(tokenizer, role)
    for n, events in enumerate([*map(parser.feed, ids), parser.close()]):
        for event in events:
            if isinstance(event, Malformed):
                raise HarmonyError(f"token {n}: {event.reason}: "
                                   f"{event.text!r}")
    return parser.messages

# %%
from gptoss.text.harmony import render

call = Message("assistant", '{"a": 17}', "commentary", "functions.add",
               "<|constrain|>json")
result = Message("tool", "<|end|>", "commentary", "assistant",
                 name="functions.add")
talk = [Message("user", "Q"), Message("assistant", "think", "analysis"),
        call, result, Message("assistant", "A", "final")]
assert parse(tokenizer, render(tokenizer, talk, reply=False,
                               drop="none")) == talk
try:
    parse(tokenizer, tokens(slip), role="assistant")
except HarmonyError as error:
    print(str(error).partition(": ")[2])

# %% [markdown]
# ## What is refused
#
# No token is. Only a parser for a role that does not exist:

# %%
try:
    StreamParser(tokenizer, "bot")
except HarmonyError as error:
    print(error)

# %% [markdown]
# ## It holds
#
# 3,000 random runs of control tokens, header words, halves of characters and
# unknown ids: nothing is raised, every opened message is done, and its deltas
# make its content.

# %%
import itertools
import random

rng = random.Random(0)
pool = [*map(tokenizer.special.get, ("<|start|>", "<|message|>", "<|end|>",
                                     "<|channel|>", "<|constrain|>",
                                     "<|call|>", "<|return|>"))] * 3
pool += [-1, 10 ** 6, tokenizer.special["<|endoftext|>"]]
for word in ("assistant", " to=functions.add", "analysis", "final", "🙂"):
    pool += tokenizer.encode(word)
for _ in range(3000):
    parser, opened, text, done = StreamParser(tokenizer), 0, "", []
    soup = rng.choices(pool, k=12)
    for event in [*itertools.chain(*map(parser.feed, soup)), *parser.close()]:
        if isinstance(event, Opened):
            opened, text = opened + 1, ""
        elif isinstance(event, Delta):
            text += event.text
        elif isinstance(event, Done):
            done.append(event.message)
            assert event.message.content == text
    assert done == parser.messages and len(done) == opened
print("3,000 runs: nothing raised, every opened message done")

# %% [markdown]
# ## Against the others
#
# Replies that users of other engines reported, read by the official parser
# (which vLLM and SGLang use) and by ours:

# %%
import base64
import gzip
import json
import os
import tempfile
from pathlib import Path

import openai_harmony as official

from gptoss.text.vocabulary import tokenizer_json
from gptoss.weights.config import GptOssConfig

raw = gzip.decompress(
    (files("bpe_openai.data") / "o200k_base.tiktoken.gz").read_bytes())
o200k = {base64.b64decode(token): int(rank)
         for token, rank in map(bytes.split, raw.splitlines())}
real = tokenizer = Tokenizer(tokenizer_json(o200k),
                             GptOssConfig().vocab_size)
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "o200k_base.tiktoken").write_bytes(raw)
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
    theirs = official.load_harmony_encoding("HarmonyGptOss")

# %%
REPORTED = [
    ("openai/harmony#80", "The user asks for X.<|end|>"),
    ("frontend-crates#237", "<|channel|>final__HANDOFF__<|return|>"),
    ("llama.cpp#27720", "<|channel|>??<|end|><|start|>assistant"
     "<|channel|>final<|message|>42<|return|>"),
    ("vllm#31677", "<|channel|>commentary to=functions.bash<|channel|>"
     "commentary<|message|>{}<|call|>"),
    ("vllm#51977", "<|channel|>commentary to=functions.web code json"
     "<|message|>{}<|call|>"),
    ("vllm#22519", "<|channel|>analysis<|message|>so<|end|>commentary "
     "to=functions.f<|message|>{}<|call|>")]


def brief(message: Message | official.Message) -> str:
    """Channel>recipient:content of the message."""
    content = message.content
    text = content if isinstance(content, str) else content[0].text
    return f"{message.channel}>{message.recipient}:{text}"


for thread, text in REPORTED:
    ids = tokens(text)
    try:
        found = "\n             ".join(map(
            brief, theirs.parse_messages_from_completion_tokens(
                ids, official.Role.ASSISTANT)))
    except official.HarmonyError as error:
        found = f"error: {error}"
    parser = StreamParser(real)
    events = [*itertools.chain(*map(parser.feed, ids)), *parser.close()]
    print(f"{thread}\n  official:  {found}\n  ours:     ", "\n             "
          .join(map(brief, parser.messages)))
    print("  reported: ", "\n             ".join(
        event.reason for event in events if isinstance(event, Malformed)))

# %% [markdown]
# An error ends a request. The two replies on which the official parser raises
# nothing are worse: `??` swallows the start of the next message into a
# recipient, and a program looks for a tool of that name; so does a function
# whose name ends in `<|channel|>commentary`. The tests hold a list of such
# replies, with their threads, what both parsers find, and what ours reports:

# %%
cases = json.loads(Path("../../tests/text/harmony_malformed.json"
                        ).read_text("utf-8"))
raised = sum(isinstance(case["official"], str) for case in cases)
same = sum(case["messages"] == "the same" for case in cases)
print(f"{len(cases)} replies: the official parser raises on {raised}, agrees "
      f"on {same}, finds other messages in {len(cases) - raised - same}")

# %% [markdown]
# Where the official parser raises nothing, ours finds the same messages but
# for a few kinds of error, and on random tokens the tests find no other. The
# official parser takes
#
# - control tokens in a content or a name for text, and text that spells one
#   in a header for the token;
# - a word without `to=` for a recipient, even what its own renderer writes:
#   `<|channel|>final <|constrain|>json` comes back as a call;
# - a name behind a role, as in `user:ada`, for a tool's;
# - a channel without `<|channel|>` for a tool or a content type.
#
# It loses what follows an id that no vocabulary has, and beyond ASCII it
# splits words at other white space. `parse` is stricter: it raises on all
# that `StreamParser` reports, a channel missing or unknown among it.

# %% [markdown]
# ## Takeaways
#
# - A parser of what a model writes must have an answer to every token in
#   every state. Ours reports, and goes on at the next header.
# - Only text on the channel `final` is an answer; an unknown channel keeps its
#   name, and is reported before its text.
# - A call without a stop token is not called: its arguments may be cut short.
#
# ## Exercises
#
# ### Exercise 1
#
# Say from the tables who speaks, on which channel, to whom, and what is
# reported. Then run: `assistant final`, `get_weather to=assistant`,
# `asistant<|channel|>analysis<|channel|>finl`.

# %% tags=["hide-cell"]
for header in ("assistant final", "get_weather to=assistant",
               "asistant<|channel|>analysis<|channel|>finl"):
    parser = StreamParser(tokenizer, role=None)
    events = [event for token in tokens(f"<|start|>{header}<|message|>x")
              for event in parser.feed(token)]
    message = next(event.message for event in events
                   if isinstance(event, Opened))
    print(message.role, message.name, message.channel, message.recipient)
    print("   ", [event.reason for event in events
                  if isinstance(event, Malformed)])
# A bare channel counts. A to= makes the word before it a tool. Of two
# channels the known one wins, although the other is the later.

# %% [markdown]
# ### Exercise 2
#
# Find a message that openai-harmony renders and cannot read back, without any
# control token's name in its text.

# %% tags=["hide-cell"]
from gptoss.text.harmony import render_message


def as_official(message: Message) -> official.Message:
    made = official.Message.from_author_and_content(
        official.Author(role=message.role, name=message.name),
        message.content)
    for field in ("channel", "recipient", "content_type"):
        if value := getattr(message, field):
            made = getattr(made, f"with_{field}")(value)
    return made


for message in (Message("user", "hi", name="ada"),
                Message("assistant", "{}", "final",
                        content_type="<|constrain|>json")):
    ids = theirs.render(as_official(message))
    assert ids == render_message(real, message)
    assert parse(real, ids) == [message]
    try:
        print(theirs.parse_messages_from_completion_tokens(ids)[0].to_dict())
    except official.HarmonyError as error:
        print(error)

# %% [markdown]
# ### Exercise 3
#
# A model repeats its header: `<|start|>assistant<|channel|>analysis<|start|>`
# `assistant<|channel|>final<|message|>42<|return|>`. What do the arrows of the
# picture say, and what does the parser?

# %% tags=["hide-cell"]
text = ("<|start|>assistant<|channel|>analysis<|start|>assistant"
        "<|channel|>final<|message|>42<|return|>")
parser = StreamParser(tokenizer, role=None)
for token in tokens(text):
    for event in parser.feed(token):
        print(event)
# a start within a header begins it anew; the first header is reported
assert [message.content for message in parser.messages] == ["42"]

# %% [markdown]
# ## Sources
#
# - openai/harmony 0.0.8: `docs/format.md` (the form), `src/encoding.rs`
#   (`StreamableParser`).
# - Malformed replies: openai/harmony#38, #80, #114; vllm#22519, #23567,
#   #31677, #51977; llama.cpp#27720, #21286; ai-dynamo/frontend-crates#237;
#   the rest with their case in `tests/text/harmony_malformed.json`.
