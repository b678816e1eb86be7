"""Markdown pages in tests."""

import re


def table_after(line, page):
    """Return the cells of the first table after some text, by the first cell of each line."""
    lines = re.search(r"(?:^\|.*\|\n)+", page[page.index(line) :], re.MULTILINE).group().splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}
