#!/usr/bin/env bash
# Everything that waits for a GPU, as one table (tests/gpu/run_all.py). Needs `make setup` with a CUDA build of torch, and `make data`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec .venv/bin/python tests/gpu/run_all.py "$@"
