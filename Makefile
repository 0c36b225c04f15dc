# Every line here is a command a person could type; each target does the set-up it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test test-all test-fast coverage bench bench-miss bench-slow bench-memory chaos soak fuzz up down check lint types imports generated fmt clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

# The main job, end to end: make demo [IDP=keycloak] [JSON=path]; on containers: make up demo GATEWAY=compose
demo: $(READY)
	$(BIN)/kong-token-exchange demo --config kong.yml $(if $(GATEWAY),--gateway $(GATEWAY)) $(if $(IDP),--idp $(IDP)) $(if $(JSON),--json $(JSON))

test: $(READY)
	$(BIN)/pytest -m "not long"

# With what takes its time: reloads under load, hybrid mode, later Pythons
test-all: $(READY)
	$(BIN)/pytest

# Every branch of the plugin server by its own tests
coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q tests/protocol
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

# Everything that needs no Java and no second process
test-fast: $(READY)
	$(BIN)/pytest tests/unit tests/protocol

# Ratios against kong-pdk and a server in C, in one run: make bench [JSON=path]
# With RECORD=path every round is kept, too; docs/performance.md is written from that.
bench: $(READY)
	$(BIN)/python -m benchmarks.bench $(if $(JSON),--json $(JSON)) $(if $(RECORD),--record $(RECORD))

# CPU and time of an exchange, by its parts and by HTTP client: make bench-miss [JSON=path]
bench-miss: $(READY)
	$(BIN)/python -m benchmarks.miss $(if $(JSON),--json $(JSON))

# What cached requests notice of an issuer that takes 2.5 s, about a minute: make bench-slow [JSON=path]
bench-slow: $(READY)
	$(BIN)/python -m benchmarks.slow_issuer $(if $(JSON),--json $(JSON))

# A million valid tokens within the cache's bound and a fifth, 10 to 20 minutes: make bench-memory [TOKENS=100000]
bench-memory: $(READY)
	$(BIN)/python -m benchmarks.memory $(if $(TOKENS),--tokens $(TOKENS))

# Faults under real traffic, about 10 minutes; at full length: make chaos LONG=1
chaos: $(READY)
	$(BIN)/python -m tests.chaos $(if $(LONG),--long) --report docs/resilience.md

# Made-up input for every reader of outside bytes, and 10,000 mutated tokens: make fuzz [FUZZ_SECONDS=60]
FUZZ_SECONDS ?= 600
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# Kong, the sidecar, Keycloak and the rest as containers: docker/README.md
up:
	docker compose -f docker/compose.yml up --build --wait

down:
	docker compose -f docker/compose.yml --profile '*' down --volumes --remove-orphans

# 200,000 events with exits, exceptions and clients that vanish; then 10 s of made-up key ids
soak: $(READY)
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.kid_spray

check: lint types imports generated

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs kong_token_exchange tests

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

# schema.json and docs/configuration.md are written from kong_token_exchange/schema.py,
# docs/security-coverage.md from the ids that tests carry
generated: $(READY)
	$(BIN)/kong-token-exchange schema --check
	$(BIN)/python -m tests.support.coverage --check

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/kong-token-exchange schema --write
	$(BIN)/python -m tests.support.coverage --write

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
