#!/usr/bin/env bash
# Sets up an environment and runs the tests; arguments go to pytest.
REQUIREMENTS=tests/requirements.txt
. "$(dirname "$0")/environment.sh"
python -m ruff check .
python -m pytest -q --numprocesses auto --maxprocesses 4 "$@"
