"""How does a conversation become tokens?

Generated from book/text/conversation.py; edit the chapter, not this file.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gptoss.text.tokenizer import Tokenizer
from gptoss.text.typescript import Tool, split_lines, typescript
from gptoss.text.vocabulary import HarmonyError

# --- A message ---------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."


@dataclass(frozen=True)
class Message:
    """One message of a conversation; all fields are plain text.

    `name`: who of the role speaks; a tool's message needs it
    ("functions.add"), it stands in the header in place of the role.
    `recipient`: the tool that a call goes to; a result has "assistant".
    `content_type`: "<|constrain|>json" (that prefix, and only it, becomes
    a control token) or other text.
    """

    role: str
    content: str = ""
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


# --- A message as tokens -----------------------------------------------------

CONSTRAIN = "<|constrain|>"


def _control(tokenizer: Tokenizer, name: str) -> int:
    """The id of control token `name`."""
    if name not in tokenizer.special:
        raise HarmonyError(f"tokenizer: expected a control token {name}, "
                           f"found {sorted(tokenizer.special)}")
    return tokenizer.special[name]


def _header(message: Message) -> list[tuple[str, str]]:
    """The header of `message` as (control token or "", text) pairs."""
    if message.role not in ROLES:
        raise HarmonyError(f"role: expected one of {', '.join(ROLES)}, "
                           f"found {message.role!r}")
    if message.role == "tool" and not message.name:
        raise HarmonyError("a tool's message: expected a name like "
                           "'functions.add', found none")
    author = [] if message.role == "tool" else [message.role]
    if message.name:
        author.append(message.name)
    parts = [("<|start|>", ":".join(author))]
    if message.recipient not in (None, "all"):
        parts.append(("", f" to={message.recipient}"))
    if message.channel is not None:
        parts.append(("<|channel|>", message.channel))
    if (kind := message.content_type) is not None:
        rest = kind.removeprefix(CONSTRAIN)
        parts += ([("", f" {kind}")] if rest == kind
                  else [("", " "), (CONSTRAIN, rest)])
    return parts


def render_message(tokenizer: Tokenizer, message: Message,
                   stop: str = "<|end|>") -> list[int]:
    """Token ids of one message, `<|start|>` to its stop token.

    A message of the assistant to a recipient ends in `<|call|>` instead of
    `<|end|>`. Raises HarmonyError for an unknown role or a nameless tool.
    """
    if (stop == "<|end|>" and message.role == "assistant"
            and message.recipient is not None):
        stop = "<|call|>"
    ids = []
    for control, text in (*_header(message), ("<|message|>", message.content),
                          (stop, "")):
        if control:
            ids.append(_control(tokenizer, control))
        ids += tokenizer.encode(text)
    return ids


# --- What the provider and the application say -------------------------------

_NUMBER, _STRING = {"type": "number"}, {"type": "string"}
_BROWSER = (
    Tool("search", "Searches for information related to `query` and displays "
         "`topn` results.",
         {"type": "object", "required": ["query"], "properties": {
             "query": _STRING, "topn": _NUMBER | {"default": 10},
             "source": _STRING}}),
    Tool("open", "Opens the link `id` from the page indicated by `cursor` "
         "starting at line number `loc`, showing `num_lines` lines.\n"
         "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
         "If `cursor` is not provided, the most recent page is implied.\n"
         "If `id` is a string, it is treated as a fully qualified URL "
         "associated with `source`.\nIf `loc` is not provided, the viewport "
         "will be positioned at the beginning of the document or centered on "
         "the most relevant passage, if available.\nUse this function "
         "without `id` to scroll to a new location of an opened page.",
         {"type": "object", "properties": {
             "id": {"type": ["number", "string"], "default": -1},
             **{key: _NUMBER | {"default": -1}
                for key in ("cursor", "loc", "num_lines")},
             "view_source": {"type": "boolean", "default": False},
             "source": _STRING}}),
    Tool("find", "Finds exact matches of `pattern` in the current page, or "
         "the page given by `cursor`.",
         {"type": "object", "required": ["pattern"], "properties": {
             "pattern": _STRING, "cursor": _NUMBER | {"default": -1}}}))


BUILTIN_TOOLS = {
    "browser": (
        "Tool for browsing.\nThe `cursor` appears in brackets before each "
        "browsing display: `[{cursor}]`.\nCite information from the tool "
        "using the following format:\n`【{cursor}†L{line_start}"
        "(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\nDo "
        "not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)", _BROWSER),
    "python": (
        "Use this tool to execute Python code in your chain of thought. The "
        "code will not be shown to the user. This tool should be used for "
        "internal reasoning, but not for code that is intended to be visible "
        "to the user (e.g. when creating plots, tables, or files).\n\nWhen "
        "you send a message containing Python code to python, it will be "
        "executed in a stateful Jupyter notebook environment. python will "
        "respond with the output of the execution or time out after 120.0 "
        "seconds. The drive at '/mnt/data' can be used to save and persist "
        "user files. Internet access for this session is UNKNOWN. Depends on "
        "the cluster.", ())}


def _section(name: str, about: str, tools: Iterable[Tool]) -> str:
    """`## name`, a description, and the tools as TypeScript."""
    mark = "// " if tools else ""
    out = [f"## {name}\n", *(mark + line for line in split_lines(about))]
    return "\n".join([*out, typescript(tools, name)] if tools else out)


def system_message(effort: str | None = "medium", date: str | None = None,
                   functions: bool = False, cutoff: str | None = "2024-06",
                   identity: str | None = IDENTITY,
                   channels: Iterable[str] = CHANNELS,
                   builtin: Iterable[str] = ()) -> Message:
    """What the provider says: identity, dates, effort, channels.

    `functions`: whether a developer message offers tools. `builtin`: names
    out of "browser", "python". None leaves a line out. Raises HarmonyError
    for another effort or name.
    """
    builtin = sorted(builtin)
    for value, known in ((effort, (None, *EFFORTS)),
                         *((name, (*BUILTIN_TOOLS,)) for name in builtin)):
        if value not in known:
            raise HarmonyError(f"system message: expected one of {known}, "
                               f"found {value!r}")
    who = [] if identity is None else [identity]
    who += [] if cutoff is None else [f"Knowledge cutoff: {cutoff}"]
    who += [] if date is None else [f"Current date: {date}"]
    parts = ["\n".join(who)] * bool(who)
    parts += [f"Reasoning: {effort}"] * (effort is not None)
    parts += ["# Tools"] * bool(builtin)
    parts += [_section(name, *BUILTIN_TOOLS[name]) for name in builtin]
    if named := ", ".join(channels):
        rule = ("\nCalls to these tools must go to the commentary channel: "
                "'functions'." if functions else "")
        parts.append(f"# Valid channels: {named}. Channel must be included "
                     f"for every message.{rule}")
    return Message("system", "\n\n".join(parts))


def developer_message(instructions: str = "",
                      tools: Iterable[Tool] = ()) -> Message:
    """What the application says: instructions and functions on offer."""
    tools = tuple(tools)
    parts = ["# Instructions", instructions] if instructions else []
    parts += ["# Tools", _section("functions", "", tools)] if tools else []
    return Message("developer", "\n\n".join(parts))


# --- A conversation ----------------------------------------------------------

def _is_answer(message: Message) -> bool:
    """Whether `message` ends the assistant's turn."""
    return (message.role == "assistant" and message.channel == "final"
            and message.recipient in (None, "all")
            and message.content != "")


