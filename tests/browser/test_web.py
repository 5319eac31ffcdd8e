"""The web book in a real browser: Chromium, driven by Playwright.

Needs the built book (`make book`) and a Chromium or Chrome that
find_browser.py finds. Without a browser these tests fail; with
GPTOSS_NO_BROWSER=1 they are skipped, and nothing of this is proved.
"""

import functools
import http.server
import os
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
import torch
from find_browser import TO_DO, find
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    Request,
    sync_playwright,
)

from gptoss import mxfp4
from gptoss.attention import masks, rope, sinks
from gptoss.model.rows import Rows, roll_back
from gptoss.moe.routing import route, softmax_then_topk

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
PAGES = ["search.html", "genindex.html", *(f"book/{name}.html" for name in (
    re.findall(r"(?:root|file): book/(\S+)",
               (ROOT / "_toc.yml").read_text("utf-8"))))]
PATIENCE = 120_000  # milliseconds: a busy machine is no fault of the book
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
DESKS = (1200, 1319, 1320, WIDE["width"])  # pixels; the last one stays

pytestmark = [pytest.mark.xdist_group("browser"), pytest.mark.skipif(
    os.environ.get("GPTOSS_NO_BROWSER") == "1",
    reason="GPTOSS_NO_BROWSER=1: the web book was not opened")]
each_page = pytest.mark.parametrize("name", PAGES)


# --- The site, without a browser ---------------------------------------------

class Links(HTMLParser):
    """Ids and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src")
                       if found.get(key)]


@functools.cache
def links(path: Path) -> Links:
    return Links(path.read_text("utf-8"))


def built(name: str) -> Path:
    path = SITE / name
    assert path.exists(), f"{name} is not built: run `make book`"
    return path


def source(name: str) -> str:
    """The chapter of a page; "" if it has none."""
    path = (ROOT / name).with_suffix(".py")
    return path.read_text("utf-8") if path.exists() else ""


@each_page
def test_no_link_or_anchor_is_broken(name: str) -> None:
    page, broken = built(name), []
    for link in links(page).links:
        target, anchor = urldefrag(link)
        if urlsplit(target).scheme in ("http", "https", "mailto", "data"):
            continue
        path = page if not target else Path(os.path.normpath(
            page.parent / unquote(urlsplit(target).path)))
        if not path.is_file():
            broken.append(link)
        elif (anchor and path.suffix == ".html"
              and unquote(anchor) not in links(path).ids):
            broken.append(link)
    assert not broken


def test_every_exported_name_leads_to_its_section() -> None:
    """The reference page's first link of an entry is a section's, and the
    chapter's exported cells lead back."""
    api = built("book/api.html").read_text("utf-8")
    names = re.findall(r'<li><p><a class="reference internal" '
                       r'href="((?:\w+/)?\w+\.html)#([^"]+)"><span[^>]*>'
                       r'<code', api)
    assert len(names) > 300
    for page, anchor in names:
        assert unquote(anchor) in links(SITE / "book" / page).ids
    listed = re.findall(r"^- \[`", (ROOT / "book" / "api.md").read_text(
        "utf-8"), re.MULTILINE)
    assert len(names) == len(listed)


def test_chapters_are_found() -> None:
    """Or what is asked of chapters below would be asked of none."""
    assert sum("\n# ### Exercise " in source(name) for name in PAGES) > 75
    assert sum("$$" in source(name) for name in PAGES) > 20


# --- A browser ---------------------------------------------------------------

