# Every target sets itself up: `.venv` is made from requirements.lock when it is missing or out of date.
# Where there is no make, the same commands are `python -m autograder …` inside the environment.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
SETUP   := .venv/.complete
RUN     := .venv/bin/python -m autograder
SITE    := .venv-site/.complete

# Empty means: the command's own default. Not `?=`: a variable of the shell that happens to have the name says nothing.
LESSON       =
STAGE        =
PROJECT      =
PROFILE      =
JOBS         =
SUBMITTED    =
OUT          =
STUDENT      =
SCHEDULER    =
DB           =
AGAIN        =
LATE         =
COMPARE      =
UNSAFE       =
VERBOSE      =
LIMITS       =
ONLY         =
MINUTES      =
LIST         =
STUDENTS     =
LESSONS      =
STOCK        =
KEEP         =
ANSWERS      =
ARGS         =
MUTANTS      =
JUDGED       =
SOLUTIONS    =
REPOSITORY   =
CHECK        =
SEEDS        =
SECONDS_EACH =
option = $(if $($(1)),--$(2) "$($(1))")
flag = $(if $(filter-out 0 no false,$($(1))),--$(2))

.DEFAULT_GOAL := help
.PHONY: help setup lab check submit course run prove sweep grade bench-grading gpu gpu-wheels site test lint lock release clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | while IFS="$$(printf '\t')" read -r t d; do printf '  make %-13s %s\n' "$$t" "$$d"; done

setup: $(SETUP) ## only the environment (.venv, from requirements.lock)

$(SETUP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found: install one, or name it: make PYTHON=/path/to/python3.12 …"; exit 1; }
	@"$(PYTHON)" autograder/learner/machine.py
	@echo "Setting up .venv with $(PYTHON) from requirements.lock: a few minutes, once."
	@"$(PYTHON)" -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

lab: $(SETUP) ## your own copies of the lessons, in work/, in jupyterlab [LESSON=09 ARGS="--no-browser --allow-root"]
	@$(RUN) lab $(call option,LESSON,lesson) $(call option,ARGS,args)

check: $(SETUP) ## how far you are: runs the checks of your notebooks [LESSON=09 STAGE=2 PROJECT=1]
	@$(RUN) check $(call option,LESSON,lesson) $(call option,STAGE,stage) $(call option,PROJECT,project)

submit: $(SETUP) ## your notebooks in one zip, to hand in: STUDENT=id [STAGE=2]
	@test -n "$(STUDENT)" || { echo "make submit asks who you are: make submit STUDENT=your-login"; exit 2; }
	@$(RUN) submit $(call option,STUDENT,student) $(call option,STAGE,stage)

course: $(SETUP) ## rebuild course/ from solutions/ [LESSON=09 VERBOSE=1]
	$(RUN) course $(call option,LESSON,lesson) $(call option,STAGE,stage) $(call flag,VERBOSE,verbose)

run: $(SETUP) ## execute every lesson, and prove that the stubs fail [LESSON=09 STAGE=2 PROFILE=cpu|gpu|auto JOBS=2 VERBOSE=1]
	$(RUN) run $(call option,LESSON,lesson) $(call option,STAGE,stage) $(call option,PROFILE,profile) \
	  $(call option,JOBS,jobs) $(call flag,VERBOSE,verbose)

prove: $(SETUP) ## is every wrong answer caught, every right one accepted? [LESSON=09 ANSWERS=file.py MUTANTS=1 JUDGED=1]
	@test -n "$(LESSON)" || { echo "make prove asks for a lesson: make prove LESSON=09"; exit 2; }
	.venv/bin/python tests/prove.py "$(LESSON)" $(call option,ANSWERS,answers) $(call flag,MUTANTS,mutants) $(call flag,JUDGED,judged)

sweep: $(SETUP) ## does a check refuse the answer at one seed of a thousand? [LESSON=09 CHECK=3a SEEDS=1000 SECONDS_EACH=60]
	@test -n "$(LESSON)" || { echo "make sweep asks for a lesson: make sweep LESSON=09"; exit 2; }
	.venv/bin/python tests/sweep.py "$(LESSON)" $(call option,CHECK,check) $(call option,SEEDS,seeds) $(call option,SECONDS_EACH,seconds)

grade: $(SETUP) ## grade a class; without a folder, the sample class [SUBMITTED=dir OUT=dir LESSON=09 STUDENT=id JOBS=2 AGAIN=1 COMPARE=1 LATE=config.py DB=postgresql+psycopg://… SCHEDULER=tcp://… LIMITS="--memory 8000" UNSAFE=1 VERBOSE=1]
	@$(RUN) grade $(call flag,UNSAFE,unsafe) $(call flag,AGAIN,again) $(call flag,COMPARE,compare) $(call flag,VERBOSE,verbose) $(LIMITS) \
	  $(call option,SUBMITTED,submitted) $(call option,OUT,out) $(call option,LESSON,lesson) $(call option,STUDENT,student) \
	  $(call option,JOBS,jobs) $(call option,LATE,late) $(call option,DB,db) $(call option,SCHEDULER,scheduler)

bench-grading: $(SETUP) ## grading a generated class, beside nbgrader's own: hours [STUDENTS=100 LESSONS="1 9" STOCK=2 JOBS=2 KEEP=1]
	.venv/bin/python -m benchmarks.grading $(call flag,KEEP,keep) $(call option,STUDENTS,students) \
	  $(call option,LESSONS,lessons) $(call option,STOCK,stock) $(call option,JOBS,jobs)

gpu: $(SETUP) ## everything a GPU answers, in benchmarks/results/gpu.json; without one, what can be checked [ONLY="speed/29 llama" MINUTES=8 AGAIN=1 LIST=1]
	.venv/bin/python -m benchmarks.gpu $(if $(ONLY),--only $(ONLY)) $(call option,MINUTES,minutes) $(call flag,AGAIN,again) $(call flag,LIST,list)

gpu-wheels: $(SETUP) ## for a GPU machine without network: wheels and notebooks, in build/gpu-wheels/
	.venv/bin/python -m benchmarks.wheels

site: $(SITE) ## the course as pages, after make run, in build/site [SOLUTIONS=1 OUT=dir REPOSITORY=https://…]
	@.venv-site/bin/python -m autograder.site $(call flag,SOLUTIONS,solutions) $(call option,OUT,out) $(call option,REPOSITORY,repository)

$(SITE): requirements-site.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found: make site PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up .venv-site with $(PYTHON) from requirements-site.lock: a minute, once."
	@"$(PYTHON)" -m venv --clear .venv-site
	@.venv-site/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-site.lock
	@touch $@

test: $(SETUP) lint ## every test of the library, the autograder and the answers
	.venv/bin/python -m pytest -n auto --dist loadgroup

lint: $(SETUP) ## ruff: its checks and its format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet . || { echo "not formatted: .venv/bin/ruff format ."; exit 1; }

release: $(SETUP) ## archives in dist/: one for learners, one for instructors
	$(RUN) release

lock: ## make requirements.lock and requirements-site.lock again from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra lab --extra class --extra dev --extra conformance --universal \
	  --python-version 3.11 --no-annotate --upgrade -o requirements.lock
	"$(PYTHON)" -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['site'], sep='\n')" \
	  | uv pip compile - --universal --python-version 3.11 --no-annotate --no-header --upgrade -o requirements-site.lock

clean: ## remove what the commands made, not .venv
	rm -rf build dist
