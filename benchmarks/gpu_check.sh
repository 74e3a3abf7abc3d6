#!/usr/bin/env bash
# Everything worth checking on a machine with one GPU, in one call. Run it in the repository's root:
#
#     ./benchmarks/gpu_check.sh                    # outputs under ${OUT:-outputs/gpu_check}
#     ONLY="linear train" ./benchmarks/gpu_check.sh
#
# NOT YET RUN ON A GPU. Only its parts have been dry-run on a CPU, on the debug model:
#     FLAVOR=debugmodel SEQ_LEN=64 LOCAL_BATCH=1 ADAPTER_RANK=4 ONLY=train ./benchmarks/gpu_check.sh
#
# Parts: tests (pytest -m gpu; those for two GPUs skip where there is one), linear, update, svd, loader, loss, host,
# checkpointing, step, peers, train (20 steps of a random Llama-3.1-8B with K = 8 virtual adapters: with and without
# torch.compile, packed, with W gathered for every micro-batch and once, with bf16 masters, in fp32). Each part has a time
# limit and the next runs even if it fails; the summary at the end lists every part's exit status. What the training needs
# of memory is in the first lines of its output; compare it with peak_memory_gib.
set -uo pipefail

OUT=${OUT:-outputs/gpu_check}
PYTHON=${PYTHON:-python3}
ONLY=${ONLY:-tests linear update svd loader loss host checkpointing step peers train}
FLAVOR=${FLAVOR:-8B}
PEERS_FLAVOR=${PEERS_FLAVOR:-1B} # of the comparison with transformers and peft, which must be installed
SEQ_LEN=${SEQ_LEN:-2048}
LOCAL_BATCH=${LOCAL_BATCH:-2}
STEPS=${STEPS:-20}
LIMIT=${LIMIT:-900} # seconds for one part
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
summary=()
failed=0

# part NAME COMMAND...: run with a time limit, keep the output, go on.
part() {
  local name=$1 status start=$SECONDS
  shift
  echo "=== $name: $*"
  timeout "$LIMIT" "$@" 2>&1 | tee "$OUT/$name.txt"
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || [ "$name $status" = "tests 5" ] || failed=1 # 5: no test is marked gpu
  summary+=("$name: status $status, $((SECONDS - start)) s")
}

wanted() { [[ " $ONLY " == *" $1 "* ]]; }

# FILE RECORDS SHORTEST LONGEST: random records, every token trained: what is measured is speed.
write_records() {
  "$PYTHON" - "$@" <<'PYTHON'
import json, random, sys
path, (count, shortest, longest) = sys.argv[1], map(int, sys.argv[2:])
random.seed(0)
with open(path, "w") as file:
    for _ in range(count):
        ids = [random.randrange(256) for _ in range(random.randint(shortest, longest))]
        file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
PYTHON
}

# Two power iterations: random weights have no slices worth more.
write_config() {
  cat >"$1" <<TOML
[model]
name = "llama3"
flavor = "$FLAVOR"
[data]
train = "$2"
format = "tokens"
[training]
steps = $STEPS
seq_len = $SEQ_LEN
local_batch_size = $LOCAL_BATCH
mixed_precision_param = "bfloat16"
[optimizer]
lr = 2e-5
[adapter]
rank = ${ADAPTER_RANK:-16}
svd = "randomized"
svd_niter = 2
[hdpissa]
num_adapters = ${ADAPTERS:-8}
[activation_checkpoint]
mode = "${AC:-selective}"
[metrics]
progress_bar = false
TOML
}

