#!/usr/bin/env bash
# GRPO on Qwen2.5-7B: what run_apo_7B.sh is compared with. The anchor metrics are logged all the same.
# Needs: 8 GPUs of 80 GiB, planned peak 65.4 GiB a GPU; data/dapo.jsonl (examples/README.md).
# Arguments: section.field=value ..., for instance train.num_steps=100; several machines: launch.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec examples/math/launch.sh --config examples/math/qwen2.5_7b.yaml train.run_dir=runs/qwen2.5_7b_grpo \
    objective.loss_mode=vanilla "$@"
