"""How is a conversation held?

Generated from book/chat/chat.py; edit the chapter, not this file.
"""

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

# --- A model from anywhere ---------------------------------------------------

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


# --- The chat ----------------------------------------------------------------

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


__all__ = [
    "Chat",
    "load",
]
