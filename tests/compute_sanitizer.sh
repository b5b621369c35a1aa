#!/usr/bin/env bash
# Runs the CUDA tests under NVIDIA's compute-sanitizer, tool by tool, on a machine with a GPU. Writes a log per tool and
# a summary.
#
#   tests/compute_sanitizer.sh [--small] [--parallel] [--seconds N] FOLDER [memcheck|racecheck|initcheck|synccheck]...
#
# --small: every divergence and dtype once; --parallel: all tools at once; --seconds: a tool that takes longer is
# stopped, which counts as a failure. PYTHON and COMPUTE_SANITIZER replace the programs of the PATH. Reports have line
# numbers if the package was built with NVCC_APPEND_FLAGS=-lineinfo. Exit status: 1 if a tool failed, 2 if none can run.
set -euo pipefail
usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
}
small='' parallel='' seconds=0 # no limit
while [[ ${1-} == -* ]]; do
  case $1 in
    --small) small=yes ;;
    --parallel) parallel=yes ;;
    --seconds)
      seconds=${2-}
      [[ $seconds =~ ^[0-9]+$ ]] || usage
      shift
      ;;
    *) usage ;;
  esac
  shift
done
if (($# == 0)); then usage; fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
tools=("${@:2}")
if ((${#tools[@]} == 0)); then tools=(memcheck racecheck initcheck synccheck); fi
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
sanitizer=${COMPUTE_SANITIZER:-compute-sanitizer}
readonly found=99  # an exit status that pytest does not have

cannot() {
  echo "compute_sanitizer.sh: $1" >&2
  exit 2
}
command -v "$sanitizer" >/dev/null || cannot "no $sanitizer; it is part of the CUDA toolkit (set COMPUTE_SANITIZER)"
help=$("$sanitizer" --help)
reason=$("$python" -c '
import torch
from kldiv_ext import _library
print(_library.cuda_missing_reason if torch.cuda.is_available() else "torch sees no CUDA device")') ||
  cannot "$python cannot import kldiv_ext"
[[ -z $reason ]] || cannot "$reason"

# The emulated kernels are CPU tests. The slower tools get one test per path through the kernels.
every_test=(tests --ignore=tests/emulation -k cuda)
files=(tests/test_{distillation_loss,distillation_gradients,kl_div,token_stats}.py)
some_tests=("${files[@]}" -k "cuda and (options or reductions or shape or strides or grad_output or in_place or statistics)")
if [[ $small ]]; then
  some_tests=("${files[@]}" -k
    "cuda and (test_options and defaults or test_shape or over_many_columns or test_grad_output or test_statistics)")
  every_test=("${some_tests[@]}")
fi

under() { # TOOL PROGRAM...
  local options=(--tool "$1" --error-exitcode "$found" --target-processes application-only --launch-timeout 120
    --show-backtrace device)
  local ours=(--kernel-name kns=kldiv) environment=(TORCHINDUCTOR_COMPILE_THREADS=1)
  case $1 in
    memcheck)
      # Torch handles the errors that CUDA's functions return, and provokes some of them.
      options+=(--report-api-errors no "${ours[@]}")
      # In the caching allocator the memory next to a tensor is allocated too: an overrun would not be seen.
      environment+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
      ;;
    initcheck)
      # Tools before CUDA 13.5 report as uninitialized what a filtered kernel wrote. So they watch every kernel, and
      # only reports that name ours count.
      if [[ $help == *initcheck-track-filtered-global-memory* ]]; then options+=("${ours[@]}"); fi
      options+=(--print-limit 10000)
      environment+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
      ;;
    *) options+=("${ours[@]}") ;;
  esac
  local left=$((seconds && deadline <= SECONDS ? 1 : seconds ? deadline - SECONDS : 0))
  timeout --kill-after=10 "$left" env "${environment[@]}" "$sanitizer" "${options[@]}" "${@:2}"
}

reports() { grep -cE '^=========.* at .*kldiv' "$1" || true; } # memory accesses and races in our kernels

# Sets `verdict` for TOOL; fails unless it is "clean".
check() { # TOOL LOG
  local fault='' status=0 ours tests=("${some_tests[@]}")
  case $1 in
    memcheck) fault=overrun tests=("${every_test[@]}") ;;
    initcheck) fault=uninitialized ;;
  esac
  if [[ $fault ]]; then
    under "$1" "$python" -m tests.sanitize.faults "$fault" cuda >"$2.fault" 2>&1 || true
    if (($(reports "$2.fault") == 0)); then
      verdict="does not report a deliberate fault: $2.fault"
      return 1
    fi
  fi
  under "$1" "$python" -m pytest "${tests[@]}" >"$2" 2>&1 || status=$?
  ours=$(reports "$2")
  verdict="clean"
  if ((ours > 0)); then
    verdict="$ours reported places are in our kernels"
  elif ((status == 124 || status == 137)); then
    verdict="stopped after $seconds s"
  elif ((status == found)) && [[ $1 != initcheck ]]; then
    verdict="found something"
  elif ((status != 0 && status != found)); then
    verdict="the tests failed (status $status)"
  elif ! grep -qE '[0-9]+ passed' "$2"; then
    verdict="no test ran"
  elif ! grep -q 'SUMMARY: ' "$2"; then
    verdict="the tool wrote no summary"
  elif grep -q 'were not printed' "$2"; then
    verdict="more reports than it prints"
  fi
  [[ $verdict == clean ]]
}

one_tool() { # TOOL
  local begin=$SECONDS deadline=$((SECONDS + seconds)) status=0
  check "$1" "$folder/$1.log" || status=1
  printf '%-10s %5ss  %s\n' "$1" "$((SECONDS - begin))" "$verdict" | tee "$folder/$1.verdict"
  return "$status"
}

exit_status=0
running=()
for tool in "${tools[@]}"; do
  if [[ $parallel ]]; then
    one_tool "$tool" &
    running+=($!)
  else
    one_tool "$tool" || exit_status=1
  fi
done
for process in "${running[@]}"; do wait "$process" || exit_status=1; done
for tool in "${tools[@]}"; do cat "$folder/$tool.verdict"; done >"$folder/summary.txt"
exit "$exit_status"
