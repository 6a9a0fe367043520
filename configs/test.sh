#!/usr/bin/env bash
# Sets up an environment, checks the code style and runs the tests. Arguments are passed on to
# pytest.
REQUIREMENTS=tests/requirements.txt
. "$(dirname "$0")/environment.sh"
python -m ruff check .
export OMP_NUM_THREADS=1
# each of many processes would compile all packages that it imports
unset PYTHONDONTWRITEBYTECODE
# one process more than cores, as some tests wait
processes=$(($(getconf _NPROCESSORS_ONLN) + 1))
python -m pytest -q --numprocesses $processes --maxprocesses 4 --dist worksteal "$@"
