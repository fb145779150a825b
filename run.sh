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
  opt125m | opt1.3b | opt2.7b     measured, not unlearned (the OPT rows of Table 1); their weights are pickles on the
                                  hub, which only --allow-pickle loads

paths are taken from the folder of run.sh

other commands
  compare PRESET                  every method of Table 1, then one table (finished runs are kept)
      [--methods M ...] [--sets 0 1 2 3 4] [--seeds N ...] [--lrs METHOD=LR ...]
  ablation PRESET                 Figure 3: without the learn loss, without the KL, without both
  sweep PRESET                    Table 2's grid over alpha and beta; --table 5: its learning rates
      [--points ALPHA,BETA ...] [--lrs LR ...] [--sets N ...] [--seeds N ...]
  ask RUN "PREFIX"                what the model of a finished run says before and after
  test [PYTEST ARGS]              the tests
  bench [FLAGS]                   speed and memory against the literal algorithms and the libraries: BENCHMARKS.md
  lint                            the style check
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
  --gpus N                        processes, by the deepspeed launcher (1; neo1.3b, neo2.7b, tinyllama: every GPU there is)
  --resume                        go on with an interrupted run
  --tasks all | NAME ...          what the model can still do, before and after: tasks.py (--task-data DIR, --prompts,
                                  --length-norm go with it)
  anything of python icu.py --help, such as --protocol released --alpha 1.0 --lr 1e-5 --seed 3 --method npo --dry-run
TEXT
}

# --- the environment: once, in .venv; remade when requirements.txt changes ---
environment() {
  local stamp=.venv/requirements.sha256 wanted
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "python3 3.11 or newer is needed"
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
knn_flags=() icu_flags=() task_flags=() gpus= place=()
split_flags() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --set | --limit | --tokenizer | --encoder | --max-overlap | --data)
        [ $# -gt 1 ] || fail "$1 needs a value"
        knn_flags+=("$1" "$2")
        [ "$1" != --data ] || icu_flags+=("$1" "$2")
        shift 2
        ;;
      --gpus)
        case "${2:-}" in "" | *[!0-9]* | 0*) fail "--gpus needs a number of 1 or more" ;; esac
        gpus=$2
        shift 2
        ;;
      --tasks)
        task_flags+=("$1") && shift
        while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do task_flags+=("$1") && shift; done
        ;;
      --task-data | --prompts)
        [ $# -gt 1 ] || fail "$1 needs a value"
        task_flags+=("$1" "$2")
        shift 2
        ;;
      --length-norm) task_flags+=("$1") && shift ;;
      --allow-copies) knn_flags+=("$1") && shift ;;
      *) icu_flags+=("$1") && shift ;;
    esac
  done
}

