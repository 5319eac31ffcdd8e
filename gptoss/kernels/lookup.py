"""Where did these words stand before?

Generated from book/kernels/lookup.py; edit the chapter, not this file.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptoss.text.sampling import reject

# --- Code --------------------------------------------------------------------

Proposal = tuple[Sequence[int], Tensor | None]

# tokens that agree -> how likely a guess is right, before any was seen
BELIEVED = {8: 0.85, 4: 0.7, 2: 0.5, 1: 0.3}
STRENGTH = 4  # guesses seen that this belief is worth
UNSEEN, FORESEEN, SURPRISE = range(3)  # what the lookup made of a token


class Lookup:
    """Guesses what followed the last tokens where they stood before.

    lengths: of the n-grams that are looked for, each >= 1, in this order.
    most: guesses at once, >= 1. GenerateError for others.
    chances: of the guesses last proposed, how likely each is right if those
    before it are.
    met: of each token of the text, UNSEEN, FORESEEN or SURPRISE.
    """

    reads = 0

    def __init__(self, lengths: Sequence[int] = (8, 4, 2, 1), most: int = 8
                 ) -> None:
        for name, values in (("lengths", lengths), ("most", [most])):
            if not values or any(type(n) is not int or n < 1 for n in values):
                reject(name, "integers >= 1", values)
        self.lengths, self.most = tuple(lengths), most
        self._text: list[int] = []
        self.begin(())

    def begin(self, text: Sequence[int]) -> None:
        held = len(self._text)
        if not held or list(text[:held]) != self._text:  # not the same text
            held, self._text = 0, []
            self.met: list[int] = []
            self._after: dict[tuple[int, ...], int] = {}  # n-gram -> place
        self.chances: list[float] = []
        self._seen: dict[tuple[int, bool, int], tuple[int, int]] = {}
        self._own = len(text)  # from here on it is being written
        self.add(text[held:])

    def _ends(self) -> list[tuple[int, ...]]:
        """The n-grams at the end of the text."""
        return [tuple(self._text[-n:]) for n in self.lengths
                if len(self._text) >= n]

    def _known(self, ends: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The first of them that stood before."""
        return next((end for end in ends if end in self._after), None)

    def _kind(self, at: int, agree: int) -> tuple[int, bool, int]:
        """By what guesses are counted."""
        least = max(n for n in BELIEVED if n <= agree)
        return least, at >= self._own, self.met[at]

    def _chance(self, kind: tuple[int, bool, int]) -> float:
        right, seen = self._seen.get(kind, (0, 0))
        believed = BELIEVED[kind[0]] * (0.5 if kind[2] == SURPRISE else 1)
        return (right + STRENGTH * believed) / (seen + STRENGTH)

    def add(self, tokens: Sequence[int]) -> None:
        text, after = self._text, self._after
        for token in tokens:
            ends, met = self._ends(), UNSEEN
            known = self._known(ends)
            if known:
                at = after[known]
                met = FORESEEN if text[at] == token else SURPRISE
                # what was given says little of what is written
                if len(text) >= self._own:
                    kind = self._kind(at, len(known))
                    right, seen = self._seen.get(kind, (0, 0))
                    self._seen[kind] = right + (met == FORESEEN), seen + 1
            after.update(dict.fromkeys(ends, len(text)))
            text.append(token)
            self.met.append(met)

    def propose(self, most: int, draws: Any, generator: Any) -> Proposal:
        self.chances = []
        known = self._known(self._ends())
        if known is None:
            return [], None
        at = self._after[known]
        period = len(self._text) - at  # a text that ends goes round
        places = [at + n % period for n in range(most)]
        self.chances = [self._chance(self._kind(place, len(known) + n))
                        for n, place in enumerate(places)]
        return [self._text[place] for place in places], None


__all__ = [
    "BELIEVED",
    "FORESEEN",
    "Lookup",
    "Proposal",
    "STRENGTH",
    "SURPRISE",
    "UNSEEN",
]
