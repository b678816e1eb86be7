"""Tables of plain text: every width keeps every word."""

from collections import Counter

import pytest

from tengrad_triton.tables import LEAST, Column, table, wrapped

COLUMNS = [Column("weight", wraps=True), Column("choice made"), Column("µs", right=True)]
ROWS = [
    ("N128 G1 P64 I9 O4 conv [3, 3] stride (1, 1)", "per_sample", "178"),
    ("a_name_without_any_gap_that_is_longer_than_the_column", "one\ntwo", "2.5"),
    "a line across all columns, which may be long as well",
    ("", "", ""),
]
TEXT = " ".join(cell for row in ROWS for cell in ([row] if isinstance(row, str) else row))


@pytest.mark.parametrize("width", [24, 30, 40, 44, 60, 80, 200])
def test_no_line_is_wider_and_nothing_is_lost(width):
    lines = table(COLUMNS, ROWS, width)
    assert max(map(len, lines)) <= width
    shown, letters = " ".join(lines), Counter("".join(lines))
    assert {word for word in TEXT.split() if len(word) <= LEAST} <= {*shown.split(), *shown.replace(",", "").split()}
    assert all(letters[letter] >= count for letter, count in Counter("".join(TEXT.split())).items())
    assert all(line == line.rstrip() for line in lines)


def test_a_file_has_one_line_for_each_row():
    lines = table(COLUMNS, ROWS[:1], None)
    assert [len(lines), *lines[0].split()] == [3, "weight", "choice", "made", "µs"]
    assert lines[2] == f"{ROWS[0][0]}  per_sample   178"


def test_numbers_stand_on_the_right_and_titles_on_the_rule():
    lines = table([Column("n"), Column("two words", right=True)], [("a", "1"), ("b", "100")], 8)
    assert lines == ["     two", "n  words", "────────", "a      1", "b    100"]


def test_what_does_not_fit_beside_each_other_stands_below():
    lines = table(COLUMNS, ROWS[:1], 30)
    assert lines == ["N128 G1 P64 I9 O4 conv [3, 3]", "stride (1, 1)", "  choice made per_sample,", "  µs 178"]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (12, ["one", "  two-three", "", "four"]),
        (9, ["one", "  two-thr", "  ee", "", "four"]),
        (None, ["one two-three", "", "four"]),
    ],
)
def test_a_text_keeps_its_lines_and_breaks_a_word_only_where_it_does_not_fit(width, lines):
    assert wrapped("one two-three\n\nfour", width, indent="  ") == lines
