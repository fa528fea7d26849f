# Sourced by scripts/train and scripts/test: makes or reuses the virtual environment, goes to the checkout, and sets
# $python to the environment's interpreter. Outside the checkout, only the package caches of pip or uv change.

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

# One environment per Python version; rebuilt when the interpreter, the pinned versions or the checkout's path change.
# requirements.lock has what training needs; requirements-dev.lock also has what the tests need.
lock=${lock:-requirements.lock}
venv=.venv/$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
python=$PWD/$venv/bin/python
wanted() { echo "$("$base" -VV) $PWD $1 $(cat "$1" pyproject.toml | cksum)"; }
has_uv() { command -v uv >/dev/null; }
install() {
  if has_uv; then
    uv pip install --quiet --python "$python" "$@"
  else
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
  fi
}
mkdir -p .venv
if command -v flock >/dev/null; then exec 9>.venv/lock && flock 9; fi # scripts that start at the same time take turns
complete=$(cat "$venv/complete" 2>/dev/null || true)
if [ "$complete" != "$(wanted "$lock")" ] && [ "$complete" != "$(wanted requirements-dev.lock)" ]; then
  if [ "$complete" != "$(wanted requirements.lock)" ]; then
    rm -rf "$venv"
    if has_uv; then
      echo "making the environment $venv with uv ..." >&2
      uv venv --quiet --python "$base" "$venv"
    else
      echo "making the environment $venv with pip (about a minute, once; with uv installed, it takes seconds) ..." >&2
      "$base" -m venv "$venv"
    fi
  fi
  install --require-hashes -r "$lock"
  install --no-deps --no-build-isolation -e .
  # pip would compile on one core, with the packages' tests, which doubles the time of the installation.
  has_uv || "$python" -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' "$venv/lib" mnist_flax || true
  wanted "$lock" >"$venv/complete"
fi
exec 9>&-
