"""How much of a conversation must be read again?

Generated from book/chat/memory.py; edit the chapter, not this file.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import SamplingOptions

# --- The cache and the tokens in it ------------------------------------------

SLACK = 1024  # ring slots beyond the window; no longer turn needs a replay


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of `a` and `b` are the same."""
    for n, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return n
    return min(len(a), len(b))


class PrefixCache:
    """A cache of batch 1 and the tokens whose keys and values it holds.

    `slack`: slots of the rings beyond the window; so many tokens plus one
    can be taken back without feeding older ones again. `draft`: who guesses
    tokens, as for `generate`; a small model keeps its own cache here.
    """

    def __init__(self, model: GptOss, slack: int = 0, draft: Any = None
                 ) -> None:
        self.model = model
        self.draft = draft
        if draft is not None:  # kernels are imported where they are needed
            from gptoss.kernels.drafts import drafter_for

            self.draft = drafter_for(draft, model)
        self.cache = model.new_cache(slack=slack)
        self.tokens: list[int] = []  # fed, or to be fed next
        self.fed = 0  # tokens fed so far that were not written here
        self.left = 0  # tokens of the prompt that are still to be fed
        self._full = 0  # tokens that the full layers hold, if that is more

    def resume(self, prompt: Sequence[int]) -> int:
        """Keep what the cache shares with `prompt`; return where to feed
        from. At least the last token is fed: its logits are needed."""
        held = max(self.cache.length, self._full)
        shared = min(common_prefix(prompt, self.tokens[:held]),
                     len(prompt) - 1)
        start = self.cache.rollback(shared)
        self.tokens, self._full = list(prompt), shared
        return start

    def __repr__(self) -> str:
        return f"PrefixCache({len(self.tokens):,} tokens)"

    def write(self, prompt: Sequence[int],
              options: SamplingOptions | None = None, **changes: Any
              ) -> Iterator[int | None]:
        """`generate` after `prompt`, feeding only what must be fed; with
        its pauses, after which `self.left` tokens are still to be fed."""
        start = self.resume(prompt)
        self.left = len(prompt) - start
        for token in generate(self.model, prompt[start:], options,
                              cache=self.cache, pauses=True, draft=self.draft,
                              before=prompt[:start], **changes):
            left = len(prompt) - self.cache.length if token is None else 0
            self.fed, self.left = self.fed + self.left - left, left
            if token is not None:
                self.tokens.append(token)
            yield token


# --- What belongs to one conversation ----------------------------------------

class Session:
    """What one conversation remembers.

    prefix: its cache, and the tokens in it. turn: its last `Turn`, or None.
    seed: of the seeds of its rounds; None: they come from torch's numbers.
    draft: who guesses tokens, as for `generate`.
    """

    def __init__(self, model: GptOss, slack: int = SLACK,
                 seed: int | None = None, draft: Any = None) -> None:
        self.prefix = PrefixCache(model, slack, draft)
        self.turn: Any = None
        self._random = None if seed is None else random.Random(seed)

    def __repr__(self) -> str:
        return f"Session({len(self.prefix.tokens):,} tokens)"

    def next_seed(self) -> int:
        """Of the next round. Of several processes all draw one, so that
        torch's numbers stay alike."""
        return (int(torch.randint(2 ** 48, ()).item())
                if self._random is None else self._random.getrandbits(48))


__all__ = [
    "PrefixCache",
    "SLACK",
    "Session",
    "common_prefix",
]
