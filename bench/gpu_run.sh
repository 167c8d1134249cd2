#!/usr/bin/env bash
# Everything worth doing with nine minutes of a GPU: build, tests, sanitizers, timings.
#   bench/gpu_run.sh [--dry-run] [OUT]      OUT: the folder for logs and results, default $OUT, else build/gpu_run
# Each part that passes writes its name to build/gpu_run/done (or $GPU_RUN_STATE/done) and is skipped from then on, so
# that a second call goes on where the first one stopped, whatever becomes of OUT in between.
# A dry run needs no GPU: it builds, collects the tests, and runs each timing once, tiny.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=
if [ "${1:-}" = --dry-run ]; then dry=1 && shift; fi
out=$(realpath -m "${1:-${OUT:-build/gpu_run}}")
state=$(realpath -m "${GPU_RUN_STATE:-build/gpu_run}")
mkdir -p "$out" "$state" && touch "$state/done"
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=

part() {  # NAME SECONDS COMMAND...: run it unless it is done
  local name=$1 seconds=$2 begin=$SECONDS
  shift 2
  if grep -qx "$name" "$state/done"; then echo "$name: done before" && return; fi
  if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
    echo "$name" >>"$state/done" && echo "$name: passed in $((SECONDS - begin)) s"
  else
    failed="$failed $name" && echo "$name: FAILED after $((SECONDS - begin)) s" && tail -n 30 "$out/$name.log"
  fi
}

build() {
  make build VENV=none PYTHON="$python" PPO_KERNELS_CUDA=ON
}

gpu_tests() {
  "$python" -m pytest -q -p no:cacheprovider --durations=10 ${dry:+--collect-only} tests/verify/test_gpu.py
}

# A quarter of the op tests beside the others: most of their time is the host's. Left out is what drives the ops from
# the host by other means (the dispatcher, torch.compile, fenced memory), or would move many gigabytes for it.
tests() {
  local -a jobs=() files=(tests/test_*.py)
  local status=0
  for i in 0 1 2 3; do
    local -a mine=()
    for ((j = i; j < ${#files[@]}; j += 4)); do mine+=("${files[j]}"); done
    # An interrupt, unlike a kill, still ends in a summary.
    timeout -s INT 140 "$python" -m pytest -q --tier whole -p no:cacheprovider --tb=short ${dry:+--collect-only} \
      -m "not host" -k "(cuda or triton) and not beyond_the_reach_of_32_bits" "${mine[@]}" >"$state/tests-$i.log" 2>&1 &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || status=1; done
  tail -n 60 "$state"/tests-?.log
  return $status
}

# Rows and batches of several blocks, which run at the same time. They are chosen once, outside of the slow tools.
sanitizers() {
  local -a files few
  mapfile -t files < <("$python" -m tests.lib.op_tests)
  mapfile -t few < <("$python" -m pytest -q --collect-only --several-blocks -k cuda "${files[@]}" | grep ::)
  printf '%s\n' "${#few[@]} tests" "${few[@]}"
  [ ${#few[@]} -gt 0 ] || return 1
  if [ -n "$dry" ]; then return; fi
  local status=0
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --kernel-name kernel_substring=ppo --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider "${few[@]}" || status=1
  done
  return $status
}

timings() {
  local size=--gpu
  if [ -n "$dry" ]; then size=--tiny; fi
  "$python" -m bench $size --json "$out/results.json" --report "$out"
}

export -f build gpu_tests tests sanitizers timings
export dry python out state
if [ -n "$dry" ]; then export PPO_KERNELS_HOST_CUDA=1; fi  # else there is no test of "cuda" to collect
[ -n "$dry" ] || nvidia-smi >"$out/machine.txt" 2>&1
part build 130 bash -c build
part gpu_tests 90 bash -c gpu_tests
part tests 150 bash -c tests
part sanitizers 80 bash -c sanitizers
part timings 90 bash -c timings
[ -z "$failed" ] || { echo "failed:$failed" && exit 1; }
