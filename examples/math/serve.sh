#!/usr/bin/env bash
# SGLang servers on a machine of their own, for runs that do not share their GPUs; they start before the trainer
# or after it, and end with Ctrl-C or SIGTERM. The trainer finds them by rollout.sglang.servers_file, on a disk
# that both see. With SGLANG_API_KEY set, here and for the trainer, only who knows it reaches them.
#
#   examples/math/serve.sh examples/math/llama3_70b.yaml [section.field=value ...]
#
#   HOST   address under which the trainer's machines reach this one; default: the first that it has
set -euo pipefail
config="$(realpath "${1:?which configuration? $0 FILE.yaml}")"
cd "$(dirname "$0")/../.."

exec python -m apo_megatron.rollout.server --config "$config" \
    "rollout.sglang.host=${HOST:-$(hostname -I | cut -d ' ' -f 1)}" "${@:2}"
