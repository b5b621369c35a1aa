#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in under ten minutes: in stages, each with its own time limit.
#
#   benchmarks/gpu.sh [OUT] [build|tests|sanitize|benchmark|linear|accuracy|report]...
#
# OUT (or $OUT) receives GPU-DATE.json, linear-GPU-DATE.json, accuracy-GPU-DATE.json, summary.txt and logs.tar.gz.
# Without names all stages run except report, which puts the results of OUT into benchmarks/results, the documents and
# the plots. A failing stage does not stop the next one; it makes the exit status 1. Environment:
#   PYTHON                  default python3
#   WHEELS                  a folder of wheels of packages that this Python lacks
#   COMMIT                  named in the results if the copy has no history
#   BUILD_SECONDS, ...      a stage's limit; the results name the problems that BENCHMARK_SECONDS do not suffice for
#   DEVICE=cpu, QUICK=1     try the script without a GPU, with tiny problems
# shellcheck disable=SC2329 # stages are called by their names
set -euo pipefail

readonly default_stages=(build tests sanitize benchmark linear accuracy)
# 580 s in all, without report.
declare -A seconds=([build]=130 [tests]=120 [sanitize]=85 [benchmark]=130 [linear]=60 [accuracy]=55 [report]=60)
script=$(realpath "$0")
cd "$(dirname "$script")/.."
export PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin"
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
quick=()
if [[ ${QUICK-} ]]; then quick=(--quick); fi

# ---------------------------------------------------------------- stages: STAGE OUT NAME LIMIT

has() { "$python" -c "import $1" 2>/dev/null; }

build() {
  export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
  if [[ $device == cpu ]]; then
    export FORCE_CPU=1
  else
    local capability='import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))'
    TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "$capability")}
    export TORCH_CUDA_ARCH_LIST FORCE_CUDA=1 NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS--lineinfo}"
  fi
  "$python" setup.py build_ext --inplace
  "$python" -m kldiv_ext.info
  if [[ $device == cuda ]]; then
    "$python" -c 'from kldiv_ext._library import cuda_missing_reason as reason; assert not reason, reason'
  fi
}

tests() {
  local processes=() chosen=(tests --ignore=tests/emulation -k "$device")
  if has xdist; then processes=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
  if [[ ${QUICK-} ]]; then chosen=(tests/test_token_stats.py -k "$device"); fi
  # A package that a test file lacks fails that file alone. The stage fails if no test passes, or all are skipped.
  "$python" -m pytest "${chosen[@]}" "${processes[@]}" -rfE --tb=short --durations=5 \
    --continue-on-collection-errors | tee "$work/pytest"
  grep -qE '[0-9]+ passed' "$work/pytest"
}

sanitize() {
  PYTHON=$python tests/compute_sanitizer.sh --small --parallel --seconds "$(($3 - 15))" "$work/sanitize"
}

benchmark() {
  "$python" -m benchmarks --suite gpu --device "$device" --seconds 0.25 --repeats 20 --limit "$(($3 > 50 ? $3 - 25 : $3 / 2))" \
    "${quick[@]}" --json "$1/$2.json"
}

linear() {
  "$python" -m benchmarks.linear --device "$device" --dtype bfloat16 --seconds 4 "${quick[@]}" --json "$1/linear-$2.json"
}

accuracy() {
  "$python" -m benchmarks.accuracy --device "$device" --contenders kldiv_ext,eager,eager_float,liger "${quick[@]}" \
    --json "$1/accuracy-$2.json"
}

