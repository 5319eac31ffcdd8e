"""How does a program mark a story?

Generated from book/training/stories.py; edit the chapter, not this file.
"""

import math
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

# --- Which words can a story be about? ---------------------------------------

GIRLS = ("Mira", "Lily", "Nora", "Anna", "Ruby", "Zoe", "Ella", "Maya",
         "Tess", "Wren")
BOYS = ("Tom", "Max", "Leo", "Sam", "Finn", "Hugo", "Otto", "Ben", "Jack",
        "Milo")
WORDS = {
    "hero": GIRLS + BOYS,
    "friend": ("Pip", "Bruno", "Daisy", "Oscar", "Hazel", "Toby", "Clara",
               "Felix", "Ivy", "Rufus", "Nina", "Walter"),
    "kind": ("fox", "rabbit", "mouse", "cat", "duck", "hedgehog", "kitten",
             "lamb"),
    "fkind": ("bear", "goose", "dog", "frog", "squirrel", "mole", "badger",
              "horse"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "purple",
               "pink", "brown", "silver", "golden", "grey"),
    "thing": ("kite", "ball", "hat", "boat", "drum", "lamp", "scarf",
              "book", "bell", "shell", "cup", "basket", "key", "box",
              "flute", "button"),
    "home": ("the forest", "the small house", "the hollow tree", "the valley",
             "the quiet village", "the cave", "the old barn",
             "the garden", "the tower", "the cottage"),
    "place": ("the river", "the lake", "the beach", "the market",
              "the meadow", "the bridge", "the hill", "the park",
              "the mill", "the pond", "the harbour", "the orchard"),
    # words that may differ from one sentence to the next
    "_day": ("morning", "day", "afternoon", "evening"),
    "_spot": ("bench", "bush", "stone", "wall", "log", "gate", "fence",
              "wagon", "oak", "stairs"),
    "_size": ("little", "small", "young", "tiny"),
    "_loud": ("said", "cried", "called", "whispered"),
}
CAST_SLOTS = tuple(slot for slot in WORDS if not slot.startswith("_"))
PRONOUNS = {name: ("she", "her") for name in GIRLS}
PRONOUNS |= {name: ("he", "his") for name in BOYS}


# --- What happens, and in which order? ---------------------------------------

