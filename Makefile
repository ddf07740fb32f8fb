# make demo PYTHON=python3 uses an existing environment instead of a local .venv
VENV = .venv/bin/python
PYTHON = $(VENV)
READY = $(if $(filter $(VENV),$(PYTHON)),.venv/ready)

help:
	@echo "make demo         train, pack and sample on a CPU in minutes: runs/demo/packed.pt and grid.png"
	@echo "make test         run the tests"
	@echo "make kernel-test  after a change to kernel.cu: run it without a GPU, compile it for sm_80 and sm_90a"
	@echo "make bench-gpu    on a GPU: check kernel.cu, then time it and whole models"
	@echo "make bench        print every figure of README's results again (about 40 minutes on 2 cores)"
	@echo "make paper        the paper's figures and tables, small (23 minutes on 2 cores): runs/paper/results.md and PNGs;"
	@echo "                  alone: make fig1, fig2, fig4, table1, table2; make compare A=CKPT B=CKPT"
	@echo "make recipes      which training recipe is better, by held-out loss: hours; QUICK=1 for minutes"
	@echo "make install      only make the local environment, .venv"
	@echo "make clean        remove .venv and caches; runs/ stays"
	@echo "PYTHON=python3 after any of them uses your own environment"

install: $(READY)

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: $(READY)
	$(PYTHON) train.py --compile --out runs/demo
	$(PYTHON) sample.py --ckpt runs/demo/packed.pt --out runs/demo/grid.png

test: $(READY)
	$(PYTHON) -m pytest -q tests

kernel-test: $(READY)
	$(PYTHON) -m pytest -q tests/test_kernel.py

bench: $(READY)
	$(PYTHON) tests/bench_kernel.py --json runs/bench_kernel.json
	$(PYTHON) tests/bench_model.py --json runs/bench_model.json
	$(PYTHON) tests/bench_qat.py --json runs/bench_qat.json
	$(PYTHON) tests/bench_data.py --json runs/bench_data.json
	$(PYTHON) tests/bench_faults.py --json runs/bench_faults.json
	$(PYTHON) tests/paper.py fig1  # trains the two that come next, where they are missing
	$(PYTHON) tests/bench_quality.py runs/demo/packed.pt runs/demo-full/full.pt --json runs/bench_quality.json
	$(PYTHON) tests/bench_samplers.py runs/demo/packed.pt --json runs/bench_samplers.json
	$(PYTHON) tests/bench_memory.py --json runs/bench_memory.json

bench-gpu: $(READY)
	$(PYTHON) -m pytest -q tests/test_kernel.py -k gpu
	-compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m pytest -q tests/test_kernel.py -k "gpu and small"
	-compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m pytest -q tests/test_kernel.py -k "gpu and small"
	$(PYTHON) tests/bench_kernel.py --json runs/bench_kernel_gpu.json
	$(PYTHON) tests/bench_model.py --steps 50 --json runs/bench_model_gpu.json

# SEEDS="0 1 2" gives fig2 and table1 as medians and ranges, of models trained from each.
paper fig1 fig2 fig4 table1 table2: $(READY)
	$(PYTHON) tests/paper.py $(@:paper=all) $(if $(SEEDS),--seeds $(SEEDS))

compare: $(READY)
	$(PYTHON) tests/paper.py compare $(A) $(B)

recipes: $(READY)
	$(PYTHON) tests/recipes.py $(if $(QUICK),--quick)

clean:
	rm -rf .venv .pytest_cache __pycache__ tests/__pycache__

.PHONY: help install demo test kernel-test bench bench-gpu paper fig1 fig2 fig4 table1 table2 compare recipes clean
