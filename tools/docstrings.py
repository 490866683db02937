"""Write the comment beside each parameter into the docstring, where `help()`, editors and type checkers show it.

Usage: python tools/docstrings.py FOLDER
setup.py does so with the modules of a wheel. Notebooks and sources stay as they are: a one-line docstring, and a comment beside each
parameter. A second run changes nothing.
"""

import ast
import io
import sys
import textwrap
import tokenize
from pathlib import Path

WIDEST = 100
TITLES = ("Args:", "Returns:")


def comments_by_line(source):
    """Map the number of each line that ends in a comment to the comment's text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokens
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
    }


def parameters_of(function, comments):
    """List the (name, comment) pairs of a function's parameters and of its result."""
    given, args = [], function.args
    places = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(places) - len(args.defaults)) + args.defaults
    given += zip(places, defaults, strict=True)
    given += [(args.vararg, None)] if args.vararg else []
    given += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    last_lines = [max(arg.end_lineno, default.end_lineno if default else 0) for arg, default in given]
    pairs = []
    for (arg, _), line in zip(given, last_lines, strict=True):
        alone = last_lines.count(line) == 1  # a comment beside several belongs to none of them
        if alone and line in comments and line < function.body[0].lineno:
            pairs.append((arg.arg, comments[line]))
    returned = comments.get(function.returns.end_lineno) if function.returns else None
    if returned and function.returns.end_lineno not in last_lines:
        pairs.append(("return", returned))
    return pairs


def fields_of(cls, comments):
    """List the (name, comment) pairs of the fields of a dataclass."""
    fields = [node for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return [(node.target.id, comments[node.end_lineno]) for node in fields if node.end_lineno in comments]


def is_dataclass(cls):
    """Tell whether a class is decorated as a dataclass."""
    return any("dataclass" in ast.unparse(decorator) for decorator in cls.decorator_list)


def documented(tree, comments):
    """Yield each function or class of a module, methods included, with the pairs that its docstring shall list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            makers = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            pairs = parameters_of(makers[0], comments) if makers else []
            yield node, fields_of(node, comments) if is_dataclass(node) else pairs
        elif isinstance(node, ast.FunctionDef) and node.name != "__init__":
            yield node, parameters_of(node, comments)


def section(pairs, indent):
    """Write the lines that follow the first line of a docstring."""
    lines = []
    for title in TITLES:
        chosen = [(name, text) for name, text in pairs if (name == "return") == (title == "Returns:")]
        lines += ["", f"{indent}{title}"] if chosen else []
        for name, text in chosen:
            text = text.replace("\\", "\\\\").replace('"""', "'''")
            first = f"{indent}    {text}" if name == "return" else f"{indent}    {name}: {text}"
            lines += textwrap.wrap(first, WIDEST, subsequent_indent=f"{indent}        ", break_long_words=False)
    return [*lines, indent]


def first_part(text):
    """Cut a docstring before the sections that this tool writes."""
    ends = [text.find(f"\n\n{' ' * indent}{title}") for title in TITLES for indent in (4, 8, 12)]
    return text[: min((end for end in ends if end >= 0), default=len(text))].rstrip()


def with_parameters(source):
    """Return the source of a module whose docstrings list what is said beside their parameters."""
    comments, lines = comments_by_line(source), source.split("\n")
    changes = []
    for node, pairs in documented(ast.parse(source), comments):
        text = node.body[0] if isinstance(node.body[0], ast.Expr) else None
        is_text = text is not None and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        if pairs and is_text and lines[text.lineno - 1].lstrip().startswith('"""'):
            changes.append((text.lineno, text.end_lineno, text.col_offset, pairs))
    for start, end, column, pairs in sorted(changes, reverse=True):
        indent = " " * column
        old = "\n".join(lines[start - 1 : end]).rstrip()
        body = first_part(old.removesuffix('"""'))
        lines[start - 1 : end] = [*body.split("\n"), *section(pairs, indent)[:-1], f'{indent}"""']
    return "\n".join(lines)


def write(folder):
    """Complete the docstrings of all exported modules of a folder."""
    for path in sorted(Path(folder).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "# AUTOGENERATED! DO NOT EDIT! File to edit:" in source:
            path.write_text(with_parameters(source), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
