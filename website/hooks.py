"""What mkdocs calls while it builds the website; mkdocs.yml names this file."""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from website import architecture, command_line, links, rendering
from website.imports import ROOT

AT_THE_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages whose files lie in the repository's root, where a code host looks for them."""
WRITTEN = {"architecture.md": architecture.page, "api/command-line.md": command_line.page}
"""Pages that are written at the build."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that docs/ does not hold."""
    for name, uri in AT_THE_ROOT.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for uri, write in WRITTEN.items():
        files.append(File.generated(config, uri, content=write()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Make links between files of the repository hold on the website."""
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files if file.src_uri not in AT_THE_ROOT.values()}
    pages |= AT_THE_ROOT | {"README.md": "index.md"}
    source = next(name for name, uri in pages.items() if uri == page.file.src_uri)
    return links.rewrite(markdown, source, pages)


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Warn where the page's Markdown reads differently on a code host."""
    if page.file.abs_src_path and "\n::: " not in page.markdown:  # a host shows these lines as they are
        rendering.compare(page.markdown, html, page.file.src_uri)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Warn of what the finished page would fetch from other hosts."""
    links.expect_nothing_fetched(output, page.file.src_uri)
