# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

NODES ?= 4
GPUS_PER_NODE ?= 2
SIMULATED_NODES ?= 0
IMAGE_TAG ?= dev

export PIPELINEJOB_CACHE ?= /var/cache/pipelinejob
export PYTHONPATH := operator:worker:.
export PYTHONDONTWRITEBYTECODE := 1
export IMAGE_TAG

# One environment for each content of the lock file, outside the checkout: clones share it.
VENV := $(PIPELINEJOB_CACHE)/venv-$(shell { cat locks/dev.txt; python3 -VV; } | sha256sum | cut -c1-16)
PYTHON := $(VENV)/bin/python
CLUSTER := python3 -m tests.cluster
SOURCES := operator worker tests tools

# AGAIN=1: what has failed is run once more, and named. A test that passes only then is a defect
# too, but none that the change at hand has brought. $(1): what to run.
define pytest
$(PYTHON) -m pytest $(1) $(if $(AGAIN),|| { echo "--- FAILED ONCE: what has failed runs again"; \
	$(PYTHON) -m pytest --last-failed --last-failed-no-failures none $(1) && echo "--- FLAKY: passed the second time"; })
endef

##@ Try it

.PHONY: help
help: ## Explain every target.
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## Train examples/tiny-gpt.yaml on the cluster in KUBECONFIG, or on one started here, and show how it goes.
	@examples/demo.sh

##@ Test

.PHONY: test
test: lint test-unit test-weights test-integration test-e2e ## Run everything: lint, unit, integration and end-to-end tests.

.PHONY: lint
lint: $(VENV)/complete ## Check style, types, the arrows between the parts, and that generated files are fresh.
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy operator/pipelinejob_operator worker/pipelinejob_worker tests/cluster tools
	$(VENV)/bin/lint-imports
	$(PYTHON) -m tools.generate --check

.PHONY: test-unit
test-unit: $(VENV)/complete ## Run the tests that need no cluster.
	$(CLUSTER) binaries
	$(call pytest,tests/unit)

.PHONY: test-weights
test-weights: $(VENV)/complete ## Cut a decoder with real weights, which the first run fetches (93 MB).
	$(call pytest,tests/weights)

.PHONY: test-integration
test-integration: $(VENV)/complete ## Run the tests that need only etcd, an API server, kube-scheduler and kwok, which they start.
	$(CLUSTER) binaries
	python3 -c "from tests.cluster import binaries; binaries.ensure_kwok()"
	$(call pytest,tests/integration)

.PHONY: test-e2e
test-e2e: $(VENV)/complete ## Run real jobs on the cluster in KUBECONFIG, or on one started here and taken down again.
	@if [ -z "$${KUBECONFIG:-}" ]; then $(CLUSTER) selfcheck; trap '$(CLUSTER) down' EXIT; fi; \
	source tests/cluster/use.sh; \
	$(call pytest,tests/e2e)

.PHONY: test-chaos
test-chaos: $(VENV)/complete ## Of test-e2e: let every fault strike once, at a moment that changes from day to day.
	@source tests/cluster/use.sh; \
	$(PYTHON) -m pytest -s tests/e2e/chaos

.PHONY: chaos
chaos: $(VENV)/complete ## Let faults strike a job that trains, in an order that SEED= decides, for MINUTES=.
	@source tests/cluster/use.sh; \
	$(PYTHON) -m tests.e2e.chaos $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) $(ARGUMENTS)

.PHONY: soak
soak: $(VENV)/complete ## Serve clients of all sorts for MINUTES= (10), and see that no process grows.
	@source tests/cluster/use.sh; \
	$(PYTHON) -m tests.e2e.soak $(if $(MINUTES),--minutes $(MINUTES))

.PHONY: test-kueue
test-kueue: $(VENV)/complete ## Queue jobs with the real Kueue, which the first run builds (8 min).
	python3 -c "from tests.cluster import binaries; binaries.ensure_kueue()"
	@if [ -z "$${KUBECONFIG:-}" ]; then trap '$(CLUSTER) down' EXIT; fi; \
	source tests/cluster/use.sh; \
	$(PYTHON) -m pytest tests/kueue

.PHONY: test-gpu
test-gpu: $(VENV)/complete ## Run the stage loop on CUDA and NCCL; says so where there is no device.
	$(PYTHON) -m pytest -s tests/gpu

##@ Measure

