#!/usr/bin/env bash
# Run the tests that need no development tool on other versions of what the package needs, from the wheel alone, in .venv-NAME-PYTHON.
# Usage: tools/versions.sh NAME lowest-direct|highest [TESTS]     with PYTHONS="3.11 3.12 3.13" for some interpreters (default: 3.11)
# Called by the Makefile. An interpreter that is not here is fetched by uv where its source can be reached.
set -euo pipefail
name=$1 resolution=$2 tests=${3:-}
uv=$(command -v uv || ls .venv/bin/uv 2>/dev/null || true)
if [ -z "$uv" ]; then
    "${PYTHON:-python3}" -m venv .venv-uv
    .venv-uv/bin/python -m pip install --quiet --require-hashes -r requirements-uv.txt
    uv=.venv-uv/bin/uv
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TORCHINDUCTOR_CACHE_DIR="$work/compiled"  # half a file that a run left when it was killed would fail the next one
rm -rf build  # setuptools would add the modules that were renamed
"$uv" build --quiet --wheel --out-dir "$work" .
for python in ${PYTHONS:-3.11}; do
    here=.venv-$name-$python
    "$uv" venv --quiet --clear --python "$python" "$here"
    # what the tests import beyond the package comes in its newest version; compiled networks of old PyTorch need setuptools
    "$uv" pip install --quiet --python "$here/bin/python" --resolution "$resolution" -r pyproject.toml
    "$uv" pip install --quiet --python "$here/bin/python" --no-deps "$work"/*.whl
    "$uv" pip install --quiet --python "$here/bin/python" pytest hypothesis mpmath scipy setuptools --constraint <("$uv" pip freeze --python "$here/bin/python" | grep -v ddpm)
    "$uv" pip freeze --python "$here/bin/python" | grep -iE '^(torch|torchvision|accelerate|matplotlib|numpy|pillow|safetensors|scikit-learn|tqdm)==' | tr '\n' ' '
    mkdir -p "$work/$python"
    cp -r tests "$work/$python"
    chosen=${tests:-$("$here/bin/python" tools/portable.py)}
    (cd "$work/$python" && "$OLDPWD/$here/bin/python" -m pytest -q -p no:cacheprovider --strict-markers -o 'markers=gpu: needs a CUDA device
slow: takes more than a few seconds' $chosen)
done
