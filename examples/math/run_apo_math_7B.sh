#!/usr/bin/env bash
# APO on Qwen2.5-Math-7B with the paper's push, pull, K and exclusive anchoring.
# Needs: 8 GPUs of 80 GiB, planned peak 58.8 GiB a GPU; data/dapo.jsonl (examples/README.md).
# Arguments: section.field=value ..., for instance train.num_steps=100; several machines: launch.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec examples/math/launch.sh --config examples/math/qwen2.5_math_7b.yaml "$@"