value() { # value FLAG DEFAULT: the last value that FLAG was given, or DEFAULT
  local flag=$1 found=$2 previous="" arg
  for arg in "${knn_flags[@]}" "${icu_flags[@]}"; do
    [ "$previous" != "$flag" ] || found=$arg
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

# --- presets: one run each, mine -> unlearn -> report ---
hub() { # hub NAME REVISION [FLAG ...]: `base` for a model of the hub at a pinned revision, unless --model names another
  base=(--model "$1" --revision "$2" "${@:3}")
  [ -z "$(value --model "")" ] || base=(--model "$1" "${@:3}")
}

preset_flags() { # preset_flags PRESET: sets `base`, the icu.py flags that make the preset, and `source`, its knn.py flags
  local preset=$1 released=
  [ "$(value --protocol paper)" != released ] || released=yes
  # 1.3B and 2.7B: global batch 4; in the released code the DeepSpeed file's lr of 2e-6 beats the flag's 5e-6.
  local large=(--batch-size 4 --dtype bf16 ${released:+--lr 2e-6})
  case "$preset" in
    tiny)
      # A small model needs a larger step, every token a target and more weight on what is kept (LOG.md).
      local data=runs/tiny-data
      base=(--model $data/model --bert minilm --bert-threshold auto --ppl heldout=$data/heldout.jsonl)
      base+=(--targets all --batch-size 32 --lr 2e-4 --alpha 1 --beta 4)
      source=(--forget $data/forget.jsonl --pool $data/pool.jsonl)
      ;;
    neo125m) hub EleutherAI/gpt-neo-125m 21def0189f5705e2521767faed922f1f15e7d7db ;;
    neo1.3b) hub EleutherAI/gpt-neo-1.3B dbe59a7f4a88d01d1ba9798d78dbe3fe038792c8 "${large[@]}" ;;
    neo2.7b) hub EleutherAI/gpt-neo-2.7B e24fa291132763e59f4a5422741b424fb5d59056 "${large[@]}" ;;
    tinyllama)
      hub TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T 036fa4651240b9a1487f709833b9e4b96b4c1574 "${large[@]}"
      ;;
    opt125m) hub facebook/opt-125m 27dcfa74d334bc871f3234de431e71c6eeba5dd6 --eval-only ;;
    opt1.3b) hub facebook/opt-1.3b 3f5c25d0bc631cb57ac65913f76e22c2dfb61d62 --eval-only ;;
    opt2.7b) hub facebook/opt-2.7b 905a4b602cda5c501f1b3a2650a4152680238254 --eval-only ;;
    *) fail "unknown preset '$preset'; one of: $PRESETS (or: test bench lint ask compare ablation sweep help)" ;;
  esac
  base+=(--preset "$preset")
  [ "$preset" = tiny ] && return
  base+=(--ppl pile wikitext $(released_rate "$(value --method icu)"))
  source=(--pile ${released:+--allow-copies}) # Released code: the nearest row, copies included.
}

visible_gpus() { $PYTHON -c 'import torch; print(torch.cuda.device_count())'; }

launch() { # launch FILE.py FLAG ...: by the deepspeed launcher where several processes are asked for
  local command=($PYTHON "$1") port
  case "$preset" in neo1.3b | neo2.7b | tinyllama) [ -n "$gpus" ] || gpus=$(visible_gpus) ;; esac
  [ "${gpus:-0}" -gt 0 ] || gpus=1
  if [ "$gpus" -gt 1 ] || has --offload || [ "$(value --zero 2)" = 3 ]; then # these two are DeepSpeed's
    [ "$(visible_gpus)" -gt 0 ] || export DS_ACCELERATOR=cpu
    port=$($PYTHON -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    command=($PYTHON -m deepspeed.launcher.runner --quiet --no_local_rank --num_gpus "$gpus" --master_port "$port" "$1")
  fi
  supervised "${command[@]}" "${@:2}"
}

supervised() { # supervised COMMAND ...: a signal to run.sh reaches all its processes, and their end is waited for
  local child status stopped=
  set -m # a process group of its own
  "$@" &
  child=$!
  set +m
  trap 'stopped=143; kill -TERM -- -$child 2>/dev/null || true' TERM
  trap 'stopped=130; kill -INT -- -$child 2>/dev/null || true' INT
  while true; do
    status=0
    wait $child || status=$?
    kill -0 -- -$child 2>/dev/null || break
    sleep 0.2
  done
  trap - TERM INT
  return ${stopped:-$status}
}

measure_tasks() { # measure_tasks FLAG ...: tasks.py with this run's flags
  local data flag
  data=$(value --data "")
  ! has --allow-pickle || set -- "$@" --allow-pickle
  for flag in --device --dtype; do [ -z "$(last_of $flag)" ] || set -- "$@" $flag "$(last_of $flag)"; done
  launch tasks.py --protocol "$(value --protocol paper)" ${data:+--task-data "$data"} "${task_flags[@]}" "$@"
}

last_of() { # last_of FLAG: its last value among the preset's flags and the user's
  local previous= arg found=
  for arg in "${base[@]}" "${icu_flags[@]}"; do
    [ "$previous" != "$1" ] || found=$arg
    previous=$arg
  done
  printf '%s' "$found"
}

