#!/usr/bin/env bash
# Everything that only a card can tell, in at most eight minutes on one GPU of 24 GB or more, without a download.
#   bash runs/check_gpu.sh [FOLDER]        # writes FOLDER/check_gpu.json and FOLDER/check_gpu.md, by default in out/check_gpu
set -euo pipefail
cd "$(dirname "$0")/.."
exec python runs/check_gpu.py "$@"
