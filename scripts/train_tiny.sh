#!/usr/bin/env bash
# Make the embedded model from nothing: scenes, autoencoder, text encoders, backbone, its guidance, joint stage.
#
#   bash scripts/train_tiny.sh            (about six hours on two CPU cores; set the numbers lower for a trial)
#
# The backbone in assets/tiny had as many minutes, but in three goes, each with a new start of the optimizer: 44 without the
# heads (--depth_weight 0 --object_weight 0 --clean_share 0.3), 52 with the depth head, 100 as here (--muon_lr 0.015).
#
# A stage whose result is there is skipped, so the script can be stopped and started again; inside a stage the training
# commands go on from their last state. Variables, with their defaults:
WORK=${WORK:-outputs/tiny}                      # everything that is made on the way
SCENES=${SCENES:-24000}                         # training scenes (seed 0); the backbone holds out 256 of them
HELD_OUT=${HELD_OUT:-256}                       # scenes of another seed, for the validation loss and the previews
AUTOENCODER_MINUTES=${AUTOENCODER_MINUTES:-16}  # training time of the autoencoder
BACKBONE_MINUTES=${BACKBONE_MINUTES:-196}       # training time of the text-to-image backbone
GUIDANCE_MINUTES=${GUIDANCE_MINUTES:-46}        # time in which the backbone learns guidance
JOINT_STEPS=${JOINT_STEPS:-5500}                # optimizer steps of the joint stage
JOINT_BATCH=${JOINT_BATCH:-16}                  # pairs a step
LORA_RANK=${LORA_RANK:-64}                      # adapters in the blocks
INPUT_RANKS=${INPUT_RANKS:-"64 64"}             # adapters of vector_in
TEXT_RANK=${TEXT_RANK:-64}                      # adapter of txt_in
COMPILE=${COMPILE-$(command -v g++ || true)}    # not empty: compile the joint stage's blocks, a quarter faster
ASSETS=${ASSETS:-$WORK/assets}                  # where the finished files go; assets/tiny is the shipped model's place
EVALUATE=${EVALUATE:-256}                       # scenes of the final evaluation; 0 leaves it away
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
jointdit_setup

HELD_OUT_SEED=7 # not the seed of the evaluation's scenes, which nothing but the evaluation may see
MODEL=$WORK/model
PLAIN=$WORK/plain_backbone
mkdir -p "$WORK" "$MODEL"

stage() { # stage RESULT DESCRIPTION COMMAND...: run the command unless its result is there
    local result=$1 description=$2
    shift 2
    if [ -e "$result" ]; then
        echo "== $description: there ($result)"
        return
    fi
    echo "== $description"
    "$@"
    [ -e "$result" ] || { echo "$description stopped before $result was made; start again to go on" >&2; exit 3; }
}

scenes() { # scenes FOLDER COUNT SEED
    python dataset/make_scenes.py --output "$1" --count "$2" --size 128 --seed "$3"
    touch "$1/.complete"
}

cache() { # cache FOLDER
    python dataset/preprocess_step2.py --image_folder "$1" --clip_l "$MODEL/clip_l.safetensors" \
        --t5xxl "$MODEL/t5xxl_fp16.safetensors" --ae "$MODEL/ae.safetensors" --batch_size 16 --save_precision fp16 \
        --posterior mean
    touch "$1/cache/.complete"
}

backbone() { # backbone FOLDER MINUTES FLAG...
    local folder=$1 minutes=$2
    shift 2
    mkdir -p "$folder"
    [ "$folder" = "$MODEL" ] || cp -r "$MODEL/tokenizer" "$MODEL/tokenizer_2" "$folder"
    python scripts/tiny/train_backbone.py --scenes "$WORK/scenes" --latents "$WORK/latents.safetensors" \
        --ae "$MODEL/ae.safetensors" --output "$folder" --minutes "$minutes" "$@"
}

