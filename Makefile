# make book      measure with the profile and build the book into book/_build/html
# make test      run the tests
# make pocket    train the pocket LLaVA anew (GPU: minutes, two cores: hours; resumes where it stopped)
# The default Python makes a virtual environment in .venv; PROFILE names a parameter file in analysis/params.
PROFILE ?= pocket
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: book study html test lint check-results quality pocket clean
.DELETE_ON_ERROR:

book: study html

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet -r requirements.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation -e . || $(RUN) -m pip install --quiet --no-deps -e .
	touch $@

study: .venv/installed
	$(RUN) analysis/run.py --profile $(PROFILE)

html: .venv/installed
	$(RUN) book/build.py --profile $(PROFILE)

test: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m pytest

check-results: .venv/installed
	$(RUN) analysis/run.py --profile pocket --check

quality: .venv/installed
	$(RUN) -m dyrate.pocket.quality

pocket: .venv/installed
	$(RUN) -m dyrate.pocket.train --work build/pocket --out data/pocket
	$(RUN) -m dyrate.pocket.quality

clean:
	rm -rf build book/_build book/analysis
