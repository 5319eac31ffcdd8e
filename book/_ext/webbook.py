"""What the web book adds to Jupyter Book: a Sphinx extension.

- A figure without alternative text gets the paragraph that says what to see.
- An exported cell names its module and links to the reference page.
- `{run-times}` lists what was checked in every chapter, and how long it took.
- A notebook page has a plain link to Google Colab beside its downloads.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

COLAB = "https://colab.research.google.com"
LONGEST = 300  # characters of an alternative text
STORED = "book/status.json"  # chapter -> seconds, written by `make status`


# --- Figures -----------------------------------------------------------------

def words(node: nodes.Node) -> str:
    return " ".join(node.astext().split())


def cut(text: str) -> str:
    """No longer than a screen reader should say it, cut at a sentence."""
    if len(text) <= LONGEST:
        return text
    ends = [found.end() for found in re.finditer(r"[.!?](?= )", text)
            if found.end() <= LONGEST]
    return text[:ends[-1]] if ends else text[:LONGEST].rsplit(" ", 1)[0]


def comment(cell: nodes.Node) -> str:
    """The comment `# Figure: …` that the cell begins with, or ""."""
    source = next(cell.findall(nodes.literal_block), None)
    text = source.astext() if source else ""
    found = re.match(r"# Figure: (.*(?:\n#.*)*)", text)
    text = " ".join(re.sub(r"\n# ?", " ", found[1]).split()) if found else ""
    return text[:1].upper() + text[1:]


def caption(cell: nodes.Node) -> str:
    """What the prose around a cell says about its figure: the paragraph
    after it, or the one before if only that speaks of it."""
    place = cell.parent.index(cell)
    after = [words(node) for node in cell.parent[place + 1:place + 2]
             if isinstance(node, nodes.paragraph)
             and not node.astext().startswith("(")]
    before = [words(node) for node in cell.parent[:place][::-1]
              if isinstance(node, nodes.paragraph)]
    says = re.compile(r"What to see|(On the )?[Ll]eft|Right|Solid|Above")
    near = [text for text in after + before[:1] if says.match(text)]
    for text in near + [text for text in before[:1] if text.endswith(":")] + (
            after + before):
        return re.sub(r"^What to see: (\w)",
                      lambda found: found[1].upper(), text)
    return ""


class AlternativeText(SphinxPostTransform):
    """Give every figure that a cell printed a text that says what it shows.

    A comment `# Figure: …` at the top of the cell comes first.
    """

    default_priority = 20  # after myst-nb has chosen the format

    def run(self, **kwargs: object) -> None:
        seen: dict[str, int] = {}
        for image in self.document.findall(nodes.image):
            if image.get("alt"):
                continue
            cell = image.parent
            while cell and cell.get("nb_element") != "cell_code":
                cell = cell.parent
            text = cut(comment(cell) or caption(cell)) if cell else ""
            if not text:
                continue
            seen[text] = seen.get(text, 0) + 1
            image["alt"] = text if seen[text] == 1 else (
                f"{text} (figure {seen[text]})")


# --- Exported cells ----------------------------------------------------------

class ExportLabels(SphinxPostTransform):
    """Above an exported cell: the file that it goes to."""

    default_priority = 21

    def run(self, **kwargs: object) -> None:
        own = self.env.metadata[self.env.docname].get("gptoss") or {}
        own = own if isinstance(own, dict) else json.loads(own)
        for cell in list(self.document.findall(nodes.container)):
            tags = [name[4:] for name in cell.get("classes", [])
                    if name.startswith("tag_export")]
            if not tags:
                continue
            name = tags[0].partition(":")[2] or own.get("module", "")
            if "folder" not in own and "/" not in name:
                part = self.env.docname.split("/")[1:-1]
                name = "/".join([*part, name])
            file = (own.get("folder", "gptoss") + "/"
                    + name.removeprefix("/") + ("" if "." in name else ".py"))
            page = self.app.builder.get_relative_uri(self.env.docname,
                                                     "book/api")
            link = nodes.reference(
                "", file, internal=True, classes=["export-label"],
                refuri=f"{page}#{nodes.make_id(file)}")
            cell.insert(0, nodes.paragraph("", "", link,
                                           classes=["export-line"]))


# --- Status ------------------------------------------------------------------

def seconds_of_run(report: Path) -> dict[str, float]:
    """Chapter -> seconds, from the JUnit report of a run of nbval."""
    times: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname", "").removesuffix(".ipynb")
        name = re.split(r"[./]", name)[-1]
        times[name] = times.get(name, 0.0) + float(case.get("time", 0))
    return {name: round(times[name], 1) for name in sorted(times)}


class RunTimes(SphinxDirective):
    """A table: every chapter, what it holds, how long its cells ran.

    The times are those of the last `make notebooks` here, or else the ones
    that were committed.
    """

    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir)
        report, kept = root / "_build" / "notebooks.xml", root / STORED
        if report.exists():
            seconds, where = seconds_of_run(report), (
                "The run of all notebooks that preceded this page.")
        else:
            seconds = json.loads(kept.read_text("utf-8"))
            where = ("The run of all notebooks when these times were stored; "
                     "make notebooks measures anew." if seconds else
                     "No times are stored; make notebooks measures them.")
        rows = [self.row(path, seconds)
                for path in (root / f"{name}.ipynb" for name in re.findall(
                    r"file: (book/\S+)",
                    (root / "_toc.yml").read_text("utf-8")))
                if path.exists()]
        total = ("all", *(sum(column) for column in zip(
            *(row[1:-1] for row in rows), strict=True)),
            f"{sum(float(row[-1] or 0) for row in rows):.1f}")
        head = ("chapter", "code cells", "exported lines", "figures",
                "exercises", "seconds")
        return [table(head, [*rows, total]), nodes.paragraph("", where)]

    def row(self, path: Path, seconds: dict[str, float]) -> tuple:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        lines = sum(len("".join(cell["source"]).splitlines())
                    for cell in code
                    if any(tag.startswith("export") for tag
                           in cell["metadata"].get("tags", [])))
        figures = sum("image/png" in output.get("data", {})
                      for cell in code for output in cell["outputs"])
        prose = "\n".join("".join(cell["source"]) for cell in cells
                          if cell["cell_type"] == "markdown")
        exercises = re.findall(r"^(?:#+ |\*\*)Exercise \d", prose, re.M)
        name = path.relative_to(self.env.srcdir).with_suffix("").as_posix()
        return (name.removeprefix("book/"), len(code), lines, figures,
                len(exercises),
                f"{seconds[path.stem]:.1f}" if path.stem in seconds else "")


def table(head: tuple, rows: list[tuple]) -> nodes.table:
    """A table whose first column names chapters."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]

    def entry(value: object, first: bool) -> nodes.entry:
        text = f"{value:,}" if isinstance(value, int) else str(value)
        made = nodes.paragraph("", text)
        if first and value not in ("all", "chapter"):
            made = nodes.paragraph("", "", nodes.reference(
                "", text, internal=True, refuri=f"{text}.html"))
        return nodes.entry("", made, classes=[] if first else ["text-right"])

    for part, content in ((nodes.thead(), [head]), (nodes.tbody(), rows)):
        for row in content:
            part += nodes.row("", *(entry(value, place == 0)
                                    for place, value in enumerate(row)))
        group += part
    return nodes.table("", group)


