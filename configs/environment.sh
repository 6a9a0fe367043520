# Sourced by the other scripts: changes to the repository and activates a Python that has the
# packages in $REQUIREMENTS. That is the one on the path if it has them all; or the active virtual
# environment, to which missing packages are added; otherwise .venv, created once and updated when
# the list changes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${REQUIREMENTS:-requirements.txt}

has_everything() {
    command -v "$1" >/dev/null && "$1" - "$requirements" <<'PY' 2>/dev/null
import pathlib, re, sys
from importlib.metadata import version
def names(path):
    for line in path.read_text().split("\n"):
        if line.startswith("-r "):
            yield from names(path.parent / line[3:])
        elif line.strip():
            yield re.match(r"([\w-]+)>=([\d.]+)", line).groups()
number = lambda text: [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]
is_new = [number(version(n)) >= number(v) for n, v in names(pathlib.Path(sys.argv[1]))]
sys.exit(sys.version_info < (3, 10) or not all(is_new))
PY
}

# conda's base is always active: it is left as it is
active=${VIRTUAL_ENV:-}
[ "${CONDA_DEFAULT_ENV:-base}" = base ] || active=$CONDA_PREFIX

if has_everything python; then
    :
elif [ -n "$active" ] && python -c 'import pip, sys
sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "adding the packages in $requirements that $active lacks"
    python -m pip install --quiet --disable-pip-version-check -r "$requirements"
elif has_everything .venv/bin/python; then
    PATH="$PWD/.venv/bin:$PATH"
else
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        python=
    done
    [ -n "$python" ] || { echo "error: Python 3.10 or newer is required: install it" >&2; exit 2; }
    echo "installing the packages in $requirements into .venv (once; takes a few minutes)"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
        -r "$requirements"
    # compiled here, as pip would use one core; some files are templates
    .venv/bin/python -m compileall -qq -j 0 .venv/lib || true
    PATH="$PWD/.venv/bin:$PATH"
fi
