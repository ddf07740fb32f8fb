# make demo PYTHON=python3 uses an existing environment instead of a local .venv
VENV = .venv/bin/python
PYTHON = $(VENV)
TOO_OLD = import sys; sys.version_info < (3, 10) and sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0])

help:
	@echo "make demo         train, pack and sample on a CPU in minutes: runs/demo/packed.pt and grid.png"
	@echo "make test         run the tests"
	@echo "make kernel-test  after a change to kernel.cu: run it without a GPU, compile it for sm_80 and sm_90a"
	@echo "make bench-gpu    on a GPU: check kernel.cu, then time it and whole models"
	@echo "make bench        print the figures of README's results again"
	@echo "make paper        the paper's figures and tables, small: runs/paper/results.md and PNGs;"
	@echo "                  alone: make fig1, fig2, fig4, table1, table2; make compare A=CKPT B=CKPT"
	@echo "make recipes      from scratch, or from full precision with a teacher: hours; QUICK=1 for minutes"
	@echo "make install      only make the local environment, .venv"
	@echo "make clean        remove .venv and caches; runs/ stays"
	@echo "PYTHON=python3 after any of them uses your own environment"

install: .venv/ready

.venv/ready: requirements.txt
	@python3 -c '$(TOO_OLD)'
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

ready: $(if $(filter $(VENV),$(PYTHON)),.venv/ready)
	@"$(PYTHON)" -c '$(TOO_OLD)'

demo: ready
	"$(PYTHON)" train.py --compile --out runs/demo
	"$(PYTHON)" sample.py --ckpt runs/demo/packed.pt --out runs/demo/grid.png

test: ready
	"$(PYTHON)" -m pytest -q tests

kernel-test: ready
	"$(PYTHON)" -m pytest -q tests/test_kernel.py

bench: ready
	"$(PYTHON)" tests/bench_speed.py --json runs/bench_speed.json
	"$(PYTHON)" tests/paper.py fig1  # trains the two that come next, where they are missing
	"$(PYTHON)" tests/bench_quality.py runs/demo/packed.pt runs/demo-full/full.pt --json runs/bench_quality.json
	"$(PYTHON)" tests/bench_quality.py runs/demo/packed.pt --dtype int8
	"$(PYTHON)" tests/bench_quality.py runs/demo/packed.pt --sampler ddpm --steps 25

bench-gpu: ready
	"$(PYTHON)" -m pytest -q tests/test_kernel.py -k gpu
	-compute-sanitizer --tool memcheck --error-exitcode 1 "$(PYTHON)" -m pytest -q tests/test_kernel.py -k "gpu and small"
	-compute-sanitizer --tool racecheck --error-exitcode 1 "$(PYTHON)" -m pytest -q tests/test_kernel.py -k "gpu and small"
	"$(PYTHON)" tests/bench_speed.py layers --json runs/bench_layers_gpu.json
	"$(PYTHON)" tests/bench_speed.py models --json runs/bench_models_gpu.json

# SEEDS="0 1 2" gives fig2 and table1 as medians and ranges, of models trained from each.
paper fig1 fig2 fig4 table1 table2: ready
	"$(PYTHON)" tests/paper.py $(@:paper=all) $(if $(SEEDS),--seeds $(SEEDS))

compare: ready
	"$(PYTHON)" tests/paper.py compare "$(A)" "$(B)"

recipes: ready
	"$(PYTHON)" tests/recipes.py $(if $(QUICK),--quick)

clean:
	rm -rf .venv .pytest_cache __pycache__ tests/__pycache__

.PHONY: help install ready demo test kernel-test bench bench-gpu paper fig1 fig2 fig4 table1 table2 compare recipes clean
