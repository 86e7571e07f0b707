# The commands for users and developers. Each one runs a script in scripts/ or e2e/, which documents its options.
.DEFAULT_GOAL := help
.PHONY: help demo down shell logs test unit e2e fuzz fmt image crds

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## start a demonstration fleet on a local Kubernetes
	@scripts/demo.sh

down: ## remove the demonstration
	@scripts/demo.sh down

shell: ## open a shell with access to the fleet; one command: make shell CMD='kubectl get fleet'
	@CMD="$${CMD:-}"; scripts/demo.sh shell "$$CMD"

logs: ## operator logs
	@scripts/demo.sh logs

test: ## run all tests; KEEP=1 keeps the cluster
	@scripts/test.sh

unit: ## run the unit and property tests: no cluster, broker or database
	@scripts/test.sh unit

e2e: ## run the end-to-end tests on a local Kubernetes; TEST=name selects tests
	@scripts/test.sh e2e

fuzz: ## fuzz all parsers, one minute each; TARGET=name selects one
	@scripts/fuzz.sh $${TARGET:-}

fmt: ## format the sources
	@cargo fmt --all
	@gofmt -w e2e/health e2e/cert-manager

image: ## build the images and print their paths
	@cargo build --locked --release --bin fleetwright
	@e2e/images.sh archive fleetwright mosquitto timescaledb

crds: ## generate the CRDs and their reference from the types in src/api
	@cargo run --locked -- crds --output crds/ --reference docs/reference.md
