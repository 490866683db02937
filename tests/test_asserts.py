"""A failed assertion of a notebook says both numbers."""

import asserts
import nbformat
import notebooks
import pytest
from nbclient.exceptions import CellExecutionError


def explained(tmp_path, code, **names):
    """Run code whose last assertion fails, and return what is said about it."""
    path = tmp_path / "cell.py"
    path.write_text(code)
    with pytest.raises(AssertionError) as caught:
        exec(compile(code, str(path), "exec"), names)
    return asserts.explain(caught.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("a = 2\nassert a + 1 == 4", "a + 1 = 3"),
        ("a, b = 1.5, 2\nassert abs(\n    a - b\n) < 0.1 * a", "abs(a - b) = 0.5\n0.1 * a = 0.15000000000000002"),
        ("import math\nassert math.isclose(math.pi, 3, abs_tol=0.1)", f"math.pi = {3.141592653589793}"),
        ("def f(x):\n    assert x > 0 and x < 2, ''\nf(5)", "x = 5\nx = 5"),
        ("assert not any([0, 1])", "[0, 1] = [0, 1]"),
        ("assert list(range(900)) == []", "list(range(900)) = [0, 1, 2"),
    ],
)
def test_both_sides_are_named(tmp_path, code, said):
    found = explained(tmp_path, code)
    assert found.startswith(said)
    assert len(found) < 3 * asserts.WIDTH


def test_code_without_a_source_is_left_alone():
    with pytest.raises(AssertionError) as caught:
        exec(compile("assert 1 > 2", "<nowhere>", "exec"))
    assert asserts.explain(caught.value) == ""


def test_running_a_notebook_shows_them(tmp_path):
    nb = nbformat.v4.new_notebook(metadata=notebooks.KERNEL)
    nb.cells = [nbformat.v4.new_code_cell("x = 2\nassert 3 * x == x + 5")]
    path = tmp_path / "01_x.ipynb"
    nbformat.write(nb, path)
    with pytest.raises(CellExecutionError, match=r"3 \* x = 6\s+x \+ 5 = 7"):
        notebooks.execute(path, tmp_path)
