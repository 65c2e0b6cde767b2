#!/usr/bin/env bash
# Installs a kit of gpu_kit.py beside a Python that has torch, without a package index, and says what is still missing.
# Usage: bash install.sh [PYTHON]     Nothing of that Python changes: the packages go into the folder site.
set -euo pipefail
cd "$(dirname "$0")"
python="${1:-python3}"
"$python" -m pip install --quiet --no-index --find-links wheels --no-deps --upgrade --target site wheels/*.whl
PYTHONPATH="$PWD/site" "$python" - <<'CHECK'
import importlib, sys

missing = []
for name in ("torch", "numpy", "accelerate", "bitsandbytes", "peft", "transformers", "yaml", "pydantic", "qpruner.hf"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        missing.append(f"{name}: {error}")
if missing:
    sys.exit("still missing, or not importable:\n  " + "\n  ".join(missing))
import torch

gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if torch.cuda.is_available() else "no GPU that torch sees"
print(f"torch {torch.__version__}, {gpu}")
CHECK
echo "go on: PYTHONPATH=$PWD/site $python $PWD/benchmarks/gpu_7b.py"
