#!/bin/bash
# A backbone of 2 M parameters for the package's own tasks. Run it again to go on after a stop; a
# larger number of steps as the first argument goes on as well, since rates fall at the end alone.
#
#   bash examples/train_tasks_model.sh [STEPS] [OUTPUT]
#   codd-hf evaluate answers --model OUTPUT/backbone --dataset tasks --split validation[:500]
#
# Not yet trained to the end.
set -euo pipefail
steps=${1:-20000} output=${2:-runs/tasks}

exec codd-hf train \
    --dataset tasks \
    --output "$output" \
    --stages pretraining \
    --set vocab_size=1024 \
    --set hidden_size=192 \
    --set num_layers=4 \
    --set pretraining.max_steps="$steps" \
    --set pretraining.tokens_per_batch=4096 \
    --set pretraining.learning_rate=3e-3 \
    --set pretraining.decay_fraction=0.3 \
    --set pretraining.window_probability=1 \
    --set pretraining.max_extra_windows=0 \
    --set pretraining.evaluation_steps=500 \
    --set pretraining.checkpointing_steps=500
