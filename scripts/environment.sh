# Sourced by scripts/train and scripts/test: makes or reuses the virtual environment, goes to the checkout, and sets
# $python to the environment's interpreter. Nothing outside the checkout is touched.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The interpreter: $PYTHON, or the first one found that is neither too old nor too new.
is_supported() {
  command -v "$1" >/dev/null &&
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}
if [ -n "${PYTHON:-}" ]; then
  is_supported "$PYTHON" || { echo "PYTHON=$PYTHON: must be Python 3.11 to 3.13, with venv" >&2; exit 2; }
  base=$PYTHON
else
  for base in python3 python python3.13 python3.12 python3.11 ''; do
    if [ -n "$base" ] && is_supported "$base"; then break; fi
  done
  [ -n "$base" ] || { echo "no Python 3.11 to 3.13 (with venv) found; name one: PYTHON=/path/to/python $0" >&2; exit 2; }
fi

# One environment for each version of Python; made again when the interpreter, the pinned versions or the place change.
venv=.venv/$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
python=$PWD/$venv/bin/python
wanted="$("$base" -VV) $PWD $(cat requirements.lock pyproject.toml | cksum)"
mkdir -p .venv
if command -v flock >/dev/null; then exec 9>.venv/lock && flock 9; fi # two scripts started at once take turns
if [ "$(cat "$venv/complete" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$venv"
  if command -v uv >/dev/null; then
    echo "making the environment $venv with uv ..." >&2
    uv venv --quiet --python "$base" "$venv"
    uv pip install --quiet --python "$python" --require-hashes -r requirements.lock
    uv pip install --quiet --python "$python" --no-deps --no-build-isolation -e .
  else
    echo "making the environment $venv with pip (about a minute, once; with uv installed it takes seconds) ..." >&2
    "$base" -m venv "$venv"
    "$python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
  fi
  echo "$wanted" >"$venv/complete"
fi
exec 9>&-
