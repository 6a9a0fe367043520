#!/usr/bin/env bash
# Sets up an environment, checks the code style and runs the tests. Arguments are passed on to pytest.
REQUIREMENTS=tests/requirements.txt
. "$(dirname "$0")/environment.sh"
python -m ruff check .
python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