# --- Colab -------------------------------------------------------------------

def home_address(pyproject: Path) -> str:
    """The repository's address: that of the fork which builds the pages
    (`GPTOSS_REPOSITORY=owner/name`), else pyproject.toml's, else ""."""
    if name := os.environ.get("GPTOSS_REPOSITORY", ""):
        return f"https://github.com/{name}"
    urls = tomllib.loads(pyproject.read_text("utf-8"))["project"]["urls"]
    return urls.get("Repository", "").rstrip("/").removesuffix(".git")


def colab_link(app: Sphinx, pagename: str, _template: str, context: dict,
               _doctree: nodes.document | None) -> None:
    """Beside the downloads of a notebook. With the repository's address the
    link opens the chapter; without it Colab asks for the file."""
    if context.get("page_source_suffix") != ".ipynb":
        return
    home = home_address(Path(app.srcdir) / "pyproject.toml").removeprefix(
        "https://github.com/")
    url = (f"{COLAB}/github/{home}/blob/main/{pagename}.ipynb" if home
           else f"{COLAB}/")
    for group in context.get("header_buttons", []):
        if group.get("label") == "download-buttons":
            group["buttons"].append({
                "type": "link", "url": url, "text": "Colab",
                "icon": "fas fa-cloud", "label": "colab-button",
                "tooltip": ("Open in Google Colab" if home else
                            "Open Google Colab, then upload the .ipynb")})


def without_thebe(app: Sphinx) -> None:
    """Jupyter Book's remote kernels: nothing here uses them, and their
    script fails on the search page. Only their style sheet stays."""
    for event in ("env-before-read-docs", "doctree-resolved"):
        app.events.listeners[event] = [
            one for one in app.events.listeners[event]
            if not one.handler.__module__.startswith("sphinx_thebe")]


def setup(app: Sphinx) -> dict[str, object]:
    without_thebe(app)
    app.add_post_transform(AlternativeText)
    app.add_post_transform(ExportLabels)
    app.add_directive("run-times", RunTimes)
    app.connect("html-page-context", colab_link, priority=900)
    return {"version": "1", "parallel_read_safe": True,
            "parallel_write_safe": True}


if __name__ == "__main__":  # python book/_ext/webbook.py REPORT.xml
    Path(STORED).write_text(json.dumps(
        seconds_of_run(Path(sys.argv[1])), indent=1) + "\n", "utf-8")
