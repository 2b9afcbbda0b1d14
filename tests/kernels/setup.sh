#!/usr/bin/env bash
# Triton and MegaBlocks' block-sparse kernels for the tests marked "kernels": into .venv/kernels, 285 MB to download and
# 1 GB on disk. No GPU is needed. Does nothing when they are there. `make clean` removes them with the rest of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=.venv/kernels
wanted=tests/kernels/requirements.txt
if ! cmp -s "$wanted" "$folder/.complete"; then
    rm -rf "$folder"
    # --no-deps: stk's are numpy and torch, which must stay those of .venv.
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --target "$folder" -r "$wanted"
    cp "$wanted" "$folder/.complete"
fi
