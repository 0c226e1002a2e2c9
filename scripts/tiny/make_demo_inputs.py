"""Write the demo's inputs, assets/demo/: held-out scenes as image, disparity and caption, and more captions.

python scripts/tiny/make_demo_inputs.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, render_batch
from library.args import Flags, flag, parse
from library.cli import run_main, say
from library.files import write_json, write_text
from library.images import write_depth_npy, write_rgb

SHOWN = (14, 0, 15)  # scenes given as image or depth: sand, a room, grass
SPOKEN = (7, 17, 19)  # scenes of which only the caption is given


@dataclass(frozen=True, kw_only=True)
class DemoInputsArgs(Flags):
    """Demo inputs."""

    output: Path = flag(Path("assets/demo"), help="where the files go", metavar="FOLDER")
    size: int = flag(128, help="side of the pictures in pixels", minimum=16)


def main() -> None:
    """Render the scenes and write image_N.png, depth_N.npy, prompt_N.txt and prompts.txt."""
    args = parse(sys.argv[1:], DemoInputsArgs, description="Write the demo's inputs.")
    shown = render_batch(HELD_OUT_SEED, SHOWN, args.size, "cpu")
    for place, caption in enumerate(shown.captions):
        write_rgb(args.output / f"image_{place + 1}.png", shown.rgb_B3hw[place])
        write_depth_npy(args.output / f"depth_{place + 1}.npy", shown.disparity_Bhw[place])
        write_text(args.output / f"prompt_{place + 1}.txt", caption + "\n")
    spoken = render_batch(HELD_OUT_SEED, SPOKEN, args.size, "cpu")
    write_text(args.output / "prompts.txt", "\n".join(spoken.captions) + "\n")
    made_by = {"generator_version": GENERATOR_VERSION, "seed": HELD_OUT_SEED, "shown": SHOWN, "spoken": SPOKEN}
    write_json(args.output / "made_by.json", made_by)
    say(f"{args.output}: {len(SHOWN)} scenes, {len(SPOKEN)} prompts")


if __name__ == "__main__":
    run_main(main)
