# make demo   the whole road at nano size: photographs -> shards -> training -> registry -> endpoint -> picture
# make test   every test          make check   format, lint, types, layout          make bench   benchmarks
# make soak   the long tests: many kills, bad storage, load on the service
# Each target first installs what it needs into .venv, again only when the pins change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PINS   := $(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
STAMP  := $(VENV)/.installed-$(PINS)
OUT    ?= out/demo
# Dozens of processes import the same modules: each compiling them again would take minutes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test soak check bench format install programs clean

demo: $(STAMP)
	$(BIN)/python pipelines/demo.py --out $(OUT)

test: $(STAMP) programs
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --reruns 2

soak: $(STAMP) programs
	$(BIN)/python -m pytest -m soak -s

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

bench: $(STAMP)
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(STAMP)

programs:
	PYTHON=$(PYTHON) tests/install_programs.sh

# Compiled on all cores, which pip does not use; some packages hold files that are no Python of today.
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -j 0 -x '/(tests?|testing/_internal|transformers/models)/' $(VENV)/lib >/dev/null 2>&1 || true
	touch $@

clean:
	rm -rf out .mypy_cache .ruff_cache .pytest_cache
