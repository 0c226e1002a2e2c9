#!/usr/bin/env bash
# Train JointDiT's add-ons on a prepared image folder, with the released recipe.
#
#   bash scripts/train.sh your_image_folder [more flags of train.py]
#
# Prepare the folder first (README, "Train on your own data"); without step 2 add --no_is_latent_training.
# Its path is taken from the project's folder, unless it is absolute. Stop with Ctrl-C: a state is saved, and the same
# command with `--resume latest` goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -ge 1 ] || { echo "usage: bash scripts/train.sh IMAGE_FOLDER [FLAGS]" >&2; exit 2; }
folder=$1
shift

# shellcheck source=scripts/setup.sh
source scripts/setup.sh
jointdit_setup
accelerate launch --config_file default_config.yaml --main_process_port 12342 --mixed_precision bf16 \
    --num_cpu_threads_per_process 8 train.py \
    --image_folder "$folder" \
    --is_latent_training \
    --pretrained_model_name_or_path models/flux/flux1-dev.safetensors \
    --clip_l models/flux/clip_l.safetensors \
    --t5xxl models/flux/t5xxl_fp16.safetensors \
    --ae models/flux/ae.safetensors \
    --output_dir experiments \
    --exp_name test_training \
    --output_resolution 1024 1024 \
    --depth_transform none \
    --save_model_as safetensors --sdpa \
    --persistent_data_loader_workers --max_data_loader_n_workers 16 --seed 42 --gradient_checkpointing \
    --mixed_precision bf16 --save_precision bf16 \
    --output_name joint \
    --learning_rate 1e-5 --max_train_epochs 8 --highvram --save_every_n_epochs 1 --optimizer_type adafactor \
    --optimizer_args "relative_step=False" "scale_parameter=False" "warmup_init=False" \
    --lr_scheduler constant_with_warmup \
    --max_grad_norm 0.0 --timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw \
    --guidance_scale 1.0 --fused_backward_pass --blocks_to_swap 8 --full_bf16 \
    --sample_every_n_steps 5000 --save_every_n_steps 25000 --train_batch_size 4 --sample_at_first \
    "$@"