joint() {
    # shellcheck disable=SC2086
    accelerate launch --config_file default_config.yaml --mixed_precision bf16 train.py \
        --image_folder "$WORK/scenes" --is_latent_training --validation_folder "$WORK/held_out" \
        --pretrained_model_name_or_path "$MODEL/flux1-tiny.safetensors" --clip_l "$MODEL/clip_l.safetensors" \
        --t5xxl "$MODEL/t5xxl_fp16.safetensors" --ae "$MODEL/ae.safetensors" --prompt_folder "$WORK/prompts" \
        --output_dir "$WORK" --exp_name joint --output_name jointdit_addons --depth_transform none \
        --max_train_steps "$JOINT_STEPS" --train_batch_size "$JOINT_BATCH" --learning_rate 2e-3 \
        --optimizer_type adamw --optimizer_args "weight_decay=0.01" "betas=(0.9, 0.99)" --lr_scheduler cosine \
        --lr_warmup_steps 100 --max_grad_norm 1.0 --ema_decay 0.998 --seed 42 \
        --lora_rank "$LORA_RANK" --vector_in_ranks $INPUT_RANKS --txt_in_rank "$TEXT_RANK" \
        --timestep_sampling shift --discrete_flow_shift 3.1582 --clean_flow_shift 0.25 \
        --save_every_n_steps 1000 --save_state --save_last_n 2 --resume latest \
        --val_every_n_steps 1000 --sample_every_n_steps 2000 ${COMPILE:+--compile}
}

publish() {
    mkdir -p "$ASSETS"
    local name
    for name in flux1-tiny.safetensors ae.safetensors ae.json clip_l.safetensors clip_l.json t5xxl_fp16.safetensors \
        t5xxl_fp16.json; do
        cp "$MODEL/$name" "$ASSETS/"
    done
    cp "$WORK/joint/jointdit_addons.safetensors" "$WORK/joint/jointdit_addons.json" "$ASSETS/"
    cp -r "$MODEL/tokenizer" "$MODEL/tokenizer_2" "$ASSETS/"
}

stage "$WORK/scenes/.complete" "Rendering $SCENES training scenes" scenes "$WORK/scenes" "$SCENES" 0
stage "$WORK/held_out/.complete" "Rendering $HELD_OUT held-out scenes" scenes "$WORK/held_out" "$HELD_OUT" "$HELD_OUT_SEED"
stage "$MODEL/ae.safetensors" "Training the autoencoder for $AUTOENCODER_MINUTES minutes" \
    python scripts/tiny/train_autoencoder.py --scenes "$WORK/scenes" --output "$MODEL" --minutes "$AUTOENCODER_MINUTES"
stage "$MODEL/tokenizer_2/tokenizer_config.json" "Training the tokenizers" \
    python scripts/tiny/train_tokenizers.py --scenes "$WORK/scenes" --output "$MODEL"
stage "$PLAIN/flux1-tiny.safetensors" "Training text encoders and backbone for $BACKBONE_MINUTES minutes" \
    backbone "$PLAIN" "$BACKBONE_MINUTES"
stage "$MODEL/flux1-tiny.safetensors" "Distilling guidance for $GUIDANCE_MINUTES minutes" \
    backbone "$MODEL" "$GUIDANCE_MINUTES" --init "$PLAIN" --teacher "$PLAIN" --muon_lr 0.005
stage "$WORK/scenes/cache/.complete" "Caching latents and text features" cache "$WORK/scenes"
stage "$WORK/held_out/cache/.complete" "Caching the held-out scenes" cache "$WORK/held_out"
stage "$WORK/prompts/empty_prompts" "Caching prompts" \
    python dataset/preprocess_step3.py --clip_l "$MODEL/clip_l.safetensors" --t5xxl "$MODEL/t5xxl_fp16.safetensors" \
    --output_folder "$WORK/prompts"
stage "$WORK/joint/jointdit_addons.safetensors" "Training the joint stage for $JOINT_STEPS steps" joint
echo "== Copying the model to $ASSETS"
publish
if [ "$EVALUATE" -gt 0 ]; then
    stage "$WORK/evaluation.json" "Evaluating" \
        python scripts/evaluate_tiny.py --model_folder "$ASSETS" --scenes "$EVALUATE" --json "$WORK/evaluation.json"
fi
