"""Markdown pages in tests."""

import re


def table_after(line, page):
    """Return the cells of the first table after some text, by the first cell of each line."""
    lines = re.search(r"(?:^\|.*\|\n)+", page[page.index(line) :], re.MULTILINE).group().splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}


def code_blocks(page):
    """Return the Python code of a page, a text for each block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
