# Every target makes its own virtual environment in .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN    := .venv/bin
CODE   := s3_bulk_convert.py tests

.PHONY: help demo recording flow test test-slow test-all test-real soak mutants bench lint clean
.DEFAULT_GOAL := help

help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## */  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

.venv/ready: requirements.txt tests/requirements.txt
	@echo "downloading the packages of the tests into .venv, once: they take some 300 MB and a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	@touch $@

demo: .venv/ready  ## convert about 60 real files from a real S3 server, twice, on this machine only
	$(BIN)/python -m tests.demo

recording: .venv/ready  ## draw what a terminal shows of the demo into tests/demo/demo.svg
	$(BIN)/python -m tests.demo.recording

flow: .venv/ready  ## draw the way of an object into docs/flow.svg
	$(BIN)/python -m tests.flow

test: .venv/ready  ## all tests but the slow ones
	$(BIN)/python -m pytest -c tests/pytest.ini -n 5 --dist worksteal tests

test-slow: .venv/ready  ## the long proofs: random kills, many examples
	$(BIN)/python -m pytest -c tests/pytest.ini -m slow -s tests

test-all: .venv/ready  ## all tests but the slow ones on each Python that is here, and with the oldest packages
	$(BIN)/python -m tests.real.pythons

# Other S3 servers, each in a directory of its own. LocalStack needs Python 3.13.
SERVERS := $(patsubst tests/standins/servers/requirements-%.txt,.venv-%/ready,$(wildcard tests/standins/servers/requirements-*.txt))
ITS_PYTHON = $(PYTHON)
.venv-localstack/ready: ITS_PYTHON = $(shell $(PYTHON) -c 'from tests.real.pythons import python_of; print(python_of("3.13") or "python3.13")')

.venv-%/ready: tests/standins/servers/requirements-%.txt
	$(ITS_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

.venv-s3rver/ready: tests/standins/servers/requirements-s3rver.txt
	npm install --silent --no-audit --no-fund --prefix $(@D) $$(cat $<)
	@touch $@

test-real: .venv/ready  ## against real S3 servers, also over TLS, and with real tools; ONLY=ceph one of them
	-@$(MAKE) --keep-going --no-print-directory $(SERVERS)
	$(BIN)/python -m tests.real.servers $(ONLY)

soak: .venv/ready  ## an hour of faults, changes and kills: nothing paid twice, lost, wrong or growing; MINUTES=5 less
	$(BIN)/python -m tests.proofs.soak --minutes $(or $(MINUTES),60)

mutants: .venv/ready  ## plant defects in a copy, one at a time: a test sees each; ONLY=word some of them
	$(BIN)/python -m tests.proofs.mutants $(ONLY)

.venv/ready-bench: .venv/ready tests/bench/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/bench/requirements.txt
	@touch $@

bench: .venv/ready-bench  ## measure it: all parts take an hour or two; ONLY=listing one of them; QUICK=1 small numbers
	$(BIN)/python -m tests.bench $(ONLY)

lint: .venv/ready  ## style, complexity and nesting, types
	$(BIN)/ruff check --config tests/ruff.toml $(CODE)
	$(BIN)/ruff format --check --config tests/ruff.toml $(CODE)
	$(BIN)/mypy --config-file tests/mypy.ini $(CODE)

clean:  ## remove .venv and caches
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
