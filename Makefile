# What one does with Fleetwright. Each target is a script of scripts/ or e2e/, which says more.
.DEFAULT_GOAL := help
.PHONY: help demo down shell logs test unit e2e fmt image crds

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## a living fleet on a local Kubernetes, from a fresh clone
	@scripts/demo.sh

down: ## removes the demonstration, and leaves nothing behind
	@scripts/demo.sh down

shell: ## a shell that reaches the fleet; or one command: make shell CMD='kubectl get fleet'
	@CMD="$${CMD:-}"; scripts/demo.sh shell "$$CMD"

logs: ## what the operator says
	@scripts/demo.sh logs

test: ## everything that must hold; KEEP=1 leaves the cluster of the tests
	@scripts/test.sh

unit: ## the quick tests alone: no cluster, no broker, no database
	@scripts/test.sh unit

e2e: ## the tests on the local Kubernetes alone; TEST=name for some of them
	@scripts/test.sh e2e

fmt: ## formats the sources
	@cargo fmt --all
	@gofmt -w e2e/health e2e/cert-manager

image: ## builds the images and prints where they are
	@cargo build --locked --release --bin fleetwright
	@e2e/images.sh archive fleetwright mosquitto timescaledb

crds: ## writes the CRDs, and their reference, that the types of src/api make
	@cargo run --locked -- crds --output crds/ --reference docs/reference.md
