"""Depth maps by any depth network of transformers, as disparity; Depth Anything V2 with its authors' own resizing.

Shape suffixes: B batch, h w rows and columns.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForDepthEstimation
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # from `transformers` it asks torchvision

from dataset.annotators.loading import load_whole
from library.errors import UserError

# What Depth Anything V2's authors feed it: cubic, short side at least 518, sides multiples of the patch size.
SHORT_SIDE = 518
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What each kind of network says, after the post-processing of transformers.
_SAYS = {
    "depth_anything": "disparity",  # unless its configuration says metric
    "prompt_depth_anything": "depth",
    "dpt": "disparity",  # MiDaS and DPT-Large; those tuned on one data set give depth: --depth_output depth
    "depth_pro": "depth",
    "glpn": "depth",
    "zoedepth": "depth",
    "tipsv2_dpt": "depth",
}
_NEAREST = 1e-3  # of the median: depth below it is taken as it, so that one wrong pixel doesn't decide the scale


def network_size(height: int, width: int, *, multiple: int) -> tuple[int, int]:
    """Return (height, width) at which Depth Anything V2 sees a picture.

    The sides are scaled alike until the shorter is 518, then each is rounded to the nearest multiple, up if that
    would make it shorter than 518.
    """
    scale = SHORT_SIDE / min(height, width)

    def rounded(side: int) -> int:
        nearest = round(side * scale / multiple) * multiple
        return nearest if nearest >= SHORT_SIDE else math.ceil(side * scale / multiple) * multiple

    return rounded(height), rounded(width)


def resize_for_network(rgb_B3hw: Tensor, *, multiple: int) -> Tensor:
    """Resize pictures to `network_size` by cubic interpolation (a = -0.75, no smoothing), and leave the range as it
    comes: values may pass 0 and 1 a little."""
    size = network_size(*rgb_B3hw.shape[-2:], multiple=multiple)
    return functional.interpolate(rgb_B3hw, size=size, mode="bicubic", align_corners=False)


def resize_back(map_Bhw: Tensor, *, height: int, width: int) -> Tensor:
    """Resize maps bilinearly with the corners' centres on each other."""
    return functional.interpolate(map_Bhw[:, None], size=(height, width), mode="bilinear", align_corners=True)[:, 0]


class DepthNetwork:
    """A depth network that gives disparity, near = large, at the size of its pictures."""

    def __init__(self, name: str, *, output: str = "auto", device: torch.device) -> None:
        """Load `name`, a hub name or a local folder, in float32.

        `output` says what the network gives: "disparity", "depth" (distance), or "auto" for what is known of its kind.

        Raises:
            UserError: it can't be loaded, or `output` is "auto" and its kind isn't known.
        """
        flag = f"--depth_model {name}"
        config: Any = load_whole(AutoConfig, name, flag=flag)
        self.says = output if output != "auto" else _says(config, flag=flag)
        self.device = device
        self.processor: Any = None
        self.multiple = 0
        if config.model_type == "depth_anything":
            self.multiple = config.patch_size
        else:
            self.processor = load_whole(AutoImageProcessor, name, flag=flag)
        self.model: Any = load_whole(AutoModelForDepthEstimation, name, flag=flag, dtype=torch.float32)
        self.model.to(device).eval()

    @torch.inference_mode()
    def estimate(self, rgb_B3hw: Tensor) -> Tensor:
        """Return float32 (B, h, w) disparity on the CPU for pictures in [0, 1] of one size."""
        height, width = rgb_B3hw.shape[-2:]
        if self.processor is None:
            map_Bhw = self._by_own_rule(rgb_B3hw.to(self.device))
        else:
            map_Bhw = self._by_processor(rgb_B3hw, height=height, width=width)
        return (map_Bhw if self.says == "disparity" else to_disparity(map_Bhw)).float().cpu()

    def _by_own_rule(self, rgb_B3hw: Tensor) -> Tensor:
        mean, std = (rgb_B3hw.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        pixels = (resize_for_network(rgb_B3hw, multiple=self.multiple) - mean) / std
        map_Bhw = self.model(pixel_values=pixels).predicted_depth
        return resize_back(map_Bhw, height=rgb_B3hw.shape[-2], width=rgb_B3hw.shape[-1])

    def _by_processor(self, rgb_B3hw: Tensor, *, height: int, width: int) -> Tensor:
        pictures = list((rgb_B3hw * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
        inputs = self.processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
        output = self.model(**inputs.to(self.device))
        sizes = [(height, width)] * len(pictures)
        sized = {"target_sizes": sizes}
        if self.model.config.model_type == "zoedepth":  # it pads, and has to be told what to cut off
            sized["source_sizes"] = sizes
        maps = self.processor.post_process_depth_estimation(output, **sized)
        return torch.stack([each["predicted_depth"].reshape(height, width) for each in maps])


def to_disparity(depth_Bhw: Tensor) -> Tensor:
    """Turn distances into 1 / distance, map by map; no distance (0, negative, infinite) becomes 0, the farthest."""
    valid = torch.isfinite(depth_Bhw) & (depth_Bhw > 0)
    disparity_Bhw = torch.zeros_like(depth_Bhw)
    for depth_hw, inside_hw, out_hw in zip(depth_Bhw, valid, disparity_Bhw, strict=True):
        if inside_hw.any():
            nearest = depth_hw[inside_hw].median() * _NEAREST
            out_hw[inside_hw] = 1 / depth_hw[inside_hw].clamp(min=nearest)
    return disparity_Bhw


def _says(config: Any, *, flag: str) -> str:
    if getattr(config, "depth_estimation_type", "relative") == "metric":
        return "depth"
    if config.model_type not in _SAYS:
        raise UserError(f"{flag}: is a {config.model_type}, of which it isn't known what it gives; say --depth_output")
    return _SAYS[config.model_type]
