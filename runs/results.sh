#!/usr/bin/env bash
# results/RESULTS.md and its figures, from the outputs that lie in results/experiments. Nothing is trained.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/experiments.py results/experiments results/figures > results/RESULTS.partial
mv results/RESULTS.partial results/RESULTS.md
