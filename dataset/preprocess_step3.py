"""Preprocessing step 3: the text features of the empty prompt and of the evaluation prompts.

    python dataset/preprocess_step3.py --clip_l ... --t5xxl ...

They are used for text dropout and for the previews during training. Without weight flags the embedded model's encoders
are used.
"""

import sys

from dataset.preprocess_args import PromptsArgs
from dataset.preprocess_step2 import load_encoder, text_made_by
from dataset.prompt_features import encode_prompts, read_prompts, write_prompt_features
from library.args import parse
from library.cli import is_main_process, run_main, say, set_threads
from library.weight_paths import frozen_paths


def main() -> None:
    """Read the flags and write both sets of features."""
    args = parse(sys.argv[1:], PromptsArgs, description="Cache the features of the empty and of the evaluation prompts")
    set_threads(args.num_threads)
    if not is_main_process():
        return  # a few prompts: nothing to share
    paths = frozen_paths(args, "clip_l", "t5xxl")
    prompts = read_prompts(args.evaluation_prompts)
    encoder = load_encoder(args, paths)
    features = encode_prompts(encoder, prompts)
    made_by = text_made_by(args, encoder, paths)
    write_prompt_features(args.output_folder, features, made_by=made_by, dtype=args.dtype)
    say(f"features of the empty prompt and {len(prompts)} evaluation prompts written to {args.output_folder}")


if __name__ == "__main__":
    run_main(main)
