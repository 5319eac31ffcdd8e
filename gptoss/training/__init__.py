"""Part training of the book: 19 names, loaded when first asked for

Generated from the front matter of book/training/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.training.conversations import lesson_stream as lesson_stream
    from gptoss.training.exams import examine as examine
    from gptoss.training.exams import report_card as report_card
    from gptoss.training.kits import KITS as KITS
    from gptoss.training.kits import Kit as Kit
    from gptoss.training.leaks import LeakError as LeakError
    from gptoss.training.leaks import without_leaks as without_leaks
    from gptoss.training.lessons import Exchange as Exchange
    from gptoss.training.lessons import Lesson as Lesson
    from gptoss.training.planting import plant_copying as plant_copying
    from gptoss.training.pocket import make_pocket as make_pocket
    from gptoss.training.rows import batches as batches
    from gptoss.training.rows import lesson_row as lesson_row
    from gptoss.training.stories import read_story as read_story
    from gptoss.training.stories import story_stream as story_stream
    from gptoss.training.stories import tell as tell
    from gptoss.training.train import Recipe as Recipe
    from gptoss.training.train import put_on_grid as put_on_grid
    from gptoss.training.train import weighted_loss as weighted_loss

_HOME = {
    "Exchange": "lessons",
    "KITS": "kits",
    "Kit": "kits",
    "LeakError": "leaks",
    "Lesson": "lessons",
    "Recipe": "train",
    "batches": "rows",
    "examine": "exams",
    "lesson_row": "rows",
    "lesson_stream": "conversations",
    "make_pocket": "pocket",
    "plant_copying": "planting",
    "put_on_grid": "train",
    "read_story": "stories",
    "report_card": "exams",
    "story_stream": "stories",
    "tell": "stories",
    "weighted_loss": "train",
    "without_leaks": "leaks",
}
_MODULES = (
    "stories",
    "lessons",
    "kits",
    "conversations",
    "leaks",
    "rows",
    "planting",
    "train",
    "exams",
    "pocket",
)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
    "Exchange",
    "KITS",
    "Kit",
    "LeakError",
    "Lesson",
    "Recipe",
    "batches",
    "examine",
    "lesson_row",
    "lesson_stream",
    "make_pocket",
    "plant_copying",
    "put_on_grid",
    "read_story",
    "report_card",
    "story_stream",
    "tell",
    "weighted_loss",
    "without_leaks",
]
