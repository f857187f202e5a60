#!/usr/bin/env bash
# GRPO with a KL penalty to the reference on the tokens of wrong answers only: where APO acts, without its form.
# On Qwen2.5-7B. The coefficient is our choice.
# Needs: 8 GPUs of 80 GiB, planned peak 65.4 GiB a GPU; data/dapo.jsonl (examples/README.md).
# Arguments: section.field=value ..., for instance objective.kl_loss_coeff=0.01; several machines: launch.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec examples/math/launch.sh --config examples/math/qwen2.5_7b.yaml train.run_dir=runs/qwen2.5_7b_kl_on_wrong \
    objective.loss_mode=vanilla objective.use_kl_loss_on_wrong=true objective.kl_loss_coeff=0.02 "$@"
