"""Write the notebooks without the solutions of the exercises, for a class: cells to fill, and the checks that judge them.

Usage: python tools/exercises.py [--out FOLDER] [NAME ...]
       python tools/exercises.py --plans       the table of book/teachers.md, with hours counted anew
NAME is the beginning of a notebook's name; all notebooks without. `make exercises` writes into _exercises/, which git ignores.

Of a solution's code its imports and assertions stay, with the loops around them; the words and all other statements go. A cell to
fill names what its checks use. A notebook that somebody has worked in is not overwritten, unless --force says so.
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
    """Tell whether a statement judges: an assertion or a call that raises if something is not so."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    called = ast.unparse(call.func).split(".")[-1] if isinstance(call, ast.Call) else ""
    return isinstance(statement, ast.Assert) or called in JUDGES


def parts_of(statement):
    """Return the statements inside an `if`, a loop or a `with`; none for any other, nor where there is an `else`."""
    holds = isinstance(statement, ast.If | ast.For | ast.While | ast.With)
    return statement.body if holds and not getattr(statement, "orelse", []) else []


def split(statements):
    """Tell the statements that judge, however deep they stand in `if` and loops, from those that do the work."""
    kept, gone = [], []
    for statement in statements:
        if parts_of(statement):
            inner_kept, inner_gone = split(parts_of(statement))
            kept, gone = kept + inner_kept, gone + inner_gone
        elif judges(statement):
            kept.append(statement)
        else:
            gone.append(statement)
    return kept, gone


def checks_of(code, statements, indent=""):
    """Return the lines of the statements that judge, each in the `if` and loops around it; `...` stands for work that is gone."""
    lines = []
    for statement in statements:
        inner = parts_of(statement)
        if judges(statement):
            lines.append(indent + ast.get_source_segment(code, statement))
        elif split(inner)[0]:
            written = code.splitlines()
            head = written[statement.lineno - 1 : inner[0].lineno - 1]
            head = head or [written[statement.lineno - 1][: inner[0].col_offset].rstrip()]  # all in one line
            todo = [] if all(judges(s) or parts_of(s) for s in inner) else [f"{indent}    ...  # your code"]
            lines += [*head, *todo, *checks_of(code, inner, indent + "    ")]
    return lines


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
    rest = [s for s in statements if s not in imports]
    checks, gone = split(rest)
    made = set(names_in(gone, ast.Store))
    wanted = [name for name in dict.fromkeys(names_in(checks, ast.Load)) if name in made]
    asked = f"# Your code. The checks below use {', '.join(wanted)}." if wanted else "# Your code."
    imported = "\n".join(ast.get_source_segment(code, s) for s in imports)
    return "\n\n".join(part for part in (imported, f"{asked}\n...", "\n".join(checks_of(code, rest))) if part)


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


def sources(text):
    """Return what stands in the cells of a notebook, given as the text of its file; None where it is no notebook."""
    try:
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    except (ValueError, KeyError, TypeError):
        return None


def write(out, names=(), *, force=False):
    """Write the notebooks whose names begin with one of those given, or all; return how many cells there are to fill."""
    written = {}
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        if not names or path.name.startswith(tuple(names)):
            written[out / path.name] = without_solutions(json.loads(path.read_text(encoding="utf-8")))
    if not written:
        sys.exit(f"no notebook begins with {' or '.join(names)}")
    texts = {path: json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" for path, notebook in written.items()}
    differ = [p.name for p, text in texts.items() if p.exists() and sources(p.read_text(encoding="utf-8")) != sources(text)]
    if differ and not force:
        sys.exit(f"{out} holds {', '.join(differ)} with other cells than would be written: name another --out, or --force to lose them")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return sum("exercise" in cell["metadata"].get("tags", []) for notebook in written.values() for cell in notebook["cells"])


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
    parser.add_argument("--force", action="store_true", help="overwrite notebooks that somebody has worked in")
    args = parser.parse_args()
    if args.plans:
        print(table())
    else:
        print(f"{args.out}: {write(args.out, args.names, force=args.force)} cells to fill")


if __name__ == "__main__":
    main()
