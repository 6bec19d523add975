# Doors to the scripts, so that nobody has to know them by heart.
.PHONY: help test quick style quickstart tables

help:
	@echo "make test        style, types and all tests, as scripts/test.sh"
	@echo "make quick       the same without tests that take long"
	@echo "make style       lint, types and the rules of the house"
	@echo "make quickstart  a small model from nothing, seven minutes on two cores"
	@echo "make tables      tables and pictures of the pages, from docs/results/"

test:
	bash scripts/test.sh

quick:
	bash scripts/test.sh -m "not slow"

style:
	bash -c 'source scripts/env.sh dev && ruff check . && ruff format --check . && mypy && python -m pytest -q tests/test_architecture.py tests/docs'

quickstart:
	bash scripts/quickstart.sh

tables:
	bash -c 'source scripts/env.sh dev && python scripts/bench/publish.py'
