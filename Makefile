# Every target does its own set-up in $(VENV): `make demo` or `make test` is all a fresh machine needs.
# Needs Python 3.11+ and a C++ compiler; scripts/find_python.sh says in one line which of them is missing.

VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h')
CXX_FORMATTED := $(CXX_SOURCES) $(wildcard tests/csrc/*.cpp)
RESULTS ?= results
BUILD_LOG := $(VENV)/build.log

.PHONY: help setup demo serve doctor test test-slow test-transformers-4 test-triton-3.6 test-ray test-oldest lock test-gpu check format docs
.PHONY: bench bench-tower regressions gpu-matrix gpu-model numerics report reproduce dist wheels test-wheels clean

help:  ## Lists the targets.
	@grep -hE '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

# Set-up, in four steps that each run again only when what they depend on changed

$(VENV)/.python: scripts/find_python.sh
	@python=$$(sh scripts/find_python.sh) && "$$python" -m venv $(VENV)
	@touch $@

# The releases of every dependency: a new one changes nothing here before `make lock`
LOCK := requirements/ci.txt

$(VENV)/.torch: $(VENV)/.python $(LOCK)
	@echo "lraee: installing torch, torchvision, triton and open_clip_torch into $(VENV)"
	@$(PIP) --requirement $(LOCK)
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml setup.py
	@echo "lraee: installing the package into $(VENV)"
	@LRAEE_BUILD_EXT=0 $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# Linked anew each time: what a linker left that was cut off would count as finished
$(VENV)/.extension: $(VENV)/.package $(CXX_SOURCES)
	@if [ "$${LRAEE_BUILD_EXT:-1}" != 0 ]; then \
	  rm -f lraee/_C*.so build/lib*/lraee/_C*.so && echo "lraee: building the C++ extension" && \
	  PATH="$(abspath $(BIN)):$$PATH" $(PY) setup.py --quiet build_ext --inplace >$(BUILD_LOG) 2>&1 || \
	  { cat $(BUILD_LOG) >&2; echo "lraee: the C++ extension did not build, see above" >&2; exit 1; }; fi
	@touch $@

setup: $(VENV)/.extension  ## Makes .venv with torch, open_clip and this package with its C++ extension.

# What users run

# DATA=folder: own photos; MODEL=ViT-B-32 PRETRAINED=openai: any tag that open_clip can fetch.
MODEL_ARGS = $(if $(MODEL),--model "$(MODEL)") $(if $(PRETRAINED),--pretrained "$(PRETRAINED)")
DEMO_ARGS = $(if $(DATA),--data "$(DATA)") $(MODEL_ARGS)

demo: setup  ## Runs a real CLIP on real photos, float against INT8 (DATA=, MODEL=, PRETRAINED=).
	@$(BIN)/lraee demo $(DEMO_ARGS)

# DATA=folder: own photos, instead of those that scikit-image ships.
SAMPLES = import os, skimage; from lraee.evaluation.demo import SAMPLES; \
  print(*(os.path.join(os.path.dirname(skimage.__file__), "data", name) for name in SAMPLES), sep="\n")

serve: setup  ## A page to search photos, and their embeddings over HTTP (DATA=, MODEL=, PRETRAINED=).
	@mkdir -p $(RESULTS)
	@$(if $(DATA),$(BIN)/lraee embed "$(DATA)",$(PY) -c '$(SAMPLES)' | $(BIN)/lraee embed -) \
	  --out $(RESULTS)/photos.parquet $(MODEL_ARGS)
	@$(BIN)/lraee serve --photos $(RESULTS)/photos.parquet $(MODEL_ARGS)

doctor: setup  ## Says which implementation of each operator runs here, and why the others do not.
	@$(BIN)/lraee doctor

# What contributors run

# A process for each of two cores, one thread each: tests that are about threads set their own number
PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile --durations 25
test: setup  ## The test suite without its full sweeps.
	$(PARALLEL) -m "not slow and not gpu"

# SWEEPS: further options of pytest
test-slow: setup  ## The full sweeps that `make test` leaves out.
	$(PARALLEL) -m "slow and not gpu" $(SWEEPS)

# The older of the two versions that are known, beside the newer one of .venv
TRANSFORMERS_4 := transformers==4.57.* tokenizers==0.22.* "huggingface_hub>=0.34,<1"

$(VENV)/transformers-4: | setup
	@$(PIP) --target $@ --no-deps $(TRANSFORMERS_4)

test-transformers-4: setup $(VENV)/transformers-4  ## The tests of models of transformers 4.
	PYTHONPATH=$(VENV)/transformers-4 $(PARALLEL) -m "not slow and not gpu" \
	  tests/towers/test_hugging_face.py tests/towers/test_hugging_face_running.py \
	  tests/towers/test_hugging_face_weights.py tests/towers/test_wrappers.py \
	  tests/towers/test_hugging_face_text.py tests/towers/test_open_clip_hf_text.py

# Ray brings packages that nothing else here needs; those of .venv keep their versions
RAY_TESTS := tests/serving/test_ray.py tests/serving/test_ray_serve.py

$(VENV)/ray: | setup
	@$(PY) -m pip freeze --exclude-editable >$(VENV)/versions.txt
	@$(PIP) --target $@ --constraint $(VENV)/versions.txt "ray[data,serve]>=2.40,<3"

test-ray: setup $(VENV)/ray  ## The tests that start a Ray cluster on this machine.
	PYTHONPATH=$(abspath $(VENV)/ray) OMP_NUM_THREADS=1 $(PY) -m pytest $(RAY_TESTS)

# Another Triton than that of .venv's torch: torch 2.10 and 2.11 bring it
$(VENV)/triton-3.6: | setup
	@$(PIP) --target $@ --no-deps "triton==3.6.*"

test-triton-3.6: setup $(VENV)/triton-3.6  ## Compiles the fixed part of the GPU matrix with Triton 3.6.
	PYTHONPATH=$(VENV)/triton-3.6 $(PY) -m bench.gpu_matrix --subset --arch 80 90

# The lowest releases that pyproject.toml declares, but for torch, torchvision and triton
$(VENV)/oldest: requirements/oldest.txt | setup
	@rm -rf $@ && $(PIP) --target $@ --no-deps --requirement $<
	@touch $@

test-oldest: setup $(VENV)/oldest  ## Tests of each dependency, in the oldest release that is declared.
	PYTHONPATH=$(VENV)/oldest $(PARALLEL) -m "not slow and not gpu" \
	  tests/test_dependencies.py $(OLDEST_TESTS)

OLDEST_TESTS := tests/towers/test_open_clip.py tests/storage/test_sealed.py tests/cli/test_tables.py \
  tests/calibration/test_gate_fitting.py tests/calibration/test_risk.py tests/study/test_rows.py \
  tests/study/page/test_page.py tests/serving/test_embed.py tests/serving/test_server.py \
  tests/serving/test_index.py tests/serving/test_search.py tests/data/test_decoding.py tests/data/test_batches.py

test-gpu: setup  ## The tests that need an NVIDIA GPU.
	TRITON_INTERPRET=0 $(PY) -m pytest -m gpu

check: setup  ## Lint, format and types; changes nothing.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FORMATTED)

format: setup  ## Formats all code in place.
	$(BIN)/ruff check --fix --select I
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FORMATTED)

