"""The glossary is a complete, sorted table."""

import re
from pathlib import Path

GLOSSARY = Path(__file__).resolve().parent.parent / "book" / "glossary.md"
ROWS = [line.strip("| ").split(" | ") for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


def test_every_row_is_complete():
    assert len(ROWS) > 80
    assert [row for row in ROWS if len(row) != 3 or not all(cell.strip() for cell in row)] == []
    assert [row[0] for row in ROWS if not row[2].endswith(".")] == []


def test_terms_are_sorted_and_unique():
    terms = [row[0].casefold() for row in ROWS]
    assert terms == sorted(terms)
    assert len(set(terms)) == len(terms)


def test_chinese_terms_are_chinese():
    assert [row[0] for row in ROWS if not re.search(r"[\u4e00-\u9fff]", row[1])] == []
    assert [row[0] for row in ROWS if re.search(r"[\u4e00-\u9fff]", row[0] + row[2])] == []
