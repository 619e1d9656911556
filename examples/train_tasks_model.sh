#!/bin/bash
# A small backbone for the package's own tasks, and its head: from masks the embedded model, from
# uniform noise a smaller one. Run it again to go on after a stop.
#
#   bash examples/train_tasks_model.sh [OUTPUT] [mask|uniform]
#   codd-hf evaluate answers --model OUTPUT/head/pipeline --dataset tasks --split "validation[:500]"
set -euo pipefail
output=${1:-runs/tasks}
head=(--num-latents 256 --conditional-max-steps 800 --set conditional.max_extra_windows=0)
case ${2:-mask} in
    mask) backbone=(--set num_layers=6 --set pretraining.max_steps=9000) ;;
    uniform)
        backbone=(--set pretraining.noise=uniform --set num_layers=4 --set pretraining.max_steps=6000)
        head+=(--conditional-num-draws 2 --set conditional.cache_size=128)
        ;;
    *) echo "the noise must be mask or uniform, got $2" >&2 && exit 2 ;;
esac

codd-hf train \
    --dataset tasks \
    --output "$output" \
    --stages pretraining \
    "${backbone[@]}" \
    --set vocab_size=1024 \
    --set hidden_size=128 \
    --set pretraining.tokens_per_batch=4096 \
    --set pretraining.learning_rate=3e-3 \
    --set pretraining.decay_fraction=0.8 \
    --set pretraining.window_probability=1 \
    --set pretraining.max_extra_windows=0 \
    --set pretraining.evaluation_steps=250 \
    --set pretraining.checkpointing_steps=250

codd-hf train \
    --dataset tasks --split "train[:16000]" \
    --backbone "$output/backbone" \
    --output "$output/head" \
    "${head[@]}"
