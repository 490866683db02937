"""Write the notebooks without the solutions of the exercises, for a class: cells to fill, and the checks that judge them.

Usage: python tools/exercises.py [--out FOLDER] [NAME ...]
       python tools/exercises.py --plans       the table of book/teachers.md, with hours counted anew
NAME is the beginning of a notebook's name; all notebooks without. `make exercises` writes into _exercises/, which git ignores.

Of a solution's code its imports and assertions stay; the words and all other statements go. A cell to fill names what its checks use.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "book" / "_ext"))

import measures  # noqa: E402
from nbdev_directives import split_solutions  # noqa: E402

JUDGES = ("assert_refused", "assert_close", "assert_equal")  # calls that judge as `assert` does
PLANS = {  # plan -> the chapters of each meeting
    "A lecture": [["00", "02", "09", "10"]],
    "A week": [["00", "01", "02"], ["03", "04", "05"], ["06", "07"], ["08", "09", "10"], ["11", "12", "13"]],
    "A term": [
        *(["00", "01"], ["02"], ["03"], ["04", "05"], ["06", "07"], ["08", "09"], ["10"], ["11", "12"]),
        *(["13", "14"], ["16", "17"], ["18", "19"], ["20"], ["21", "22"], ["23", "24", "25"]),
    ],
}


def judges(statement):
    """Tell whether a statement judges: an assertion, a call that raises if something is not so, or an `if` over nothing but these."""
    if isinstance(statement, ast.If):  # such as `if dataset == "digits":`
        return all(map(judges, statement.body + statement.orelse))
    call = statement.value if isinstance(statement, ast.Expr) else None
    called = ast.unparse(call.func).split(".")[-1] if isinstance(call, ast.Call) else ""
    return isinstance(statement, ast.Assert) or called in JUDGES


def names_in(statements, context):
    """Collect the names that statements store or load."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    found = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)]
    kinds = ast.FunctionDef | ast.ClassDef
    return found + [node.name for node in statements if isinstance(node, kinds) and context is ast.Store]


def to_fill(code):
    """Turn the code of a solution into a cell to fill: imports, a line that says what is asked for, the checks."""
    statements = ast.parse(code).body
    imports = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    checks = [s for s in statements if judges(s)]
    gone = [s for s in statements if s not in imports and s not in checks]
    made = set(names_in(gone, ast.Store))
    wanted = [name for name in dict.fromkeys(names_in(checks, ast.Load)) if name in made]
    asked = f"# Your code. The checks below use {', '.join(wanted)}." if wanted else "# Your code."
    parts = ["\n".join(ast.get_source_segment(code, s) for s in chosen) for chosen in (imports, checks)]
    return "\n\n".join(part for part in (parts[0], f"{asked}\n...", parts[1]) if part)


def without_solutions(notebook):
    """Return a notebook, given as JSON, with cells to fill in place of its solutions, and without outputs of theirs."""
    cells, waits = [], False
    for cell, solves in split_solutions(notebook["cells"]):
        if solves:
            cell = cell | {"source": to_fill("".join(cell["source"])), "outputs": [], "execution_count": None}
            tags = [tag for tag in cell["metadata"].get("tags", []) if tag not in ("hide-input", "nbval-check-output")]
            cell["metadata"] = cell["metadata"] | {"tags": [*tags, "exercise"]}
            waits = False
        elif waits and cell["cell_type"] == "markdown":
            cells.append({"cell_type": "markdown", "id": f"answer-{len(cells)}", "metadata": {}, "source": "*Your answer.*"})
        asks = cell["cell_type"] == "markdown" and "{exercise}" in cell["source"]
        waits = asks or (waits and solves is False and cell["cell_type"] != "markdown")
        if "".join(cell["source"]).strip():
            cells.append(cell)
    return notebook | {"cells": cells}


def write(out, names=()):
    """Write the notebooks whose names begin with one of those given, or all; return how many cells there are to fill."""
    out.mkdir(parents=True, exist_ok=True)
    n = 0
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        notebook = without_solutions(json.loads(path.read_text(encoding="utf-8")))
        n += sum("exercise" in cell["metadata"].get("tags", []) for cell in notebook["cells"])
        (out / path.name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return n


def table(root=ROOT):
    """Write the plans as a table, with the hours of reading of each meeting."""
    hours = measures.reading_hours(root)["hours"]
    lines = ["| plan | meeting | chapters | hours |", "|---|---|---|---|"]
    for plan, meetings in PLANS.items():
        for i, chapters in enumerate(meetings, 1):
            lines.append(f"| {plan if i == 1 else ''} | {i} | {', '.join(map(str, map(int, chapters)))} | {sum(hours[c] for c in chapters):.1f} |")
        total = sum(hours[c] for chapters in meetings for c in chapters)
        lines.append(f"| | | **together** | **{total:.1f}** |")
    return "\n".join(lines)


def main():
    """Write notebooks, or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "_exercises")
    parser.add_argument("--plans", action="store_true")
    args = parser.parse_args()
    if args.plans:
        print(table())
    else:
        print(f"{args.out}: {write(args.out, args.names)} cells to fill")


if __name__ == "__main__":
    main()
