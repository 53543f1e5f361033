# Everything from a fresh clone: `make demo`, `make test`. Both build the environment in .venv first;
# a second run does only what is missing.

# The first Python of a supported version; choose another with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' 2>/dev/null && echo $$p && break; done)
# The tests that compare with PyTorch need torch. TORCH_INDEX is an index of CPU builds, for where the configured
# one has none; without a CPU build those tests are skipped, and say so.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Parallel test processes; each takes file after file, in the order of tests/conftest.py: long ones first.
JOBS ?= 2

BIN := .venv/bin
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCK = $(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
PACKAGING := setup.cfg pyproject.toml
CHROMIUM = { test "$$(id -u)" = 0 && timeout 60 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 \
	apt-get -qq install --no-install-recommends --yes chromium; }

.PHONY: setup setup-test setup-slow demo real test test-slow test-peers lint clean

setup: .venv/.demo

setup-test: .venv/.test

setup-slow: .venv/.slow

# Debian's Python may lack ensurepip: its pip then installs pip into the environment from outside.
.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found: install one, or pass its path with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }

.venv/.demo: .venv/bin/python $(PACKAGING) $(wildcard requirements/demo-*.txt)
	@echo "Setting up .venv (about a minute)"
	$(PIP) --no-deps --requirement requirements/demo-$(LOCK)
	$(PIP) --no-deps --editable .
	@touch $@

.venv/.test: .venv/.demo $(wildcard requirements/test-*.txt) requirements/torch_cpu.py
	$(PIP) --no-deps --requirement requirements/test-$(LOCK)
	$(BIN)/python requirements/torch_cpu.py $(TORCH) --index-url "$(TORCH_INDEX)"
	@touch $@

# The slow tests also need Apache Beam, the TPU compiler, timm and a browser. The browser is Debian's Chromium, which is
# installed for root where apt has it; without one the tests of the viewer's page are skipped, and say so.
.venv/.slow: .venv/.test $(wildcard requirements/slow-*.txt) requirements/originals.txt
	$(PIP) --no-deps --requirement requirements/slow-$(LOCK)
	rm -rf .venv/originals
	$(PIP) --no-deps --target .venv/originals --requirement requirements/originals.txt \
		|| echo "timm or torchvision not found: the tests of the patch encoders' originals will be skipped"
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || $(CHROMIUM) >/dev/null 2>&1 \
		|| echo "Chromium not found and not installed: the tests of the viewer's page will be skipped"
	@touch $@

demo: setup
	$(BIN)/pathflip demo --out demo

# Train, score and export on real tissue (docs/real_tissue.md): `make real DATA=EBHI-SEG`, the dataset's folder.
SEEDS ?= 0 1 2
real: setup
	@test -n "$(DATA)" || { echo "Pass the folder of EBHI-Seg: make real DATA=EBHI-SEG (docs/real_tissue.md)"; exit 1; }
	$(BIN)/python benchmarks/real_tissue.py --data "$(DATA)" --out real --seeds $(SEEDS) \
		--language --export colon-biopsy

test: setup-test
	$(PYTEST) -m "not slow" --durations 15

test-slow: setup-slow
	$(PYTEST) -m slow --durations 30

# Tests that need a separate environment, such as other versions of JAX or TensorFlow, each built once in .peers/:
# all of them, or one by `make test-peers PEER=tensorflow`; tests/peers/README.md says what each proves.
test-peers: setup-test
	TORCH_INDEX="$(TORCH_INDEX)" $(BIN)/python tests/peers/run.py --jobs $(JOBS) --torch "$(TORCH)" $(PEER)

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf .venv .peers demo build *.egg-info
