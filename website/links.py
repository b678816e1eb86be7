"""Links between Markdown files that hold in the repository and on the website.

The files link to each other as they lie in the repository. A link to a page leads to that page here too. A file that is
no page has no address here, since the project has no public one: its link becomes its path in the repository.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Mapping

from website.imports import ROOT

# Fenced blocks and code spans match too, without a target, and stay as they are.
_FENCED = r"^```.*?^```"
_CODE = r"(`+)(?!`).+?(?<!`)\1(?!`)"
_LINK = re.compile(_FENCED + "|" + _CODE + r"|\[(?P<text>(?:[^][`]|`[^`]*`)*)\]\((?P<target>[^()\s]+)\)", re.M | re.S)
_FETCHED = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*? (?:src|href)="((?:https?:)?//[^"]*)')
_ELSEWHERE = re.compile(r"[a-z]+:|#")  # another site, or a heading of the same page

log = logging.getLogger("mkdocs.plugins.tengrad_triton.links")


def rewrite(markdown: str, source: str, pages: Mapping[str, str]) -> str:
    """Return a page's text with links that hold on the website.

    Args:
        markdown: the text.
        source: its file in the repository, such as ``docs/guides/gpt.md``.
        pages: for each file in the repository that is on the website, the path of its source there.
    """

    def link(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if target is None or _ELSEWHERE.match(target):
            return match[0]
        path, _, heading = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if file in pages:
            here = posixpath.relpath(pages[file], posixpath.dirname(pages[source]) or ".")
            return f"[{text}]({here}{'#' + heading if heading else ''})"
        if not (ROOT / file).exists():
            log.warning("%s links to %s, which does not exist", source, target)
        return f"`{file}`" if text.strip("`") in {file, path, target} else f"{text} (`{file}`)"

    return _LINK.sub(link, markdown)


def expect_nothing_fetched(html: str, name: str) -> None:
    """Warn of scripts, styles and images of other hosts: a reader's browser asks only the host of the pages."""
    for address in _FETCHED.findall(html):
        log.warning("%s fetches %s: put the file below docs/", name, address)
