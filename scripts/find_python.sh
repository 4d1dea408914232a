#!/bin/sh
# Prints the Python to build with, or says in one line what this machine lacks; downloads nothing.
#
# PYTHON=name   take this Python and no other
# CXX=name      take this C++ compiler (default c++, as torch does)
# LRAEE_BUILD_EXT=0   the C++ extension is not wanted, so no compiler is needed
set -eu

fail() {
  echo "lraee: $*" >&2
  exit 1
}

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python=
for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
  if command -v "$name" >/dev/null 2>&1 && is_new_enough "$name"; then
    python=$name
    break
  fi
done
if [ -z "$python" ]; then
  found=$("${PYTHON:-python3}" -c 'import platform; print(platform.python_version())' 2>/dev/null ||
    echo none)
  fail "Python must be 3.11 or newer, got $found; install one, or name it: make PYTHON=python3.12"
fi

"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python must have the venv and ensurepip modules, got none; on Debian: python3-venv"

if [ "${LRAEE_BUILD_EXT:-1}" != 0 ]; then
  cxx=${CXX:-c++}
  echo 'int main() { return 0; }' | $cxx -std=c++20 -x c++ -c -o /dev/null - 2>/dev/null ||
    fail "a C++20 compiler must be installed, got none that works as '$cxx'; on Debian: g++," \
      "or name one: CXX=g++-13 make"
  "$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    fail "$python must have its C headers, got no Python.h; on Debian: python3-dev"
fi

echo "$python"
