#!/usr/bin/env bash
# Everything that needs a CUDA GPU, within 40 minutes, from an environment that has kimi_core:
#
#   benches/gpu.sh OUT      # writes OUT/summary.txt and a log for each step
#
# A step that fails or takes too long does not end the others. Exit status: 0 if all passed, 1 if one
# did not, 2 without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

out=$(mkdir -p "${1:?usage: benches/gpu.sh OUT}" && cd "$1" && pwd)
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo 'No CUDA GPU that torch can use: nothing was run.' | tee "$out/summary.txt"
  exit 2
}

step() {  # step SECONDS NAME COMMAND...
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  if timeout --kill-after=20 "$limit" "$@" > "$out/$name.log" 2>&1; then
    printf 'passed  %4d s  %s\n' $((SECONDS - start)) "$*" | tee -a "$out/summary.txt"
  else
    printf 'FAILED  %4d s  %s\n' $((SECONDS - start)) "$*" | tee -a "$out/summary.txt"
    failed=1
  fi
}

failed=0
python - > "$out/summary.txt" << 'PYTHON'
import torch

for number in range(torch.cuda.device_count()):
    card = torch.cuda.get_device_properties(number)
    print(f"{card.name}, {card.total_memory / 1e9:.0f} GB")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")
PYTHON
cat "$out/summary.txt"

# Kernels against their slow twins, gather, cast, pack, whole runs, and two ranks over NCCL.
step 700 tests python -m pytest -m gpu --numprocesses=0 -v
step 500 benches python -m pytest benches/ -m gpu
step 300 think python -m kimi_core.cli train think name=gpu-think model.device=cuda iterations=10 "runs=$out/runs"
step 700 smollm2 python -m kimi_core.cli train smollm2 name=gpu-smollm2 model.device=cuda iterations=10 "runs=$out/runs"
exit $failed
