#!/usr/bin/env bash
# Sourced by the three task scripts: sets `weights` to the flags of the real model if it was downloaded
# (scripts/download_models.sh), and to nothing otherwise, which means the embedded model.
#
#   weights=(FLAG...)   weight flags of inference.py
#   real_model          true if they name the real model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
jointdit_setup

weights=()
if [ -e models/flux/flux1-dev.safetensors ]; then
    weights=(
        --jointdit_addons_path models/jointdit/jointdit_addons.safetensors
        --pretrained_model_name_or_path models/flux/flux1-dev.safetensors
        --clip_l models/flux/clip_l.safetensors
        --t5xxl models/flux/t5xxl_fp16.safetensors
        --ae models/flux/ae.safetensors
    )
else
    echo "models/flux/flux1-dev.safetensors isn't there (scripts/download_models.sh fetches it): using the embedded model"
fi

real_model() {
    [ ${#weights[@]} -gt 0 ]
}
