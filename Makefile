# The two commands a new user needs: `make demo` and `make test`. Both make .venv first; nothing else is to be installed.
PYTHON ?= python3
BIN    := .venv/bin
RUN    ?= runs/demo

.PHONY: demo test lint networks bench clean

.venv/done: pyproject.toml constraints.txt setup.py $(wildcard src/anymask/kernels/*.[ch] src/anymask/kernels/*.inc)
	$(PYTHON) -c "import sys; sys.exit('anymask needs Python 3.10 or newer, this is ' + sys.version.split()[0]) if sys.version_info < (3, 10) else None"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/done
	$(BIN)/anymask compare --config configs/demo.toml --out $(RUN)

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Where PYTHONDONTWRITEBYTECODE is set, each process that a test starts compiles the package anew, for half a second.
test: export PYTHONDONTWRITEBYTECODE =
test: lint
	$(BIN)/pytest -n 2 --dist worksteal

networks: .venv/done
	$(BIN)/python tools/networks.py
	$(BIN)/python tools/make_docs.py

# On a quiet machine. OTHERS: a Python that has SparseProp and sparselab beside anymask (docs/speed.md).
OTHERS ?= $(BIN)/python
bench: .venv/done
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/trainer.py
	$(BIN)/python benchmarks/inference.py
	$(OTHERS) benchmarks/layers.py
	$(BIN)/python tools/make_docs.py

clean:
	rm -rf .venv build dist src/*.egg-info