BEATS = (
    ("opening", (
        "Once upon a time there was a {_size} {kind} named {hero}.",
        "Once upon a time, a {_size} {kind} called {hero} woke up early.",
        "Once upon a time there lived a {_size} {kind} by the name of "
        "{hero}.",
        "There once was a {_size} {kind} whose name was {hero}.",
        "This is the story of {hero}, a {_size} {kind}.",
        "Long ago there was a {_size} {kind} named {hero}.")),
    ("home", (
        "{hero} lived in {home}.",
        "{She} lived in {home} with {her} mother.",
        "{Her} home was {home}.",
        "{hero} and {her} family lived in {home}.",
        "It was warm in {home}, where {hero} lived.")),
    ("love", (
        "More than anything, {she} loved {her} {colour} {thing}.",
        "{hero} had a {colour} {thing} and took it everywhere.",
        "For {her} birthday {she} got a {colour} {thing}.",
        "{Her} father gave {hero} a {colour} {thing}.",
        "The best thing {she} had was a {colour} {thing}.")),
    ("journey", (
        "One {_day} {she} went to {place} with the {thing}.",
        "One {_day} {hero} took the {colour} {thing} to {place}.",
        "\"Let us go to {place},\" {she} {_loud} one {_day}.",
        "The next {_day} {hero} walked all the way to {place}.",
        "One {_day} the sun was shining, and {hero} ran to {place}.")),
    ("play", (
        "",
        "There {she} played with the {thing} until {she} was tired.",
        "{hero} the {kind} sang a song and danced with the {thing}.",
        "What a lovely {_day} it was at {place}!",
        "{She} showed the {thing} to the birds.")),
    ("loss", (
        "But a strong wind came, and the {colour} {thing} was gone.",
        "Then {hero} fell asleep. When {she} woke up, "
        "the {thing} was gone.",
        "{She} put the {thing} down for a moment, and then "
        "{she} could not find it.",
        "Suddenly the {kind} saw that the {colour} {thing} was missing.",
        "But on the way from {home} {she} lost the {thing}.")),
    ("sorrow", (
        "",
        "The {_size} {kind} sat down and cried.",
        "\"Oh no!\" {_loud} {hero}. \"Where is my {thing}?\"",
        "{She} was very sad, for there was no other {thing} like it.",
        "{hero} looked all over {place}, but it was not there.")),
    ("friend", (
        "A {fkind} named {friend} came by.",
        "Just then a {fkind} came along. It was {friend}.",
        "{friend} the {fkind} heard {whom}.",
        "Near the {_spot} {she} met a {fkind} called {friend}.",
        "Then {she} saw {friend}, a {fkind} with kind eyes.")),
    ("question", (
        "\"What is wrong, little {kind}?\" asked {friend}.",
        "\"Why are you sad, {hero}?\" asked {friend}.",
        "\"Can I help you?\" asked the {fkind}.",
        "\"What are you looking for?\" asked {friend}.")),
    ("answer", (
        "\"I came from {home} and lost my {colour} {thing},\" "
        "said {hero}.",
        "\"My {thing} is gone,\" said the {kind}. \"It is {colour}.\"",
        "{hero} told {friend} about the {colour} {thing}.",
        "\"Have you seen a {colour} {thing}?\" asked {hero}.")),
    ("offer", (
        "\"Do not worry,\" said {friend}. \"I will help you.\"",
        "\"Let us look for it at {place} together,\" said {friend}.",
        "{friend} thought for a while. \"I know what to do,\" "
        "said the {fkind}.",
        "\"We will find it, {hero},\" said the {fkind}.")),
    ("search", (
        "So the {kind} and the {fkind} looked under a {_spot} at {place}.",
        "They searched all around {place}.",
        "{friend} looked on one side of {place}, and {hero} on "
        "the other.",
        "The {kind} and the {fkind} asked everybody at {place}.")),
    ("finding", (
        "At last the {fkind} saw something {colour} at {place}. "
        "It was the {thing}!",
        "And there, behind the {_spot}, was the {colour} {thing}!",
        "Then the {kind} shouted, \"Here is my {thing}!\" It was under "
        "the {_spot}.",
        "In the end {friend} found the {colour} {thing} near the "
        "{_spot} at {place}.")),
    ("thanks", (
        "\"Thank you, {friend}!\" said {hero}, and the {fkind} smiled.",
        "{hero} hugged {friend} and thanked the {fkind}.",
        "\"You are a good friend,\" said {hero} to the {fkind}.",
        "\"Thank you, {friend},\" said the {kind} to the {fkind}.")),
    ("return", (
        "That {_day} the {kind} carried the {colour} {thing} from {place} "
        "back to {home}.",
        "{hero} left {place} and took the {thing} home to {home}.",
        "Then they went to {home} and played with the {colour} {thing}.",
        "Soon the {kind} was back in {home} with the {colour} {thing}.")),
    ("ending", (
        "From that day on, {hero} and {friend} were best friends.",
        "{hero} the {kind} never lost the {thing} again.",
        "And {hero} and {friend} lived happily ever after.",
        "The {kind} and the {fkind} were friends for ever.",
        "That night {hero} dreamed of {friend} and the {colour} {thing}.")),
)


# --- How is a story told, and which casts are kept back? ---------------------

def draw_cast(rng: random.Random) -> dict[str, str]:
    """Draw who and what a story is about: one word for each fixed slot.

    Hero and friend differ, and so do their kinds: their lists have no word
    in common.
    """
    return {slot: rng.choice(WORDS[slot]) for slot in CAST_SLOTS}


def with_pronouns(cast: dict[str, str]) -> dict[str, str]:
    """Add the slots that follow from the hero: she, her, She, Her …"""
    she, her = PRONOUNS[cast["hero"]]
    whom = "her" if she == "she" else "him"
    return cast | {"she": she, "her": her, "She": she.title(),
                   "Her": her.title(), "whom": whom}


