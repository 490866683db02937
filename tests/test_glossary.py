"""The glossary is a complete, sorted table that leads to the chapters."""

import re
from pathlib import Path

GLOSSARY = Path(__file__).resolve().parent.parent / "book" / "glossary.md"
ROWS = [line.strip("| ").split(" | ") for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]


def test_every_row_is_complete():
    assert len(ROWS) > 80
    assert [row for row in ROWS if len(row) != 4 or not all(cell.strip() for cell in row)] == []
    assert [row[0] for row in ROWS if not row[2].endswith(".")] == []


def test_terms_are_sorted_and_unique():
    terms = [row[0].casefold() for row in ROWS]
    assert terms == sorted(terms)
    assert len(set(terms)) == len(terms)


def test_chinese_terms_are_chinese():
    assert [row[0] for row in ROWS if not re.search(r"[\u4e00-\u9fff]", row[1])] == []
    assert [row[0] for row in ROWS if re.search(r"[\u4e00-\u9fff]", row[0] + row[2])] == []


def test_terms_lead_to_the_chapters_that_explain_them():
    """The number that is shown is the chapter's, and its text holds the term, or a word of it that is no filler."""
    for term, _, _, link in ROWS:
        number, path = re.fullmatch(r"\[(\d+)\]\(\.\./(nbs/\d\d_\w+\.ipynb)\)", link).groups()
        assert int(re.search(r"/(\d\d)_", path)[1]) == int(number), term
        chapter = (GLOSSARY.parent.parent / path).read_text(encoding="utf-8").casefold()
        words = re.findall(r"\w{4,}|[A-Z]\w+", term)
        beginnings = [re.sub("(ation|ion|ing|e|s)$", "", word.casefold()).replace("is", "i[sz]") for word in words]
        assert any(re.search(rf"\b{word}", chapter) for word in beginnings), f"{term} is not in {path}"
