#!/usr/bin/env bash
# An image with its depth from a sentence. Flags given to this script are added at the end and win:
#
#   bash scripts/joint_generation.sh --text_prompt "..." --seed 1 2 3
#
# Paths are taken from the project's folder, whatever folder this is called from: give others whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/weights.sh
source scripts/weights.sh

size=()
if real_model; then
    size=(--output_resolution 1024 1024)
fi
accelerate launch --config_file default_config.yaml --mixed_precision bf16 inference.py \
    ${weights[@]+"${weights[@]}"} ${size[@]+"${size[@]}"} \
    --gen_type joint_generation \
    --text_prompt "a red ball on a blue box in a bright room" \
    --seed 50 \
    --sdpa --guidance_scale 3.5 --blocks_to_swap 8 \
    --mixed_precision bf16 --full_bf16 "$@"
