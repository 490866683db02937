#!/usr/bin/env bash
# Run the checks one after another, each under a heading; the first failure ends the run. Called by the Makefile.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() {
    local title=$1 start=$SECONDS
    shift
    printf '\n=== %s\n' "$title"
    "$@"
    printf -- '--- %d s\n' "$((SECONDS - start))"
}

copy_notebooks() {
    mkdir "$work/$1"
    cp -r settings.ini nbs "$work/$1"
}

export_in_sync() {
    copy_notebooks export
    mkdir "$work/export/ddpm_nb"
    cp ddpm_nb/__main__.py ddpm_nb/py.typed "$work/export/ddpm_nb"  # written by hand
    (cd "$work/export" && nbdev_export)
    diff -ru -x __pycache__ -x weights -x classifiers -x measured -x pipelines "$work/export/ddpm_nb" ddpm_nb ||
        { echo "run make export, and commit ddpm_nb"; return 1; }
}

notebooks_clean() {
    copy_notebooks clean
    (cd "$work/clean" && nbdev_clean)
    diff -rq -x .ipynb_checkpoints "$work/clean/nbs" nbs || { echo "run nbdev_clean and commit the notebooks"; return 1; }
}

committed_book() {
    rm -rf _build/committed/_build/html  # the page of a chapter that was renamed would stay
    BOOK_EXECUTE=off jupyter-book build . --path-output _build/committed --quiet -W --keep-going
}

address() {
    # On GitHub, a copy that still names another repository would publish links to it; a pull request comes from anywhere.
    [ -z "${GITHUB_REPOSITORY:-}" ] || [ "${GITHUB_EVENT_NAME:-}" = pull_request ] || python tools/address.py --check "$GITHUB_REPOSITORY"
}

build_wheel() {
    rm -rf build  # setuptools would add the modules that were renamed
    python -m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir "$work" .
    python -m zipfile -e "$work"/*.whl "$work/wheel"
    grep -q "Args:" "$work/wheel/ddpm_nb/forward.py" || { echo "the wheel's docstrings lack the texts of parameters"; return 1; }
}

notebooks_from_the_wheel() {
    # As on Colab: the notebook files and the installed package, and nothing else of the repository.
    mkdir -p "$work/alone/tests"
    cp -r nbs conftest.py "$work/alone"
    cp tests/nbval_sanitize.cfg "$work/alone/tests"  # which differences of outputs do not count
    cd "$work/alone"
    PYTHONPATH="$work/wheel" python -c 'import ddpm_nb, sys; sys.exit("wheel" not in ddpm_nb.__file__)'
    TQDM_DISABLE=1 PYTHONPATH="$work/wheel" pytest -q -n 2 --dist loadfile --durations=10 $NBVAL nbs
}

step "the address" address
step "ddpm_nb is what the notebooks export" export_in_sync
step "notebooks are clean" notebooks_clean
step "lint" ruff check --quiet .
if [ "${1:-all}" = fast ]; then
    # all that CONTRIBUTING.md calls a rule: of notebooks and package, of what the site and README show, of devices, misuse and plans
    step "the project's rules" pytest -q tests/test_project.py tests/test_equations.py tests/test_glossary.py tests/test_docstrings.py \
        tests/test_figures.py tests/test_touch.py tests/test_claims.py tests/test_fonts.py tests/test_first_picture.py tests/test_front.py \
        tests/test_measures.py tests/test_misuse.py tests/test_devices.py::test_every_public_name_is_walked \
        tests/test_teaching.py::test_plans_name_chapters_and_their_hours tests/test_progress.py::test_no_page_is_filled_by_bars \
        tests/test_readme.py::test_{make_targets,linked_files}_exist tests/test_readme.py::test_the_readme_says_what_was_measured_of_a_first_picture
    exit
fi
step "the book, from the committed outputs" committed_book
step "the site, and that its code would run" python tools/check_site.py _build/committed/_build/html
# Two processes with one thread each do more than one process with two.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
step "tests" pytest -q -rs -n 2 --dist loadfile --durations=10 tests  # and what was skipped, and why
step "the wheel" build_wheel
step "notebooks, in an empty folder with the wheel alone" notebooks_from_the_wheel