docs: setup  ## The documentation as a site in build/site; any broken link or reference is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Benchmarks: nothing else should run on the machine

BENCH := $(PY) -m pytest -o console_output_style=classic

bench: setup  ## Each operator on the layers of real towers, one line each; JSON in results/.
	@mkdir -p $(RESULTS)
	$(BENCH) bench/bench_*_*.py --benchmark-json $(RESULTS)/operators.json

bench-tower: setup  ## Whole image towers against torch float32, bfloat16 and quantize_dynamic.
	@mkdir -p $(RESULTS)
	$(BENCH) bench/bench_tower.py --benchmark-json $(RESULTS)/tower.json

regressions: setup  ## FLOPs against golden numbers; latency of INT8, and of exits, in one process; memory.
	$(BENCH) bench/regression_flops.py bench/regression_latency.py bench/regression_exits.py \
	  bench/regression_footprint.py

gpu-matrix: setup  ## Compiles every Triton kernel for every GPU family, without a GPU.
	$(PY) -m bench.gpu_matrix

gpu-model: setup  ## Predicted (not measured) GPU times.
	$(PY) -m bench.gpu_model

numerics: setup  ## INT8 numerics on a real 257-token tower (DATA=folder of photos; installs extra `numerics`).
	@LRAEE_BUILD_EXT=0 $(PIP) --no-build-isolation --editable ".[numerics]"
	$(PY) -m bench.numerics_257 $(if $(DATA),"$(DATA)")

