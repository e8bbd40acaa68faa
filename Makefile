# make help lists what there is. Variables: PYTHON (3.10 or newer), TORCH (what pip shall install as PyTorch).
PYTHON ?= python3
TORCH ?= torch==2.13.0
K_DIFFUSION := k-diffusion==0.1.1.post1

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --quiet
PROMPT := a red ball and a blue star on snow, night sky

# Threads sleep while they wait instead of spinning, which on a busy machine is many times faster (see __main__.py).
demo test quality: export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench bench-plan bench-gpu bench-devices quality fuzz shots panel-venvs clean mutants cluster-test

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/installed ## base picture, MultiDiffusion and AccDiffusion v2 at 4x side by side: out/demo/demo.png
	$(RUN) -m testbed.demo --prompt "$(PROMPT)" --out out/demo

test: $(VENV)/installed-dev ## all tests
	$(RUN) -m pytest -q -n auto

lint: $(VENV)/installed-dev ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(VENV)/installed ## speed and memory: a table, then one JSON object
	$(RUN) -m benchmarks

bench-plan: $(VENV)/installed ## what SDXL takes at 4096x4096, counted in seconds: one JSON object
	$(RUN) -m benchmarks.plan

bench-gpu: $(VENV)/installed ## full-size SDXL on a GPU in two minutes (SECONDS=120); goes on where it was cut off
	$(RUN) -m benchmarks.gpu --seconds $(or $(SECONDS),120)

bench-devices: $(VENV)/installed ## what several devices gain: measured here, foreseen for SDXL
	$(RUN) -m benchmarks.devices

quality: $(VENV)/installed ## methods compared on drawn scenes: tables and contact sheets in out/quality
	$(RUN) -m testbed.quality

cluster-test: $(VENV)/installed-dev ## many pictures on a Ray of this machine, which it installs (260 MB)
	$(PIP) --constraint $(VENV)/constraints.txt --requirement requirements-cluster.txt
	$(RUN) -m pytest -q tests/many/test_cluster.py

fuzz: $(VENV)/installed-dev ## tens of thousands of made-up plans, arguments and parameters: how many are not answered
	$(RUN) -m tests.webui.fuzz

shots: $(VENV)/installed-dev panel-venvs ## pictures of the panel in docs/panel, with the WebUIs' two gradio versions
	ACCDIFF_SHOTS=docs/panel $(RUN) -m pytest -q -p no:xdist tests/webui/test_panel.py -k how_it_looks

mutants: $(VENV)/installed-mutants ## small mistakes made in the code: how many a test notices (SAMPLE=150 of them, SEED=0)
	$(RUN) -m tests.mutants --sample $(or $(SAMPLE),150) --seed $(or $(SEED),0)

panel-venvs: .venv-gradio3/installed .venv-gradio4/installed ## the WebUIs' two gradio versions, for the panel's tests

.venv-gradio%/installed: tests/webui_stand_in/gradio%.txt
	test -x .venv-gradio$*/bin/python || $(PYTHON) -m venv .venv-gradio$*
	.venv-gradio$*/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	@touch $@

clean: ## forgets the virtual environment and what was made with it
	rm -rf $(VENV) .venv-gradio* out .pytest_cache .mypy_cache .ruff_cache .hypothesis .mutants

# A stamp file for each installation, so that a second call has nothing to do. torch comes first and its version is a
# constraint for all that follows: nothing can bring another one.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name it with PYTHON=..., like make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(RUN) || { echo "Setting up $(VENV) (torch and others: some minutes, 1 GB)"; $(PYTHON) -m venv $(VENV); }
	$(PIP) $(TORCH)
	@$(RUN) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	$(PIP) --constraint $(VENV)/constraints.txt --requirement requirements.txt
	$(PIP) --no-deps $(K_DIFFUSION)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PIP) --constraint $(VENV)/constraints.txt --requirement requirements-dev.txt
	@touch $@

$(VENV)/installed-mutants: $(VENV)/installed-dev requirements-mutants.txt
	$(PIP) --no-deps --requirement requirements-mutants.txt
	@touch $@
