#!/usr/bin/env bash
# Download the real weights (39 GB for FLUX.1-dev) to models/, where the three task scripts look for them. Tokenizers come
# with the text encoders, so that nothing is downloaded later.
#
#   bash scripts/download_models.sh            FLUX.1-dev, its text encoders, and JointDiT's released add-ons
#   bash scripts/download_models.sh addons     only the add-ons; likewise: flux, text
#
# Files that are there already are left alone; a broken download goes on where it stopped.
# FLUX.1-dev asks you to accept its licence: open https://huggingface.co/black-forest-labs/FLUX.1-dev while signed in,
# agree, and run `hf auth login` once. docs/licences.md says what each licence permits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() {
    echo "scripts/download_models.sh: $*" >&2
    exit 2
}

# fetch FOLDER REPOSITORY FILE: one file from the hub, unless it is there
fetch() {
    local folder=$1 repository=$2 file=$3
    if [ -s "$folder/$file" ]; then
        echo "have  $folder/$file"
        return
    fi
    echo "fetch $folder/$file from $repository"
    hf download "$repository" "$file" --local-dir "$folder"
}

# fetch_tokenizer FOLDER REPOSITORY FILE: a tokenizer's files, unless FILE, one of them, is there
fetch_tokenizer() {
    local folder=$1 repository=$2 file=$3 pattern patterns=()
    if [ -s "$folder/$file" ]; then
        echo "have  $folder"
        return
    fi
    echo "fetch $folder from $repository"
    for pattern in "tokenizer*" special_tokens_map.json vocab.json merges.txt spiece.model; do
        patterns+=(--include "$pattern")
    done
    hf download "$repository" "${patterns[@]}" --local-dir "$folder" || fail "$folder: download failed; see the message above"
}

get_flux() {
    echo "FLUX.1-dev (23.8 GB) and its autoencoder (0.3 GB): FLUX.1 [dev] Non-Commercial License"
    local file
    for file in flux1-dev.safetensors ae.safetensors; do
        fetch models/flux black-forest-labs/FLUX.1-dev "$file" ||
            fail "models/flux/$file: the hub refused it; accept the licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, then run: hf auth login"
    done
}

get_text() {
    echo "CLIP-L (0.2 GB, MIT) and T5-XXL (9.8 GB, Apache-2.0), with their tokenizers"
    local file
    for file in clip_l.safetensors t5xxl_fp16.safetensors; do
        fetch models/flux comfyanonymous/flux_text_encoders "$file" || fail "models/flux/$file: download failed; see the message above"
    done
    fetch_tokenizer models/flux/tokenizer openai/clip-vit-large-patch14 vocab.json
    fetch_tokenizer models/flux/tokenizer_2 google/t5-v1_1-xxl spiece.model
}

get_addons() {
    echo "JointDiT add-ons (4.7 GB): no licence is stated; made from FLUX.1-dev, whose licence covers derivatives"
    # The hub's file has had both names.
    local have
    for have in models/jointdit/jointdit_addons.safetensors models/jointdit/jointdit.safetensors; do
        if [ -s "$have" ]; then
            echo "have  $have"
            return
        fi
    done
    hf download byungki-kwon/JointDiT --include "jointdit*.safetensors" --include "jointdit*.json" --local-dir models/jointdit ||
        fail "models/jointdit: download failed; see the message above"
    if [ -s models/jointdit/jointdit.safetensors ] && ! [ -e models/jointdit/jointdit_addons.safetensors ]; then
        mv models/jointdit/jointdit.safetensors models/jointdit/jointdit_addons.safetensors
        if [ -e models/jointdit/jointdit.json ]; then mv models/jointdit/jointdit.json models/jointdit/jointdit_addons.json; fi
    fi
    [ -s models/jointdit/jointdit_addons.safetensors ] || fail "models/jointdit: byungki-kwon/JointDiT holds no jointdit*.safetensors"
}

parts=("$@")
[ $# -gt 0 ] || parts=(flux text addons)
for part in "${parts[@]}"; do
    case $part in
        flux | text | addons) ;;
        *) fail "$part: unknown; choose from flux, text, addons" ;;
    esac
done

# shellcheck source=scripts/setup.sh
source scripts/setup.sh
jointdit_setup
for part in "${parts[@]}"; do
    "get_$part"
done
echo "All there. Next: bash scripts/depth_estimation.sh"