def browser_path() -> str:
    try:
        path = find()
    except LookupError as error:
        pytest.fail(f"no browser: {error}", pytrace=False)
    if path is None:
        pytest.fail(f"no browser: {TO_DO}; `make browser` tries to get one",
                    pytrace=False)
    return path


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Address of a server of the built book."""
    built("index.html")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), (
        functools.partial(Silent, directory=str(SITE))))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = browser_path()
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=[
            "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync",
            # nothing leaves this machine; to stop each request here instead
            # would switch the browser's cache off
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--no-proxy-server"])
        yield chromium
        chromium.close()


class Watched:
    """A page whose complaints and outside requests are kept."""

    def __init__(self, page: Page, site: str) -> None:
        self.page, self.site = page, site
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.on("request", self.note)
        page.on("console", lambda said: self.errors.append(said.text)
                if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", lambda answer: self.errors.append(
            f"{answer.status} {answer.url}") if answer.status >= 400
            else None)

    def note(self, request: Request) -> None:
        if not request.url.startswith((self.site, "data:", "blob:")):
            self.outside.append(request.url)

    def open(self, name: str) -> Page:
        self.page.goto(urljoin(self.site, name), wait_until="load")
        self.page.wait_for_function(
            "!document.querySelector('.math') || "
            "(window.MathJax && MathJax.startup && MathJax.startup.promise"
            " && (MathJax.startup.promise.then(() => window.typeset = true),"
            " window.typeset))")
        return self.page

    def check(self) -> None:
        assert not self.outside, "a request left the page's own host"
        assert not self.errors


def newcomer(browser: Browser) -> BrowserContext:
    context = browser.new_context(viewport=WIDE)
    context.set_default_timeout(PATIENCE)
    return context


@pytest.fixture(scope="module")
def reader(browser: Browser) -> Iterator[BrowserContext]:
    """Who opens page after page; what they have in common is kept."""
    context = newcomer(browser)
    yield context
    context.close()


@pytest.fixture
def leafing(reader: BrowserContext, site: str) -> Iterator[Watched]:
    """A page of somebody who has seen others."""
    page = reader.new_page()
    yield Watched(page, site)
    page.close()


@pytest.fixture
def watched(browser: Browser, site: str) -> Iterator[Watched]:
    """A page of a reader who never was here."""
    context = newcomer(browser)
    yield Watched(context.new_page(), site)
    context.close()


# what stands out to the right of the window
WIDER = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [document.documentElement.scrollWidth, ...[...document.querySelectorAll(
    'main *, footer *')].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('pre, table, div.math, .sidebar-toggle'))
    .slice(0, 5).map(e => e.outerHTML.slice(0, 120))]"""

# lines of code that are cut off, by so many pixels; what is printed breaks
CUT_OFF = """() => [...document.querySelectorAll('main pre')].filter(
  e => e.scrollWidth > e.clientWidth).map(
  e => [e.scrollWidth - e.clientWidth, e.textContent.slice(0, 80)])"""

FIGURES = """() => [...document.querySelectorAll('main img')].map(
  e => [e.src.split('/').pop(), e.alt, e.naturalWidth])"""

# of each solution: is its code to be seen before its summary is clicked, and
# after it?
SOLUTIONS = """() => [...document.querySelectorAll(
  'section#exercises details.hide')].map(e => {
    const code = e.querySelector('pre'), before = code.checkVisibility();
    e.querySelector('summary').click();
    return [before, code.checkVisibility()]; })"""

MATHS = """() => ({
  all: document.querySelectorAll('.math').length,
  bare: [...document.querySelectorAll('.math')].filter(
    e => !e.querySelector('mjx-container')).map(e => e.textContent),
  wrong: [...document.querySelectorAll('mjx-merror')].map(
    e => e.textContent)})"""


@each_page
def test_page(leafing: Watched, name: str) -> None:
    """Loads whole and in silence; typeset, described, nowhere too wide;
    solutions open."""
    page = leafing.open(name)
    assert page.locator("main h1:visible").count() == 1
    maths = page.evaluate(MATHS)
    assert not maths["bare"] and not maths["wrong"]
    chapter = source(name)
    if "$$" in chapter:
        assert maths["all"] > 0
    texts = []
    page.evaluate("""() => Promise.all([...document.images].map(e => {
        e.loading = 'eager'; return e.decode(); }))""")
    for file, text, width in page.evaluate(FIGURES):
        assert width > 0, file
        assert len(text) >= 20 and ".png" not in text, file
        texts.append(text)
    assert len(texts) == len(set(texts)), "two figures, one text"
    for width in DESKS:
        page.set_viewport_size({**WIDE, "width": width})
        assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(WIDER) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate(WIDER) == []
    if "\n# ## Exercises\n" in chapter:
        solutions = page.evaluate(SOLUTIONS)
        assert len(solutions) >= chapter.count("\n# ### Exercise ") > 0
        assert solutions == [[False, True]] * len(solutions)
    leafing.check()


def test_a_solution_opens_by_mouse_and_by_key(watched: Watched) -> None:
    page = watched.open("book/weights/mxfp4.html")
    folded = page.locator("section#exercises details.hide")
    for n, act in ((0, "click"), (1, "press")):
        code = folded.nth(n).locator("pre").first
        assert not code.is_visible()
        summary = folded.nth(n).locator("summary")
        summary.click() if act == "click" else summary.press("Enter")
        assert code.is_visible()
    watched.check()


