#!/usr/bin/env bash
# Everything worth doing with nine minutes of a GPU, what matters most first: build, smoke, our timings, sanitizers, op
# tests, the timings of others.
#   PPO_KERNELS_COMMIT=... bench/gpu_run.sh [--dry-run] [OUT]      OUT: log and report, default $OUT, else build/gpu_run
#   bench/gpu_run.sh --list                                        the parts and their seconds
# A part that passes writes its name to build/gpu_run/done (or $GPU_RUN_STATE/done) and is skipped from then on; timings
# are kept row by row beside it, and each part's own log. So a second call goes on where the first one stopped, whatever becomes of OUT. Parts
# joined by "+" run at the same time. Compiled for this card alone; the others are compiled without one (part "aot").
# A dry run needs no GPU: it builds, collects the tests, and runs each timing once, tiny.
set -uo pipefail
cd "$(dirname "$0")/.."

# In order, with the most seconds that each may take, and 5 more to be killed in: nine minutes in all.
PARTS="build:90 smoke:40 ours:70 memcheck:65+racecheck:65 cuda_tests:70 others:55 compile:35 triton_tests:60"
dry=
case "${1:-}" in
  -h | --help) sed -n '2,/^set/{s/^# \?//p}' "$0" && exit ;;
  --list) tr ' ' '\n' <<<"$PARTS" | sed 's/:\([0-9]*\)/ \1 s/g; s/+/ + /' && exit ;;
  --dry-run) dry=1 && shift ;;
esac
case "${1:-}" in
  -*) echo "$1 is no option; --help says what there is" >&2 && exit 2 ;;
esac
out=$(realpath -m "${1:-${OUT:-build/gpu_run}}")
state=$(realpath -m "${GPU_RUN_STATE:-build/gpu_run}")
# A record without its commit is worth nothing, and a copy of the files alone cannot tell it.
PPO_KERNELS_COMMIT=${PPO_KERNELS_COMMIT:-$(git describe --always --dirty 2>/dev/null)}
if [ -z "$PPO_KERNELS_COMMIT" ]; then
  echo "There is no git here: say in PPO_KERNELS_COMMIT which commit this is (git describe --always --dirty)" >&2 && exit 2
fi
export PPO_KERNELS_COMMIT PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
if [ -z "$dry" ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "$python sees no GPU with torch, so nothing was run: PYTHON= names another Python, --dry-run needs no GPU" >&2 && exit 2
fi
mkdir -p "$out" "$state" && touch "$state/done"
workers=$(nproc)
[ "$workers" -le 8 ] || workers=8

build() {
  # make may be missing on such a machine, and the ops are all that is needed.
  local arch
  arch=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '9.0')")
  TORCH_CUDA_ARCH_LIST=$arch PPO_KERNELS_CUDA=ON "$python" setup.py --quiet build_ext --inplace
}

tests() {  # the arguments of pytest
  "$python" -m pytest -q -p no:cacheprovider --tb=short --durations=10 ${dry:+--collect-only} "$@"
}

many() { [ -n "$dry" ] || echo "-n $workers --dist worksteal"; }

smoke() { tests $(many) -k "cuda" tests/verify/test_gpu.py; }

# What drives the ops from the host by other means (the dispatcher, torch.compile, fenced memory) is left out, and what
# would move many gigabytes for it.
cuda_tests() { tests $(many) --tier whole -m "not host" -k "cuda and not beyond_the_reach_of_32_bits" tests/test_*.py; }
triton_tests() {
  tests $(many) --tier whole -m "not host" -k "triton and not beyond_the_reach_of_32_bits" tests/test_*.py tests/verify/test_gpu.py
}

# Rows and batches of several blocks, which run at the same time. They are chosen once, outside of the slow tools.
# initcheck is left out: these tests fill what torch hands out, so that nothing is uninitialized.
chosen() { "$python" -m pytest -q --collect-only --several-blocks -k cuda $("$python" -m tests.lib.op_tests) | grep ::; }
sanitize() {
  local -a few
  mapfile -t few < <(chosen)
  printf '%s\n' "${#few[@]} tests" "${few[@]}"
  [ ${#few[@]} -gt 0 ] || return 1
  [ -z "$dry" ] || return 0
  compute-sanitizer --tool "$1" --kernel-name kernel_substring=ppo --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider "${few[@]}"
}
memcheck() { sanitize memcheck; }
racecheck() { sanitize racecheck; }

timings() {  # of whom; what is there already is kept
  local size=--gpu
  [ -z "$dry" ] || size=--tiny
  "$python" -m bench $size --providers "$1" --json "$state/results.json" --resume
}
report() {  # of what has been timed so far
  local seconds=15
  [ -z "$dry" ] || seconds=300
  timeout -k 5 $seconds "$python" -m bench --results "$state/results.json" --clocks "$state/clocks.csv" --report "$out" \
    >"$state/report.log" 2>&1 || { echo "report: FAILED" && tail -n 30 "$state/report.log" && return 1; }
}
ours() { timings ours && report; }
others() { timings others; }
compile() { timings compile; }

part() {  # NAME:SECONDS: run it unless it is done
  local name=${1%:*} seconds=${1#*:} begin=$SECONDS status=0
  [ -z "$dry" ] || seconds=600  # of a machine that is slower and busy
  if grep -qx "$name" "$state/done"; then echo "$name: done before" && return; fi
  # An interrupt, unlike a kill, still ends in a summary; what ignores it is killed.
  timeout -s INT -k 5 "$seconds" bash -c "$name" >"$state/$name.log" 2>&1 || status=$?
  { echo "== $name ended with $status after $((SECONDS - begin)) s" && cat "$state/$name.log"; } >>"$out/log.txt"
  if [ $status -eq 0 ]; then
    echo "$name" >>"$state/done" && echo "$name: passed in $((SECONDS - begin)) s"
  else
    echo "$name: FAILED after $((SECONDS - begin)) s" && tail -n 30 "$state/$name.log" && return 1
  fi
}

export -f build tests many smoke cuda_tests triton_tests chosen sanitize memcheck racecheck timings ours others compile report
export dry python out state workers
if [ -n "$dry" ]; then
  export PPO_KERNELS_HOST_CUDA=1  # else there is no test of "cuda" to collect
else
  nvidia-smi >>"$out/log.txt" 2>&1
  nvidia-smi --query-gpu=timestamp,clocks.sm,clocks_event_reasons.active --format=csv,noheader,nounits -lms 500 \
    >>"$state/clocks.csv" 2>/dev/null &
  trap "kill $! 2>/dev/null" EXIT
fi
failed=
for parts in $PARTS; do
  if [[ $parts != *+* ]]; then part "$parts" || failed="$failed ${parts%:*}"; continue; fi
  jobs=()
  for one in ${parts//+/ }; do part "$one" & jobs+=($!); done
  for job in "${jobs[@]}"; do wait "$job" || failed="$failed $(sed 's/:[0-9]*//g' <<<"$parts")"; done
done
report || failed="$failed report"
[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
