#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the engines and their driver and runs it. Needs g++ and CMake, no Python and no torch.
# Usage: tests/native/run.sh [MODE [BUILD DIRECTORY]]
#   address   with the address and undefined-behaviour sanitizers (the default)
#   thread    with the thread sanitizer, some of the cases
#   arm       for 64-bit Arm, with the undefined-behaviour sanitizer, run by qemu, some of the cases;
#             needs Debian's packages g++-aarch64-linux-gnu and qemu-user-static, or like ones
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
mode="${1:-address}"
options=()
runner=()
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
arm)
    build="${2:-$root/build/native-tests-arm}"
    runner=(qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu)
    for tool in aarch64-linux-gnu-g++ "${runner[0]}"; do
        command -v "$tool" > /dev/null || {
            echo "error: there is no $tool; on Debian it is in g++-aarch64-linux-gnu and" \
                "qemu-user-static" >&2
            exit 1
        }
    done
    options+=(-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
        -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCOMPRESSED_LINEAR_SANITIZERS=undefined)
    step=7
    ;;
*)
    echo "error: unknown mode '$mode' (known: address, thread, arm)" >&2
    exit 2
    ;;
esac
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=None -DCOMPRESSED_LINEAR_NATIVE_TESTS=ON \
    "${options[@]}" > /dev/null
cmake --build "$build" --parallel 2 > "$build/build.log" || { cat "$build/build.log"; exit 1; }
tests=(test_float test_integer test_repack test_schedule)
# The thread sanitizer does not follow fibers, and the emulator has one thread.
[ "$mode" = thread ] || tests+=(test_emulator test_primitives test_marlin_repack test_marlin_gemm)
# Two at a time: most of what they do takes one thread.
printf '%s\n' "${tests[@]}" | xargs -P 2 -I '{}' env "${runner[@]}" "$build/{}" "$step"
