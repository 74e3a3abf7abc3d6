#!/usr/bin/env bash
# The runs of docs/study.md:  docs/study/run.sh PART [option of tools/compare_methods.py ...]
# Parts: quickstart, spectra (of its best runs), clipped, adapters, rank, mute, aggregate, batch, share, family,
# leading, smollm2. Each can be killed, and goes on when it is started again. Results are in
# outputs/study/PART; those of the study itself are in docs/study/PART.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.."
part=${1:?which part}
shift
export NGPU=${NGPU:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a run is one worker with one thread
source tools/environment.sh
setup_environment "$PWD"
quickstart=(--config train_configs/study_quickstart.toml)
rates=optimizer.lr=1.5e-3:2.4e-2:5

compare() { # title, arms, then options
  local title=$1 arms=$2
  shift 2
  "$PYTHON" tools/compare_methods.py --title "$title" --methods "$arms" --folder "outputs/study/$part" --seeds 3 \
    --widen 0 --rank-by validation_loss "$@"
}

case $part in
quickstart) # adapter.rank is 8: K * r = 64
  arms=hdpissa,hdpissa+slices=top,hdpissa+slices=random,hdpissa+num_adapters=1+rank=64,hdpissa+num_adapters=1
  arms+=,pissa,pissa+rank=64,lora+rslora=true+optimizer.lr=1e-3:1.6e-2:5
  arms+=,lora+rslora=true+rank=64+optimizer.lr=2e-4:3.2e-3:5,full+optimizer.lr=5e-4:8e-3:5
  arms+=,dora+optimizer.lr=3e-3:4.8e-2:5,mora,hira+optimizer.lr=2e-2:3.2e-1:5
  arms+=,bone+optimizer.lr=1e-3:1.6e-2:5,bat+optimizer.lr=1e-3:1.6e-2:5
  compare "Quick start, every method tuned" "$arms" --grid $rates --match parameters --baseline hdpissa "$@" \
    "${quickstart[@]}"
  ;;