def test_next_leads_through_the_whole_book(watched: Watched) -> None:
    seen = ["index.html"]
    while found := re.search(r'<a class="right-next"\s+href="([^"]+)"', built(
            f"book/{seen[-1]}").read_text("utf-8")):
        seen.append(urljoin(seen[-1], found[1]))
    assert [f"book/{name}" for name in seen] == PAGES[2:]
    page = watched.open(PAGES[-1])
    page.locator("a.left-prev").click()
    page.wait_for_url(f"**/{PAGES[-2]}")
    page.locator("a.right-next").click()
    page.wait_for_url(f"**/{PAGES[-1]}")


def test_search(watched: Watched) -> None:
    page = watched.open("book/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("attention sink")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=attention*")
    found = page.locator("#search-results li a")
    found.first.wait_for()
    page.wait_for_function("document.querySelector('.search-summary')"
                           ".textContent.includes('found')")
    targets = [link.get_attribute("href") for link in found.all()]
    assert any("attention/sinks" in target for target in targets[:3])
    watched.check()


CONTRAST = """() => {
  const light = c => { const v = c.map(x => (x /= 255) <= .04045 ? x / 12.92
      : ((x + .055) / 1.055) ** 2.4);
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const ground = e => { for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length == 3 || c[3] == 1) return c.slice(0, 3); }
    return [255, 255, 255]; };
  const found = {};
  for (const what of ['main p', 'main a:not(.headerlink)', 'main h2',
      'main pre span',
      'main code', 'summary p', 'main td', 'nav a', '.output pre',
      '.live text', '.live label', 'a.export-label'])
    for (const e of [...document.querySelectorAll(what)].filter(
        e => e.textContent.trim() && e.checkVisibility()).slice(0, 400)) {
      const style = getComputedStyle(e);
      const ink = e.namespaceURI.endsWith('svg') ? style.fill : style.color;
      const c = numbers(ink);
      if (c.length == 4 && c[3] < 1) continue;
      const [a, b] = [light(c.slice(0, 3)), light(ground(e))];
      const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      if (ratio < (found[what] ?? [99])[0])
        found[what] = [ratio, e.outerHTML.slice(0, 90)]; }
  return found; }"""


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_light_and_dark(watched: Watched, mode: str) -> None:
    """The browser's wish is followed, and text keeps its contrast."""
    watched.page.emulate_media(color_scheme=mode)
    for name in ("book/weights/encoding.html", "book/api.html"):
        page = watched.open(name)
        ground = page.evaluate("getComputedStyle(document.body)"
                               ".backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (mode == "light")
        for what, (ratio, element) in page.evaluate(CONTRAST).items():
            assert ratio >= 4.5, (what, element)
    watched.check()


def test_the_reader_chooses_dark(watched: Watched) -> None:
    page = watched.open("book/index.html")
    html = page.locator("html")
    for _ in range(3):
        if html.get_attribute("data-theme") == "dark":
            break
        page.locator("button.theme-switch-button").first.click()
    assert html.get_attribute("data-theme") == "dark"
    watched.open("book/notation.html")
    assert html.get_attribute("data-theme") == "dark"


def test_print(watched: Watched) -> None:
    """Only the page itself is printed, and no line is cut off."""
    page = watched.open("book/attention/sinks.html")
    page.set_viewport_size({"width": 700, "height": 990})  # A4 less margins
    page.emulate_media(media="print")
    for what in (".bd-sidebar-primary", ".bd-sidebar-secondary",
                 ".bd-header", ".prev-next-footer", "button.copybtn"):
        for element in page.locator(what).all():
            assert not element.is_visible(), what
    assert page.evaluate(WIDER) == []
    cut = page.evaluate("""() => [...document.querySelectorAll(
        'main pre, main table, main div.math')].filter(e =>
        e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).map(
        e => e.textContent.slice(0, 60))""")
    assert cut == []
    watched.check()


def test_downloads(watched: Watched, site: str) -> None:
    """A chapter can be downloaded as the notebook that it is, and opened in
    Colab, by plain links."""
    page = watched.open("book/attention/sinks.html")
    button = page.locator("a[href$='attention/sinks.ipynb']").first
    href = urljoin(page.url, button.get_attribute("href"))
    served = page.request.get(href).body()
    assert served == (ROOT / "book" / "attention/sinks.ipynb").read_bytes()
    assert page.locator("a[href^='https://colab.research.google.com']").count()


# --- The figures that move ---------------------------------------------------

def slide(page: Page, name: str, value: float) -> None:
    """Put a slider on a value, as its reader would."""
    page.locator(f".live input[data-name={name}]").evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }",
        str(value))


