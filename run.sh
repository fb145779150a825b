#!/usr/bin/env bash
# One command an experiment: makes the environment on first use, then chains knn.py -> icu.py -> report.py.
# Every flag after the preset is handed on and overrides the preset's own.
set -eo pipefail  # not -u: the bash 3.2 of macOS calls an empty array unset
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: bash run.sh [PRESET] [FLAG ...]

presets
  tiny                            (default) a self-made corpus and model, on any CPU, no hub needed, a few minutes
  neo125m | neo1.3b | neo2.7b     the paper's runs: GPT-Neo on the Pile extraction data (section 5)
  tinyllama                       Appendix C
  opt125m | opt1.3b | opt2.7b     measured, not unlearned (the OPT rows of Table 1)

other commands
  test [PYTEST ARGS]              the tests
  lint                            the style check
  ask RUN "PREFIX"                what the model of a finished run says before and after
  help                            this text

flags of the Pile presets
  --set 0..4                      the paper's forget sets (0)
  --limit N                       only the first N rows of it
  --model DIR --tokenizer DIR --encoder DIR --bert DIR --data DIR
                                  local folders instead of the hub: the model to unlearn; GPT-2's tokenizer, which the
                                  Pile's token ids are in; the sentence encoder; BERTScore's encoder; the data files
  --allow-copies --max-overlap X  which neighbours may teach the secret back (see python knn.py --help)
flags of every preset
  --out DIR                       the run folder (runs/PRESET-...)
  anything of python icu.py --help, such as --protocol released --alpha 1.0 --lr 1e-5 --seed 3 --method npo --dry-run
TEXT
}

# --- the environment: once, in .venv; remade when requirements.txt changes ---
environment() {
  local stamp=.venv/requirements.sha256 wanted
  wanted=$(python3 -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())')
  if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    echo "making the environment in .venv (once; a few minutes) ..." >&2
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt >&2
    echo "$wanted" >$stamp
  fi
  PYTHON=.venv/bin/python
  export TOKENIZERS_PARALLELISM=false
}

# --- flags: what knn.py takes goes to knn.py, the rest to icu.py, --data to both ---
knn_flags=() icu_flags=()
split_flags() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --set | --limit | --tokenizer | --encoder | --max-overlap | --data)
        [ $# -gt 1 ] || fail "$1 needs a value"
        knn_flags+=("$1" "$2")
        [ "$1" != --data ] || icu_flags+=("$1" "$2")
        shift 2
        ;;
      --allow-copies) knn_flags+=("$1") && shift ;;
      *) icu_flags+=("$1") && shift ;;
    esac
  done
}

value() { # value FLAG DEFAULT: the last value that FLAG was given, or DEFAULT
  local flag=$1 found=$2 previous="" arg
  for arg in "${knn_flags[@]}" "${icu_flags[@]}"; do
    [ "$previous" != "$flag" ] || found=$arg
    case "$arg" in "$flag"=*) found=${arg#*=} ;; esac
    previous=$arg
  done
  printf '%s' "$found"
}

has() { # has FLAG: whether it was given
  local arg
  for arg in "${knn_flags[@]}" "${icu_flags[@]}"; do [ "$arg" != "$1" ] || return 0; done
  return 1
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# --- presets ---
tiny() {
  local data=runs/tiny-data out
  out=$(value --out runs/tiny)
  $PYTHON tiny.py --out $data
  $PYTHON knn.py --forget $data/forget.jsonl --pool $data/pool.jsonl --out $data/pairs.jsonl --overwrite "${knn_flags[@]}"
  # Thresholds are calibrated on records that the tiny model never saw; its learning rate is its own (LOG.md).
  $PYTHON icu.py --pairs $data/pairs.jsonl --model $data/model --bert minilm --preset tiny --lr 1e-4 \
    --thresholds auto --unseen $data/unseen.jsonl --bert-threshold auto --ppl heldout=$data/heldout.jsonl \
    --out "$out" --overwrite "${icu_flags[@]}"
  has --dry-run || $PYTHON report.py "$out"
}

pile() { # pile PRESET MODEL [the preset's own icu flags ...]
  local preset=$1 own=(--model "$2" --preset "$1" "${@:3}") out
  out=$(value --out "runs/$preset-set$(value --set 0)-$(value --method icu)-$(value --protocol paper)")
  own+=(--out "$out" --ppl pile wikitext)
  # Released code: the nearest row, copies included.
  [ "$(value --protocol paper)" != released ] || knn_flags+=(--allow-copies)
  # Models and data are looked for before any work: without --pairs, --dry-run checks all the rest.
  $PYTHON icu.py --dry-run "${own[@]}" "${icu_flags[@]}" >/dev/null
  $PYTHON knn.py --pile --dry-run --out "$out.pairs.jsonl" --overwrite "${knn_flags[@]}"
  has --dry-run && return
  $PYTHON knn.py --pile --out "$out.pairs.jsonl" --overwrite "${knn_flags[@]}"
  $PYTHON icu.py --pairs "$out.pairs.jsonl" "${own[@]}" "${icu_flags[@]}"
  $PYTHON report.py "$out"
}

# --- main ---
preset=${1:-tiny}
case "$preset" in
  -h | --help | help) usage && exit 0 ;;
  -*) preset=tiny ;; # flags without a preset
  *) [ $# -eq 0 ] || shift ;;
esac
split_flags "$@"
if has --help || has -h; then usage && exit 0; fi

# 1.3B and 2.7B: global batch 4; in the released code the DeepSpeed file's lr of 2e-6 beats the flag's 5e-6.
large=(--batch-size 4 --dtype bf16)
[ "$(value --protocol paper)" != released ] || large+=(--lr 2e-6)
case "$preset" in
  test) environment && exec $PYTHON -m pytest -q "$@" ;;
  lint) environment && exec .venv/bin/ruff check . ;;
  ask) environment && exec $PYTHON report.py --ask "$@" ;;
  tiny) environment && tiny ;;
  neo125m) environment && pile neo125m EleutherAI/gpt-neo-125m ;;
  neo1.3b) environment && pile neo1.3b EleutherAI/gpt-neo-1.3B "${large[@]}" ;;
  neo2.7b) environment && pile neo2.7b EleutherAI/gpt-neo-2.7B "${large[@]}" ;;
  tinyllama) environment && pile tinyllama TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T "${large[@]}" ;;
  opt125m) environment && pile opt125m facebook/opt-125m --eval-only ;;
  opt1.3b) environment && pile opt1.3b facebook/opt-1.3b --eval-only ;;
  opt2.7b) environment && pile opt2.7b facebook/opt-2.7b --eval-only ;;
  *) fail "unknown preset '$preset'; one of: tiny neo125m neo1.3b neo2.7b tinyllama opt125m opt1.3b opt2.7b (or test, ask, help)" ;;
esac
