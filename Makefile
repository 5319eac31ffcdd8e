# `make demo` and `make test` need nothing but Python 3.11 or newer (with pip)
# and a C++ compiler; both set up .venv themselves. The last check of `make
# test` opens the web book in a browser: the first looks for one, or gets one.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
    $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
STAMP := .venv/installed
# chapters executed, and test processes run, at the same time: one core each
JOBS ?= 2
# wheels that run on Python 3.11 although their metadata asks for a newer one
NO_DEPS = $(shell sed -n 's/^\# no-deps: //p' requirements.txt)

export OMP_NUM_THREADS ?= 1
export PYTHONHASHSEED ?= 0

.PHONY: demo test tangle freeze book serve status clean gpu \
        find-browser check-tangle check-frozen lint unit notebooks browser
.NOTPARALLEL:

# what the user of the demo says, one message each; the second conversation
# has two tools, a calculator and the date
SUMS = "What is 347 + 285?" "Take 88 from 403."
SAID = "Hello!" "My cat is called Zorali." "Tell me a story about a fox." \
    "What is 12 * 34?" "What is my cat called?"
CHAT = $(BIN)/python -m gptoss chat --temperature 0 --transcript

demo: $(STAMP)
	$(BIN)/python -m gptoss generate --temperature 0 --prompt "Once upon a time"
	@printf '%s\n' $(SUMS) | $(CHAT) --no-tools
	@printf '%s\n' $(SAID) | $(CHAT)

# From cheap to dear; stops at the first that fails.
test: find-browser check-tangle check-frozen lint unit notebooks book browser
	@echo "== every check passed"

$(STAMP): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; set PYTHON="; \
	    exit 1; }
	@echo "== installing into .venv (a few minutes, once)"
	@# Debian has venv's installer of pip in a package of its own
	@if $(PYTHON) -c "import ensurepip" 2>/dev/null; \
	    then $(PYTHON) -m venv .venv; \
	    else $(PYTHON) -m venv --without-pip .venv && \
	    $(PYTHON) -m pip --python $(BIN)/python --quiet install pip; fi
	@$(PIP) install -r requirements.txt
	@$(PIP) install --no-deps --ignore-requires-python $(NO_DEPS)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@# the font cache is announced on stderr, which no notebook should hold
	@$(BIN)/python -c "import matplotlib.font_manager" 2>/dev/null
	@touch $@

find-browser: $(STAMP)
	@echo "== a browser for the last check"
	@$(BIN)/python tests/browser/find_browser.py

check-tangle: $(STAMP)
	@echo "== gptoss/ and book/api.md are what the chapters export"
	@$(BIN)/python book/_ext/tangle.py --check

check-frozen: $(STAMP)
	@echo "== every notebook is its chapter, executed"
	@$(BIN)/python book/_ext/tangle.py --freeze --check

lint: $(STAMP)
	@echo "== ruff"
	@$(BIN)/ruff check --quiet .

unit: $(STAMP)
	@echo "== pytest"
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup \
	    --ignore=tests/browser tests
	@echo "== pytest, with the kernels that users run (tests/conftest.py)"
	@GPTOSS_KERNELS=auto HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs \
	    -n $(JOBS) --dist loadgroup -m both_paths --ignore=tests/browser tests

notebooks: $(STAMP)
	@echo "== nbval: every output is what its cell prints now"
	@HF_HUB_OFFLINE=1 GPTOSS_KERNELS=torch $(BIN)/python -m pytest \
	    -n $(JOBS) --dist loadscope --nbval --nbval-kernel-name python3 \
	    --junitxml=_build/notebooks.xml book

book: $(STAMP)
	@echo "== web book, warnings are errors"
	@# --all: a page that is not read again does not repeat its warnings
	@$(BIN)/jupyter-book build --all --quiet -W --keep-going . >/dev/null
	@echo "_build/html/index.html"

browser: find-browser
	@echo "== the web book in Chromium"
	@$(BIN)/python -m pytest -n $(JOBS) --dist load tests/browser

tangle: $(STAMP)
	@$(BIN)/python book/_ext/tangle.py

freeze: tangle
	@$(BIN)/python book/_ext/tangle.py --freeze -j $(JOBS)

# the run times that the status page shows where no notebook was run
status: notebooks
	@$(BIN)/python book/_ext/webbook.py _build/notebooks.xml
	@echo "book/status.json"

serve: book
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

# needs a CUDA GPU, torch and triton, and installs nothing: GPU="--dry" tries
# it on a CPU, GPU_PYTHON names another interpreter
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),python3)
gpu:
	@$(GPU_PYTHON) bench/gpu.py $(GPU)

clean:
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache .hypothesis
