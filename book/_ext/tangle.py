"""What is on the page was run

Generated from book/cli/freezing.py; edit the chapter, not this file.
"""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path
from textwrap import indent

from api import api_page
from chapters import (
    OWN,
    Module,
    TangleError,
    import_block,
    module_text,
    public_names,
    read_chapter,
)
from freeze import run_freeze

# --- Writing and checking ----------------------------------------------------

def listed(root: Path) -> list[Path]:
    """The chapters that _toc.yml names, in its order."""
    contents = root / "_toc.yml"
    names = re.findall(r"file: (book/\S+)", contents.read_text("utf-8"))
    return [path for path in (root / f"{name}.py" for name in names)
            if path.exists()]


_PART = '''\
"""Part {part} of the book: {count} names, loaded when first asked for

Generated from the front matter of book/{part}/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
{typed}

_HOME = {{
{home}
}}
_MODULES = {modules}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{{__name__}}.{{_HOME[name]}}"), name)
    if name in _MODULES:
        return import_module(f"{{__name__}}.{{name}}")
    raise AttributeError(f"module {{__name__!r}} has no attribute {{name!r}}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
{names}
]
'''


def part_text(part: str, modules: list[Module]) -> str:
    """The __init__.py of a part that consists of `modules`.

    Raises TangleError for a public name that no module of its chapter binds.
    """
    homes, stems = {}, [module.name.rpartition("/")[2] for module in modules]
    for module in modules:
        tree = ast.parse(module_text(module))
        for name in public_names(tree, module.name):
            if name in module.public:
                homes[name] = module.name.rpartition("/")[2]
    asked = {name: module.chapter for module in modules
             for name in module.public}
    for name, chapter in asked.items():
        if name not in homes or name in stems:
            raise TangleError(f"{chapter}: public name {name!r} is "
                              + ("a module's too" if name in stems else
                                 "bound in none of its modules"))
    names = sorted(homes)
    typed = import_block([ast.ImportFrom(
        f"{OWN}.{part}.{homes[name]}", [ast.alias(name, name)], 0)
        for name in names], width=75)  # they stand under an `if`
    return _PART.format(
        part=part, count=len(names), typed=indent(typed or "pass", "    "),
        home="\n".join(f'    "{name}": "{homes[name]}",' for name in names),
        modules="(" + "".join(f'\n    "{stem}",' for stem in stems) + "\n)",
        names="\n".join(f'    "{name}",' for name in names))


def tangle(chapters: list[Path], whole: bool = False) -> dict[str, str]:
    """Path from the project's root -> text, for all exports of `chapters`.

    With `whole`, the parts' __init__.py and the reference page of all these
    chapters are among them.
    Raises TangleError if two chapters export to the same module, or for
    public names of a chapter that lies in no folder.
    """
    modules: dict[str, Module] = {}
    for chapter in chapters:
        for module in read_chapter(chapter).values():
            if module.file in modules:
                raise TangleError(f"module {module.name}: exported by both "
                                  f"{modules[module.file].chapter} and "
                                  f"{module.chapter}")
            if module.public and "/" not in module.chapter:
                raise TangleError(f"{module.chapter}: public names, and no "
                                  "part of the book to hand them on")
            modules[module.file] = module
    texts = {file: module_text(module) for file, module in modules.items()}
    if whole:
        parts: dict[str, list[Module]] = {}
        for module in modules.values():
            if (module.folder == OWN and "/" in module.name
                    and "." not in module.name):
                parts.setdefault(module.name.rpartition("/")[0],
                                 []).append(module)
        for part, members in parts.items():
            texts.setdefault(f"{OWN}/{part}/__init__.py",
                             part_text(part, members))
        texts["book/api.md"] = api_page(list(modules.values()))
    return texts


def left_behind(texts: dict[str, str], root: Path) -> list[str]:
    """Generated files of the package that no chapter makes any more."""
    there = (path for path in (root / OWN).rglob("*")
             if path.suffix in (".py", ".pyi", ".h", ".cpp"))
    return sorted(name for name, path in (
        (path.relative_to(root).as_posix(), path) for path in there)
        if name not in texts
        and "Generated from " in path.read_text("utf-8")[:400])


def run_tangle(texts: dict[str, str], root: Path, check: bool,
               whole: bool = False) -> int:
    """Write what differs, or with `check` print a diff; the exit code.

    With `whole`, `texts` is all there should be: other generated files are
    removed, or with `check` reported.
    """
    code = 0
    for name, text in texts.items():
        file = root / name
        there = file.read_text("utf-8") if file.exists() else ""
        if there == text:
            continue
        if check:
            code = 1
            print("".join(difflib.unified_diff(
                there.splitlines(True), text.splitlines(True), name,
                f"{name}, from its chapter")), end="")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
            print(f"wrote {name}")
    for name in left_behind(texts, root) if whole else ():
        print(f"{'no chapter makes' if check else 'removed'} {name}")
        if check:
            code = 1
        else:
            (root / name).unlink()
    return code


# --- One command -------------------------------------------------------------

def main(arguments: list[str] | None = None) -> int:
    """Generate the package from the chapters of book/, or execute them."""
    parser = argparse.ArgumentParser(prog="tangle", description=main.__doc__)
    parser.add_argument("chapters", nargs="*", type=Path,
                        help="default: all of book/")
    parser.add_argument("--check", action="store_true",
                        help="write nothing, exit 1 if anything differs")
    parser.add_argument("--freeze", action="store_true",
                        help="execute chapters that changed into .ipynb")
    parser.add_argument("--force", action="store_true",
                        help="freeze also what did not change")
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N",
                        help="chapters to execute at the same time")
    options = parser.parse_args(arguments)
    try:
        chapters = options.chapters or listed(Path())
        if options.freeze:
            return run_freeze(chapters, options.check, options.force,
                              options.jobs)
        whole = not options.chapters
        return run_tangle(tangle(chapters, whole), Path(), options.check,
                          whole)
    except (TangleError, OSError) as error:
        print(f"tangle: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__" and Path(sys.argv[0]).stem == "tangle":
    raise SystemExit(main())


__all__ = [
    "left_behind",
    "listed",
    "main",
    "part_text",
    "run_tangle",
    "tangle",
]
