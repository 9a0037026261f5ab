# glasses_nb: `make help` lists the targets. Needed: Python 3.11 or newer, git, make.
SHELL = /bin/sh
PY = .venv/bin/python
PAPER =
BROWSE = $(CURDIR)/_build/html/index.html
export PYTHON

.PHONY: help setup run test lab sync site bench artifacts
.DEFAULT_GOAL = help

help:
	@echo 'make run              set up, run every notebook, build the site   (the main job)'
	@echo 'make run PAPER=name   the same for one paper, such as PAPER=ademamix'
	@echo 'make test             set up, then every check'
	@echo 'make lab              JupyterLab on the notebooks'
	@echo 'make sync             clean, export, README: before a commit'
	@echo 'make site             the site alone, from the outputs that the notebooks store'
	@echo 'make bench            the benchmarks (tests/bench)'
	@echo 'make artifacts PAPER=name   the long runs behind the shipped tables and weights'
	@echo
	@echo 'PYTHON=/path/to/python3 chooses the interpreter. On Linux without a GPU,'
	@echo 'PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves a large download.'

setup:
	@sh tools/setup.sh

run: setup
	@$(PY) tools/nb_run.py $(if $(PAPER),--paper $(PAPER))
	@$(PY) tools/make_readme.py
	@$(MAKE) --no-print-directory site

site: setup
	@$(PY) tools/build_docs.py
	@echo 'open file://$(BROWSE)'
	@echo 'or serve it: $(PY) -m http.server -d _build/html   and open http://localhost:8000'

test: setup
	@echo '== exported modules, notebooks and README in step'
	@$(PY) tools/check_sync.py
	@echo '== notebooks'
	@$(PY) tools/nb_run.py --check --workers 2
	@echo '== tests'
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q --durations=10 tests

lab: setup
	@.venv/bin/jupyter-lab nbs

sync: setup
	@.venv/bin/nbdev_clean
	@.venv/bin/nbdev_export
	@$(PY) tools/make_readme.py

bench: setup
	@for f in tests/bench/bench_*.py; do test -f "$$f" || continue; echo "== $$f"; $(PY) "$$f" || exit 1; done

artifacts: setup
	@test -n '$(PAPER)' || { echo 'which paper? make artifacts PAPER=name' >&2; exit 1; }
	@test -f 'tools/artifacts/$(PAPER).py' || { \
	  echo "no long runs for '$(PAPER)': there is no tools/artifacts/$(PAPER).py" >&2; exit 1; }
	@$(PY) tools/artifacts/$(PAPER).py
