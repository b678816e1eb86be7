"""The website: every public name is on a page of the reference, and links, help and drawing are right."""

import logging
import re

import pytest

import tengrad_triton
from tengrad_triton import baselines, kernels, likelihoods
from tengrad_triton.recipes.cli.commands import COMMANDS
from website import architecture, command_line, links, rendering
from website.imports import ORDER, ROOT, graph, without_detours

DOCS = ROOT / "docs"
REFERENCE = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
PUBLIC = [
    *(f"tengrad_triton.{name}" for name in tengrad_triton.__all__),
    *(f"tengrad_triton.likelihoods.{name}" for name in likelihoods.__all__ if name not in tengrad_triton.__all__),
    *(f"tengrad_triton.baselines.{name}" for name in baselines.__all__),
    *(f"tengrad_triton.kernels.*.{spec.name}" for spec in kernels.SPECS),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_has_every_public_name(name):
    assert re.search(rf"^::: {name.replace('.*.', r'.+[.]')}$", REFERENCE, re.M)


PAGES = {"docs/math.md": "math.md", "docs/guides/gpt.md": "guides/gpt.md", "CONTRIBUTING.md": "contributing.md"}
LINKS = {
    # source, text, and the text on the website
    "a page": ("docs/guides/gpt.md", "[a](../math.md#m1-x) b", "[a](../math.md#m1-x) b"),
    "from the root": ("CONTRIBUTING.md", "[`docs/math.md`](docs/math.md)", "[`docs/math.md`](math.md)"),
    "to the root": ("docs/guides/gpt.md", "[a](../../CONTRIBUTING.md#b)", "[a](../contributing.md#b)"),
    "a file": ("docs/math.md", "see [the sizes](../perf/sizes.py).", "see the sizes (`perf/sizes.py`)."),
    "a file by its name": ("CONTRIBUTING.md", "[LICENSE](LICENSE)", "`LICENSE`"),
    "another site": ("docs/math.md", "[a](https://example.org/x)", "[a](https://example.org/x)"),
    "a heading": ("docs/math.md", "[a](#b)", "[a](#b)"),
    "code": ("docs/math.md", "`[a](../LICENSE)`", "`[a](../LICENSE)`"),
    "a fence": ("docs/math.md", "```\n[a](../LICENSE)\n```\n", "```\n[a](../LICENSE)\n```\n"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_lead_to_pages_or_become_paths(case):
    source, text, expected = LINKS[case]
    assert links.rewrite(text, source, PAGES) == expected


def test_a_link_to_nothing_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        links.rewrite("[a](gone.md)", "docs/math.md", PAGES)
    assert "docs/math.md links to gone.md" in caplog.text


@pytest.mark.parametrize("path", [*DOCS.rglob("*.md"), ROOT / "README.md"], ids=lambda path: path.name)
def test_images_have_texts_and_files(path):
    for text, target in re.findall(r"!\[(.*?)\]\((.*?)\)", path.read_text()):
        assert text
        assert (path.parent / target).exists()


def reached(imports, part):
    return imports[part].union(*(reached(imports, other) for other in imports[part]))


def test_the_drawing_has_every_package_and_leads_to_every_import():
    direct, page = graph(), architecture.page()
    drawn = without_detours(direct)
    for part in ORDER:
        assert f">{part}</text>" in page
        assert reached(drawn, part) == reached(direct, part)
    assert page.count('class="arrow"') == sum(map(len, drawn.values()))
    assert "capture" in direct["curvature"]
    assert "kernels" not in drawn["curvature"]


def test_the_help_of_every_command_is_on_a_page():
    page = command_line.page()
    for name in COMMANDS:
        assert f"Usage: tengrad-triton {name}" in page
    assert "--resume" in page
    assert max(map(len, page.splitlines())) <= 120


OTHERWISE = {
    "a list that joins its paragraph": ("a\n- b\n", "<p>a\n- b</p>"),
    "a flat list": ("- a\n  - b\n", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>"),
    "an emphasis": ("X*‖ / ‖X*", "<p>X<em>‖ / ‖X</em></p>"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_pages_that_read_otherwise_on_a_code_host_are_warned_of(case, caplog):
    markdown, html = OTHERWISE[case]
    with caplog.at_level(logging.WARNING):
        rendering.compare("- a\n- b\n", "<ul>\n<li>a</li>\n<li>b</li>\n</ul>", "same.md")
        assert not caplog.text
        rendering.compare(markdown, html, "page.md")
    assert "page.md reads otherwise" in caplog.text


FETCHED = {
    '<script src="https://example.org/a.js">': True,
    '<script defer src="//example.org/a.js">': True,
    '<link rel="stylesheet" href="https://example.org/a.css">': True,
    '<img alt="a" src="http://example.org/a.png">': True,
    '<link rel="canonical" href="https://example.org/">': False,
    '<script src="assets/a.js">': False,
    '<a href="https://example.org">': False,
}


@pytest.mark.parametrize("html", FETCHED)
def test_a_page_that_fetches_from_elsewhere_is_warned_of(html, caplog):
    with caplog.at_level(logging.WARNING):
        links.expect_nothing_fetched(html, "page.md")
    assert bool(caplog.text) is FETCHED[html]
