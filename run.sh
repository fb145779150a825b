#!/usr/bin/env bash
# The environment, made once in .venv; then what was asked for, with it. `bash run.sh help` says what there is;
# experiment.py, which commands a preset or a comparison is made of.
set -eo pipefail  # not -u: the bash 3.2 of macOS calls an empty "$@" unset
cd "$(dirname "$0")"
python=.venv/bin/python

if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: python3 3.11 or newer is needed" >&2
  exit 2
fi

environment() { # .venv: once, and again when requirements.txt changes
  local stamp=.venv/requirements.sha256 wanted found
  wanted=$(python3 -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())')
  found=$(cat "$stamp" 2>/dev/null) || true
  if [ "$found" != "$wanted" ]; then
    echo "making the environment in .venv (once; a few minutes) ..." >&2
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt >&2
    echo "$wanted" >"$stamp"
  fi
  export TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # `import icu` works in any folder
}

case "$1" in
  test) # a process a core; a file's tests, which share what they made, stay together
    environment; shift
    exec "$python" -m pytest -q -n "$(nproc 2>/dev/null || echo 2)" --maxprocesses 8 \
      --dist loadfile --no-loadscope-reorder "$@" ;;
  lint) environment; exec .venv/bin/ruff check . ;;
  audit | judge | report | tasks) environment; name=$1; shift; exec "$python" "evals/$name.py" "$@" ;;
  bench) environment; shift; exec "$python" dev/bench.py "$@" ;;
  ask) environment; shift; exec "$python" evals/report.py --ask "$@" ;;
  purge) environment; shift; exec "$python" -m kit.purge "$@" ;;
esac
case " $* " in " help "* | *" -h "* | *" --help "*) exec python3 experiment.py --help ;; esac
python3 experiment.py --check "$@" # a slip of the pen is told before an environment is made
environment
exec "$python" experiment.py "$@"
