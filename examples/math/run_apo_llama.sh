#!/usr/bin/env bash
# APO on Llama-3.1-8B-Instruct.
# Needs: 8 GPUs of 80 GiB, planned peak 60.5 GiB a GPU; data/dapo.jsonl (examples/README.md).
# Arguments: section.field=value ..., for instance train.num_steps=100; several machines: launch.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec examples/math/launch.sh --config examples/math/llama3.1_8b.yaml "$@"
