#!/usr/bin/env bash
# Fuzzes the core with libFuzzer, and what reads text with atheris: SECONDS each, 60 unless given.
#
#   tests/fuzz/nightly.sh [SECONDS]      # needs clang (CXX=clang++-19); atheris if it is installed
#
# Inputs that reach new code go to build/fuzz/new/TARGET. A finding ends the script.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${1:-60}
cmake -S . -B build/fuzz -G Ninja --log-level=WARNING -DCMAKE_CXX_COMPILER="${CXX:-clang++}" \
  -DKIMI_CUDA=OFF -DKIMI_FUZZ=ON -DKIMI_SANITIZE=address,undefined
cmake --build build/fuzz --target fuzz_buffer fuzz_arena
for target in buffer arena; do
  mkdir -p "build/fuzz/new/$target"
  "build/fuzz/tests/fuzz/fuzz_$target" -max_total_time="$seconds" -max_len=400 \
    -print_final_stats=1 "build/fuzz/new/$target" "tests/fuzz/corpus/$target"
done
for target in config prompts answers programs verdicts results records; do
  mkdir -p "build/fuzz/new/$target"
  python tests/fuzz/targets.py "$target" --seconds "$seconds" --new "build/fuzz/new/$target"
done
