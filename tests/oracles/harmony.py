"""openai-harmony, the official renderer and parser, offline."""

import os
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

from gptoss.text.harmony import Message
from gptoss.text.typescript import Tool
from oracles import o200k


def library() -> ModuleType:
    import openai_harmony
    return openai_harmony


@cache
def encoding():
    """The official encoding, read from the vocabulary at hand.

    It looks for o200k_base.tiktoken in TIKTOKEN_ENCODINGS_BASE; without that
    it would ask the network.
    """
    with (tempfile.TemporaryDirectory() as folder,
          patch.dict(os.environ, TIKTOKEN_ENCODINGS_BASE=folder)):
        Path(folder, "o200k_base.tiktoken").write_bytes(
            o200k.tiktoken_file())
        return library().load_harmony_encoding("HarmonyGptOss")


def system(effort: str | None = "medium", date: str | None = None,
           cutoff: str | None = "2024-06", identity: str | None = None,
           channels: Iterable[str] = (), builtin: Iterable[str] = ()):
    """The official system message; the arguments are ours."""
    oh = library()
    content = oh.SystemContent(
        model_identity=identity, knowledge_cutoff=cutoff,
        reasoning_effort=effort and oh.ReasoningEffort(effort.title()),
        conversation_start_date=date,
        channel_config=oh.ChannelConfig.require_channels(list(channels)))
    for name in builtin:
        content = getattr(content, f"with_{name}_tool")()
    return oh.Message.from_role_and_content(oh.Role.SYSTEM, content)


def developer(instructions: str = "", tools: Iterable[Tool] = ()):
    """The official developer message; the arguments are ours."""
    oh = library()
    content = oh.DeveloperContent.new()
    if instructions:
        content = content.with_instructions(instructions)
    if tools := list(tools):
        content = content.with_function_tools([
            oh.ToolDescription.new(tool.name, tool.description,
                                   parameters=tool.parameters)
            for tool in tools])
    return oh.Message.from_role_and_content(oh.Role.DEVELOPER, content)


def message(ours: Message):
    """One of our messages as an official one."""
    oh = library()
    made = oh.Message.from_author_and_content(
        oh.Author(role=oh.Role(ours.role), name=ours.name), ours.content)
    for field in ("channel", "recipient", "content_type"):
        if (value := getattr(ours, field)) is not None:
            made = getattr(made, f"with_{field}")(value)
    return made


def ours(official) -> Message:
    """An official message as one of ours."""
    return Message(official.author.role.value,
                   "".join(part.text for part in official.content),
                   official.channel, official.recipient,
                   official.content_type, official.author.name)


def render(messages: list, how: str = "", drop: bool = True) -> list[int]:
    """Token ids of official messages; `how`: for_completion, for_training."""
    oh, args = library(), []
    if how == "for_completion":
        args.append(oh.Role.ASSISTANT)
    call = getattr(encoding(), "_".join(filter(None, (
        "render_conversation", how))))
    return call(oh.Conversation.from_messages(messages), *args,
                config=oh.RenderConversationConfig(auto_drop_analysis=drop))


def parse(ids: Iterable[int], role: str | None = None,
          strict: bool = True) -> list[Message]:
    """What the official parser makes of `ids`; raises its own errors."""
    oh = library()
    return [ours(found) for found in
            encoding().parse_messages_from_completion_tokens(
                list(ids), role and oh.Role(role), strict=strict)]
