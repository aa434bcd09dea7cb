#!/usr/bin/env bash
# trim.sh VENV: take away what packages carry for building against them and for testing them.
set -euo pipefail
packages=$(echo "$1"/lib/python3*/site-packages)
rm -rf "$packages"/torch/{include,test} "$packages"/pyarrow/include "$packages"/torch/bin/{protoc*,test_*}
rm -rf "$packages"/{numpy,pandas,scipy,networkx,numba,sympy}/tests
find "$packages" -name '*.a' -delete
# Triton builds its launchers with a C compiler as it runs, and there is none: without it plain torch does that work.
rm -rf "$packages"/triton
