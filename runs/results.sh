#!/usr/bin/env bash
# results/RESULTS.md, and that of the earlier task in results/archive, with their figures, from outputs that lie beside them.
# Nothing is trained.
set -euo pipefail
cd "$(dirname "$0")/.."
python runs/experiments.py results/figures > results/RESULTS.partial
mv results/RESULTS.partial results/RESULTS.md
python runs/archive.py results/archive/experiments results/archive/figures > results/archive/RESULTS.partial
mv results/archive/RESULTS.partial results/archive/RESULTS.md
