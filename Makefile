# Each target does all the set-up it needs: Python 3.11 or newer and make are enough to start from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test check soak acceptance readme clean

help:
	@echo "make demo        ask a real long document questions, with three recipes, and print a table"
	@echo "make test        the test suite (ARGS='tests/unit -x' narrows it)"
	@echo "make check       lint, formatting, types, import rules, generated files; changes nothing"
	@echo "make soak        random faults under load for SECONDS=600, drawn from SEED"
	@echo "make acceptance  what is too long for the suite; writes benchmarks/results/*.json, as docs/testing.md says"
	@echo "make readme      put the measured numbers, tables and plots into README.md and docs/"
	@echo "make clean       remove the virtual environment and everything that was built"

setup:
	@PYTHON="$(PYTHON)" sh scripts/setup.sh

demo: setup
	@$(BIN)/kvsluice demo $(ARGS)

# files run in two processes at once, in the order of their names; ARGS="-n 0 ..." runs them in one
test: setup
	@$(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

check: setup
	@$(BIN)/python scripts/check.py

# -P keeps the repository root off the import path: no top-level module may be called `kernels`
SECONDS ?= 600
soak: setup
	@$(BIN)/python -P -m kvsluice.tests.faults.soak --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)

RESULTS := benchmarks/results
acceptance: setup
	@$(BIN)/python -P -m kvsluice.evals.acceptance $(ARGS)
	@$(BIN)/pytest -m acceptance
	@$(BIN)/python -P -m kvsluice.tests.faults.attacks --seconds 10 --json $(RESULTS)/attacks.json
	@$(BIN)/python -P -m kvsluice.benchmarks.fault_runs --kills 50 --stalls 50
	@$(BIN)/python -P -m kvsluice.benchmarks.overload --out $(RESULTS)/overload.json
	@$(BIN)/python -P -m kvsluice.tests.faults.soak --seconds 600 --json $(RESULTS)/soak.json
	@$(BIN)/python -P -m kvsluice.tests.load.gateway_load --json $(RESULTS)/gateway_load.json
	@PYTHON="$(PYTHON)" sh scripts/setup_peers.sh
	@$(BIN)/python -P -m kvsluice.benchmarks.peer_guidellm --json $(RESULTS)/peer_guidellm.json
	@$(BIN)/python -P -m kvsluice.tests.faults.scaling --json $(RESULTS)/scaling.json

readme: setup
	@$(BIN)/python scripts/readme_tables.py
	@$(BIN)/python scripts/recipe_report.py
	@$(BIN)/python scripts/performance_report.py
	@$(BIN)/python scripts/gateway_report.py
	@$(BIN)/python scripts/loadtest_report.py

clean:
	rm -rf .venv build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
