"""Make an image with its depth from a sentence, the depth of an image, or an image for a depth map.

    python inference.py --gen_type depth_estimation --input_image picture.png

Without weight flags the small embedded model is used. `--help` lists all flags.
"""

import sys

from library.args import parse
from library.cli import run_main, say, set_threads
from library.inference import run_inference
from library.inference_args import InferenceArgs


def main() -> None:
    """Read the flags, make the results and say where they are."""
    args = parse(sys.argv[1:], InferenceArgs, program="inference.py", description=__doc__.splitlines()[0])
    set_threads(args.num_threads)
    for path in run_inference(args):
        say(f"Wrote {path.with_suffix('.png')} and what goes with it")


if __name__ == "__main__":
    run_main(main)