def shown(page: Page) -> dict[str, str]:
    return page.locator(".live").evaluate("e => ({...e.dataset})")


def test_a_block_under_its_scale(watched: Watched) -> None:
    """The moving figure agrees with gptoss.mxfp4."""
    page = watched.open("book/weights/encoding.html")
    weights = page.evaluate("live.mxfp4.block")
    assert len(weights) == mxfp4.BLOCK
    values = torch.tensor(weights, dtype=torch.float64)
    _, rule = mxfp4.encode(values)
    assert page.evaluate("live.mxfp4.rule(live.mxfp4.block)") == rule.item()
    assert shown(page)["byte"] == str(rule.item())
    edges = torch.tensor(mxfp4.FP4_VALUES)  # and what lies between them
    edges = torch.cat([edges, edges + 0.25, edges - 0.25]).repeat(2)[:64]
    for byte in range(100, 140):
        scales = torch.full((1,), byte, dtype=torch.uint8)
        for block in (values, *(edges.double() * 2.0 ** (byte - 127)).view(
                2, 32)):
            ours = mxfp4.decode(*mxfp4.encode(block, scales), torch.float64)
            theirs = page.evaluate(
                "([w, s]) => live.mxfp4.stored(w, s)", [block.tolist(), byte])
            assert theirs == ours.tolist()
    for byte in range(113, 125):
        slide(page, "byte", byte)
        ours = mxfp4.decode(*mxfp4.encode(values, torch.full(
            (1,), byte, dtype=torch.uint8)), torch.float64)
        found = shown(page)
        assert int(found["byte"]) == byte
        assert int(found["clipped"]) == (
            values.abs() > 6 * 2.0 ** (byte - 127)).sum()
        assert int(found["zero"]) == ((ours == 0) & (values != 0)).sum()
        assert float(found["error"]) == pytest.approx(
            ((ours - values).norm() / values.norm()).item())
    page.locator(".live button").click()
    assert shown(page)["byte"] == str(rule.item())
    watched.check()


def test_the_window_can_be_dragged(watched: Watched) -> None:
    """The moving figure agrees with gptoss.masks."""
    page = watched.open("book/attention/masks.html")
    order = torch.arange(24)[None]
    for window in range(1, 25):
        slide(page, "window", window)
        mask = masks.visible(order, order, window)[0]
        drawn = page.evaluate("""() => Array.from(document.querySelectorAll(
            '.live svg rect')).map(e => e.classList.contains('live-seen'))""")
        assert drawn[:24 * 24] == mask.flatten().tolist()
        assert int(shown(page)["keys"]) == mask[-1].sum()
    for layers in (1, 2, 5, 12):
        slide(page, "layers", layers)
        for window in (1, 3, 6, 24):
            slide(page, "window", window)
            reach = masks.receptive_field(["sliding_attention"] * layers,
                                          window)[-1].sliding
            assert int(shown(page)["reach"]) == reach
    rows = page.locator(".live svg rect")
    page.locator(".live").scroll_into_view_if_needed()
    rows.nth(24 * 20).scroll_into_view_if_needed()
    start, end = (rows.nth(24 * 20 + key).bounding_box()
                  for key in (15, 11))
    page.mouse.move(start["x"] + 3, start["y"] + 3)
    page.mouse.down()
    assert (shown(page)["query"], shown(page)["window"]) == ("20", "6")
    page.mouse.move(end["x"] + 3, end["y"] + 3)
    page.mouse.up()
    page.mouse.move(start["x"] + 3, start["y"] + 3)
    assert (shown(page)["query"], shown(page)["window"]) == ("20", "10")
    watched.check()


