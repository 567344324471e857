# On a fresh machine with Python 3.11+ and make: `make demo` and `make test` do everything.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The CPU build, exact because a range would let pip take gigabytes of CUDA. Already there: pip installs nothing.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Tests run in this many processes of one thread each: two threads of one process would be idle half of the time.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal

.PHONY: demo test test-all readme site lint quality speed bench endtoend profiles frontier plots methods clean

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "longwave needs Python 3.11 or newer; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_torch.py "$(TORCH)" "$(TORCH_INDEX)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/longwave demo

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint site
	$(PYTEST) -m "not slow"

test-all: lint readme site
	$(PYTEST)

# README as a stranger would type it, of what is committed: a clone, an empty home, its install, code and commands
readme:
	$(PYTHON) tools/play_readme.py

# docs/ as pages, in out/site; a link that leads nowhere fails
site: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# the regression gate: fails when a method's divergence or needles leave their recorded band; needs evaluation data
quality: $(VENV)/ready
	$(BIN)/python -m benchmarks.gate

# time and memory of every method beside dense, random weights; goes on where it ended
speed: $(VENV)/ready
	$(BIN)/python -m benchmarks.family

# decode attention on an NVIDIA GPU, against full attention and other ways to decode the same channels; and its plot
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.kernels --grid --rivals --out out/kernels.json
	$(BIN)/python -m benchmarks.plot_kernels out/kernels.json

# Llama-3.1-8B from prompt to token on an NVIDIA GPU, random weights
endtoend: $(VENV)/ready
	$(BIN)/python -m benchmarks.endtoend --out out/endtoend.json

# tables and plot of docs/results/frontier from its committed samples
frontier: $(VENV)/ready
	$(BIN)/python -m benchmarks.frontier

# every picture of docs/results from the rows committed beside it
plots: $(VENV)/ready
	$(BIN)/python -m benchmarks.plots

# the table of docs/methods.md, asked of the code
methods: $(VENV)/ready
	$(BIN)/python -m tests.methods.page

profiles: $(VENV)/ready
	$(BIN)/python -m benchmarks.profiles

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
