# Every target sets itself up: `.venv` is made from requirements.lock when it is missing or out of date.
# Where there is no make, the same commands are `python -m autograder …` inside the environment.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
SETUP   := .venv/.complete
RUN     := .venv/bin/python -m autograder

# Empty means: the command's own default.
LESSON  ?=
STAGE   ?=
PROFILE ?=
JOBS    ?=
SUBMITTED ?=
OUT     ?=
STUDENT ?=
SCHEDULER ?=
DB      ?=
AGAIN   ?=
LATE    ?=
COMPARE ?=
UNSAFE  ?=
LIMITS  ?=
STUDENTS ?=
LESSONS ?=
STOCK   ?=
KEEP    ?=
option = $(if $($(1)),--$(2) "$($(1))")

.DEFAULT_GOAL := help
.PHONY: help setup lab course run grade bench-grading test lint lock release clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | while IFS="$$(printf '\t')" read -r t d; do printf '  make %-13s %s\n' "$$t" "$$d"; done

setup: $(SETUP) ## only the environment (.venv, from requirements.lock)

$(SETUP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found: install one, or name it: make PYTHON=/path/to/python3.12 …"; exit 1; }
	@echo "Setting up .venv with $(PYTHON) from requirements.lock: a few minutes, once."
	@"$(PYTHON)" -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

lab: $(SETUP) course/index.ipynb ## JupyterLab on the lessons
	.venv/bin/python -m jupyterlab course/index.ipynb

course: $(SETUP) ## rebuild course/ from solutions/ [LESSON=09]
	$(RUN) course $(call option,LESSON,lesson) $(call option,STAGE,stage)

run: $(SETUP) ## execute every lesson, and prove that the stubs fail [LESSON=09 STAGE=2 PROFILE=cpu|gpu|auto JOBS=2]
	$(RUN) run $(call option,LESSON,lesson) $(call option,STAGE,stage) $(call option,PROFILE,profile) $(call option,JOBS,jobs)

grade: $(SETUP) ## grade a class; without a folder, the sample class [SUBMITTED=dir OUT=dir LESSON=09 STUDENT=id JOBS=2 AGAIN=1 COMPARE=1 LATE=config.py DB=postgresql+psycopg://… SCHEDULER=tcp://… LIMITS="--memory 8000" UNSAFE=1]
	$(RUN) grade $(if $(UNSAFE),--unsafe) $(if $(AGAIN),--again) $(if $(COMPARE),--compare) $(LIMITS) \
	  $(call option,SUBMITTED,submitted) $(call option,OUT,out) $(call option,LESSON,lesson) $(call option,STUDENT,student) \
	  $(call option,JOBS,jobs) $(call option,LATE,late) $(call option,DB,db) $(call option,SCHEDULER,scheduler)

bench-grading: $(SETUP) ## grading a generated class, beside nbgrader's own: hours [STUDENTS=100 LESSONS="1 9" STOCK=2 JOBS=2 KEEP=1]
	.venv/bin/python -m benchmarks.grading $(if $(KEEP),--keep) $(call option,STUDENTS,students) \
	  $(call option,LESSONS,lessons) $(call option,STOCK,stock) $(call option,JOBS,jobs)

test: $(SETUP) lint ## every test of the library, the autograder and the answers
	.venv/bin/python -m pytest -n auto --dist loadgroup

lint: $(SETUP) ## ruff
	.venv/bin/ruff check .

release: $(SETUP) ## archives in dist/: one for learners, one for instructors
	$(RUN) release

lock: ## make requirements.lock again from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --upgrade -o requirements.lock

clean: ## remove what the commands made, not .venv
	rm -rf build dist