def test_the_factor_slides(watched: Watched) -> None:
    """The moving figure agrees with gptoss.rope."""
    page = watched.open("book/attention/rope.html")
    for truncate in (False, True):
        page.locator(".live input[type=checkbox]").set_checked(truncate)
        low, high = rope.correction_range(64, 150_000.0, truncate=truncate)
        for step in range(0, 25, 4):
            factor = 2 ** (step / 4)
            slide(page, "factor", step / 4)
            ours = rope.inverse_frequencies(64, 150_000.0, factor,
                                            truncate=truncate)
            theirs = page.evaluate("([s, t]) => live.rope.frequencies(s, t)",
                                   [factor, truncate])
            assert theirs == pytest.approx(ours.tolist(), rel=1e-6)
            found = shown(page)
            assert float(found["factor"]) == factor
            assert float(found["low"]) == pytest.approx(low, rel=1e-12)
            assert float(found["high"]) == pytest.approx(high, rel=1e-12)
            assert float(found["concentration"]) == pytest.approx(
                rope.concentration(factor), rel=1e-15)
            plain = rope.inverse_frequencies(64, 150_000.0)
            assert float(found["slowed"]) == pytest.approx(
                (plain[17] / ours[17]).item(), rel=1e-6)
    watched.check()


def test_the_sink_slides(watched: Watched) -> None:
    """The moving figure agrees with gptoss.sinks."""
    page = watched.open("book/attention/sinks.html")
    fixed = torch.tensor(page.evaluate("live.sinks.scores")).double()
    for sink in (-8, -1.5, 0, 3, 12):
        slide(page, "sink", sink)
        for shift in (-10, -0.5, 0, 7):
            slide(page, "shift", shift)
            ours = sinks.softmax_with_sink(
                fixed.view(1, 1, -1) + shift,
                torch.tensor([sink]).double()).flatten()
            theirs = page.evaluate(
                "([a, s]) => live.sinks.softmax(a, s).weights",
                [(fixed + shift).tolist(), sink])
            assert theirs == pytest.approx(ours.tolist(), rel=1e-9)
            found = shown(page)
            assert (float(found["sink"]), float(found["shift"])) == (
                sink, shift)
            assert float(found["kept"]) == pytest.approx(ours.sum().item())
            assert float(found["share"]) == pytest.approx(
                1 - ours.sum().item(), abs=1e-12)
    watched.check()


def test_a_logit_moves_into_a_tie(watched: Watched) -> None:
    """The moving figure agrees with gptoss.moe.routing, bf16 and ties."""
    page = watched.open("book/moe/routing.html")
    logits = torch.tensor(page.evaluate("live.routing.logits"),
                          dtype=torch.float64)
    told = set()
    for step in range(0, 61, 3):
        value = 1.845 + 0.0005 * step
        slide(page, "logit", value)
        logits[5] = value
        found = shown(page)
        low = logits.bfloat16()
        assert page.evaluate("x => x.map(y => live.routing.bf16(y))",
                             logits.tolist()) == low.tolist()
        for name, row in (("exact", logits), ("found", low)):
            ids = route(row[None], 4)[1][0].tolist()
            assert found[name] == ",".join(map(str, ids))
        tie = bool(low[2] == low[5])
        flipped = set(found["exact"].split(",")) != set(
            found["found"].split(","))
        assert (found["tie"], found["flipped"]) == (
            str(tie).lower(), str(flipped).lower())
        told.add((tie, flipped))
        kept = softmax_then_topk(low[None].double(), 4, False)[0].sum()
        assert float(found["kept"]) == pytest.approx(kept.item())
    assert told == {(False, False), (True, False), (True, True)}
    watched.check()


def test_tokens_are_taken_back(watched: Watched) -> None:
    """The moving figure agrees with gptoss.model.rows."""
    page = watched.open("book/model/remembering.html")
    t, window, layers = 24, 4, 3
    for slack in range(7):
        slide(page, "slack", slack)
        size = window + slack
        ring = torch.tensor([[t - size + n for n in range(size)]])
        rows = Rows(*torch.tensor([[t], [t], [0]]), ring=ring)
        for length in (0, 1, 5, 10, 16, 17, 18, 19, 20, 21, 22, 23, 24):
            slide(page, "length", length)
            after, again = roll_back(rows, length, window,
                                     layers * (window - 1))
            found = shown(page)
            assert found["replays"] == str(again.item()).lower()
            assert int(found["start"]) == after.lengths.item()
    watched.check()


def test_figures_stand_without_scripts(browser: Browser, site: str) -> None:
    """The static figure is there, and so is a word about the moving one."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    for name in ("weights/encoding", "attention/rope", "attention/masks",
                 "attention/sinks", "moe/routing",
                 "model/remembering"):
        page.goto(f"{site}book/{name}.html")
        assert page.locator("section#picture img").first.is_visible()
        assert "In the web book" in page.locator(".live").inner_text()
    context.close()