def _forgotten(messages: list[Message], drop: str) -> int:
    """Reasoning before this index is dropped."""
    if drop == "none":
        return 0
    if drop == "turns":
        return max((n for n, message in enumerate(messages)
                    if _is_answer(message)), default=0)
    if drop != "official":
        raise HarmonyError(f"drop: expected 'official', 'turns' or 'none', "
                           f"found {drop!r}")
    said = [message.channel for message in messages
            if message.role == "assistant"]
    if said[-1:] != ["final"]:
        return 0
    return [message.channel for message in messages].index("final")


def render(tokenizer: Tokenizer, messages: Iterable[Message],
           reply: bool = True, drop: str = "official") -> list[int]:
    """Token ids of a conversation, and `<|start|>assistant` if `reply`.

    `drop`: which messages of the analysis channel are left out. "turns":
    those before the assistant's last answer, a final message that is not
    empty. "official", as openai-harmony: those before the first final
    message, if the assistant's last message is final. "none".
    """
    messages = list(messages)
    start = _forgotten(messages, drop)
    ids = []
    for n, message in enumerate(messages):
        if n >= start or message.channel != "analysis":
            ids += render_message(tokenizer, message)
    begin = [_control(tokenizer, "<|start|>"), *tokenizer.encode("assistant")]
    return ids + begin if reply else ids


def render_training(tokenizer: Tokenizer, messages: Iterable[Message],
                    drop: str = "official") -> list[int]:
    """As render(reply=False), but a final message at the end ends in
    `<|return|>`."""
    messages = list(messages)
    ids = render(tokenizer, messages, reply=False, drop=drop)
    if messages and (messages[-1].role, messages[-1].channel) == (
            "assistant", "final"):
        ids[-1] = _control(tokenizer, "<|return|>")
    return ids


__all__ = [
    "BUILTIN_TOOLS",
    "CHANNELS",
    "CONSTRAIN",
    "EFFORTS",
    "IDENTITY",
    "Message",
    "ROLES",
    "developer_message",
    "render",
    "render_message",
    "render_training",
    "system_message",
]
