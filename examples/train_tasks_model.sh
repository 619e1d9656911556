#!/bin/bash
# A backbone of 2 M parameters for the package's own tasks. Run it again to go on after a stop; a
# larger number of steps as the first argument goes on as well, since rates fall at the end alone.
#
#   bash examples/train_tasks_model.sh [STEPS] [OUTPUT]
#   python examples/evaluate_tasks.py OUTPUT/backbone
#
# Not yet trained to the end. What is known is of a vocabulary of 768 and six heads of attention, 2,000
# steps (6.7 M tokens): 33 % of 60 sums right one token at a time, 22 % of dates, 7 % of orderings, no
# record and no word problem. Digits are copied by then, words are not: 768 tokens split some of them.
set -euo pipefail
steps=${1:-12000} output=${2:-runs/tasks}

exec codd-hf train \
    --dataset tasks \
    --output "$output" \
    --stages pretraining \
    --vocab-size 1024 \
    --hidden-size 192 \
    --num-layers 4 \
    --pretraining-max-steps "$steps" \
    --pretraining-tokens-per-batch 3072 \
    --pretraining-learning-rate 3e-3 \
    --pretraining-decay-fraction 0.3 \
    --pretraining-window-probability 1 \
    --pretraining-max-extra-windows 0 \
    --pretraining-evaluation-steps 250 \
    --pretraining-checkpointing-steps 250
