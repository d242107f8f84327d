#!/usr/bin/env bash
# Builds the engine without Python and checks its kernels: cross_check.sh COMPILER [RUNNER ...], such as
#   cross_check.sh g++
#   cross_check.sh aarch64-linux-gnu-g++ qemu-aarch64 -L /usr/aarch64-linux-gnu
#   cross_check.sh g++ python3 tests/native/emulated_check.py
set -euo pipefail
cd "$(dirname "$0")/../.."
compiler=$1
shift
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S . -B "$build" -DCMAKE_CXX_COMPILER="$compiler" -DGDLIB_NATIVE_CHECK=ON -DGDLIB_WERROR=ON \
  ${GDLIB_SANITIZE:+-DGDLIB_SANITIZE=$GDLIB_SANITIZE} \
  ${CROSS_PROCESSOR:+-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$CROSS_PROCESSOR} >/dev/null
cmake --build "$build" --parallel 2 >/dev/null
"$@" "$build/native_check"
