# Two commands: `make demo` writes demo.mp4, `make test` runs everything CI runs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.PHONY: demo test clean
demo: .venv/bin/nox
	.venv/bin/nox -s demo

test: .venv/bin/nox
	.venv/bin/nox

.venv/bin/nox:
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q "nox>=2024.10"

clean:
	rm -rf .venv .nox
