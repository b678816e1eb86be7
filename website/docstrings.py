"""Docstrings on the reference pages: complete, and with links."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from griffe import Class, Extension, Function, Object

from website.imports import ROOT

_HEADING = re.compile(r"^## (M\d+)\. (.*)$", re.M)
_LABEL = re.compile(r"(?:docs/math\.md, )?\b(M\d+)\b")
_PAGE = re.compile(r"\bdocs/([\w-]+)\.md\b")
_PUBLIC = re.compile(r"(?<!`)`(\w+)`(?!`)")


class Docstrings(Extension):
    """Completes docstrings that a decorator fills in, and links the labels of formulas, pages and public names."""

    def __init__(self) -> None:
        super().__init__()
        pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
        self._pages = {name: _slug(text[text.index("# ") + 2 :].splitlines()[0]) for name, text in pages.items()}
        self._formulas = {label: _slug(f"{label}. {title}") for label, title in _HEADING.findall(pages["math"])}
        self._public = set(importlib.import_module("tengrad_triton").__all__)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Take over the docstring that `baselines.settings.document` makes."""
        if cls.docstring and any("document" in str(decorator.value) for decorator in cls.decorators):
            found = getattr(importlib.import_module(cls.module.path), cls.name)
            cls.docstring.value = inspect.getdoc(found) or ""
        self._link(cls)

    def on_function(self, *, func: Function, **_: Any) -> None:
        """Link what a function's docstring mentions."""
        self._link(func)

    def _link(self, item: Object) -> None:
        if item.docstring is None:
            return
        text = _LABEL.sub(self._formula, item.docstring.value)
        text = _PAGE.sub(self._page, text)
        item.docstring.value = _PUBLIC.sub(self._name, text)

    def _formula(self, match: re.Match[str]) -> str:
        label = match[1]
        return f"[{label}][{self._formulas[label]}]" if label in self._formulas else match[0]

    def _page(self, match: re.Match[str]) -> str:
        return f"[{match[0]}][{self._pages[match[1]]}]" if match[1] in self._pages else match[0]

    def _name(self, match: re.Match[str]) -> str:
        return f"[`{match[1]}`][tengrad_triton.{match[1]}]" if match[1] in self._public else match[0]


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
