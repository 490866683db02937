"""Measure how heavy the chapters and modules are to read, so that changes can be compared.

Usage: python tools/measures.py [FOLDER] [--hours FILE]
FOLDER is a copy of this repository, this one if it is not given. Three tables are printed.

Chapters: `words` of text (a formula counts as one word, code as none), of which `in ex.` stand
in exercises and their solutions; `code` lines (neither blank nor only a comment) in all cells,
again with those in exercises, and `shown` those that stand unfolded before them; `cells`; lines of the `longest` code cell; lines over 88 and 100
columns; `figure`, the words before the first picture; `pairs`, in all code cells: the assignments of a tuple whose values are of
different kinds, such as a call and a constant, or calls of different functions (see `are_alike`).

Modules: `lines` of code; the median of syntax `nodes` a line in the bodies of functions;
`comments` for 100 lines of these bodies; `private` and `public` functions and classes at the top
level; `pairs`, those of them that are exported; `early`, the references to a name that only a later cell of the module defines.

Purposes: each line of a function or class counts for one purpose. A function that is named in
PURPOSES has the purpose under which it stands; one whose name begins with check_ or _check is a
check; any other is the subject of its chapter. Inside subjects, lines that only refuse (an `if`
that ends in `raise`, a call of a check) are checks, too. Where the disk, say, is what a chapter
is about (SUBJECTS), its lines are the subject.
"""

import argparse
import ast
import io
import json
import re
import tokenize
from collections import Counter
from pathlib import Path
from statistics import median

import rules

# Methods are written Class.method; a class that is named covers its methods.
PURPOSES = {
    "disk": """
        trainer_state load_trainer_state save_checkpoint _remove_old _score read_checkpoint
        load_checkpoint TrainLog _last_good _append read_log prepare_run refuse_other_run
        read_settings _write_settings _write_model _remove_newer Checkpoints StageCheckpoints
        Listing _layout _read_found _download_manners _download load_torchvision _from_torchvision
        read_picture list_pictures _find_classes _scan
        FolderDataset _existing_folder load_folder _from_dataset _Pairs _load
        read_metadata _read_jsonl _read_csv _read_texts _read_part _settings
        TextToImage.from_pretrained to_parts TextToImage.save_pretrained _from_parts
        save_classifier load_classifier
    """,
    "process": """
        pick_precision MixedPrecision check_processes Interrupted StopSignals OneProcess seed_dropout own_streams spared_streams
        _global_streams _load_streams _interrupted _add_gradients
    """,
    "cpu form": """
        join_weights join_projections upsample_joined attend_columns
        attend_by_products attend_joined _channel_by_channel is_plain _faster_upsample _faster_attention
        faster_on_cpu _compiled optimize_for_sampling keep_freed_memory
    """,
    # what chapters teach in a section of their own: in which range images are (8), which parts fit (22)
    "subject": """
        check_data _check_fit
    """,
    "check": """
        _refuse_shards
    """,
}
# What a chapter is about counts as its subject, whatever it is elsewhere.
SUBJECTS = {
    "checks": "check",
    "files": "disk",
    "fast": "cpu form",
    "pictures": "disk",
    "runs": "disk",
    "processes": "process",
    "progress": "process",
    "precision": "process",
}
LIBRARIES = {"torch", "nn", "F", "math", "np", "random"}  # of these a function is called, not a method
SILENT = ast.expr_context  # says of a name only whether it is read or written
TAGS = {name: purpose for purpose, names in PURPOSES.items() for name in names.split()}
WORDS_A_MINUTE, LINES_A_MINUTE = 180, 25  # of somebody who reads text and skims code
ORDER = ("subject", "check", "disk", "process", "cpu form")


def is_code(line):
    """Tell whether a line is neither blank nor only a comment."""
    return bool(line.strip()) and not line.strip().startswith("#")


def count_words(text):
    """Count the words of Markdown: a formula is one word, code and directives are none."""
    text = re.sub(r"\$\$.*?\$\$(?: \([\w-]+\))?|\$[^$\n]+\$", " formula ", text, flags=re.S)
    text = re.sub(r"^`{3,}.*$|^:[\w-]+:.*$", "", text, flags=re.M)
    return len(re.findall(r"[^\W\d_][\w'-]*", re.sub(r"`[^`\n]+`|\]\([^)]*\)", " ", text)))


def in_exercises(notebook):
    """Tell of each cell whether it belongs to the section of exercises."""
    inside, told = False, []
    for cell in notebook.cells:
        headings = re.findall(r"^(#+) +(.*)", cell.source, re.M) if cell.kind == "markdown" else []
        for level, title in headings:
            if re.match(r"(exercises|solutions?)\b", title, re.I):
                inside = True
            elif len(level) <= 2:
                inside = False
        inside = inside or (cell.kind == "markdown" and "```{exercise}" in cell.source)
        told.append(inside)
    return told


