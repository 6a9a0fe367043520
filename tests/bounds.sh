#!/usr/bin/env bash
# Runs a quick part of the tests with the oldest packages that requirements.txt allows on Python
# 3.10, and with the newest on Python 3.13, each in a fresh virtual environment; TESTS=tests runs
# all of them. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/uv"        # uv, unlike pip, can choose the oldest versions
"$folder/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
uv="$folder/uv/bin/uv --quiet --no-python-downloads"
tests=${TESTS:-"tests/test_layout.py tests/test_models.py tests/test_checkpoint.py
    tests/explanation/test_lrp.py tests/data/test_feature_store.py tests/report/test_heatmaps.py
    tests/test_studies.py tests/crash"}

failed=0
for bounds in "3.10 lowest-direct" "3.13 highest"; do
    read -r version resolution <<<"$bounds"
    environment="$folder/$version"
    if ! $uv venv --python "$version" "$environment"; then
        echo "skipped: there is no Python $version"
        continue
    fi
    $uv pip install --python "$environment" --resolution "$resolution" -r tests/requirements.txt
    $uv pip freeze --python "$environment" | grep -E '^(torch|numpy|h5py)=='
    "$environment/bin/python" -m pytest -q $tests "$@" || failed=1
    rm -rf "$environment"
done
exit $failed
