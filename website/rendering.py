"""Whether a page reads the same here and on a code host, which follow different rules of Markdown."""

from __future__ import annotations

import logging
import re
from collections import Counter

from markdown_it import MarkdownIt

_TAG = re.compile(r"<(/?)(ul|ol|li|h2|h3|table|tr|td|pre|strong|em|img)[ >]")

log = logging.getLogger("mkdocs.plugins.tengrad_triton.rendering")


def compare(markdown: str, html: str, name: str) -> None:
    """Warn where a page has more or fewer of some element than CommonMark makes of its text.

    After a paragraph within an item of a list, for example, the next item has to follow an empty line here.
    """
    expected, found = _elements(MarkdownIt("commonmark").enable("table").render(markdown)), _elements(html)
    more, fewer = (", ".join(f"{n} {what}" for what, n in x.items()) for x in (found - expected, expected - found))
    if more or fewer:
        log.warning("%s reads otherwise on a code host: more here: %s; fewer: %s", name, more or "-", fewer or "-")


def _elements(html: str) -> Counter[str]:
    """Return the numbers of elements; items are counted for each depth of lists within lists."""
    counts: Counter[str] = Counter()
    depth = 0
    for end, tag in _TAG.findall(html):
        if tag in ("ul", "ol"):
            depth += -1 if end else 1
        elif not end:
            counts[f"<li> at depth {depth}" if tag == "li" else f"<{tag}>"] += 1
    return counts
