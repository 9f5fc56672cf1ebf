# Every target makes its own set-up: a virtual environment in .venv, the pinned packages, the compiled kernels.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export VENV PY TORCH_INDEX

PUBLIC := zinit_kernels
CPP := $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.inl')

.PHONY: build demo test lint format bench sanitize clean

build: $(VENV)/.ready
	@$(PYTHON) setup.py --quiet build_ext --inplace

demo: build
	$(PYTHON) -m model.demo

test: build sanitize
	$(PYTHON) -m pytest

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(PUBLIC)
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: build
	$(PYTHON) -m bench.cpu

sanitize:
	./tests/native/sanitize.sh

clean:
	rm -rf $(VENV) build dist *.egg-info zinit_kernels/*.so

$(VENV)/.ready: constraints.txt pyproject.toml scripts/bootstrap.sh
	./scripts/bootstrap.sh
	@touch $@
