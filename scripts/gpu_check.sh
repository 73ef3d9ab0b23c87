#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What only a GPU can show, in about ten minutes: builds csrc for the GPU that is there, runs the
# conformance kit of our GPU backends on it, and times linear layers.
#
#   [PYTHON=python3] bash scripts/gpu_check.sh [DIRECTORY FOR RESULTS]
#
# PYTHON needs a torch with CUDA, Triton, rich, typer and tqdm; the machine nvcc, CMake and Ninja.
# vLLM's own kernels are tried and timed as well where it is installed; this package must then be,
# too (pip install -e .). The exit status is 1 if anything failed.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-build/gpu_check}

# Without vLLM this directory is the package `vllm`.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
capability=$("$python" -c '
import torch
if not torch.cuda.is_available():
    raise SystemExit("error: torch finds no GPU, and there is nothing to check without one")
print("{}.{}".format(*torch.cuda.get_device_capability()))
') || exit 1
mkdir -p "$results"
failed=0

step() {
  local name=$1 begin=$SECONDS status=0
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$results/$name.log" || status=$?
  echo "== $name: status $status after $((SECONDS - begin)) s"
  if ((status)); then failed=1; fi
}

step configure env TORCH_CUDA_ARCH_LIST="$capability" cmake -S . -B build/gpu_check_tree -G Ninja \
  -DCMAKE_BUILD_TYPE=Release -DCOMPRESSED_LINEAR_CUDA=ON \
  -DPython_EXECUTABLE="$(command -v "$python")" \
  -DCOMPRESSED_LINEAR_OUTPUT_DIR="$PWD/vllm/compressed_linear/lib"
step build cmake --build build/gpu_check_tree
# Marlin declines most of the kit's own shapes, and takes about a hundred cases in this one.
step marlin "$python" -m vllm.compressed_linear.testing marlin --platform cuda --shape 256x512
# Triton compiles each case for a second or more.
step triton "$python" -m vllm.compressed_linear.testing triton --platform cuda --every 12
if "$python" -c 'import vllm.config' 2>/dev/null; then
  step vllm_native "$python" -m vllm.compressed_linear.testing vllm_native --platform cuda \
    --shape 256x512
fi
step benchmark "$python" -m benchmarks.gpu_linear int4 --model 8b --m 1 16 64 256 2048 \
  --output "$results/gpu_linear.json"
exit "$failed"