def measure_chapter(notebook):
    """Measure a notebook: a row of the first table."""
    told = in_exercises(notebook)
    words = [count_words(cell.source) if cell.kind == "markdown" else 0 for cell in notebook.cells]
    installs = [cell.kind == "code" and "google.colab" in cell.source for cell in notebook.cells]
    lines = [
        cell.source.splitlines() if cell.kind == "code" and not install else []
        for cell, install in zip(notebook.cells, installs, strict=True)
    ]
    code = [sum(map(is_code, cell)) for cell in lines]
    folded = ["hide-input" in cell.tags for cell in notebook.cells]
    pictured = [
        i for i, cell in enumerate(notebook.cells) if any("image/png" in o for o in cell.outputs)
    ]
    every = [line for cell in lines for line in cell]
    return {
        "chapter": notebook.name,
        "words": sum(words),
        "in ex.": sum(n for n, ex in zip(words, told, strict=True) if ex),
        "code": sum(code),
        "in ex. ": sum(n for n, ex in zip(code, told, strict=True) if ex),
        "shown": sum(
            n for n, ex, fold in zip(code, told, folded, strict=True) if not ex and not fold
        ),
        "cells": len(notebook.cells),
        "longest": max(map(len, lines)),
        "> 88": sum(len(line) > 88 for line in every),
        "> 100": sum(len(line) > 100 for line in every),
        "figure": sum(words[: pictured[0]]) if pictured else "-",
        "pairs": sum(count_pairs(cell.code) for cell in notebook.code),
    }


def functions(tree):
    """Yield every function and method in some code, those inside others too."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def body_of(function):
    """List the statements of a function without its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


def body_span(function):
    """Give the first and last line of a function's body; None if there is only a docstring."""
    body = body_of(function)
    first = body is not function.body and function.body[0].end_lineno + 1  # after the docstring
    return (first or body[0].lineno, body[-1].end_lineno) if body else None


def comment_lines(source):
    """Map the lines that hold a comment to themselves."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def measure_bodies(source):
    """Return each function's syntax nodes a line; comments and lines of code in all bodies."""
    lines, commented = source.splitlines(), comment_lines(source)
    density, inside = [], set()
    for function in functions(ast.parse(source)):
        if span := body_span(function):
            numbers = range(span[0], span[1] + 1)
            inside |= set(numbers)
            found = [node for statement in body_of(function) for node in ast.walk(statement)]
            nodes = sum(not isinstance(node, SILENT) for node in found)
            density.append(nodes / max(1, sum(is_code(lines[i - 1]) for i in numbers)))
    return density, len(inside & commented), sum(is_code(lines[i - 1]) for i in inside)


def bound_names(tree):
    """List the names that code binds at its top level, but for imports."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [
                n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)
            ]
    return names


def early_references(trees):
    """Count the references to a name that a later cell defines, and no earlier one."""
    bound = [set(bound_names(tree)) for tree in trees]
    count = 0
    for i, tree in enumerate(trees):
        later = set().union(*bound[i + 1 :]) - set().union(*bound[: i + 1])
        count += sum(isinstance(node, ast.Name) and node.id in later for node in ast.walk(tree))
    return count


def are_alike(values):
    """Tell whether the values of a tuple are of one kind.

    Calls are, if they call one name (`x.to(d), y.to(d)`), methods of one object (`x.min(), x.max()`)
    or different functions with the same arguments (`math.cos(a), math.sin(a)`).
    """
    values = [getattr(value, "operand", value) for value in values]  # -1 is a number
    if len({type(value) for value in values}) > 1:
        return False
    if not isinstance(values[0], ast.Call):
        return True
    called, names, arguments = set(), set(), set()
    for call in values:
        owner, _, name = ast.unparse(call.func).rpartition(".")
        called.add("" if owner in LIBRARIES else owner)
        names.add(name)
        arguments.add(tuple(ast.unparse(a) for a in (*call.args, *call.keywords)))
    methods_of_one = len(called) == 1 and "" not in called
    return len(names) == 1 or len(arguments) == 1 or methods_of_one


def unlike_pairs(source):
    """List the assignments of a tuple whose values are not of one kind."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            unpacked = isinstance(node.targets[0], ast.Tuple)
            if unpacked and not are_alike(node.value.elts):
                found.append(ast.unparse(node))
    return found


def count_pairs(source):
    """Count the assignments of a tuple whose values are not of one kind."""
    return len(unlike_pairs(source))


def measure_module(notebook):
    """Measure what a notebook exports: a row of the second table."""
    cells = [cell for cell in notebook.code if cell.exported]
    source = "\n\n".join(cell.code for cell in cells)
    density, comments, lines = measure_bodies(source)
    names = [node.name for cell in cells for node in cell.definitions if node.name != "_"]
    private = sum(name.startswith("_") for name in names)
    return {
        "module": notebook.module,
        "lines": sum(map(is_code, source.splitlines())),
        "functions": len(density),
        "nodes": round(median(density), 1) if density else "-",
        "comments": round(100 * comments / lines, 1) if lines else "-",
        "private": private,
        "public": len(names) - private,
        "pairs": count_pairs(source),
        "early": early_references([cell.tree for cell in cells]),
    }, density