def shelf(key: str) -> str:
    """Where a question is kept, by a checksum of what it is about: nine in
    ten for training (""); of the tenth, two thirds for the "exam" and a
    third for the "milestone"s on the way. No key, no shelf."""
    n = zlib.crc32(key.encode())
    return ("" if not key or n % 10
            else ("milestone", "exam", "exam")[n // 10 % 3])


def cast_key(cast: dict[str, str]) -> str:
    """What makes a cast new: hero, colour and thing."""
    return f"cast {cast['hero']} {cast['colour']} {cast['thing']}"


def held_out(cast: dict[str, str]) -> bool:
    """Whether a cast is kept from training: one in ten, by a checksum of
    hero, colour and thing, so that the pair was never seen together."""
    return bool(shelf(cast_key(cast)))


SLOT = re.compile(r"\{(\w+)\}")


def tell(rng: random.Random, cast: dict[str, str] | None = None,
         beats: int | None = None) -> str:
    """Tell a story (or its first `beats` beats) about `cast`."""
    words = with_pronouns(cast or draw_cast(rng))

    def fill(match: re.Match) -> str:
        slot = match[1]
        return words[slot] if slot in words else rng.choice(WORDS[slot])

    told = (SLOT.sub(fill, rng.choice(lines)) for _, lines in BEATS[:beats])
    return " ".join(line for line in told if line)


# --- How low can the loss of a story go? -------------------------------------

def story_entropy() -> float:
    """Nats of choice in one story of `tell`: the floor of any loss.

    Equation (train-floor).
    """
    size = {slot: len(words) for slot, words in WORDS.items()}
    nats = sum(math.log(size[slot]) for slot in CAST_SLOTS)
    for _, lines in BEATS:
        free = [slot for line in lines for slot in SLOT.findall(line)
                if slot.startswith("_")]
        nats += math.log(len(lines))
        nats += sum(math.log(size[slot]) for slot in free) / len(lines)
    return nats


# --- How is a story read? ----------------------------------------------------

def line_pattern(line: str, cast: dict[str, str]) -> re.Pattern:
    """The regular expression of a template under what is known so far.

    A fixed slot that `cast` knows is that word and no other; one that it
    doesn't know is a named group; a free slot is any of its words.
    """
    known = with_pronouns(cast) if "hero" in cast else cast
    seen, parts, end = set(), [], 0
    for match in SLOT.finditer(line):
        slot = match[1]
        parts.append(re.escape(line[end:match.start()]))
        end = match.end()
        if slot in known:
            parts.append(re.escape(known[slot]))
        elif slot in seen:
            parts.append(f"(?P={slot})")
        elif slot in WORDS and not slot.startswith("_"):
            parts.append(f"(?P<{slot}>{'|'.join(WORDS[slot])})")
            seen.add(slot)
        else:
            parts.append(f"(?:{'|'.join(WORDS[slot])})")
    return re.compile("".join(parts) + re.escape(line[end:]))


@dataclass
class Reading:
    """What `read_story` found.

    Attributes:
        coherent: the whole text is one story with one cast.
        cast: the words bound so far.
        beat: name of the first beat that could not be read ("" if none).
        rest: the text from there on, at most 60 characters of it.
    """

    coherent: bool = False
    cast: dict[str, str] = field(default_factory=dict)
    beat: str = ""
    rest: str = ""


def read_story(text: str) -> Reading:
    """Read a story against the plot; never fails, reports how far it got.

    A text is coherent if and only if `tell` could have told it: every
    beat in order, and hero, kind, friend, colour, thing, home and place
    the same wherever they are mentioned.
    """
    text, reached = text.strip(), 0
    furthest = Reading(beat="opening", rest=text)

    def follow(at: int, beat: int, cast: dict[str, str]) -> Reading | None:
        if beat == len(BEATS):
            return Reading(True, cast) if at >= len(text) else None
        nonlocal reached, furthest
        name, lines = BEATS[beat]
        if at >= reached:
            reached = at
            furthest = Reading(False, cast, name, text[at:at + 60])
        for line in lines:
            found = line_pattern(line, cast).match(text, at)
            if not found:
                continue
            bound = cast | found.groupdict()
            step = found.end() + (text[found.end():found.end() + 1] == " ")
            done = follow(step if line else at, beat + 1, bound)
            if done:
                return done
        return None

    return follow(0, 0, {}) or furthest


def story_stream(seed: int, hold_out: bool = False) -> Iterator[str]:
    """Endless stories; of held-out casts only, or of all the others."""
    rng = random.Random(seed)
    while True:
        cast = draw_cast(rng)
        if held_out(cast) == hold_out:
            yield tell(rng, cast)


__all__ = [
    "BEATS",
    "BOYS",
    "CAST_SLOTS",
    "GIRLS",
    "PRONOUNS",
    "Reading",
    "SLOT",
    "WORDS",
    "cast_key",
    "draw_cast",
    "held_out",
    "line_pattern",
    "read_story",
    "shelf",
    "story_entropy",
    "story_stream",
    "tell",
    "with_pronouns",
]
