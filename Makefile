# Every target that needs the package creates .venv first, if there is none, with the pinned, tested versions. It is
# installed again only when pyproject.toml or constraints.txt has changed since. To use another interpreter:
#     make install PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# CUDA builds, which beside a CPU build of torch break transformers: a folder of their own, where only comparisons look.
PEERS := timm==1.0.31 torchvision==0.28.0
# gradio asks for an older Pillow than the rest is tested with: an environment that finds in .venv what it lacks itself.
DEMO := $(VENV)/demo
WORKERS ?= 2
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
empty :=
space := $(empty) $(empty)

# pip splits these two at blanks, so the path goes in as a URL. They reach the installs that pip itself starts to build
# a package: older versions of pip read the first one there, newer ones the second.
export PIP_CONSTRAINT := file://$(subst $(space),%20,$(CURDIR))/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

.PHONY: help install quickstart demo test test-slow test-demo proofs proofs-long lint bench clean
.DEFAULT_GOAL := help

help: ## Say what each target does.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## Create .venv and install the package with pinned, tested versions.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[dev]'
	$(RUN) -m pip install --no-deps --upgrade --target .venv-peers $(PEERS) || \
		echo "no $(PEERS): the tests that compare with timm will be skipped" >&2
	@touch $(STAMP)

quickstart: $(STAMP) ## Fit PCA, pre-train, probe and save a small l-DAE: no downloads, about 4 minutes on 2 cores.
	$(RUN) examples/quickstart.py

$(DEMO)/.installed: $(STAMP) constraints-demo.txt
	$(RUN) -m venv --without-pip $(DEMO)
	{ $(RUN) -c '$(SITE)'; echo "$(CURDIR)/src"; } > "$$($(DEMO)/bin/python -c '$(SITE)')/behind.pth"
	PIP_CONSTRAINT= $(DEMO)/bin/python -m pip install -c constraints-demo.txt -e '.[demo]'
	@touch $@

demo: $(DEMO)/.installed ## Show a page to play with a model, by default the one in model_cards: make demo MODEL=runs/mine
	$(DEMO)/bin/python examples/app.py $(MODEL)

test: $(STAMP) ## Run the quick tests, in WORKERS processes; those that read data sets need LDAE_DATA to name their folder.
	$(RUN) -m pytest -q --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) ## Run the tests that take minutes.
	$(RUN) -m pytest -q -m slow

test-demo: $(DEMO)/.installed ## Open that page in a headless Chromium, if there is one, and use it.
	PIP_CONSTRAINT= $(DEMO)/bin/python -m pip install -q -c constraints-demo.txt playwright
	$(DEMO)/bin/python -m pytest -q -rs tests/test_app.py

proofs: $(STAMP) ## Kill, signal, damage and starve small runs, upload to a failing Hub; print what was lost: 10 minutes.
	$(RUN) tests/proofs

proofs-long: $(STAMP) ## The same with larger numbers, and a run on CIFAR-10 if LDAE_DATA is set: about 30 minutes.
	$(RUN) tests/proofs --long

lint: $(STAMP) ## Check the code with ruff.
	$(RUN) -m ruff check .

bench: $(STAMP) ## Run the side-by-side measurements in benchmarks/.
	@for name in features pretraining_step import_time pca desk_row loading checkpoint ema sampling linear_probe; do echo "== $$name"; $(RUN) benchmarks/$$name.py || exit 1; done

clean: ## Remove build products and caches; .venv and runs stay.
	rm -rf build dist .pytest_cache .ruff_cache src/*.egg-info
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
