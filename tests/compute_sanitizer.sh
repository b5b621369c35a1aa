#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over the CUDA tests on a machine with a GPU, tool by tool; a log each, then a summary.
#
#   tests/compute_sanitizer.sh [--small] [--parallel] [--seconds N] FOLDER [memcheck|racecheck|initcheck|synccheck]...
#
# --small: every divergence and dtype once, minutes less; --parallel: the tools side by side; --seconds: a tool that
# takes longer is stopped, which counts as found. PYTHON and COMPUTE_SANITIZER name other programs than those on the
# PATH. Reports have line numbers where the package was built with NVCC_APPEND_FLAGS=-lineinfo. Exits with 1 where
# something was found, with 2 where nothing can be run.
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

# The emulated kernels are CPU tests. What runs long under a tool: one of each way through the kernels.
every_test=(tests --ignore=tests/emulation -k cuda)
some_tests=(tests/test_{distillation_*,kl_div,token_stats}.py -k
  "cuda and (divergence or shape or strides or grad_output or reductions or options or token_stats)")
if [[ $small ]]; then
  some_tests=(tests/test_{distillation_*,kl_div,token_stats}.py -k
    "cuda and (test_divergence or test_shape or over_many_columns or test_grad_outputs or test_every_figure)")
  every_test=("${some_tests[@]}")
fi

under() { # TOOL PROGRAM...
  local options=(--tool "$1" --error-exitcode "$found" --target-processes application-only --launch-timeout 120
    --show-backtrace device)
  local ours=(--kernel-name kns=kldiv) environment=(TORCHINDUCTOR_COMPILE_THREADS=1)
  case $1 in
    memcheck)
      # Torch checks what CUDA's functions return, and some of its questions are answered with an error.
      options+=(--report-api-errors no "${ours[@]}")
      # In torch's cache of memory the neighbours of a tensor are allocated too.
      environment+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
      ;;
    initcheck)
      # Tools before CUDA 13.5 take what a kernel wrote that they do not watch for uninitialised: they watch all, and
      # find torch's own. Only reports that name our kernels count.
      if [[ $help == *initcheck-track-filtered-global-memory* ]]; then options+=("${ours[@]}"); fi
      options+=(--print-limit 10000)
      environment+=(PYTORCH_NO_CUDA_MEMORY_CACHING=1)
      ;;
    *) options+=("${ours[@]}") ;;
  esac
  local left=$((seconds && deadline <= SECONDS ? 1 : seconds ? deadline - SECONDS : 0))
  timeout --kill-after=10 "$left" env "${environment[@]}" "$sanitizer" "${options[@]}" "${@:2}"
}

reports() { grep -cE '^=========.* at .*kldiv' "$1" || true; } # a memory access or a race, by the kernel it is in

# Leaves what is to be said about TOOL in `verdict`; fails unless that is "clean".
check() { # TOOL LOG
  local fault='' status=0 ours tests=("${some_tests[@]}")
  case $1 in
    memcheck) fault=overrun tests=("${every_test[@]}") ;;
    initcheck) fault=uninitialized ;;
  esac
  if [[ $fault ]]; then
    under "$1" "$python" -m tests.sanitize.faults "$fault" cuda >"$2.fault" 2>&1 || true
    if (($(reports "$2.fault") == 0)); then
      verdict="does not notice a fault on purpose: $2.fault"
      return 1
    fi
  fi
  under "$1" "$python" -m pytest "${tests[@]}" >"$2" 2>&1 || status=$?
  ours=$(reports "$2")
  verdict="clean"
  if ((ours > 0)); then
    verdict="$ours places in reports name our kernels"
  elif ((status == 124 || status == 137)); then
    verdict="not done after $seconds s"
  elif ((status == found)) && [[ $1 != initcheck ]]; then
    verdict="found something"
  elif ((status != 0 && status != found)); then
    verdict="the tests failed (status $status)"
  elif ! grep -qE '[0-9]+ passed' "$2"; then
    verdict="no test ran"
  elif ! grep -q 'SUMMARY: ' "$2"; then
    verdict="no summary of the tool's"
  elif grep -q 'were not printed' "$2"; then
    verdict="more reports than are printed"
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
