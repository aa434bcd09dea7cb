#!/usr/bin/env bash
# trim.sh VENV: take away what packages carry for building against them and for testing them.
set -euo pipefail
packages=$(echo "$1"/lib/python3*/site-packages)
rm -rf "$packages"/torch/{include,test} "$packages"/pyarrow/include "$packages"/torch/bin/{protoc*,test_*,*Test}
for name in networkx numba numpy pandas pyarrow sympy; do
  find "$packages/$name" -type d -name tests -prune -exec rm -rf {} +
done
find "$packages" -name '*.a' -delete
# Triton builds its launchers with a C compiler as it runs, and there is none: without it plain torch does that work.
rm -rf "$packages"/triton
