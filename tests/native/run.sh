#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the engines and their driver with the address and undefined-behaviour sanitizers and runs
# it. Needs g++ and CMake, no Python and no torch. Build directory: $1, default build/native-tests.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
build="${1:-$root/build/native-tests}"
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=None -DCOMPRESSED_LINEAR_NATIVE_TESTS=ON > /dev/null
cmake --build "$build" --parallel 2 > "$build/build.log" || { cat "$build/build.log"; exit 1; }
"$build/test_engines"
"$build/test_int8_engines"
"$build/test_repack"
