"""The published HTML: it builds without a warning, holds every page, and loads nothing from the network."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parent.parent
LOADING = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}


class Loads(HTMLParser):
    """Collects what a browser fetches by itself when it opens a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") in ("canonical", "next", "prev", "index", "search"):
            return
        self.found += [attrs[name] for kind, name in LOADING if kind == tag and attrs.get(name)]


def network_loads(page):
    parser = Loads()
    parser.feed(page)
    inline = re.findall(r"(?:import\(|fetch\(|@import|src\s*[:=])\s*[\"'(]+(https?:)?//[^\"')]+", page)
    return [url for url in parser.found if re.match(r"(https?:)?//", url)] + inline


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-n", "-W", "--keep-going"]
    done = subprocess.run([*command, "--path-output", out], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / "_build" / "html"


@pytest.mark.slow
def test_every_page_of_the_table_of_contents_is_built(site):
    parts = yaml.safe_load((TOP / "_toc.yml").read_text())
    files = [parts["root"], *(c["file"] for part in parts["parts"] for c in part["chapters"])]
    for name in files:
        page = (site / f"{name}.html").read_text()
        assert "<h1" in page and "Traceback" not in page, name


@pytest.mark.slow
def test_no_page_loads_anything_from_the_network(site):
    pages = list((site / "book").rglob("*.html"))
    assert len(pages) > 5
    assert {p.name: network_loads(p.read_text()) for p in pages if network_loads(p.read_text())} == {}
    scripts = {src for p in pages for src in re.findall(r'src="([^"]*(?:mathjax|MathJax)[^"]*)"', p.read_text())}
    assert scripts, "equations need a MathJax of the site's own"
    assert all((pages[0].parent / src.split("?")[0]).exists() or src.startswith("..") for src in scripts)


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example.org/a.css">',
        '<img src="http://example.org/pixel.png">',
    ],
)
def test_a_page_that_loads_from_the_network_is_noticed(page):
    assert network_loads(page)


def test_a_plain_link_is_not_a_load():
    assert not network_loads('<a href="https://example.org">read</a><link rel="canonical" href="https://a.org/">')
