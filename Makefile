# The first two targets set up everything on a fresh machine (Python 3.11 or 3.12 with venv, a C++ compiler) and then work.
VENV := .venv
LATEST := .venv-latest
CLIENTS := .venv-clients
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: demo test install check lint types unit numerics integration drills gpu clients latest clean

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

# What computes, with the kernels of a CPU without vector instructions: another order of summation, the same results.
numerics: install
	ATEN_CPU_CAPABILITY=default $(VENV)/bin/python -m pytest -q tests/unit/training tests/unit/model tests/unit/batch tests/unit/objectives

# The whole table of methods and every size of a run: about an hour on two cores.
drills: install
	$(VENV)/bin/python -m pytest tests/integration -m drill

# Trainers and clients of other systems, unmodified, against the running server, in an environment beside the one in use. OpenRLHF and verl come
# without what they pin; what they import is named here.
clients:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet "$(TORCH)" --editable ".[dev,bench]"
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps openrlhf==0.11.2 verl==0.9.1
	$(CLIENTS)/bin/python -m pip install --quiet "$(TORCH)" tensordict omegaconf hydra-core codetiming orjson pylatexenc
	rm -rf $(CLIENTS)/lib/python3*/site-packages/tests  # of OpenRLHF's wheel, in the way of ours
	$(CLIENTS)/bin/python -m pytest -m clients tests/integration/test_real_clients.py

# On a machine with a GPU.
gpu: install
	$(VENV)/bin/python -m pytest tests/gpu

# The unit tests on the newest releases, also those above the ranges of pyproject.toml (pip says which), beside the environment in use.
latest:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet "$(TORCH)"
	$(LATEST)/bin/python -m pip install --quiet --upgrade "$(TORCH)" --editable ".[dev]"
	$(LATEST)/bin/python -m pip install --quiet --upgrade transformers huggingface-hub tokenizers
	$(LATEST)/bin/python -m pip list | grep -iE "^(torch|transformers|tokenizers|huggingface[_-]hub|ray|deepspeed|pydantic) "
	$(LATEST)/bin/python -m pytest tests/unit

clean:
	rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache
