"""Fills the cache of a prepared folder: every sample once, by several processes, to be stopped and run again.

Samples are encoded in chunks of consecutive names. What a chunk is depends on the names only, not on what is cached
already nor on the number of processes: a stopped run ends with the bytes that an undisturbed one gives.

Shape suffixes: B captions, 3 colours, h w pixels.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from dataset.cache import CachedPair, pair_to_bytes
from dataset.jointdit_dataset import PicturePairs, centre_crop
from dataset.layout import Layout
from dataset.listing import list_cache
from dataset.shards import read_shard_indexes, write_shard
from library.batches import concatenate_text, text_rows
from library.cli import is_main_process, process_count, process_rank
from library.encoding import LatentEncoder, PromptEncoder
from library.errors import UserError
from library.files import left_overs, write_atomically
from library.flux.text import TextFeatures
from library.loading import BadSample
from library.modality import MODALITIES

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """What a sample's files hold, ready for the encoders."""

    name: str
    rgb_3hw: Tensor
    depth_3hw: Tensor
    captions: tuple[str, ...]


@dataclass(kw_only=True)
class FolderEncoder:
    """Encodes the pairs of a folder into its cache; `prompts` None leaves the text features out."""

    pairs: PicturePairs
    latents: LatentEncoder
    prompts: PromptEncoder | None
    batch_size: int
    dtype: torch.dtype
    stamp: str
    max_bad_samples: int = 0
    bad: set[str] = field(default_factory=set)

    @property
    def layout(self) -> Layout:
        """Paths of the folder."""
        return self.pairs.layout

    def run(self, *, shard_size: int | None = None) -> int:
        """Cache every sample that isn't cached yet; return how many this process made.

        Without `shard_size` each sample is a file of its own, otherwise shards of so many samples are written.

        Raises:
            UserError: more than `max_bad_samples` samples are damaged or missing.
        """
        made = self.write_files() if shard_size is None else self.write_shards(shard_size)
        finish(self.pairs, stamp=self.stamp, skipped=len(self.bad))
        return made

    # ---- files and shards ---------------------------------------------------------------------------------------

    def write_files(self) -> int:
        """Write a file for every sample without one; the processes take turns with the chunks."""
        sharded = {name for _, samples in self.shards() for name in samples}
        made = 0

        def is_cached(name: str) -> bool:
            return name in sharded or self.layout.cached(name).exists()

        def unfinished() -> Iterator[Sequence[str]]:
            starts = range(process_rank() * self.batch_size, len(names), process_count() * self.batch_size)
            for chunk in (names[start : start + self.batch_size] for start in starts):
                if all(map(is_cached, chunk)):
                    bar.total -= len(chunk)
                else:
                    yield chunk

        names = self.pairs.names
        with _progress(-(-len(names) // process_count())) as bar:
            for chunk, samples in self.read_ahead(unfinished()):
                for name, content, _ in self.encode(samples):
                    if not is_cached(name):
                        with write_atomically(self.layout.cached(name)) as temporary:
                            temporary.write_bytes(content)
                        made += 1
                bar.update(len(chunk))
        return made

    def write_shards(self, shard_size: int) -> int:
        """Write shards of the samples that aren't cached, in the order of their names."""
        plan = self.plan_shards(shard_size)
        _meet()  # nobody may write before everybody has planned: the plan depends on which shards are there
        mine = plan[process_rank() :: process_count()]
        made = 0
        with _progress(sum(len(names) for _, names in mine)) as bar:
            for number, names in mine:
                samples = {}
                for chunk, read in self.read_ahead(_chunks(names, self.batch_size)):
                    samples.update({name: (content, *size) for name, content, size in self.encode(read)})
                    bar.update(len(chunk))
                if samples:
                    write_shard(self.layout, number, samples, stamp=self.stamp)
                made += len(samples)
        return made

    def plan_shards(self, shard_size: int) -> list[tuple[int, list[str]]]:
        """Numbers and samples of the shards to write.

        Consecutive names share a shard, and finished shards are whole: what is left after a broken run falls into the
        same shards again, with the same numbers.
        """
        shards = dict(self.shards())
        done = {name for samples in shards.values() for name in samples}
        left = [name for name in self.pairs.names if name not in done and not self.layout.cached(name).exists()]
        groups = _chunks(left, shard_size)
        free = (number for number in range(len(shards) + len(groups)) if number not in shards)
        return list(zip(free, groups, strict=False))

    def shards(self) -> Iterator[tuple[int, dict]]:
        """Finished shards with their samples."""
        return read_shard_indexes(self.layout, flag="--image_folder", stamp=self.stamp)

    # ---- reading and encoding -----------------------------------------------------------------------------------

    def read_ahead(self, chunks: Iterable[Sequence[str]]) -> Iterator[tuple[Sequence[str], list[_Sample]]]:
        """Read chunks of samples, each while the one before is encoded."""
        with ThreadPoolExecutor(1) as pool:
            coming: deque[tuple[Sequence[str], Future[list[_Sample]]]] = deque()
            for chunk in chunks:
                coming.append((chunk, pool.submit(self.read, chunk)))
                if len(coming) > 1:
                    names, samples = coming.popleft()
                    yield names, samples.result()
            for names, samples in coming:
                yield names, samples.result()

    def read(self, names: Sequence[str]) -> list[_Sample]:
        """Read samples; a bad one is named and left out."""
        samples = []
        for name in names:
            try:
                files = self.pairs.read_files(name)
            except BadSample as error:
                self.bad.add(name)
                if len(self.bad) > self.max_bad_samples:
                    more = f"--max_bad_samples {self.max_bad_samples}: more are bad; the last one: "
                    raise UserError((more if self.max_bad_samples else "") + str(error)) from None
                log.error("left out: %s", error)
                continue
            rgb_3hw = MODALITIES["rgb"].to_pixels(centre_crop(files.rgb_3hw))
            depth_3hw = MODALITIES["depth"].to_pixels(
                centre_crop(files.disparity_hw), transform=self.pairs.depth_transform
            )
            samples.append(_Sample(name=name, rgb_3hw=rgb_3hw, depth_3hw=depth_3hw, captions=files.captions))
        return samples

    def encode(self, samples: Sequence[_Sample]) -> Iterator[tuple[str, bytes, tuple[int, int]]]:
        """Yield each sample's name, file content, and rows and columns of its latents."""
        texts = self.encode_captions(samples)
        for sample, text in zip(samples, texts, strict=True):
            pair = CachedPair(
                rgb_Chw=self.latents.encode(sample.rgb_3hw[None], names=[sample.name], modality="rgb")[0],
                depth_Chw=self.latents.encode(sample.depth_3hw[None], names=[sample.name], modality="depth")[0],
                text=text,
                captions=sample.captions,
            )
            rows, columns = pair.rgb_Chw.shape[-2:]
            yield sample.name, pair_to_bytes(pair, dtype=self.dtype, stamp=self.stamp), (rows, columns)

    def encode_captions(self, samples: Sequence[_Sample]) -> list[TextFeatures | None]:
        """Features of all captions of each sample; `batch_size` captions are encoded at once."""
        if self.prompts is None or not samples:
            return [None] * len(samples)
        captions = [caption for sample in samples for caption in sample.captions]
        together = concatenate_text([self.prompts.encode(part) for part in _chunks(captions, self.batch_size)])
        texts: list[TextFeatures | None] = []
        start = 0
        for sample in samples:
            texts.append(text_rows(together, slice(start, start + len(sample.captions))))
            start += len(sample.captions)
        return texts


def finish(pairs: PicturePairs, *, stamp: str, skipped: int) -> None:
    """Leave the folder with an index and without remains of killed runs, if this process finds all samples cached."""
    index = list_cache(pairs.layout, stamp=stamp, flag="--image_folder")
    if len(index) + skipped < len(pairs.names):
        return
    remains = left_overs(pairs.layout.cache)
    for path in remains:
        path.unlink(missing_ok=True)
    if remains:
        list_cache(pairs.layout, stamp=stamp, flag="--image_folder")


def _meet() -> None:
    """Wait until all launched processes are here."""
    if process_count() > 1:
        state = PartialState(cpu=True)
        if state.num_processes < process_count():
            raise UserError(f"--num_processes {process_count()}: only {state.num_processes} of them work together")
        state.wait_for_everyone()


def _chunks(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _progress(total: int) -> tqdm:
    """Progress of this process's share, with the time left, on the main process."""
    return tqdm(total=total, unit="pair", disable=not is_main_process(), dynamic_ncols=True)
