# The first two targets set up everything on a fresh machine (Python 3.11 or 3.12 with venv, a C++ compiler) and then work.
VENV := .venv
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: demo test install check lint types unit integration clean

demo: install
	$(VENV)/bin/python jobs/demo.py

# Two processes: the unit tests fail when Ray is up.
test: install
	$(VENV)/bin/python -m pytest tests/unit
	$(VENV)/bin/python -m pytest tests/integration

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	touch $@

check: install lint types

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

unit: install
	$(VENV)/bin/python -m pytest tests/unit

integration: install
	$(VENV)/bin/python -m pytest tests/integration

clean:
	rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache
