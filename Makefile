# make demo | demo-llm | test | e2e | check | proto | clean
# Each target makes .venv in this folder and installs what it needs; a second run is quick.

PYTHON ?= $(shell for v in 3.11 3.12 3.13; do command -v python$$v && exit; done; command -v python3)
VENV := .venv
RUN := $(VENV)/bin
STAMPS := $(VENV)/.installed
INSTALL := $(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-llm test e2e check format lint types proto proto-baseline wheel clean

demo: $(STAMPS)/base
	$(RUN)/corolla simulate

demo-llm: $(STAMPS)/llm
	$(RUN)/corolla simulate --config experiments/demo_llm/config.toml

test: $(STAMPS)/dev
	$(RUN)/python -m pytest -n 2 --dist worksteal -q -m "not deployment"

# Federations of real processes on loopback that are killed and cut off: minutes each.
e2e: $(STAMPS)/dev
	$(RUN)/python -m pytest -q -m deployment

check: $(STAMPS)/dev lint types test

lint: $(STAMPS)/dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

format: $(STAMPS)/dev
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

types: $(STAMPS)/dev
	$(RUN)/python tests/typecheck.py

proto: $(STAMPS)/dev
	$(RUN)/python -m grpc_tools.protoc -Icorolla/proto=proto --python_out=$(VENV) --pyi_out=$(VENV) --grpc_python_out=$(VENV) corolla/proto/update.proto corolla/proto/device.proto
	cp $(VENV)/corolla/proto/update_pb2.py* $(VENV)/corolla/proto/device_pb2*.py* proto/

# The schema that peers out there have: written at a release, never to make a test pass.
proto-baseline: $(STAMPS)/dev
	$(RUN)/python -m grpc_tools.protoc -Icorolla/proto=proto --descriptor_set_out=proto/baseline.binpb corolla/proto/update.proto corolla/proto/device.proto

wheel: $(STAMPS)/dev
	rm -rf build
	$(RUN)/python -m build --wheel
	rm -rf build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Corolla needs Python 3.11 or newer; found $$($(PYTHON) --version): make PYTHON=python3.12 demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	touch $@

# torch first and pinned: the newest may be a CUDA build of several GB. Where the index serves only
# CUDA builds, point PIP_EXTRA_INDEX_URL at PyTorch's index of CPU builds.
$(STAMPS)/base: pyproject.toml constraints.txt $(STAMPS)/venv
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(STAMPS)/llm: $(STAMPS)/base
	$(INSTALL) -e '.[llm]'
	touch $@

$(STAMPS)/dev: $(STAMPS)/base
	$(INSTALL) -e '.[dev,simulation]'
	touch $@
