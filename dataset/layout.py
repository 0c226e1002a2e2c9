"""Names of all folders and files of a prepared image folder, written once."""

from dataclasses import dataclass
from pathlib import Path

from library.modality import MODALITIES

RAW_IMAGES = "raw_images"
PROCESSED_IMAGES = MODALITIES["rgb"].folder
DEPTHMAPS = MODALITIES["depth"].folder
TEXT_PROMPTS = "text_prompts"
METRIC_DEPTH = "metric_depth"
INSTANCES = "instances"
SCENES = "scenes"
CACHE = "cache"
CACHE_META = "meta.json"
INDEX = "index"
EMPTY_PROMPTS = "empty_prompts"
EVALUATION_PROMPTS = "evaluation_prompts"
STEP1_REPORT = "step1.jsonl"
STEP1_SETTINGS = "step1.json"
STEP1_PARTS = ".step1"

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of processed images; in lower or in capital letters

# What this project writes into a prepared folder: never taken for pictures of the user's.
OWN_FOLDERS = (
    RAW_IMAGES, PROCESSED_IMAGES, DEPTHMAPS, TEXT_PROMPTS, METRIC_DEPTH, INSTANCES, SCENES, CACHE, EMPTY_PROMPTS,
    EVALUATION_PROMPTS, INDEX,
)  # fmt: skip
OWN_FILES = (STEP1_REPORT, STEP1_SETTINGS)


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths inside one prepared image folder; a sample is a name without an ending, the same in every subfolder."""

    root: Path | str

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def raw_images(self) -> Path:
        """Folder of the images as they came."""
        return Path(self.root) / RAW_IMAGES

    @property
    def processed_images(self) -> Path:
        """Folder of the resized RGB images, NAME.png."""
        return Path(self.root) / PROCESSED_IMAGES

    @property
    def depthmaps(self) -> Path:
        """Folder of the disparity maps, NAME.npy, float32 (h, w), near = large."""
        return Path(self.root) / DEPTHMAPS

    @property
    def text_prompts(self) -> Path:
        """Folder of the captions, NAME.txt, UTF-8."""
        return Path(self.root) / TEXT_PROMPTS

    @property
    def metric_depth(self) -> Path:
        """Folder of metric depth along the camera's axis in metres, NAME.npy, float32 (h, w), sky inf."""
        return Path(self.root) / METRIC_DEPTH

    @property
    def instances(self) -> Path:
        """Folder of the visible objects, NAME.png, 8 bits: the object's place in the scene record, from 1; else 0."""
        return Path(self.root) / INSTANCES

    @property
    def scenes(self) -> Path:
        """Folder of the scene records, NAME.json."""
        return Path(self.root) / SCENES

    @property
    def cache(self) -> Path:
        """Folder of the cached latents and text features, NAME.safetensors."""
        return Path(self.root) / CACHE

    @property
    def cache_meta(self) -> Path:
        """JSON file that says what made the cache."""
        return self.cache / CACHE_META

    @property
    def pictures_index(self) -> Path:
        """Names and sizes of all pictures; outside the folders it lists, whose modification times it remembers."""
        return Path(self.root) / INDEX / "pictures.safetensors"

    @property
    def cache_index(self) -> Path:
        """Names, sizes and places of all cached samples."""
        return Path(self.root) / INDEX / "cache.safetensors"

    def shard(self, number: int) -> Path:
        """Path of a tar file of cached samples, NAME.safetensors each."""
        return self.cache / f"shard_{number:06d}.tar"

    def shard_index(self, number: int) -> Path:
        """JSON file that says where each sample lies in a shard; a shard without one isn't finished."""
        return self.cache / f"shard_{number:06d}.json"

    @property
    def step1_report(self) -> Path:
        """JSON lines: what became of each picture in step 1, and the sample's name it got."""
        return Path(self.root) / STEP1_REPORT

    @property
    def step1_settings(self) -> Path:
        """JSON file that says with which settings the pictures were processed."""
        return Path(self.root) / STEP1_SETTINGS

    @property
    def step1_parts(self) -> Path:
        """Folder of the processes' parts of the report while step 1 runs."""
        return Path(self.root) / STEP1_PARTS

    def cached(self, name: str) -> Path:
        """Path of a sample's cached latents and text features."""
        return self.cache / f"{name}.safetensors"

    def image(self, name: str) -> Path:
        """Path of a sample's RGB image."""
        return self.processed_images / f"{name}.png"

    def depthmap(self, name: str) -> Path:
        """Path of a sample's disparity map."""
        return self.depthmaps / f"{name}.npy"

    def prompt(self, name: str) -> Path:
        """Path of a sample's caption."""
        return self.text_prompts / f"{name}.txt"

    def metric(self, name: str) -> Path:
        """Path of a sample's metric depth."""
        return self.metric_depth / f"{name}.npy"

    def instance_map(self, name: str) -> Path:
        """Path of a sample's map of visible objects."""
        return self.instances / f"{name}.png"

    def scene(self, name: str) -> Path:
        """Path of a sample's scene record."""
        return self.scenes / f"{name}.json"


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Paths of the features of the empty and of the evaluation prompts below a working folder."""

    root: Path | str

    @property
    def empty(self) -> Path:
        """Features of the empty prompt (one space)."""
        return Path(self.root) / EMPTY_PROMPTS / "empty.safetensors"

    @property
    def empty_meta(self) -> Path:
        """JSON file that says what made the features of the empty prompt."""
        return self.empty.with_name(CACHE_META)

    @property
    def evaluation_meta(self) -> Path:
        """JSON file that says what made the features of the evaluation prompts, and the prompts themselves."""
        return Path(self.root) / EVALUATION_PROMPTS / CACHE_META

    def evaluation(self, number: int) -> Path:
        """Features of the evaluation prompt on line `number`, from 1."""
        return Path(self.root) / EVALUATION_PROMPTS / f"{number:05d}.safetensors"


def sample_name(index: int) -> str:
    """Name of the sample with this index: eight digits, so that names sort as numbers do."""
    return f"{index:08d}"
