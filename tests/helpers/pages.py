"""Markdown pages in tests: their tables, their blocks of code, and the commands that they name."""

import re
import shlex
from dataclasses import dataclass

from markdown_it import MarkdownIt

ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block: the first word after its fence, the number of lines before its text, and the text."""

    language: str
    line: int
    text: str


def blocks_of(text, before=0):
    """Return the fenced blocks of a page in their order, also those in an indented note. Formulas are indented only."""
    found = []
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            found.append(Block(token.info.partition(" ")[0], before + token.map[0] + 1, token.content))
        elif token.type == "code_block" and "```" in token.content:
            found += blocks_of(token.content, before + token.map[0])
    return found


def spans_of(text):
    """Return what a page shows as code within its lines and tables."""
    inline = [child for token in MarkdownIt().enable("table").parse(text) for child in token.children or ()]
    return [child.content for child in inline if child.type == "code_inline"]


def commands_in(script):
    """Return the commands of a shell script as lists of words, without comments, assignments and the path of .venv."""
    commands = []
    for line in script.replace("\\\n", " ").splitlines():
        command = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                command += [word] if command or not ASSIGNMENT.fullmatch(word) else []
            elif command:
                commands.append([command[0].removeprefix(".venv/bin/"), *command[1:]])
                command = []
    return commands


def run_python(page, blocks, names):
    """Run the Python blocks of a page one after another, as one module with these names; return its names."""
    for block in blocks:  # an error shows the page's own line
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
    return names


def table_after(line, page):
    """Return the cells of the first table after some text, by the first cell of each line."""
    lines = re.search(r"(?:^\|.*\|\n)+", page[page.index(line) :], re.MULTILINE).group().splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}
