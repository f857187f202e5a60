#!/bin/bash
# The SGLang servers of one node, listed in FOLDER/<node>.json, their logs in FOLDER/<node>/:
# serve.sh FOLDER --config run.yaml ...
set -euo pipefail
folder=$1
shift
read -r address _ < <(getent ahostsv4 "$SLURMD_NODENAME")
case $address in
    127.0.1.*)  # what Debian writes into /etc/hosts
        echo "error: $SLURMD_NODENAME is $address in its own /etc/hosts: nobody else would reach its servers" >&2
        exit 2 ;;
esac
exec "$PYTHON" -u -m apo_megatron.rollout.server "$@" train.run_dir="$folder/$SLURMD_NODENAME" \
    rollout.sglang.host="$address" rollout.sglang.servers_file="$folder/$SLURMD_NODENAME.json"
