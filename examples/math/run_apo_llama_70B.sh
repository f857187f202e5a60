#!/usr/bin/env bash
# APO on Llama-3-70B-Instruct: tensor parallelism within each of four machines, a pipeline stage a machine.
# Needs: 32 GPUs of 80 GiB, planned peak 61.8 GiB a GPU; data/dapo.jsonl (examples/README.md); a machine
# that serves: examples/math/serve.sh examples/math/llama3_70b.yaml; runs/ on a disk that all of them see.
# Arguments: section.field=value ...; NODE_RANK and MASTER_ADDR as launch.sh says.
set -euo pipefail
cd "$(dirname "$0")/../.."

export NUM_NODES="${NUM_NODES:-4}"
exec examples/math/launch.sh --config examples/math/llama3_70b.yaml "$@"
