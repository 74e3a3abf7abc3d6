#!/usr/bin/env bash
# Trains on this node:  NGPU=n ./run_train.sh --config FILE [--section.key value ...]
# With no --config it runs the bundled quick start. NGPU defaults to the GPUs present, else 2 CPU workers over gloo.
# Several nodes, the same command on each:  PET_NNODES=2 PET_RDZV_ENDPOINT=HEAD:29500 ./run_train.sh ...
# (torchrun's own variables: PET_X is its option --x; docs/cluster.md).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/tools/environment.sh"
setup_environment "$root"

case " $* " in
*" --config "* | *" --config="* | *" --help "* | *" -h "*) ;;
*)
  cd "$root"
  set -- --config train_configs/quickstart.toml "$@"
  ;;
esac
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
export PET_RDZV_BACKEND=${PET_RDZV_BACKEND:-c10d} PET_RDZV_ENDPOINT=${PET_RDZV_ENDPOINT:-localhost:0}
exec "$PYTHON" -m titan_hd.launch --nproc_per_node "$NGPU" -- "$@"
