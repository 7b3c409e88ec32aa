#!/usr/bin/env bash
# results/archive/RESULTS.md and its figures, from the outputs that lie beside it. Nothing is trained.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/experiments.py results/archive/experiments results/archive/figures > results/archive/RESULTS.partial
mv results/archive/RESULTS.partial results/archive/RESULTS.md
