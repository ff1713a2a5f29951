"The documentation, built once: its sidebar, its links, its reference pages, and every page in a browser."

import re
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import watched

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site, built by `aavae_docs`."
    for needed in ("nbdev", "sphinx", "myst_nb", "furo", "latex2mathml"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from aavae.tools.docs import main; sys.exit(main())", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr, done.stderr
    return out


def sidebar() -> dict[str, list]:
    "The entries of `_quarto.yml` by section."
    website = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]
    return {s["section"]: s["contents"] for s in website["sidebar"]["contents"]}


def test_sidebar(site):
    """Every page that `_quarto.yml` names is among the processed notebooks and in the site; its patterns leave no
    page of their folder out."""
    named = [c for contents in sidebar().values() for c in contents if isinstance(c, str)]
    patterns = [c["auto"].strip("/") for contents in sidebar().values() for c in contents if isinstance(c, dict)]
    found = [str(p.relative_to(ROOT / "nbs")) for pattern in patterns for p in (ROOT / "nbs").glob(pattern)]
    assert len(named) >= 10 and len(found) >= 20
    for name in named + found:
        assert (ROOT / "_proc" / name).is_file(), f"{name} is no processed notebook"
        assert (site / name).with_suffix(".html").is_file(), f"{name} has no page"
    first = (site / "index.html").read_text()
    for section in ("Start here", "Tutorials", "The images", "The training", "The tools", "Results", "Reference"):
        assert f">{section}</span>" in first
    assert ">More</span>" not in first, "a notebook belongs to no section of _quarto.yml"


def test_guide_names_every_notebook():
    "The book in the guide leaves no notebook of the package out, and names none that is gone."
    guide = (ROOT / "nbs" / "guide.ipynb").read_text()
    named = set(re.findall(r"\]\((\d_\w+/\w+\.ipynb)\)", guide))
    there = {str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs").glob("[0-9]_*/*.ipynb")}
    assert named == there


class Page(HTMLParser):
    "The anchors of a page, and the addresses that it links to or loads."

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag == "a" and "name" in attrs:
            self.ids.add(attrs["name"])
        for key in ("href", "src"):
            if attrs.get(key) is not None:
                self.links.add(attrs[key])


def broken(site: Path) -> list[str]:
    "`page: address` for each link, anchor or image under `site` that leads nowhere."
    pages = {p.resolve(): Page(p) for p in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file() or (
                url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            ):
                found.append(f"{path.relative_to(site.resolve())}: {link}")
    return sorted(found)


def test_the_crawler_finds_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h2 id="x">A</h2> <a href="#x">1</a> <a href="#y">2</a> <a href="b.html#z">3</a> <a href="c.html">4</a> '
        '<img src="no.png"> <a href="https://example.org">5</a>'
    )
    (tmp_path / "b.html").write_text('<p id="z">B</p><a href="a.html">6</a>')
    assert broken(tmp_path) == ["a.html: #y", "a.html: c.html", "a.html: no.png"]


def test_links(site):
    "Internal links, anchors and images resolve."
    assert broken(site) == []
    assert 'href="../source/loss.html#L-' in (site / "2_model/03_loss.html").read_text()
    assert 'href="../source/evaluation/probe.html#L-' in (site / "5_evaluation/03_probe.html").read_text()


def test_parameters_are_no_links(site):
    "A parameter named as some function is, `options` or `style`, does not lead there."
    link = r'<a class="reference internal" href="[^"]*#api-[^"]*">'
    code = r'(?:<span[^>]*>)?<code[^>]*><span class="pre">(\w+)</span>'

    def linked(page: str) -> set[str]:
        return set(re.findall(link + code, page))

    page = (site / "5_evaluation/16_tasks.html").read_text()
    assert '<span class="pre">options</span>' in page and "Run" in linked(page)
    for path in site.glob("[0-9]*/*.html"):
        assert not linked(path.read_text()) & {"options", "style", "knn"}, path.name


def test_reference_is_of_today(site):
    "The pages made when the site is built name every command, field, preset and study that there is."
    from aavae.cli import COMMANDS
    from aavae.config import PRESETS, TYPES

    commands, fields, results = ((site / f"{name}.html").read_text() for name in ("commands", "fields", "results"))
    for name in COMMANDS:
        assert f"<h2>{name}<" in commands, name
    for name in TYPES:
        assert f'<span class="pre">{name}</span>' in fields, name
    for name in PRESETS:
        assert name in fields
    for path in (ROOT / "results").iterdir():
        if path.is_dir():
            assert f"<h2>{path.name}<" in results, path.name


@pytest.fixture(scope="session")
def address(site):
    "Where the site is served."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_page_in_a_browser(site, address, page):
    "No console error, no request to another host, nothing wider than a phone's screen."
    page.set_viewport_size({"width": 390, "height": 844})
    wide = []
    with watched(page) as (said, asked):
        for path in sorted(site.rglob("*.html")):
            name = path.relative_to(site).as_posix()
            page.goto(f"{address}/{name}", wait_until="load")
            if page.evaluate("document.documentElement.scrollWidth") > 390:
                wide.append(name)
            assert not said, f"{name}: {said}"
    assert asked and [u for u in asked if not u.startswith((address, "data:", "blob:"))] == []
    assert wide == []


def test_search_figures_and_equations(address, page):
    "Search finds a function without a network, a stored figure is drawn, an equation has a size."
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(f"{address}/search.html?q=reparameterize")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert any(
        "loss" in href for href in page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    )
    page.goto(f"{address}/2_model/03_loss.html")
    assert (
        page.evaluate("Math.min(...[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().width))")
        > 2
    )
    page.goto(f"{address}/results.html")
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=20_000)
