#!/usr/bin/env bash
# Makes the environment in .venv, once, and runs a command in it: `bash run.sh help` lists them.
set -eo pipefail # not -u: the bash 3.2 of macOS calls an empty "$@" unset
cd "$(dirname "$0")"
python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # a script in a folder finds icu.py
export TOKENIZERS_PARALLELISM=false

environment() { # again when the requirements change
  if cat requirements.txt tests/requirements.txt | cmp -s - .venv/requirements.txt; then return; fi
  echo "making the environment in .venv (once; a few minutes) ..." >&2
  python3 -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r tests/requirements.txt >&2
  cat requirements.txt tests/requirements.txt >.venv/requirements.txt
}

if [ ! -x "$python" ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: python3 3.11 or newer is needed" >&2
  exit 2
fi
name=$1
case "$name" in
  test) # a process a core; the tests of a file, which share what they made, stay together
    environment; shift
    exec "$python" -m pytest -q -n "$(nproc 2>/dev/null || echo 2)" --maxprocesses 8 \
      --dist loadfile --no-loadscope-reorder "$@" ;;
  lint) environment; exec .venv/bin/ruff check . ;;
  audit | judge | report | tasks | tofu) environment; shift; exec "$python" "evals/$name.py" "$@" ;;
  explain | certificate) environment; shift; exec "$python" "extras/$name.py" "$@" ;;
  ask) environment; shift; exec "$python" evals/report.py --ask "$@" ;;
  bench) environment; shift; exec "$python" dev/bench.py "$@" ;;
  purge) environment; shift; exec "$python" -m kit.purge "$@" ;;
esac
case " $* " in " help "* | *" -h "* | *" --help "*) exec python3 experiment.py "$@" ;; esac
if [ ! -x "$python" ]; then python3 experiment.py --check "$@"; fi # a slip is told before the wait
environment
exec "$python" experiment.py "$@"
