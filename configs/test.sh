#!/usr/bin/env bash
# Sets up an environment, checks the code style and runs the tests. Arguments are passed on to pytest.
REQUIREMENTS=tests/requirements.txt
. "$(dirname "$0")/environment.sh"
python -m ruff check .
# one process more than cores, as some tests wait
python -m pytest -q --numprocesses $(($(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 4 --dist worksteal "$@"
