PYTHON ?= python

.PHONY: check test demo

# The code without running it: style, spelling, types.
check:
	ruff check .
	ruff format --check .
	typos
	basedpyright

# The quick tests; the whole suite is `python -m pytest`.
test:
	$(PYTHON) -m pytest -m "not slow"

# The whole way on the embedded base: train, then generate.
demo:
	$(PYTHON) megaman_lora.py --demo --overwrite_output
	$(PYTHON) generate_megaman.py --demo
