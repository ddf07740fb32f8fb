# make demo PYTHON=python3 uses an existing environment instead of a local .venv
VENV = .venv/bin/python
PYTHON = $(VENV)
TOO_OLD = import sys; sys.version_info < (3, 10) and \
	sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0])

help:
	@echo "make demo         train, pack and sample on a CPU in minutes: packed.pt, grid.png"
	@echo "make test         run the tests"
	@echo "make kernel-test  after a change to kernel.cu: run it without a GPU, compile it for GPUs"
	@echo "make kernel-audit     its races, bank conflicts and unused sectors by line, without a GPU"
	@echo "make kernel-mistakes  plant mistakes in kernel.cu: does the audit name each of them?"
	@echo "make bench-gpu    on a GPU: check kernel.cu, then time it and whole models"
	@echo "make bench        print the figures of README's results again"
	@echo "make paper        the paper's figures and tables, small: runs/paper/results.md and PNGs;"
	@echo "                  alone: make fig1, fig2, fig4, table1, table2; make compare A=CKPT B=CKPT"
	@echo "make recipes      from scratch, or full precision and a teacher: hours; QUICK=1: minutes"
	@echo "make norm         what the RMS Norm after adaLN is worth: hours"
	@echo "make pictures     a demo run's curves, its samples on the way, a digit that appears"
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

kernel-audit: ready
	"$(PYTHON)" tests/kernel_audit.py

kernel-mistakes: ready
	ALL_MISTAKES=1 "$(PYTHON)" -m pytest -v tests/test_kernel.py -k audit_names

bench: ready
	"$(PYTHON)" tests/bench_speed.py --json runs/bench_speed.json
	"$(PYTHON)" tests/paper.py fig1  # trains the two that come next, where they are missing
	"$(PYTHON)" tests/bench_quality.py runs/demo/packed.pt runs/demo-full/full.pt \
		--json runs/bench_quality.json
	"$(PYTHON)" tests/bench_quality.py runs/demo/packed.pt --dtype int8
	"$(PYTHON)" tests/bench_quality.py runs/demo/packed.pt --sampler ddpm --steps 25

SANITIZER = compute-sanitizer --error-exitcode 1
TEST_GPU = "$(PYTHON)" -m pytest -q tests/test_kernel.py -k

bench-gpu: ready
	$(TEST_GPU) "gpu"
	-$(SANITIZER) --tool memcheck $(TEST_GPU) "gpu and small"
	-$(SANITIZER) --tool racecheck $(TEST_GPU) "gpu and small"
	"$(PYTHON)" tests/bench_speed.py layers --rows 1 2 4 16 512 2048 4096 \
		--json runs/bench_layers_gpu.json
	"$(PYTHON)" tests/bench_speed.py models --json runs/bench_models_gpu.json

# SEEDS="0 1 2" gives fig2 and table1 as medians and ranges, of models trained from each.
paper fig1 fig2 fig4 table1 table2: ready
	"$(PYTHON)" tests/paper.py $(@:paper=all) $(if $(SEEDS),--seeds $(SEEDS))

compare: ready
	"$(PYTHON)" tests/paper.py compare "$(A)" "$(B)"

recipes: ready
	"$(PYTHON)" tests/recipes.py $(if $(QUICK),--quick)

norm: ready
	"$(PYTHON)" tests/norm.py

pictures: ready
	"$(PYTHON)" train.py --compile --save-every 500 --out runs/pictures
	"$(PYTHON)" tests/pictures.py runs/pictures

clean:
	rm -rf .venv .pytest_cache __pycache__ tests/__pycache__

.PHONY: help install ready demo test kernel-test kernel-audit kernel-mistakes bench bench-gpu \
	paper fig1 fig2 fig4 table1 table2 compare recipes norm pictures clean
