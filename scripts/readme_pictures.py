"""Make the README's contact sheet: all three tasks on the first held-out scenes, none left out.

python scripts/readme_pictures.py

Each picture is what inference.py makes of the same caption, image or depth with the scene's number as seed. Beside the
sheet goes a JSON file that says what made it, weights included, so that a test can tell when it has to be made again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, render_batch
from library.args import Flags, flag, parse
from library.cli import run_main, say, set_threads
from library.evaluation.task_sheet import CELL, SheetScene, draw_sheet
from library.files import write_atomically, write_json
from library.fingerprint import fingerprints
from library.modality import normalize_disparity
from library.pipeline import Pipeline
from library.weight_paths import WeightPaths, embedded_files
from library.writable import require_writable, writing

QUALITY = 88  # of WebP, which GitHub shows: a third of the bytes of PNG


@dataclass(frozen=True, kw_only=True)
class PicturesArgs(Flags):
    """README pictures."""

    output: Path = flag(
        Path("assets/readme/contact_sheet.webp"), help="the picture; FILE.json goes beside it", metavar="FILE.webp"
    )
    model_folder: Path | None = flag(
        None, help="folder with the embedded model's file names (otherwise assets/tiny)", metavar="FOLDER"
    )
    scenes: int = flag(8, help="held-out scenes, from the first one on", minimum=1)
    steps: int = flag(20, help="denoising steps", minimum=1)
    num_threads: int = flag(0, help="CPU threads; 0 takes the cores this process may use", minimum=0)


def main() -> None:
    """Read the flags, render the scenes, run the tasks, write picture and facts."""
    args = parse(sys.argv[1:], PicturesArgs, description=__doc__)
    set_threads(args.num_threads)
    require_writable(args.output, told=f"--output {args.output}")
    paths = embedded_files(folder=args.model_folder)
    scenes = make_scenes(Pipeline(WeightPaths(**paths)), count=args.scenes, steps=args.steps)
    note = (
        f"Held-out scenes 0 to {args.scenes - 1} (seed {HELD_OUT_SEED}), in order, none left out. "
        f"The caption is the prompt; {args.steps} steps; seed: the scene's number."
    )
    with writing(f"--output {args.output}"):
        with write_atomically(args.output) as temporary:
            draw_sheet(scenes, note=note).save(temporary, quality=QUALITY, method=6)
        write_json(args.output.with_suffix(".json"), facts(args, paths))
    say(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


def make_scenes(pipeline: Pipeline, *, count: int, steps: int) -> list[SheetScene]:
    """Run the three tasks on the first held-out scenes, each with its number as the seed."""
    batch = render_batch(HELD_OUT_SEED, range(count), CELL)
    made = []
    for number, caption in enumerate(batch.captions):
        rgb_3hw = (batch.rgb_B3hw[number] * 255).round() / 255  # as a PNG would hold it
        depth_hw = normalize_disparity(batch.disparity_Bhw[number])
        joint = pipeline.run("joint_generation", prompt=caption, seeds=[number], steps=steps)[0]
        depth = pipeline.run("depth_estimation", image=rgb_3hw, seeds=[number], steps=steps)[0]
        image = pipeline.run("depth_to_image", depth=depth_hw, prompt=caption, seeds=[number], steps=steps)[0]
        pictures = {
            "joint_rgb": joint.rgb_3hw,
            "joint_depth": joint.depth_hw,
            "true_rgb": rgb_3hw,
            "estimated_depth": depth.depth_hw,
            "true_depth": depth_hw,
            "given_depth": depth_hw,
            "made_rgb": image.rgb_3hw,
        }
        made.append(SheetScene(caption=caption, pictures=pictures))
        say(f"scene {number}: {caption}")
    return made


def facts(args: PicturesArgs, paths: dict[str, Path]) -> dict[str, object]:
    """Return what decides the picture."""
    return {
        "scenes": args.scenes,
        "held_out_seed": HELD_OUT_SEED,
        "generator_version": GENERATOR_VERSION,
        "steps": args.steps,
        "weights": fingerprints(paths),
    }


if __name__ == "__main__":
    run_main(main)
