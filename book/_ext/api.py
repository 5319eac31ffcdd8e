"""What is on the page was run

Generated from book/cli/freezing.py; edit the chapter, not this file.
"""

import ast
import re

from chapters import Module, bound_names, public_names

# --- A page for every name ---------------------------------------------------

def _first_paragraph(node: ast.AST) -> str:
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    parts = re.split(r"(``?[^`]+``?)", text)
    return "".join(part if n % 2 else re.sub(r"([\\*_<$\[\]{}])", r"\\\1",
                                             part)
                   for n, part in enumerate(parts))


def _call(name: str, node: ast.FunctionDef) -> str:
    if any(ast.unparse(mark) == "property" for mark in node.decorator_list):
        return name
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    names = [arg.arg for arg in every if arg.arg not in ("self", "cls")]
    return f"{name}({', '.join(names)})"


def _anchor(heading: str) -> str:
    """The fragment that MyST gives a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return plain.strip().replace(" ", "-")


def _entry(node: ast.stmt, link: str) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        shown = (node.name if isinstance(node, ast.ClassDef)
                 else _call(node.name, node))
        lines = [f"- [`{shown}`]({link}) {_first_paragraph(node)}"]
        for inner in getattr(node, "body", []):
            if (isinstance(inner, ast.FunctionDef)
                    and isinstance(node, ast.ClassDef)
                    and not inner.name.startswith("_")
                    and ast.get_docstring(inner)):
                lines.append(f"  - `.{_call(inner.name, inner)}` "
                             f"{_first_paragraph(inner)}")
        return lines
    names = [name for name in bound_names(node) if not name.startswith("_")]
    value = ast.unparse(node.value) if getattr(node, "value", None) else ""
    shown = f" `{value}`" if len(names) == 1 and 0 < len(value) <= 40 else ""
    return [f"- [`{name}`]({link}) constant{shown}" for name in names]


def api_page(modules: list[Module]) -> str:
    """Markdown: all public names of all modules, in the book's order."""
    lines = ["# Every name in the package", "",
             "Made by `make tangle` from the syntax trees of the chapters: "
             "what a module", "exports, its first words, and a link to the "
             "section that derives it.", ""]
    for module in modules:
        page = module.chapter.removesuffix(".py") + ".ipynb"
        lines += [f"## `{module.file}`", "",
                  f"From [{module.title}]({page}).", ""]
        for heading, source in module.cells:
            if "." in module.name or module.name == "__main__":
                continue
            link = f"{page}#{_anchor(heading)}"
            for node in ast.parse(source).body:
                names = public_names(ast.Module([node], []), module.name)
                if names and module.name == "__init__":
                    lines += [f"- [`{name}`]({link})" for name in names]
                elif names:
                    lines += _entry(node, link)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


__all__ = [
    "api_page",
]
