#!/usr/bin/env bash
# APO on Qwen2.5-7B. Its baselines: run_grpo_7B.sh, run_kl_7B.sh, run_kl_on_wrong_7B.sh.
# Needs: 8 GPUs of 80 GiB, planned peak 65.4 GiB a GPU; data/dapo.jsonl (examples/README.md).
# Arguments: section.field=value ..., for instance train.num_steps=100; several machines: launch.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec examples/math/launch.sh --config examples/math/qwen2.5_7b.yaml "$@"