mine() { # mine PAIRS [FLAG ...]: the pairs file of the preset
  [ "$preset" != tiny ] || $PYTHON demo/tiny.py --out runs/tiny-data
  # Models and data are looked for before any work: without --pairs, --dry-run checks all the rest.
  local plan
  ! has --resume || [ ! -f "$1" ] || return 0 # the pairs of the run that goes on
  plan=$($PYTHON icu.py --dry-run "${base[@]}" "${place[@]}" "${icu_flags[@]}")
  ! has --dry-run || echo "$plan"
  $PYTHON knn.py "${source[@]}" --out "$1" --overwrite "${knn_flags[@]}" "${@:2}" $(! has --dry-run || echo --dry-run)
}

single() { # one run of the preset
  local out model
  out=$(value --out "runs/$preset-set$(value --set 0)-$(value --method icu)-$(value --protocol paper)")
  [ "$preset" != tiny ] || out=$(value --out runs/tiny)
  mkdir -p "$(dirname "$out")"
  place=(--out "$out")
  [ "$out" != runs/tiny ] || has --resume || place+=(--overwrite) # the default command can be typed twice
  model=(--model "$(last_of --model)")
  [ -z "$(last_of --revision)" ] || model+=(--revision "$(last_of --revision)")
  # Whether the sets are at hand is found out before the work, not after it.
  [ ${#task_flags[@]} -eq 0 ] || measure_tasks --dry-run "${model[@]}" --out "$out"
  mine "$out.pairs.jsonl"
  ! has --dry-run || return 0
  launch icu.py "${base[@]}" --pairs "$out.pairs.jsonl" "${place[@]}" "${icu_flags[@]}"
  if [ ${#task_flags[@]} -gt 0 ]; then
    measure_tasks "${model[@]}" --out "$out/tasks-before" --overwrite
    [ ! -d "$out/model" ] || measure_tasks --model "$out/model" --out "$out/tasks-after" --overwrite
  fi
  $PYTHON report.py "$out"
}

# --- several runs: what is finished is kept, what was interrupted goes on ---
again= jobs=() # --overwrite: every run anew; the run folders of this comparison
job() { # job NAME [icu flag ...]
  local out=$folder/$1 how=--overwrite status=0
  jobs+=("$out")
  # --resume also refuses to keep a run that was made with other settings. Without config.json it is no run yet.
  [ ! -f "$out/config.json" ] || [ -n "$again" ] || how=--resume
  echo "== $out"
  # A method that diverges (1) has a summary: it is a result, not an end.
  launch icu.py "${base[@]}" --pairs "$pairs" --out "$out" $how "${icu_flags[@]}" "${@:2}" || status=$?
  [ $status -le 1 ] && [ -f "$out/summary.json" ] || exit $status
}

list() { # list FLAG DEFAULT...: moves the values of a flag of several out of icu_flags, into `values`
  local flag=$1 rest=() taking= arg
  values=()
  for arg in "${icu_flags[@]}"; do
    case "$arg" in
      "$flag") taking=yes ;;
      --*) taking= && rest+=("$arg") ;;
      *) if [ -n "$taking" ]; then values+=("$arg"); else rest+=("$arg"); fi ;;
    esac
  done
  icu_flags=("${rest[@]}")
  [ ${#values[@]} -gt 0 ] || values=("${@:2}")
}

several() { # several compare|ablation|sweep PRESET: every set and seed of the paper's tables, then one report
  local kind=$1 sets seeds methods rates points set seed method point
  [ "$kind" != compare ] || ! has --method || fail "compare sets --method itself: pass --methods NAME ..."
  if [ "$kind" = sweep ] && { has --alpha || has --beta; }; then
    fail "sweep sets --alpha and --beta itself: pass --points ALPHA,BETA ..."
  fi
  list --sets "$(value --set 0)" && sets=("${values[@]}")
  list --seeds "$(value --seed 0)" && seeds=("${values[@]}")
  list --methods icu kumpr kl llmu po dpo npo graddiff && methods=("${values[@]}")
  list --lrs && rates=("${values[@]}") # compare: METHOD=LR ...; sweep: LR ...
  list --points && points=("${values[@]}") # sweep: ALPHA,BETA ...
  list --table 2 && [ "${values[0]}" != 5 ] || [ ${#rates[@]} -gt 0 ] || rates=(1e-5 5e-6 2e-6 1e-6 5e-7)
  # Table 2's grid, and Figure 3's: no learn loss, no KL, neither.
  [ ${#points[@]} -gt 0 ] || points=(0.1,0.5 0.1,1.0 0.5,0.1 0.5,0.5 0.5,1.0 1.0,0.5 1.0,1.0 1.0,2.0 2.0,1.0 2.0,2.0)
  local alpha=$(last_of --alpha) beta=$(last_of --beta)
  alpha=${alpha:-0.5} beta=${beta:-1.0}
  [ "$kind" != ablation ] || points=("$alpha,$beta" "0,$beta" "$alpha,0" "0,0")
  folder=$(value --out "runs/$kind/$preset-$(value --protocol paper)")
  ! has --overwrite || again=yes
  list --out && list --resume && list --overwrite
  [ ${#task_flags[@]} -eq 0 ] || fail "--tasks goes with a single preset; measure a run's model/ with tasks.py"
  for set in "${sets[@]}"; do
    pairs=$folder/set$set.pairs.jsonl
    mkdir -p "$folder"
    if [ "$preset" = tiny ]; then mine "$pairs"; else mine "$pairs" --set "$set"; fi
    ! has --dry-run || return 0
    for seed in "${seeds[@]}"; do
      local end=set$set-seed$seed
      if [ "$kind" = compare ]; then
        for method in "${methods[@]}"; do
          job "$method-$end" --seed "$seed" --method "$method" $(method_rate "$method" "${rates[@]}")
        done
      elif [ "$kind" = sweep ] && [ ${#rates[@]} -gt 0 ]; then # Table 5: learning rates at alpha = beta = 0.5
        for point in "${rates[@]}"; do # 5e-7 takes the paper 132 epochs
          job "lr$point-$end" --seed "$seed" --alpha 0.5 --beta 0.5 --max-epochs 200 --lr "$point"
        done
      else
        for point in "${points[@]}"; do
          job "alpha${point%,*}-beta${point#*,}-$end" --seed "$seed" --alpha "${point%,*}" --beta "${point#*,}"
        done
      fi
    done
  done
  $PYTHON report.py "${jobs[@]}" --out "$folder"
}

released_rate() { # released_rate METHOD: released KUMPR, whatever the preset: the whole forget set one batch, lr 5e-5
  if [ "$1" = kumpr ] && [ "$(value --protocol paper)" = released ]; then echo "--batch-size 1000000 --lr 5e-5"; fi
}

method_rate() { # method_rate METHOD METHOD=LR...: `--lr LR` for the method, if it is in the list
  local pair
  released_rate "$1"
  for pair in "${@:2}"; do case "$pair" in "$1"=*) echo "--lr ${pair#*=}" ;; esac; done
}

# --- main ---
PRESETS="tiny neo125m neo1.3b neo2.7b tinyllama opt125m opt1.3b opt2.7b"
command=${1:-tiny}
case "$command" in
  -h | --help | help) usage && exit 0 ;;
  -*) command=tiny ;; # flags without a preset
  *) [ $# -eq 0 ] || shift ;;
esac
case "$command" in
  test) environment; exec $PYTHON -m pytest -q "$@" ;;
  bench) environment; exec $PYTHON bench.py "$@" ;;
  lint) environment; exec .venv/bin/ruff check . ;;
  ask) environment; exec $PYTHON report.py --ask "$@" ;;
  compare | ablation | sweep)
    case "${1:-tiny}" in
      -*) preset=tiny ;;
      *) preset=${1:-tiny} && shift $(($# > 0)) ;;
    esac
    ;;
  *) preset=$command ;;
esac
split_flags "$@"
if has --help || has -h; then usage && exit 0; fi
preset_flags "$preset"
environment
case "$command" in
  compare | ablation | sweep) several "$command" ;;
  *) single ;;
esac
