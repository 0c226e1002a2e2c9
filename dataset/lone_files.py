"""Files of a prepared folder that belong to no image, and images that aren't cached."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from dataset.layout import IMAGE_SUFFIXES, Layout
from dataset.sample_index import scan
from dataset.tally import EXAMPLES, Tally


def note_lone_files(tally: Tally, layout: Layout, images: Sequence[str], cached: Sequence[str]) -> None:
    """Add to the tally what `dataset.inspection`, which goes by the images, doesn't meet; both lists are sorted."""
    depthmaps = (name for name, _ in scan(layout.depthmaps, ".npy"))
    _note(tally, "lone_depth", depthmaps, lambda name: not is_in(images, name))
    captions = (name for name, _ in scan(layout.text_prompts, ".txt"))
    _note(tally, "lone_caption", captions, lambda name: not is_in(images, name))
    files = sum(1 for _ in scan(layout.processed_images, *IMAGE_SUFFIXES))
    if files > len(images):
        stems = Counter(name for name, _ in scan(layout.processed_images, *IMAGE_SUFFIXES))
        _note(tally, "same_name", stems, lambda name: stems[name] > 1)
    if cached:
        _note(tally, "uncached", images, lambda name: not is_in(cached, name))
        if images:
            _note(tally, "lone_cached", cached, lambda name: not is_in(images, name))


def is_in(names: Sequence[str], name: str) -> bool:
    """Whether a sorted sequence holds a name."""
    place = bisect_left(names, name)
    return place < len(names) and names[place] == name


def _note(tally: Tally, finding: str, names: Iterable[str], wanted: Callable[[str], bool]) -> None:
    """Count the names that are wanted, and keep the first by the alphabet."""
    first: list[str] = []
    for name in names:
        if wanted(name):
            tally.counts[finding] += 1
            first = sorted([*first, name])[:EXAMPLES]
    if first:
        tally.examples[finding] = [(name, "") for name in first]
