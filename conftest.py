"""Let nbval read notebooks as nbdev leaves them, and say how long each took."""

import json
import os
import re
from pathlib import Path

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


def notebook_times(reports):
    """Add up the seconds of each notebook's cells from pytest's reports: {name: [seconds, the slowest cell's]}, in reading order."""
    times = {}
    for report in reports:
        path = Path(report.nodeid.partition("::")[0])
        if path.suffix == ".ipynb" and report.when == "call":
            total, slowest = times.get(path.stem, (0.0, 0.0))
            times[path.stem] = [round(total + report.duration, 1), round(max(slowest, report.duration), 1)]
    return dict(sorted(times.items()))


def pytest_terminal_summary(terminalreporter):
    """Print the seconds of each notebook and of its slowest cell; where NOTEBOOK_TIMES names a file, write them there as well."""
    times = notebook_times(terminalreporter.getreports("passed") + terminalreporter.getreports("failed"))
    if not times:
        return
    terminalreporter.section("seconds of each notebook, and of its slowest cell")
    for name, (total, slowest) in times.items():
        terminalreporter.line(f"{name:28}{total:7.0f}{slowest:7.0f}")
    if target := os.environ.get("NOTEBOOK_TIMES"):
        Path(target).write_text(json.dumps(times, indent=1) + "\n")