.PHONY: bench-schedules
bench-schedules: $(VENV)/complete ## Bubble of every schedule beside its formula and beside torch's own schedules.
	@OMP_NUM_THREADS=1 $(PYTHON) -m tools.bench.schedules

.PHONY: bench-overhead
bench-overhead: $(VENV)/complete ## Our loop beside the shortest torch script: step time and memory.
	@OMP_NUM_THREADS=1 $(PYTHON) -m tools.bench.overhead

.PHONY: bench-partition
bench-partition: $(VENV)/complete ## Balanced against Even on uneven layers: predicted and measured step time.
	@OMP_NUM_THREADS=1 $(PYTHON) -m tools.bench.partition

.PHONY: bench-recovery
bench-recovery: $(VENV)/complete ## Seconds and steps that each fault costs, beside recreating all pods; rescaling; snapshots.
	@source tests/cluster/use.sh; $(PYTHON) -m tools.bench.recovery

.PHONY: bench-serve
bench-serve: $(VENV)/complete ## Serving with 1, 2 and 4 stages beside transformers: rate, time to first token, idle stages.
	@$(PYTHON) -m tools.bench.serve

.PHONY: pictures
pictures: $(VENV)/complete ## Measure and draw a step of every schedule for the documentation.
	@OMP_NUM_THREADS=1 $(PYTHON) -m tools.bench.draw

.PHONY: bench-placement
bench-placement: $(VENV)/complete ## Time the planner of placements on large made-up clusters; cost beside other ways.
	@$(PYTHON) -m tools.bench.placement

##@ Develop

.PHONY: venv
venv: $(VENV)/complete ## Install the locked development dependencies into the cache and print where.
	@echo $(VENV)

$(VENV)/complete:
	@python3 -c 'import ensurepip' 2> /dev/null || { apt-get update -qq && apt-get install -y -qq python3-venv; }
	@echo "installing the development dependencies into $(VENV) (torch is large: some minutes)"
	rm -rf $(VENV) && mkdir -p $(PIPELINEJOB_CACHE) && python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --require-hashes --no-deps --requirement locks/dev.txt
	touch $@

.PHONY: format
format: $(VENV)/complete ## Format the code and mend what ruff can.
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

.PHONY: generate
generate: $(VENV)/complete ## Write the CRD, the chart's generated files and the reference pages anew.
	$(PYTHON) -m tools.generate

.PHONY: lock
lock: ## Resolve the dependencies anew and write locks/.
	python3 -m venv $(PIPELINEJOB_CACHE)/uv && $(PIPELINEJOB_CACHE)/uv/bin/pip install --quiet uv
	for part in operator worker dev; do \
		extras=$$( [ $$part = dev ] && echo --all-extras || echo --extra $$part ); \
		$(PIPELINEJOB_CACHE)/uv/bin/uv pip compile --quiet --universal --upgrade --generate-hashes --no-emit-index-url \
			--no-annotate --no-header --python-version 3.11 $$extras --output-file locks/$$part.txt pyproject.toml; \
	done

##@ Images

.PHONY: images
images: ## Build the images with buildah, podman or docker (BUILDER=, BASE=, IMAGE_TAG=).
	images/build.sh operator worker

.PHONY: push
push: ## Push the images to REGISTRY=, for a cluster elsewhere.
	@: "$${REGISTRY:?push: REGISTRY is not set; for instance make push REGISTRY=registry.example.com/ml}"
	images/push.sh "$$REGISTRY"

##@ A cluster on this machine

.PHONY: cluster-up
cluster-up: ## Start Kubernetes with NODES= and GPUS_PER_NODE= (SIMULATED_NODES= adds kwok nodes), images loaded.
	@$(CLUSTER) up --nodes $(NODES) --gpus-per-node $(GPUS_PER_NODE) --simulated-nodes $(SIMULATED_NODES)

.PHONY: cluster-load
cluster-load: ## Build the images whose sources changed and load them into all nodes.
	@$(CLUSTER) load

.PHONY: cluster-status
cluster-status: ## Show the cluster's programs and nodes.
	@$(CLUSTER) status

.PHONY: cluster-down
cluster-down: ## Take the cluster down and leave nothing but the cache.
	@$(CLUSTER) down

.PHONY: clean
clean: cluster-down ## Take the cluster down and remove all that was built and cached.
	cd $(PIPELINEJOB_CACHE) && rm -rf {binaries,kwok,base,seed,venv}-* containers uv log durations.json .*.lock .*.partial
