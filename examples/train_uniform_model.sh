#!/bin/bash
# A small backbone whose noise is uniform tokens, for the package's own tasks, and its head. Run it
# again to go on after a stop.
#
#   bash examples/train_uniform_model.sh [OUTPUT]
#   codd-hf evaluate answers --model OUTPUT/head/pipeline --dataset tasks --split "validation[:500]"
set -euo pipefail
output=${1:-runs/uniform}

codd-hf train \
    --dataset tasks \
    --output "$output" \
    --stages pretraining \
    --set pretraining.noise=uniform \
    --set vocab_size=1024 \
    --set hidden_size=128 \
    --set num_layers=4 \
    --set pretraining.max_steps=6000 \
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
    --num-latents 256 \
    --conditional-max-steps 800 \
    --conditional-num-draws 2 \
    --set conditional.cache_size=128 \
    --set conditional.max_extra_windows=0
