#!/usr/bin/env bash
# Trains on this node:  NGPU=n ./run_train.sh [--config FILE] [--section.key value ...]
# Without any argument, or with --quickstart among them, it runs the bundled quick start, and says where its curves are.
# Relative paths are those of the folder in which it is called. NGPU defaults to the GPUs present, else 2 CPU workers over gloo.
# Several nodes, the same command on each:  PET_NNODES=2 PET_RDZV_ENDPOINT=HEAD:29500 ./run_train.sh ...
# (torchrun's own variables: PET_X is its option --x; docs/cluster.md).
set -euo pipefail
root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")") # also where a link to this file is called
export PYTHONSAFEPATH=1 # modules are not looked for in the folder in which it is called (Python 3.11 and later)
source "$root/tools/environment.sh"
setup_environment "$root" plots

quickstart=$([ $# -gt 0 ] || echo yes) arguments=()
for argument in "$@"; do
  if [ "$argument" = --quickstart ]; then quickstart=yes; else arguments+=("$argument"); fi
done
program=(-m titan_hd.launch)
if [ -n "$quickstart" ]; then
  case " ${arguments[*]-}" in
  *" --config"*)
    echo "titan_hd: error: --quickstart: has a configuration of its own; leave out one of it and --config" >&2
    exit 2
    ;;
  esac
  program=("$root/tools/quickstart.py")
  set -- --config "$root/train_configs/quickstart.toml" ${arguments[@]+"${arguments[@]}"}
fi
NGPU=${NGPU:-${PET_NPROC_PER_NODE:-}}
if [ -z "$NGPU" ]; then
  NGPU=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
case "$NGPU" in
'' | *[!0-9]* | 0)
  echo "titan_hd: error: NGPU: must be a whole number above 0, not '$NGPU'" >&2
  exit 2
  ;;
esac
# torchrun gives every worker one thread; share the cores of the node instead.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export PET_RDZV_BACKEND=${PET_RDZV_BACKEND:-c10d} PET_RDZV_ENDPOINT=${PET_RDZV_ENDPOINT:-127.0.0.1:0}
exec "$PYTHON" "${program[@]}" --nproc_per_node "$NGPU" -- "$@"
