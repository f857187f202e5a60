#!/usr/bin/env bash
# How much a model can still reach: Pass@K up to 256 tries, from the very distribution that was trained
# (temperature 1, no truncation). Compare two models: python -m tools.compare_evaluations DIR DIR --out page.html
# Needs: 8 GPUs that hold the model each (fewer: rollout.sglang.num_servers=N; a larger model:
# rollout.sglang.tensor_parallel_size=N). Killed, the same command goes on.
#
#   examples/math/eval_pass_at_k.sh runs/qwen2.5_7b_apo/hf [section.field=value ...]
#
# Paths are relative to the top folder. What comes from a Qwen2.5 base model wants rollout.stop_token_ids=[151645],
# and Qwen2.5-Math-7B, whose context is 4,096 tokens, rollout.max_new_tokens=3072 too.
set -euo pipefail
model="${1:?which model? $0 DIRECTORY_OR_HUB_ID}"
cd "$(dirname "$0")/../.."

exec python -m apo_megatron.evaluate --config examples/math/evaluate.yaml "model.hf_path=$model" \
    "output_dir=runs/pass_at_k/${model//\//--}" "benchmarks=[aime24, aime25, amc23]" \
    evaluation.temperature=1.0 evaluation.top_p=1.0 evaluation.num_samples=256 \
    "evaluation.ks=[1, 2, 4, 8, 16, 32, 64, 128, 256]" "${@:2}"
