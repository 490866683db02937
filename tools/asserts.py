"""Say what an assertion without a message compared: both sides, as numbers.

`tools/notebooks.py run` loads this into the kernel, so that a checked equation that fails shows by how much.
"""

import ast
import linecache

WIDTH = 200  # of what is shown of a side


def failed_assert(trace):
    """Return the frame and the syntax of the assertion that a traceback ends in; None where its source is not known."""
    while trace.tb_next:
        trace = trace.tb_next
    source = "".join(linecache.getlines(trace.tb_frame.f_code.co_filename))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    lines = [n for n in ast.walk(tree) if isinstance(n, ast.Assert) and n.lineno <= trace.tb_lineno <= n.end_lineno]
    return (trace.tb_frame, lines[-1].test) if lines else None


def sides(test):
    """Yield the expressions that a test compares: of each part of `and`, of `not`, of a comparison or of a call."""
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from sides(value)
    elif isinstance(test, ast.UnaryOp):
        yield from sides(test.operand)
    elif isinstance(test, ast.Compare):
        yield from (side for side in (test.left, *test.comparators) if not isinstance(side, ast.Constant))
    elif isinstance(test, ast.Call):
        inner = test.func.value if isinstance(test.func, ast.Attribute) else None
        if isinstance(inner, ast.Compare | ast.Call | ast.BinOp):  # such as (a < b).all()
            yield from sides(inner) if isinstance(inner, ast.Compare | ast.Call) else (inner,)
        yield from (arg for arg in test.args if not isinstance(arg, ast.Constant | ast.Lambda))
    else:
        yield test


def explain(error):
    """Return lines `expression = value` for what the failed assertion compared, evaluated once more."""
    found = failed_assert(error.__traceback__)
    if found is None:
        return ""
    frame, test = found
    lines = []
    for side in sides(test):
        try:
            value = eval(compile(ast.Expression(side), "<side>", "eval"), frame.f_globals, frame.f_locals)
            shown = " ".join(repr(value).split())
        except Exception as problem:  # it may not be there any more
            shown = f"({problem})"
        lines.append(f"{ast.unparse(side)} = {shown if len(shown) <= WIDTH else shown[:WIDTH] + ' ...'}")
    return "\n".join(lines)


def install(shell):
    """Let an IPython shell explain assertions that have no message."""

    def show(shell, kind, error, trace, tb_offset=None):
        if not error.args and (text := explain(error)):
            error.args = ("\n" + text,)
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((AssertionError,), show)