spectra) # Figures 3 and 7
  trained=()
  for run in hdpissa:hdpissa hdpissa_1x64:hdpissa+num_adapters=1+rank=64 pissa_8:pissa pissa_64:pissa+rank=64 \
    lora_8:lora+rslora=true lora_64:lora+rslora=true+rank=64 full:full; do
    weights=(outputs/study/quickstart/"${run#*:}"/*/hf)
    trained+=("${run%%:*}=${weights[0]}")
  done
  "$PYTHON" tools/rank_analysis.py assets/quickstart/model "${trained[@]}" --kinds q_proj,down_proj --mark 16 \
    --output outputs/study/spectra
  ;;
clipped) # the leading arms, and those of the family, with gradient clipping as the quick start has it
  arms=hdpissa,hdpissa+num_adapters=1+rank=64,pissa,pissa+rank=64,lora+rslora=true+optimizer.lr=1e-3:1.6e-2:5
  arms+=,lora+rslora=true+rank=64+optimizer.lr=2e-4:3.2e-3:5,full+optimizer.lr=5e-4:8e-3:5
  arms+=,hdpissa+samples=all+refresh_steps=10,hdpissa+samples=all+factor_scale=unit+refresh_steps=10
  compare "With clipping at 1.0" "$arms" --grid $rates --baseline hdpissa "$@" "${quickstart[@]}" \
    --training.max_norm 1.0
  ;;
adapters) # the paper's Figure 5: K at a fixed rank
  arms=hdpissa+num_adapters=1,hdpissa+num_adapters=2,hdpissa+num_adapters=4,hdpissa
  compare "K at rank 8" "$arms" --grid $rates --seeds 1 --baseline hdpissa "$@" "${quickstart[@]}"
  ;;
rank) # Figure 6: the rank at K = 8
  arms=hdpissa+rank=1,hdpissa+rank=2,hdpissa+rank=4,hdpissa
  compare "Rank at K = 8" "$arms" --grid $rates --seeds 1 --baseline hdpissa "$@" "${quickstart[@]}"
  ;;
mute) # Figure 8
  arms=hdpissa,hdpissa+mute_scalar=1e-2,hdpissa+mute_scalar=1e-4,hdpissa+mute_scalar=1e-8,hdpissa+mute_scalar=1e-16
  arms+=,hdpissa+mute_scalar=1e-32
  compare "Mute scalars" "$arms" --grid $rates --seeds 1 --baseline hdpissa "$@" "${quickstart[@]}"
  ;;
aggregate) # the same effective rates
  arms=hdpissa,hdpissa+aggregate=mean+optimizer.lr=1.2e-2:1.92e-1:5
  compare "Sum and mean" "$arms" --grid $rates --seeds 1 --baseline hdpissa "$@" "${quickstart[@]}"
  ;;
batch) # all directions learning from the whole batch and K slices of it, along the batch
  for batch in 64 128 256 512; do
    part=batch_$batch arms=hdpissa,hdpissa+num_adapters=1+rank=64
    [ $batch -gt 128 ] || arms+=,hdpissa+num_adapters=2+rank=32,hdpissa+num_adapters=4+rank=16
    compare "K * r = 64, $batch records a step" "$arms" --grid optimizer.lr=3e-3:6e-3:2 --seeds 1 \
      --baseline hdpissa "$@" "${quickstart[@]}" --training.global_batch_size $batch
  done
  ;;
share) # K at K * r = 64 and 64 records a step, beside K = 1 with as many records a step as a slice of theirs has
  whole=hdpissa+num_adapters=1+rank=64
  arms=$whole,$whole+training.global_batch_size=32,$whole+training.global_batch_size=16
  arms+=,$whole+training.global_batch_size=8,hdpissa+num_adapters=2+rank=32,hdpissa+num_adapters=4+rank=16,hdpissa
  compare "A slice's share of the batch" "$arms" --grid $rates --seeds 1 --baseline hdpissa "$@" "${quickstart[@]}" \
    --training.max_norm 1.0
  ;;
family) # beyond the paper, K = 8 r = 8; the last two arms are the ones to beat
  arms=hdpissa,hdpissa+slices=minor,hdpissa+samples=all,hdpissa+factor_scale=unit,hdpissa+exchange_dtype=int8
  arms+=,hdpissa+refresh_steps=10,hdpissa+refresh_steps=20,hdpissa+refresh_steps=40
  arms+=,hdpissa+local_steps=2,hdpissa+local_steps=4,hdpissa+local_steps=8
  arms+=,hdpissa+samples=all+factor_scale=unit,hdpissa+samples=all+refresh_steps=10
  arms+=,hdpissa+samples=all+factor_scale=unit+refresh_steps=10,hdpissa+samples=all+slices=random
  arms+=,pissa+rank=64,lora+rslora=true+rank=64+optimizer.lr=2e-4:3.2e-3:5
  compare "The folding family" "$arms" --grid $rates --repeat best --baseline hdpissa "$@" "${quickstart[@]}"
  ;;
leading) # the two that lead the family and what they are to lead, with seeds
  arms=hdpissa,hdpissa+samples=all+refresh_steps=10,hdpissa+samples=all+factor_scale=unit+refresh_steps=10
  arms+=,pissa+rank=64,lora+rslora=true+rank=64+optimizer.lr=2e-4:3.2e-3:5
  compare "What leads the folding family" "$arms" --grid $rates --baseline hdpissa --widen 1 "$@" "${quickstart[@]}"
  ;;
smollm2) # r = 16, K * r = 128; two seeds at the best rates
  arms=hdpissa,hdpissa+num_adapters=1+rank=128,lora+rslora=true+rank=128+optimizer.lr=2.5e-5:4e-4:3,pissa
  arms+=,lora+rslora=true+optimizer.lr=1e-4:1.6e-3:3,full+optimizer.lr=1e-5:1.6e-4:3
  arms+=,hdpissa+samples=all+factor_scale=unit+refresh_steps=10,hdpissa+samples=all+refresh_steps=10
  compare "SmolLM2-135M on GSM8K" "$arms" --grid optimizer.lr=5e-5:8e-4:3 --seeds 2 --repeat best --widen 1 \
    --baseline hdpissa "$@" --config train_configs/study_smollm2.toml
  ;;
*)
  echo "titan_hd: error: PART: must be one of those that the head of this file names, not $part" >&2
  exit 2
  ;;
esac
