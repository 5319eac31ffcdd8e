"""What is on the page was run

Generated from book/cli/freezing.py; edit the chapter, not this file.
"""

import ast
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from chapters import FENCE, bound_names, read_chapter

# --- The blank page ----------------------------------------------------------

_PAGE = "{prose}\n\n```{kind}\n{text}\n```"


def first_lines(source: str) -> str:
    """What a cell defines: functions and classes without their bodies, and
    the names of its constants; nothing that begins with an underscore."""
    found = []
    for node in ast.parse(source).body:
        names = [name for name in bound_names(node)
                 if not name.startswith("_")]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and names:
            found.append(_without_body(node, ""))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and names:
            found.append(f"{', '.join(names)} = ...")
    return "\n".join(found)


def _without_body(node: ast.stmt, indent: str) -> str:
    """A class keeps its fields and the heads of its methods."""
    if isinstance(node, ast.AnnAssign):
        return indent + ast.unparse(node)
    inner = [part for part in node.body if isinstance(node, ast.ClassDef)
             and isinstance(part, ast.FunctionDef | ast.AnnAssign)
             and not re.match("_(?!_)", bound_names(part)[0])]
    bare = type(node)(**{**vars(node), "body": [ast.Expr(ast.Constant(...))]})
    head = indent + ast.unparse(bare).replace("\n    ...", "").replace(
        "\n", f"\n{indent}")
    if not inner:
        return f"{head} ..."
    return "\n".join([head, *(_without_body(part, indent + "    ")
                              for part in inner)])


def _printed(cell: nbformat.NotebookNode) -> str:
    """The text under a cell; a figure says its own text in the source."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        shown = "" if "image/png" in data else data.get("text/plain", "")
        texts.append(output.get("text", "") or shown)
    return "\n".join(text.rstrip("\n") for text in texts if text)


def blank(path: Path) -> str:
    """A chapter as Markdown, without its exported cells.

    The other cells are shown, each with what it printed when the notebook
    beside the chapter was frozen, if there is one.
    """
    files = {source: module.file for module in read_chapter(path).values()
             for _, source in module.cells}
    frozen, printed = path.with_suffix(".ipynb"), {}
    if frozen.exists():
        printed = {cell.source: _printed(cell)
                   for cell in nbformat.read(frozen, 4).cells}
    page = []
    for cell in jupytext.read(path).cells:
        source, prose = cell.source, cell.cell_type == "markdown"
        code = "\n\n".join(FENCE.findall(source)) if prose else source
        out = any(tag.split(":")[0] == "export"
                  for tag in cell.metadata.get("tags", []))
        if out:
            text = "" if prose else first_lines(source)
            if prose:
                page.append(FENCE.sub("", source).strip())
            note = f"To be written: a part of `{files[code]}`."
            page.append(_PAGE.format(prose=note, kind="python", text=text)
                        if text else note)
        elif prose:
            page.append(source)
        else:
            page.append(f"```python\n{source}\n```")
            if printed.get(source):
                page.append(f"```text\n{printed[source]}\n```")
    return "\n\n".join(text for text in page if text) + "\n"


if __name__ == "__main__" and Path(sys.argv[0]).stem == "blank":
    asked = [Path(name) for name in sys.argv[1:]]
    if not asked or not all(path.is_file() for path in asked):
        sys.exit("usage: python book/_ext/blank.py book/PART/CHAPTER.py ...")
    print("\n".join(map(blank, asked)), end="")


__all__ = [
    "blank",
    "first_lines",
]
