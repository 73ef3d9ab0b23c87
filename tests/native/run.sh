#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the engines and their driver and runs it. Needs g++ and CMake, no Python and no torch.
# Usage: tests/native/run.sh [MODE [BUILD DIRECTORY]]
#   address   with the address and undefined-behaviour sanitizers (the default)
#   thread    with the thread sanitizer, some of the cases
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
mode="${1:-address}"
options=()
step=1
case "$mode" in
address)
    build="${2:-$root/build/native-tests}"
    ;;
thread)
    build="${2:-$root/build/native-tests-thread}"
    options+=(-DCOMPRESSED_LINEAR_SANITIZERS=thread)
    step=11
    # The first report ends the run, also one from a thread of its own.
    export TSAN_OPTIONS="halt_on_error=1 ${TSAN_OPTIONS:-}"
    ;;
*)
    echo "error: unknown mode '$mode' (known: address, thread)" >&2
    exit 2
    ;;
esac
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=None -DCOMPRESSED_LINEAR_NATIVE_TESTS=ON \
    "${options[@]}" > /dev/null
cmake --build "$build" --parallel 2 > "$build/build.log" || { cat "$build/build.log"; exit 1; }
for test in test_engines test_int8_engines test_repack; do
    "$build/$test" "$step"
done
