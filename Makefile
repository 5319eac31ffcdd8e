# `make demo` and `make test` need nothing but Python 3.11 (with venv and pip).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
JOBS ?= 2
STAMP = .venv/installed
# wheels that run on Python 3.11 although their metadata asks for a newer one
NO_DEPS = $(shell sed -n 's/^\# no-deps: //p' requirements.txt)

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore::DeprecationWarning

.PHONY: demo test tangle freeze book serve clean \
        check-tangle check-frozen lint unit notebooks

demo: $(STAMP)
	$(BIN)/python -m gptoss generate --temperature 0 --prompt "Once upon a time"

test: check-tangle check-frozen lint unit notebooks book
	@echo "every check passed"

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	    --ignore-requires-python $(NO_DEPS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
	    --no-build-isolation -e .
	touch $@

check-tangle: $(STAMP)
	$(BIN)/python gptoss/tangle.py --check

check-frozen: $(STAMP)
	$(BIN)/python gptoss/tangle.py --freeze --check

lint: $(STAMP)
	$(BIN)/ruff check --quiet .

unit: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup tests

notebooks: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --nbval \
	    --nbval-kernel-name python3 book

book: $(STAMP)
	$(BIN)/jupyter-book build --quiet -W --keep-going --path-output . \
	    --config _config.yml --toc _toc.yml book

tangle: $(STAMP)
	$(BIN)/python gptoss/tangle.py

freeze: tangle
	$(BIN)/python gptoss/tangle.py --freeze -j $(JOBS)

serve: book
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html 8000

clean:
	rm -rf _build build .pytest_cache .ruff_cache .hypothesis
