#!/usr/bin/env bash
# How good a model is: Pass@1 to Pass@8 and majority votes on six sets of mathematics, at temperature 0.6.
# Needs: 8 GPUs that hold the model each (fewer: rollout.sglang.num_servers=N; a larger model:
# rollout.sglang.tensor_parallel_size=N). Killed, the same command goes on.
#
#   examples/math/eval_model.sh runs/qwen2.5_7b_apo/hf [section.field=value ...]
#
# Paths are relative to the top folder. What comes from a Qwen2.5 base model wants rollout.stop_token_ids=[151645],
# and Qwen2.5-Math-7B, whose context is 4,096 tokens, rollout.max_new_tokens=3072 too.
set -euo pipefail
model="${1:?which model? $0 DIRECTORY_OR_HUB_ID}"
cd "$(dirname "$0")/../.."

exec python -m apo_megatron.evaluate --config examples/math/evaluate.yaml "model.hf_path=$model" \
    "output_dir=runs/evaluations/${model//\//--}" "${@:2}"
