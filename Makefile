# make book and make test set up what they need; `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
LOCK := $(UV) pip compile --prerelease disallow --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 1200 --nbval-sanitize-with tests/nbval_sanitize.cfg

# Another build of PyTorch for a new .venv, such as the one without CUDA: the address of an index that has it.
TORCH_INDEX ?=
CUDA := torch|torchvision|triton|cuda-[a-z0-9-]+|nvidia-[a-z0-9-]+

# Settings of another Python or Jupyter on this machine must not reach the notebooks' kernels.
unexport JUPYTER_PATH JUPYTER_CONFIG_PATH PYTHONPATH PYTHONHOME MPLBACKEND VIRTUAL_ENV TQDM_DISABLE

.DEFAULT_GOAL := help
.PHONY: export help setup book test check look axe pdf bench slow own exercises lab lock address gpu fresh oldest clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(VENV)/.ready ## create .venv with the pinned packages and this one

$(VENV)/.ready: requirements-uv.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another with: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Setting up $(VENV) (downloads $(if $(TORCH_INDEX),,about 3 GB )the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-uv.txt
ifeq ($(TORCH_INDEX),)
	$(UV) pip sync --python $(BIN)/python --require-hashes requirements-dev.txt
else  # all but PyTorch as pinned; PyTorch in the pinned version, of which the lock knows only the hashes of the other build
	awk '/^[a-z]/ { left = /^($(CUDA))==/ } !left' requirements-dev.txt > $(VENV)/requirements.txt
	$(UV) pip sync --python $(BIN)/python --require-hashes $(VENV)/requirements.txt
	$(UV) pip install --python $(BIN)/python --default-index $(TORCH_INDEX) $$(grep -oE '^torch(vision)?==[^ ]+' requirements-dev.txt)
endif
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@mkdir -p $(VENV)/etc/ipython  # kernels here speak to this machine alone: they need not warn that it is unencrypted
	@echo "c.IPKernelApp.log_level = 40" > $(VENV)/etc/ipython/ipython_kernel_config.py
	@touch $@

book: setup ## run the notebooks whose outputs are stale and render the book to _build/html
	TQDM_DISABLE=1 $(BIN)/jupyter-book build . -W --keep-going  # no progress bars on pages
	@echo; echo "The book is in _build/html. Open file://$(CURDIR)/_build/html/index.html"

test: setup ## everything that continuous integration runs
	@PATH="$(CURDIR)/$(BIN):$$PATH" NBVAL="$(NBVAL)" bash tools/test.sh all

check: setup ## the fast part of the tests: export, clean notebooks, lint, the project's own rules
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash tools/test.sh fast

look: setup ## open all pages of the built book in Chromium at three widths and list what is cut, too small, without pictures or, after make axe, not accessible
	$(BIN)/python tools/look.py _build/html --pictures _build/look $(if $(wildcard tools/node_modules/axe-core),--access)

axe: ## fetch axe-core, in the pinned version, with which make look and tests/test_access.py judge access (needs npm)
	npm ci --prefix tools --ignore-scripts --no-audit --no-fund

pdf: book ## print the built book as one PDF, _build/ddpm.pdf, by Chromium (some minutes)
	$(BIN)/python tools/pdf.py _build/html --out _build/ddpm.pdf

bench: setup ## measure the package beside its peers (more than two hours on two cores) and write what the book's page on performance shows
	$(UV) pip install --quiet --python $(BIN)/python --target studies/.peers --no-deps --require-hashes -r requirements-bench.txt
	PYTHONPATH=$(CURDIR)/studies/.peers $(BIN)/python studies/bench.py --out ddpm_nb/measured/performance-cpu.json

slow: setup ## run the notebooks as on two cores without bfloat16, their clock not slowed, and print the slowest cells of each
	$(BIN)/python tools/slow.py

own: setup ## run the chapters that take pictures of one's own on such pictures (minutes)
	OWN_PICTURES=1 $(BIN)/python -m pytest -q tests/test_teaching.py -k ones_own

exercises: setup ## write the notebooks without solutions, cells to fill and the checks that judge them, into _exercises
	$(BIN)/python tools/exercises.py

lab: setup ## open the notebooks in JupyterLab
	$(UV) pip install --quiet --python $(BIN)/python --constraint requirements-dev.txt jupyterlab
	$(BIN)/jupyter lab nbs

lock: setup ## renew the pins in requirements-*.txt
	$(LOCK) requirements-uv.in -o requirements-uv.txt
	$(LOCK) requirements-dev.in -o requirements-dev.txt
	$(LOCK) --no-deps requirements-bench.in -o requirements-bench.txt

export: setup ## write ddpm_nb from the notebooks (nbdev_export)
	$(BIN)/python tools/notebooks.py export

address: ## write the address in settings.ini into the notebooks and pyproject.toml
	$(PYTHON) tools/address.py

gpu: setup ## do all that needs a GPU on this machine's GPU, in at most fifteen minutes, and write ddpm_nb/measured/gpu.json
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "no CUDA device here"'
	$(BIN)/python studies/gpu.py

oldest: ## run the tests that need no development tool on the oldest versions that pyproject.toml admits
	bash tools/versions.sh oldest lowest-direct "$(TESTS)"

fresh: ## run tests and notebooks on the newest versions that pyproject.toml allows, and once more what the wheel alone can run
	$(PYTHON) -m venv .venv-fresh
	.venv-fresh/bin/python -m pip install --quiet --require-hashes -r requirements-uv.txt
	sed -E 's/^(torch|torchvision)==.*/\1/' requirements-dev.in > .venv-fresh/newest.in
	.venv-fresh/bin/uv pip install --quiet --upgrade --python .venv-fresh/bin/python -r .venv-fresh/newest.in -e .
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 .venv-fresh/bin/python -m pytest -q -n 2 --dist loadfile $(NBVAL) tests nbs
	bash tools/versions.sh newest highest "$(TESTS)"

clean: ## remove what was built, but not .venv
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
