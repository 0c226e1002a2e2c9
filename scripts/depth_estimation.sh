#!/usr/bin/env bash
# The depth of an image. Flags given to this script are added at the end and win:
#
#   bash scripts/depth_estimation.sh --input_image picture.jpg
#
# Paths are taken from the project's folder, whatever folder this is called from: give others whole.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/weights.sh
source scripts/weights.sh

size=()
if real_model; then
    size=(--processing_resolution 0) # as released: at the input's own size
fi
accelerate launch --config_file default_config.yaml --mixed_precision bf16 inference.py \
    ${weights[@]+"${weights[@]}"} ${size[@]+"${size[@]}"} \
    --gen_type depth_estimation \
    --input_image assets/demo/image_1.png \
    --seed 42 \
    --sdpa --guidance_scale 3.5 --blocks_to_swap 8 \
    --mixed_precision bf16 --full_bf16 "$@"
