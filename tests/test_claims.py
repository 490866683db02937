"""The page of claims is what the tool writes from stored figures, and its verdicts follow from them."""

import math
import re

import claims

SHOWN = re.search(r"<!-- claims -->\n(.*?)\n<!-- end -->", claims.PAGE.read_text(encoding="utf-8"), re.S)[1]


def test_the_page_shows_the_stored_figures():
    assert claims.table() == SHOWN, "run python tools/claims.py --write"


def test_every_claim_has_its_trainings_and_a_verdict_that_follows():
    rows = list(claims.rows())
    lines = SHOWN.splitlines()[2:]
    assert len(rows) == len(lines) > 40 and len({words for words, *_ in rows}) == len(rows)
    for (words, chapter, n, trainings, gap, error), line in zip(rows, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == words and cells[1].startswith(f"[{chapter}](../nbs/{chapter:02}_") and cells[2:4] == [str(trainings), str(n)]
        decided = "yes" if gap > 2 * error else "no, the other way" if gap < -2 * error else "undecided"
        assert error > 0 and cells[5] == decided
        assert trainings >= 3 or int(n) >= 256  # several trainings, or many samples of one network


def test_the_error_is_that_of_the_difference():
    """Trainings that share a seed differ together; apart, their errors would hide a difference that each of them shows."""
    n, gap, error = claims.over_seeds([10.0, 20.0, 30.0, 40.0], [9.0, 18.0, 29.0, 38.0])
    assert (n, gap) == (4, 1.5) and math.isclose(error, math.sqrt(1 / 3) / 2)
