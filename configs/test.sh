#!/usr/bin/env bash
# Sets up an environment, checks the code style and runs the tests. Arguments are passed on to
# pytest.
REQUIREMENTS=tests/requirements.txt
. "$(dirname "$0")/environment.sh"
python -m ruff check .
# one process more than cores, as some tests wait
processes=$(($(getconf _NPROCESSORS_ONLN) + 1))
python -m pytest -q --numprocesses $processes --maxprocesses 4 --dist worksteal "$@"
