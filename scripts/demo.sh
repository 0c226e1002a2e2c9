#!/usr/bin/env bash
# Run the three tasks on the embedded model and build a page of the results: outputs/demo/index.html.
# About a minute on two CPU cores, after the first installation. Nothing but Python packages is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/setup.sh
source scripts/setup.sh
jointdit_setup

inputs=assets/demo
output=outputs/demo
rm -rf "$output"

# run ARGUMENT...: one command of the demo, shown as one would type it
run() {
    local word line='$ python inference.py'
    for word in "$@"; do
        case $word in
            *[[:space:]]*) line+=" \"$word\"" ;;
            *) line+=" $word" ;;
        esac
    done
    printf '%s\n' "$line"
    python inference.py "$@" --output_dir "$output"
}

for n in 1 2 3; do
    run --gen_type depth_estimation --input_image "$inputs/image_$n.png" --seed 42
done
while IFS= read -r prompt; do
    run --gen_type joint_generation --text_prompt "$prompt" --seed 50
done <"$inputs/prompts.txt"
for n in 1 2 3; do
    run --gen_type depth_to_image --input_depth "$inputs/depth_$n.npy" --text_prompt "$(cat "$inputs/prompt_$n.txt")" --seed 42
done
python scripts/demo_page.py --folder "$output" --truth "$inputs"
printf 'Done in %s s.\n' "$SECONDS"