# The first steps allocate and compile: the median is over the second half.
speed() {
  "$PYTHON" - "$1" <<'PYTHON'
import json, statistics, sys
steps = [json.loads(line) for line in open(sys.argv[1])]
steps = [s for s in steps if "tokens_per_second" in s]
late = steps[len(steps) // 2 :]
for key in ("tokens_per_second", "tflops_per_worker", "step_seconds", "peak_memory_gib"):
    values = [s[key] for s in late if s.get(key) is not None]
    print(f"  {key}: median {statistics.median(values):.4g}, {min(values):.4g} to {max(values):.4g}" if values else key)
print("  loss, first and last:", steps[0]["loss"], steps[-1]["loss"])
PYTHON
}

train() { # NAME OPTIONS...
  local name=$1
  shift
  rm -rf "$OUT/$name"
  part "$name" "$PYTHON" -m titan_hd.launch --nproc_per_node 1 -- --config "$temporary/config.toml" \
    --job.dump_folder "$OUT/$name" "$@"
  [ ! -f "$OUT/$name/metrics.jsonl" ] || speed "$OUT/$name/metrics.jsonl" 2>&1 | tee "$OUT/$name-speed.txt"
}

{
  "$PYTHON" -c 'import sys, torch; print(sys.version, torch.__version__, torch.cuda.is_available())'
  nvidia-smi 2>/dev/null
} | tee "$OUT/machine.txt"

if wanted tests; then
  part tests "$PYTHON" -m pytest -q -m gpu tests
fi

if wanted linear; then
  sizes=(--in-features 4096 --out-features 14336 --tokens 4096
    --hidden 4096 --intermediate 14336 --head-dim 128 --seq-len 2048)
  part linear-bf16 "$PYTHON" -m benchmarks.bench_linear "${sizes[@]}" --dtype bfloat16
  part linear-bf16-compile "$PYTHON" -m benchmarks.bench_linear "${sizes[@]}" --dtype bfloat16 --compile
  part linear-fp32 "$PYTHON" -m benchmarks.bench_linear "${sizes[@]}" --dtype float32 --repetitions 3
fi

if wanted update; then
  part update "$PYTHON" -m benchmarks.bench_update --true-8b
fi

if wanted svd; then
  part svd "$PYTHON" -m benchmarks.bench_svd --true-8b --repetitions 1
fi

if wanted loader; then
  part loader "$PYTHON" -m benchmarks.bench_loader
fi

if wanted loss; then
  part loss "$PYTHON" -m benchmarks.bench_loss --tokens 16384 --hidden 4096 --vocabulary 128256 --dtype bfloat16
fi

if wanted host; then
  part host "$PYTHON" -m benchmarks.bench_host --compile
fi

if wanted checkpointing; then
  part checkpointing "$PYTHON" -m benchmarks.bench_checkpointing
fi

if wanted step; then
  part step "$PYTHON" -m benchmarks.bench_step --flavor "llama3/$FLAVOR" --tokens "$SEQ_LEN" --rows "$LOCAL_BATCH" \
    --methods hdpissa,lora,pissa,dora --activation_checkpoint.mode selective --training.mixed_precision_param bfloat16
fi

if wanted peers; then
  part peers "$PYTHON" -m benchmarks.bench_peers --flavor "llama3/$PEERS_FLAVOR" --tokens "$SEQ_LEN" --dtype bfloat16
  part peers-masked "$PYTHON" -m benchmarks.bench_peers --flavor "llama3/$PEERS_FLAVOR" --tokens "$SEQ_LEN" \
    --dtype bfloat16 --labelled 0.3
fi

if wanted train; then
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT
  write_records "$temporary/records.jsonl" 64 "$SEQ_LEN" "$SEQ_LEN"
  write_records "$temporary/short.jsonl" 2000 4 "$((SEQ_LEN / 4))"
  write_config "$temporary/config.toml" "$temporary/records.jsonl"
  cp "$temporary/config.toml" "$OUT/train.toml"
  train train-eager
  # Four micro-batches a step for each adapter: what gathering once saves.
  several=(--training.local_batch_size 1 --training.global_batch_size 32)
  train train-gather-always "${several[@]}" --parallelism.fsdp_reshard_after_forward always
  train train-gather-once "${several[@]}" --parallelism.fsdp_reshard_after_forward never
  train train-bf16-masters --training.master_dtype bfloat16
  train train-moments-on-host --hdpissa.offload_moments true
  train train-weights-on-host --training.enable_cpu_offload true
  train train-fp32 --training.mixed_precision_param float32 --training.float32_matmul_precision high
  train train-compile --compile.enable true
  train train-packed --data.train "$temporary/short.jsonl" --data.pack true
  train train-packed-compile --data.train "$temporary/short.jsonl" --data.pack true --compile.enable true
  train train-unpacked --data.train "$temporary/short.jsonl"
fi

printf '\n=== summary\n'
printf '%s\n' "${summary[@]}" | tee "$OUT/summary.txt"
exit "$failed"
