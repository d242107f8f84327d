#!/usr/bin/env bash
# Runs Python tests on an emulated aarch64, whose kernels are those of NEON: emulated_suite.sh [WORD FOR PYTEST ...], such as
#   emulated_suite.sh tests/kernels -k neon            (16 minutes on one core; 4 without 2201x1001x400 and 900x1000x700)
#   emulated_suite.sh tests/kernels -k neon -m slow    (all sizes: 22 minutes)
# Debian's Python for arm64 and wheels for it are unpacked under build/aarch64, where the module is built too; nothing is installed.
# Wanted are cmake, g++-aarch64-linux-gnu, qemu-user and, on PATH, a Python that has pip and pybind11.
set -euo pipefail
cd "$(dirname "$0")/../.."
place=$PWD/build/aarch64
root=$place/root
rm -rf "$place"
mkdir -p "$place"/apt/{state/lists/partial,cache/archives/partial} "$root"

# An apt of its own, which knows no installed package and so fetches all that Python needs, the C library included.
touch "$place/apt/status"
cat >"$place/apt/conf" <<END
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Install-Recommends "false";
APT::Sandbox::User "$(id -un)";
Dir::State "$place/apt/state";
Dir::State::status "$place/apt/status";
Dir::Cache "$place/apt/cache";
END
export APT_CONFIG=$place/apt/conf
apt-get update -qq
apt-get install -y -qq --download-only --no-install-recommends libpython3-dev python3 libgomp1 libstdc++6 >/dev/null
for package in "$place"/apt/cache/archives/*.deb; do dpkg -x "$package" "$root"; done
python=$(readlink -f "$root/usr/bin/python3")
version=${python##*/python}
[ "$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = "$version" ] || { echo "python3 is not Debian's $version"; exit 1; }

python3 -m pip install --quiet --target "$place/site" --only-binary :all: --implementation cp --python-version "$version" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 numpy pytest hypothesis safetensors
tar -c --exclude __pycache__ gdlib tests pyproject.toml | tar -x -C "$place/site"
cmake -S . -B "$place/build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CXX_FLAGS="-isystem $root/usr/include" -DPython_EXECUTABLE="$(command -v python3)" \
  -DPython_INCLUDE_DIR="$root/usr/include/python$version" -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" >/dev/null
cmake --build "$place/build" --parallel 2 >/dev/null
cp "$place"/build/_core.*.so "$place/site/gdlib/_core.so"

libraries=$root/usr/lib/aarch64-linux-gnu:$root/lib/aarch64-linux-gnu
cd "$place/site"
# No process can start another of its kind.
exec qemu-aarch64 -L "$root" -E LD_LIBRARY_PATH="$libraries" -E PYTHONPATH="$place/site" -E OPENBLAS_NUM_THREADS=1 "$python" -m pytest -q \
  -p no:cacheprovider --ignore tests/kernels/test_processes.py "$@"
