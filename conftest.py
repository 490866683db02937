"""Let nbval read notebooks as nbdev leaves them."""

import re

EVAL_FALSE = re.compile(r"(#\|.*\n)*#\|\s*eval:\s*false")


def pytest_collection_modifyitems(items):
    """Mark cells as run, so that nbval compares outputs, and skip the cells that nbdev skips."""
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is None:
            continue
        cell.execution_count = 1  # nbdev_clean removes the counts, and nbval takes a missing count for "never run"
        if EVAL_FALSE.match(cell.source):
            item.options["skip"] = True
