"""What `dataset.check` found, as lines for a screen and as figures for a file."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.inspection import BAD, DOUBTS, FATAL, Tokens
from dataset.layout import CACHE, INSTANCES, METRIC_DEPTH, RAW_IMAGES, SCENES, Layout
from dataset.sample_index import scan
from dataset.tally import Tally

_SIZES = 4  # most frequent sizes that are listed


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether one way of training would run on the folder, and what stops it."""

    mode: str
    reasons: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that was found."""

    folder: Path
    tally: Tally
    images: int
    cached: int
    verdicts: list[Verdict]
    tokens: Tokens
    tokens_of: str
    max_bad_samples: int

    @property
    def would_run(self) -> bool:
        """Whether training would run in every way that was judged."""
        return not any(verdict.reasons for verdict in self.verdicts)

    def lines(self) -> Iterator[str]:
        """The report, one screen of it."""
        yield f"{self.folder}"
        yield from self._stages()
        yield from self._measures()
        for title, kinds in (("stops training", BAD | FATAL), ("worth a look", DOUBTS)):
            found = [f"  {self._finding(kind, text)}" for kind, text in kinds.items() if self.tally.counts[kind]]
            if found:
                yield f"{title}:"
                yield from found
        skipped = self.tally.counts["bad"] + self.tally.counts["bad_cached"]
        if skipped and self.would_run:
            yield f"--max_bad_samples {self.max_bad_samples}: {skipped} samples would be skipped"
        for verdict in self.verdicts:
            yield f"training {verdict.mode} would {'fail' if verdict.reasons else 'run'}"
            yield from (f"  {reason}" for reason in verdict.reasons)

    def figures(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        kinds = [*BAD, *FATAL, *DOUBTS]
        return {
            "folder": str(self.folder),
            "counts": {"images": self.images, "cached": self.cached, **self._files()},
            "captions": self.tally.counts["captions"],
            "findings": {kind: self.tally.counts[kind] for kind in kinds},
            "examples": {kind: dict(self.tally.examples[kind]) for kind in kinds if kind in self.tally.examples},
            "bad_samples": self.tally.counts["bad"],
            "bad_cached_samples": self.tally.counts["bad_cached"],
            "ranges": {quantity: list(ends) for quantity, ends in self.tally.ranges.items()},
            "sizes": {quantity: dict(sizes) for quantity, sizes in self.tally.sizes.items()},
            "tokenizers": self.tokens_of,
            "token_limits": {"clip": self.tokens.clip_length, "t5": self.tokens.t5_length},
            "verdicts": {verdict.mode: verdict.reasons for verdict in self.verdicts},
            "would_run": self.would_run,
        }

    def _files(self) -> dict[str, int]:
        layout = Layout(self.folder)
        folders = {
            "depthmaps": (layout.depthmaps, ".npy"),
            "text_prompts": (layout.text_prompts, ".txt"),
            METRIC_DEPTH: (layout.metric_depth, ".npy"),
            INSTANCES: (layout.instances, ".png"),
            SCENES: (layout.scenes, ".json"),
        }
        counts = {name: sum(1 for _ in scan(folder, ending)) for name, (folder, ending) in folders.items()}
        return {RAW_IMAGES: sum(len(files) for _, _, files in os.walk(layout.raw_images)), **counts}

    def _stages(self) -> Iterator[str]:
        files, count = self._files(), self.tally.counts
        yield f"  images          {self.images:>9}"
        for name, lacking in (("depthmaps", "no_depth"), ("text_prompts", "no_caption")):
            yield f"  {name:<15} {files[name]:>9}" + (f"  missing for {count[lacking]}" if count[lacking] else "")
        text = "" if count["features"] or not self.cached else " (without text)"
        missing = f"  missing for {count['uncached']}" if count["uncached"] and self.cached else ""
        yield f"  {CACHE:<15} {self.cached:>9}{missing}{text}"
        others = [f"{name} {files[name]}" for name in (RAW_IMAGES, METRIC_DEPTH, INSTANCES, SCENES) if files[name]]
        if others:
            yield f"  also: {', '.join(others)}"

    def _measures(self) -> Iterator[str]:
        ranges, sizes = self.tally.ranges, self.tally.sizes
        if "image" in sizes:
            yield f"images      {_shown_sizes(sizes['image'])}; values {_shown(ranges, 'image')}"
            yield f"disparity   {_shown(ranges, 'disparity')}"
            words = f"{self.tally.counts['captions']} of {_shown(ranges, 'words', digits=0)} words"
            if "t5_tokens" in ranges:
                most = [int(ranges[f"{kind}_tokens"][1]) for kind in ("t5", "clip")]
                words += f"; at most {most[0]} of {self.tokens.t5_length} T5 tokens, {most[1]} of "
                words += f"{self.tokens.clip_length} CLIP tokens (counted by {self.tokens_of})"
            yield f"captions    {words}"
        if "latent" in sizes:
            values = f"image {_shown(ranges, 'image_latent')}, depth {_shown(ranges, 'depth_latent')}"
            yield f"latents     {_shown_sizes(sizes['latent'])}; {values}"

    def _finding(self, kind: str, text: str) -> str:
        names = ", ".join(f"{name} ({said})" if kind in DOUBTS and said else name for name, said in self._named(kind))
        more = ", ..." if self.tally.counts[kind] > len(self._named(kind)) else ""
        return f"{self.tally.counts[kind]} {text}: {names}{more}"

    def _named(self, kind: str) -> list[tuple[str, str]]:
        return self.tally.examples.get(kind, [])


def _shown(ranges: Mapping[str, tuple[float, float]], quantity: str, *, digits: int = 4) -> str:
    low, high = ranges.get(quantity, (0.0, 0.0))
    return f"{low:.{digits}g} to {high:.{digits}g}" if digits else f"{low:.0f} to {high:.0f}"


def _shown_sizes(sizes: Counter[str]) -> str:
    listed = [f"{size} ({count})" for size, count in sizes.most_common(_SIZES)]
    if len(sizes) > _SIZES:
        listed.append(f"{len(sizes) - _SIZES} other sizes")
    return ", ".join(listed)
