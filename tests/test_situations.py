"""Every situation of the table does what the table says, and the page shows the table."""

import pytest
from situations import PAGE, SITUATIONS, page

ROWS = [
    pytest.param(situation, fisher, id=f"{kind}-{situation.title}-{fisher}")
    for kind, rows in SITUATIONS.items()
    for situation in rows
    for fisher in situation.fishers
]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute"
)  # of torch
@pytest.mark.parametrize(("situation", "fisher"), ROWS)
def test_what_happens_is_what_the_table_says(situation, fisher):
    situation.run(fisher)


def test_the_page_shows_the_table():
    assert PAGE.read_text() == page()
