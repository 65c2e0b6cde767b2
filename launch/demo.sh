#!/usr/bin/env bash
# From a fresh machine to the demo's table: makes .venv, installs, prunes a real model, searches, fine-tunes, measures.
# It ends with GGUF files of the result, and the commands of llama.cpp and Ollama that talk to them.
# Needs bash, Python 3.11 or newer, 8 GB of disk for the installation and 1 GB for the run, 6 GiB of memory.
# Usage: bash launch/demo.sh [further options of `qpruner run`]     Repeated, it resumes from its records.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # the first process compiles modules, the others read them
bash launch/setup.sh demo demo-model
echo "== qpruner run tune_configs/demo_smollm2_cpu.yaml $* (10 to 45 minutes on two free cores, depending on the CPU; longer on busy ones; Ctrl-C, then the same again, goes on)"
exec .venv/bin/qpruner run tune_configs/demo_smollm2_cpu.yaml "$@"
