PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
METADATA = settings.ini setup.py pyproject.toml
part ?= 2

export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast docs readme outputs prepare hooks bump clean sync style fast \
	notebooks notebooks-1 notebooks-2 pytests pytests-1 pytests-2

help: ## Show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-16s %s\n", $$1, $$2}'

demo: .venv/demo ## Train on the embedded brain sample: a table, and a report to open
	$(BIN)/semisup-seg demo

test: .venv/dev ## Check everything: export, style, notebooks, tests
	$(MAKE) sync style
	$(MAKE) -j2 notebooks-1 pytests-1 notebooks-2 pytests-2
	$(BIN)/python tests/aims.py

test-fast: .venv/dev ## The daily check, less than a minute: export, style, quick tests
	$(MAKE) -j2 fast sync style

sync: .venv/dev
	$(BIN)/pytest tests/test_sync.py

style: .venv/dev
	$(BIN)/chkstyle nbs tests .ci

# Two at a time, a core each: halves that another may begin with when it is done earlier
notebooks: notebooks-1 notebooks-2
pytests: pytests-1 pytests-2
notebooks-1 notebooks-2 pytests-1 pytests-2 fast: export OMP_NUM_THREADS = 1
notebooks-1: .venv/dev
	$(BIN)/nbdev-test --n-workers 0 --file-re '^[0-3]'
notebooks-2: .venv/dev
	$(BIN)/nbdev-test --n-workers 0 --file-re '^[^0-3]'
pytests-1: .venv/dev
	$(BIN)/pytest tests/test_[a-d]*.py
pytests-2: .venv/dev
	$(BIN)/pytest --ignore tests/test_sync.py tests/test_[e-z]*.py
fast: .venv/dev
	$(BIN)/pytest -m 'not slow' --ignore tests/test_sync.py

docs: .venv/dev ## Build the website into _docs
	$(BIN)/python .ci/build_docs.py site

readme: .venv/dev ## Write README.md from nbs/index.ipynb
	$(BIN)/python .ci/build_docs.py readme

outputs: export PYTHONWARNINGS = ignore
outputs: .venv/dev ## Run every notebook and keep its outputs for the website
	$(BIN)/nbdev-test --n-workers 0 --save
	$(BIN)/nbdev-clean

prepare: .venv/dev ## Before a commit: export, clean, write README.md, test
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python .ci/build_docs.py readme
	$(MAKE) test

hooks: .venv/dev ## Once per clone: merge notebooks cell by cell, export and clean them at each commit
	$(BIN)/nbdev-install-hooks
	$(BIN)/pre-commit install

bump: .venv/dev ## Raise the version: part=0 major, 1 minor, 2 patch
	$(BIN)/nbdev-bump-version --part $(part)
	sed -i.bak "s/^version *=.*/version = $$($(BIN)/python -c 'import semisup_seg as s; print(s.__version__)')/" settings.ini
	rm settings.ini.bak

clean: ## Remove what was built
	rm -rf .venv _docs _proc build dist *.egg-info

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# A stamp holds the metadata that was installed: touching a file does not install again.
.venv/demo: $(METADATA) | .venv/bin/pip
	cat $(METADATA) | cmp -s - $@ || $(PIP) install -e '.[offline]'
	cat $(METADATA) > $@

.venv/dev: $(METADATA) | .venv/bin/pip
	cat $(METADATA) | cmp -s - $@ || $(PIP) install -e '.[dev]'
	cat $(METADATA) | tee .venv/demo > $@
