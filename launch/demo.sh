#!/usr/bin/env bash
# From a fresh machine to the demo's table: makes .venv, installs, prunes a real model, searches, fine-tunes, measures.
# It ends with GGUF files of the result, and the commands of llama.cpp and Ollama that talk to them.
# Needs bash, Python 3.11 or newer, 8 GB of disk for the installation and 1 GB for the run, 6 GiB of memory.
# Usage: bash launch/demo.sh [--long] [further options of `qpruner run`]     Repeated, it resumes from its records.
# --long has three training seeds, more rows, questions, plans and cuts, the paper's flow, a file with a merged adapter;
# it does not use the records of a run without.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # the first process compiles modules, the others read them
longer="" times=1
if [ "${1:-}" = --long ]; then
  shift
  longer="; --long takes twice that" times=2
  rows=package:qpruner/demo/data/instructions
  more="{source: '$rows.jsonl', format: instruction, split: 'train[266:]'}, {source: '${rows}_confirmation.jsonl', format: instruction}"
  set -- --set "data.confirmation=[$more]" \
    --set "prune.rates=[0,0.1,0.2]" --set "sensitivity.methods=[mutual_information,second_order]" \
    --set search.max_trials=16 --set search.first_rung=4 --set search.confirm=3 --set search.confirm_seeds=1 \
    --set finetune.seeds=3 --set evaluate.limit=135 --set "serve.to=[gguf,gguf_merged]" "$@"
fi
echo "== 4 to 9 minutes on two free cores, more on a slow network; after the installation it says how long it takes here$longer"
bash launch/setup.sh demo demo-model
minutes=$(($(.venv/bin/python launch/demo_minutes.py) * times))
echo "== qpruner run tune_configs/demo_smollm2_cpu.yaml ${*@Q}"
echo "== about $minutes minutes from here on two free cores; Ctrl-C, then the same again, goes on"
exec .venv/bin/qpruner run tune_configs/demo_smollm2_cpu.yaml "$@"
