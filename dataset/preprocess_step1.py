"""Preprocessing step 1: from a folder of pictures to processed pictures, depth maps and captions.

    python dataset/preprocess_step1.py --image_folder FOLDER

Pictures of any format, in folders inside folders, become `processed_images/`; a depth network makes `depthmaps/` and a
caption network `text_prompts/` from them. `step1.jsonl` says what became of every file. The step can be interrupted and
run again at any time, and several processes (accelerate launch) share the work.
"""

import errno
import sys
from collections.abc import Callable, Iterator
from functools import cache

from tqdm import tqdm

from dataset.annotators.groups import finish_groups
from dataset.annotators.stages import (
    CaptionSource,
    DepthSource,
    describe_pictures,
    estimate_depth,
    import_captions,
    import_depth,
)
from dataset.intake import FitRule, Intake, aspect_buckets
from dataset.layout import Layout
from dataset.sources import belongs_to, list_sources
from dataset.step1_args import Step1Args
from dataset.step1_folder import claim_sizes, hold_folder, remove_leftovers, wait_for_all
from dataset.step1_report import CAPTIONS, DEPTH, PICTURES, READY, Line, Part, Summary, join_parts, shown
from library.args import parse
from library.cli import is_main_process, process_count, process_rank, run_main, say, set_threads
from library.errors import UserError

Stage = Iterator[tuple[int, list[Line]]]


def take_pictures(layout: Layout, args: Step1Args) -> int:
    """Process this process's share of the pictures, and return how many are ready."""
    rule = FitRule(
        resolution=args.resolution,
        buckets=aspect_buckets(args.resolution) if args.buckets else (),
        upscale=args.upscale,
    )
    intake = Intake(layout, rule=rule, originals=args.originals)
    total = sum(1 for _ in list_sources(layout)) if is_main_process() else 0
    ready = 0
    with Part(layout, PICTURES).writing() as write, _progress("pictures", total) as bar:
        for source in list_sources(layout):
            if belongs_to(source.relative, process=process_rank(), processes=process_count()):
                outcome = intake.take(source)
                write(outcome.as_line())
                ready += outcome.outcome == READY
            bar.update()
    return ready


def annotate(layout: Layout, stage: str, steps: Stage, *, total: int) -> None:
    """Run a stage over this process's ready pictures and report its problems."""
    with Part(layout, stage).writing() as write, _progress(stage, total) as bar:
        for done, problems in steps:
            for line in problems:
                write(line)
            bar.update(done)


def depth_stage(layout: Layout, args: Step1Args) -> Stage:
    """Return the stage that makes depth maps."""
    if args.depth_from is not None:
        assert args.depth_kind is not None
        return import_depth(layout, _ready(layout), folder=args.depth_from, kind=args.depth_kind)

    @cache
    def network() -> DepthSource:
        from dataset.annotators.depth import DepthNetwork  # transformers takes seconds to import

        return DepthNetwork(args.depth_model, output=args.depth_output, device=args.torch_device())

    return estimate_depth(layout, _ready(layout), network=network, batch_size=args.depth_batch_size)


def caption_stage(layout: Layout, args: Step1Args) -> Stage:
    """Return the stage that writes captions."""
    if args.captions_from is not None:
        return import_captions(layout, _ready(layout), folder=args.captions_from)

    @cache
    def network() -> CaptionSource:
        from dataset.annotators.captions import Captioner

        return Captioner(
            args.caption_model,
            prompts=[prompt.replace("\\n", "\n") for prompt in args.caption_prompt],
            max_new_tokens=args.caption_tokens,
            precision=args.caption_precision,
            device=args.torch_device(),
        )

    return describe_pictures(layout, _ready(layout), network=network, batch_size=args.caption_batch_size)


def run(args: Step1Args) -> Summary | None:
    """Run all stages; returns the summary in the main process."""
    layout = Layout(args.image_folder)
    with hold_folder(layout):
        if is_main_process():
            remove_leftovers(layout)
            for folder in (layout.depthmaps, layout.text_prompts):
                finish_groups(folder)
            claim_sizes(layout, {"resolution": args.resolution, "buckets": args.buckets})
        wait_for_all()
        ready = take_pictures(layout, args)
        stages: list[tuple[str, bool, Callable[[Layout, Step1Args], Stage]]] = [
            (DEPTH, args.skip_depth, depth_stage),
            (CAPTIONS, args.skip_captions, caption_stage),
        ]
        for name, skipped, stage in stages:
            if not skipped:
                annotate(layout, name, stage(layout, args), total=ready)
        wait_for_all()
        return join_parts(layout) if is_main_process() else None


def main() -> None:
    """Read the flags, run the step and say what came of it."""
    args = parse(sys.argv[1:], Step1Args, description="Make a training set of a folder of pictures")
    set_threads(args.num_threads)
    try:
        summary = run(args)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--image_folder {args.image_folder}: {error.strerror}; make room and run it again") from None
    if summary is None:
        return
    report = Layout(args.image_folder).step1_report
    for problem in summary.problems:
        say(problem)
    hidden = sum(summary.counts.values()) - summary.counts[READY] - len(summary.problems)
    if hidden:
        say(f"... and {hidden} more")
    if not summary.counts[READY]:
        raise UserError(
            f"--image_folder {shown(str(args.image_folder))}: holds no picture that can be used; see {report}"
        )
    say(", ".join(f"{number} {outcome}" for outcome, number in sorted(summary.counts.items())) + f"; see {report}")


def _ready(layout: Layout) -> Iterator[Line]:
    return (line for line in Part(layout, PICTURES) if line["outcome"] == READY)


def _progress(stage: str, total: int) -> tqdm:
    return tqdm(desc=stage, total=total, unit="", disable=not is_main_process(), dynamic_ncols=True)


if __name__ == "__main__":
    run_main(main)
