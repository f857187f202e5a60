#!/usr/bin/env bash
# APO on Qwen3-30B-A3B, a mixture of 128 experts: expert parallelism over the GPUs of each machine.
# Needs: 16 GPUs of 80 GiB, planned peak 56.3 GiB a GPU; data/dapo.jsonl (examples/README.md); a machine
# that serves: examples/math/serve.sh examples/math/qwen3_30b_a3b.yaml; runs/ on a disk that all of them see.
# Arguments: section.field=value ...; NODE_RANK and MASTER_ADDR as launch.sh says.
set -euo pipefail
cd "$(dirname "$0")/../.."

export NUM_NODES="${NUM_NODES:-2}"
exec examples/math/launch.sh --config examples/math/qwen3_30b_a3b.yaml "$@"