report() {
  if [[ ${QUICK-} ]]; then
    echo "QUICK results are not reported"
    return 1
  fi
  cp "$1"/*.json benchmarks/results/
  "$python" -m benchmarks.report
}

if [[ ${1-} == --stage ]]; then # this script, called by itself below
  work=$3
  "$2" "${@:4}"
  exit
fi

# ---------------------------------------------------------------- one after the other

usage() {
  sed -n '2,13s/^# \{0,1\}//p' "$script" >&2
  exit 2
}
is_stage() { [[ $1 =~ ^[a-z]+$ && ${seconds[$1]-} ]]; }

out=${OUT-}
if (($# > 0)) && ! is_stage "$1"; then
  [[ $1 != -* ]] || usage
  out=$1
  shift
fi
[[ $out ]] || usage
stages=("$@")
if ((${#stages[@]} == 0)); then stages=("${default_stages[@]}"); fi
for stage in "${stages[@]}"; do is_stage "$stage" || usage; done
mkdir -p "$out"
out=$(realpath "$out")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/logs"
if [[ -f $out/logs.tar.gz ]]; then tar -xzf "$out/logs.tar.gz" -C "$work"; fi # of an earlier call

install_wheels() {
  local pip=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$1")
  # One wheel that does not fit would stop all of them.
  "${pip[@]}" "$WHEELS"/*.whl || for wheel in "$WHEELS"/*.whl; do "${pip[@]}" "$wheel" || echo "left out: $wheel"; done
}
if [[ ${WHEELS-} ]]; then
  install_wheels "$work/site" >"$work/logs/wheels.log" 2>&1 || true
  export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi

"$python" -m pip list >"$work/logs/pip.log" 2>&1 || true

gpu_name=cpu
if [[ $device == cuda ]]; then
  nvidia-smi >"$work/logs/nvidia-smi.log" 2>&1 || true
  gpu_name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
  gpu_name=${gpu_name:-gpu}
fi
name=$(tr '[:upper:]' '[:lower:]' <<<"$gpu_name" | tr -cs 'a-z0-9\n' -)-$(date +%F)

# All logs in one small archive: fetching may be limited in files and bytes.
pack() {
  local log
  for log in "$work"/logs/*.log; do
    if (($(stat -c %s "$log") > 8000000)); then
      { head -c 4000000 "$log" && printf '\n[...]\n' && tail -c 4000000 "$log"; } >"$log.cut"
      mv "$log.cut" "$log"
    fi
  done
  tar -czf "$out/logs.tar.gz.new" -C "$work" logs
  mv "$out/logs.tar.gz.new" "$out/logs.tar.gz"
}

run_stage() { # sets `verdict`
  local limit log="$out/running.log" status=0 variable="${1^^}_SECONDS"
  limit=${!variable:-${seconds[$1]}}
  timeout --kill-after=10 "$limit" "$BASH" "$script" --stage "$1" "$work" "$out" "$name" "$limit" >"$log" 2>&1 ||
    status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="stopped after $limit s" ;;
    *) verdict="failed (status $status)" ;;
  esac
  if ((status != 0)); then
    echo "---- $1: $verdict; the end of its log:"
    tail -n 40 "$log" | cut -c1-300
  fi
  mv "$log" "$work/logs/$1.log"
  local part
  for part in "$work/$1"/*; do # the logs that a stage made itself
    if [[ -f $part ]]; then mv "$part" "$work/logs/$1-$(basename "$part" .log).log"; fi
  done
  ((status == 0))
}

exit_status=0
commit=$(git rev-parse HEAD 2>/dev/null || echo "${COMMIT:-unknown}")
echo "$gpu_name, $(date -u +%FT%TZ), commit $commit" >>"$out/summary.txt"
for stage in "${stages[@]}"; do
  begin=$SECONDS
  run_stage "$stage" || exit_status=1
  printf '%-10s %5ss  %s\n' "$stage" "$((SECONDS - begin))" "$verdict" | tee -a "$out/summary.txt"
  if [[ $stage == sanitize && -f $work/logs/sanitize-summary.txt.log ]]; then
    sed 's/^/  /' "$work/logs/sanitize-summary.txt.log" | tee -a "$out/summary.txt"
  fi
  pack
done
echo "---- $out/summary.txt"
cat "$out/summary.txt"
exit "$exit_status"