report: setup  ## The whole study of MODEL: DATA=, CLASSES=, VAL= (to report on); DOSE=1,8,16; OUT=results/report.
	@$(BIN)/lraee report --out "$(or $(OUT),results/report)" $(STUDY_ARGS)

STUDY_ARGS = $(if $(DATA),--data "$(DATA)") $(if $(CLASSES),--classes "$(CLASSES)") \
  $(if $(VAL),--report-data "$(VAL)") $(if $(MODEL),--model "$(MODEL)") \
  $(if $(PRETRAINED),--pretrained "$(PRETRAINED)") $(if $(DOSE),--dose "$(DOSE)")

# IMAGENET=folder with train and val; without it lraee-tiny and DATA=, VAL=, CLASSES=.
reproduce: setup  ## The protocol of the paper, figures beside the published ones (IMAGENET=, PRETRAINED=).
	@$(PY) -m bench.reproduce $(if $(IMAGENET),--imagenet "$(IMAGENET)") \
	  $(if $(PRETRAINED),--pretrained "$(PRETRAINED)") $(if $(DATA),--data "$(DATA)") \
	  $(if $(VAL),--val "$(VAL)") $(if $(CLASSES),--classes "$(CLASSES)")

dist: setup  ## The sdist, and the wheel built from it.
	$(PY) -m build --no-isolation --outdir dist

# Without an existing file every pin is the newest; else only what no longer fits changes
UV_COMPILE := $(BIN)/uv pip compile pyproject.toml --python-version 3.11 --no-annotate --no-header --quiet
lock: setup  ## Writes requirements/*.txt anew: the newest releases, and the oldest ones declared.
	@$(PIP) uv
	@rm -f $(LOCK) requirements/oldest.txt
	$(UV_COMPILE) --universal --extra dev --output-file $(LOCK)
	$(UV_COMPILE) --resolution lowest-direct --no-deps --extra report --extra embed --extra serve \
	  --extra search --no-emit-package torch --no-emit-package triton \
	  --output-file requirements/oldest.txt

WHEEL_TOOLS := $(VENV)/wheel-tools
wheels: setup  ## The sdist, and one wheel for every Python from 3.11 and torch from 2.10, audited.
	sh scripts/build_wheels.sh $(abspath $(PY)) $(abspath $(WHEEL_TOOLS)) dist

# PYTHONS: interpreters to install the wheel for; PIP_CONFIG_FILE=/dev/null: without a cap on torch
test-wheels: setup  ## That wheel in fresh environments, oldest and newest torch (PYTHONS=; 7 GB each).
	LRAEE_WHEEL="$(abspath $(lastword $(sort $(wildcard dist/lraee-*-abi3-manylinux*.whl))))" \
	  $(if $(PYTHONS),LRAEE_WHEEL_PYTHONS="$(PYTHONS)") $(PY) -m pytest tests/test_wheels.py

clean:  ## Removes what was built, and the virtual environment.
	rm -rf $(VENV) build dist *.egg-info lraee/_C*.so .mypy_cache .pytest_cache .ruff_cache