def is_refusal(node):
    """Tell whether a statement only checks: it calls a check, or ends in an error."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = node.value.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return name.startswith(("check_", "_check", "_refuse"))
    return isinstance(node, ast.Raise) or (
        isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and not node.orelse
    )


def purpose_of(name, owner=""):
    """Name the purpose of a function or class."""
    for key in (f"{owner}.{name}", owner, name):
        if key in TAGS:
            return TAGS[key]
    return "check" if re.match(r"_?check_", name) else "subject"


def lines_of(node, lines):
    """List the numbers of a definition's lines of code, its decorators included."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return {i for i in range(first, node.end_lineno + 1) if is_code(lines[i - 1])}


def measure_purposes(notebook):
    """Count the lines of a module's functions and classes by purpose: a row of the third table."""
    counts = Counter()
    for cell in (cell for cell in notebook.code if cell.exported):
        lines, given = cell.code.splitlines(), {}
        for node in cell.definitions:
            patched = [a.annotation for a in getattr(node, "args", ast.arguments([], [])).args[:1]]
            owner = getattr(patched[0], "id", "") if patched and node.decorator_list else ""
            given |= dict.fromkeys(lines_of(node, lines), purpose_of(node.name, owner))
            for method in functions(node) if isinstance(node, ast.ClassDef) else ():
                purpose = purpose_of(method.name, node.name)
                given |= dict.fromkeys(lines_of(method, lines), purpose)
            for statement in ast.walk(node):
                if is_refusal(statement):
                    numbers = lines_of(statement, lines)
                    given |= {i: "check" for i in numbers if given.get(i) == "subject"}
        counts.update(given.values())
    if (own := SUBJECTS.get(notebook.module)) is not None:
        counts["subject"] += counts.pop(own, 0)
    total = sum(counts.values())
    row = {"module": notebook.module, "lines": total} | {name: counts[name] for name in ORDER}
    return row | {"share": f"{100 * counts['subject'] / total:.0f} %" if total else "-"}


def table(rows):
    """Lay rows, given as dicts, out as text."""
    heads = list(rows[0])
    widths = [max(len(head.strip()), *(len(str(row[head])) for row in rows)) for head in heads]

    def line(cells):
        first, *rest = (str(c).strip() for c in cells)
        padded = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *padded])

    return "\n".join([line(heads), *(line(row.values()) for row in rows)])


def total(rows, name, kinds):
    """Write the last row of a table; `kinds` says of some columns how they are summed up."""
    last = dict.fromkeys(rows[0], "") | {next(iter(rows[0])): name}
    for head, how in kinds.items():
        last[head] = how([row[head] for row in rows if not isinstance(row[head], str)])
    return last


def report(root):
    """Measure a copy of the repository and write the three tables."""
    book = rules.read_book(root)
    modules = [notebook for notebook in book if notebook.module]
    chapters = [measure_chapter(notebook) for notebook in book]
    sums = ("words", "in ex.", "code", "in ex. ", "cells", "> 88", "> 100", "pairs")
    chapters.append(total(chapters, "all", dict.fromkeys(sums, sum) | {"longest": max}))
    measured = [measure_module(notebook) for notebook in modules]
    rows = [row for row, _ in measured]
    rows.append(
        total(rows, "all", dict.fromkeys(("lines", "functions", "private", "public", "early"), sum))
    )
    rows[-1]["nodes"] = round(median(n for _, density in measured for n in density), 1)
    weighted = sum(row["comments"] * row["lines"] for row in rows[:-1] if row["comments"] != "-")
    rows[-1]["comments"] = round(weighted / rows[-1]["lines"], 1)
    purposes = [measure_purposes(notebook) for notebook in modules]
    purposes.append(total(purposes, "all", dict.fromkeys(("lines", *ORDER), sum)))
    purposes[-1]["share"] = f"{100 * purposes[-1]['subject'] / purposes[-1]['lines']:.0f} %"
    titles = ("Chapters", "Modules", "Purposes of exported lines")
    texts = [f"{t}\n\n{table(r)}" for t, r in zip(titles, (chapters, rows, purposes), strict=True)]
    return "\n\n\n".join(texts)


def reading_hours(root):
    """Return the hours that each chapter takes whoever reads text and skims code, exercises left out."""
    hours = {}
    for row in map(measure_chapter, rules.read_book(root)):
        words, lines = row["words"] - row["in ex."], row["code"] - row["in ex. "]
        minutes = words / WORDS_A_MINUTE + lines / LINES_A_MINUTE
        hours[row["chapter"].split("_")[0]] = round(minutes / 60, 2)
    return {"words a minute": WORDS_A_MINUTE, "lines a minute": LINES_A_MINUTE, "hours": hours}


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=rules.ROOT)
    parser.add_argument("--hours", type=Path, metavar="FILE", help="write the hours of reading")
    args = parser.parse_args()
    if args.hours:
        args.hours.write_text(json.dumps(reading_hours(args.folder), indent=1) + "\n", "utf-8")
        return
    print(report(args.folder))


if __name__ == "__main__":
    main()
