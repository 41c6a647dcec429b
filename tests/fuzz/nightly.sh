#!/usr/bin/env bash
# Fuzzes what reads input of others, SECONDS for each target: the core with libFuzzer, what reads text
# with atheris, the HTTP services with Schemathesis.
#
#   pip install '.[test,fuzz]'
#   tests/fuzz/nightly.sh [SECONDS [TARGET...]]   # 60 seconds and all targets unless given
#
# The core needs clang (CXX=clang++-19); without it, it is skipped. Inputs that reach new code go to
# build/fuzz/new/TARGET. A finding ends the script.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-60}
shift || true
targets=("$@")
[ $# = 0 ] && targets=(buffer arena config prompts answers programs verdicts results records sandbox dashboard)
CXX=${CXX:-clang++}

core() {
  if ! command -v "$CXX"; then
    echo "SKIPPED: no $CXX, so $1 is not fuzzed here"
    return
  fi
  cmake -S . -B build/fuzz -G Ninja --log-level=WARNING -DCMAKE_CXX_COMPILER="$CXX" \
    -DKIMI_CUDA=OFF -DKIMI_FUZZ=ON -DKIMI_SANITIZE=address,undefined
  cmake --build build/fuzz --target "fuzz_$1"
  "build/fuzz/tests/fuzz/fuzz_$1" -max_total_time="$seconds" -max_len=400 \
    -print_final_stats=1 "build/fuzz/new/$1" "tests/fuzz/corpus/$1"
}

for target in "${targets[@]}"; do
  mkdir -p "build/fuzz/new/$target"
  case $target in
    buffer | arena) core "$target" ;;
    sandbox | dashboard) PYTHONPATH="tests:${PYTHONPATH:-}" python tests/fuzz/services.py "$target" --seconds "$seconds" ;;
    *) python tests/fuzz/targets.py "$target" --seconds "$seconds" --new "build/fuzz/new/$target" ;;
  esac
done
