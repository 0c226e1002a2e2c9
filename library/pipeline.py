"""Inference as one story: text, then the transformer, then pixels; one `run` for all tasks.

Shape letters: M modality, B batch (1 here), C channels, L tokens, D width, h w rows and columns.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from library.errors import UserError
from library.flux.attention import KERNELS
from library.flux.autoencoder import Autoencoder
from library.flux.latents import PATCH, PIXELS_PER_TOKEN, image_ids, pack, unpack
from library.flux.schedule import timestep_schedule
from library.flux.text import EMPTY_PROMPT, TextEncoders, TextFeatures, load_text_encoders
from library.flux.weights import (
    load_autoencoder,
    open_autoencoder,
    open_flux,
    read_autoencoder_config,
    read_flux_config,
    variant_of,
)
from library.jointdit.addons import load_jointdit, read_settings
from library.jointdit.model import JointDiT
from library.memory import clamp_swap, place
from library.modality import MODALITIES
from library.quantize import quantize_base
from library.results import Result
from library.sampling import Condition, sample
from library.sizes import MAX_TOKENS, crop, pad_to_multiple, processing_size, resize
from library.tasks import TASKS
from library.weight_paths import WeightPaths

logger = logging.getLogger(__name__)

GUIDANCE_SCALE = 3.5

Size = tuple[int, int]


class Pipeline:
    """All that inference needs; each part is loaded when it is first used, on the CPU first.

    The text encoders run first and are freed before the transformer goes to a GPU; on a CPU they are kept.

    Attributes:
        variant: the backbone's row of `VARIANTS`: its own size, number of steps and schedule.
        depth_transform: what the add-ons were trained with, "none" or "inverse"; undone in every result.
    """

    def __init__(
        self,
        paths: WeightPaths,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        blocks_to_swap: int = 0,
        attention: str = "sdpa",
        base_precision: str | None = None,
    ) -> None:
        self.paths = paths
        self.device = torch.device(device)
        self.dtype = dtype
        self.blocks_to_swap = blocks_to_swap
        self.base_precision = base_precision
        self.kernel = KERNELS[attention]
        self.config = read_flux_config(*open_flux(paths.pretrained_model_name_or_path))
        self.variant = variant_of(self.config, path=paths.pretrained_model_name_or_path)
        read_autoencoder_config(*open_autoencoder(paths.ae))  # it comes last: a wrong file shall not cost the sampling
        self.settings = read_settings(paths.jointdit_addons_path)
        self.depth_transform = self.settings.depth_transform
        self._text_encoders: TextEncoders | None = None
        self._features: dict[str, TextFeatures] = {}
        self._model: JointDiT | None = None
        self._autoencoder: Autoencoder | None = None
        self._told_sizes: set[tuple[Size, Size]] = set()

    @torch.inference_mode()
    def run(
        self,
        task: str,
        *,
        prompt: str | None = None,
        image: Tensor | None = None,
        depth: Tensor | None = None,
        seeds: Sequence[int] = (42,),
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: Size | None = None,
        processing_resolution: int | None = None,
        condition_noise: float = 0.0,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Result]:
        """Make one result for each seed; each depends on its own seed only.

        Args:
            task: a name in `TASKS`.
            prompt: what the picture shows; None is the empty prompt.
            image: (3, h, w) in [0, 1], for a task that is given a picture.
            depth: (h, w) finite disparity of any scale, near = large, for a task that is given a map.
            seeds: of the noise, drawn on the CPU in float32, so that it is the same on every device.
            steps: denoising steps, at least 1; None is the variant's own number.
            guidance_scale: for backbones that have a guidance embedding; None is 3.5.
            size: (rows, columns) of the results; None is the given input's, else the variant's own.
            processing_resolution: short side the model works at for a given input; 0 is the input's own size, None the
                variant's, or `size` if that is given.
            condition_noise: noise level in [0, 1) the given modality is held at.
            on_step: told the number of finished steps of the present result after each.

        Returns:
            Results at `size`; the given modality is returned as given, resized at most.

        Raises:
            ValueError: the task is given too much or too little; `image` or `depth` isn't of floats, of its shape or
                within its range; `steps` or `condition_noise` is out of range.
            UserError: weights aren't what they should be, or the model would work at more than 4096 x 4096 pixels.
        """
        given_name = TASKS[task].given
        values = {"rgb": image, "depth": depth}
        if any((value is not None) != (name == given_name) for name, value in values.items()):
            raise ValueError(f"task {task} is given {given_name or 'nothing'}, and only that")
        given = None if given_name is None else values[given_name]
        _require_valid(image=image, depth=depth, steps=steps, condition_noise=condition_noise)
        steps = self.variant.steps if steps is None else steps
        size, work = self._sizes(given, size=size, processing_resolution=processing_resolution)
        _require_possible(work)

        text = self.encode_prompt(prompt or EMPTY_PROMPT)
        condition = None
        made: dict[str, Tensor] = {}
        if given_name is not None and given is not None:
            row = MODALITIES[given_name]
            x_BLD = self._encode(given_name, given, size=work)
            condition = Condition(modality=row.index, x_BLD=x_BLD, level=condition_noise)
            made[given_name] = resize(row.to_unit(given), height=size[0], width=size[1])
        results = []
        for seed in seeds:
            x_MBLD = self._denoise(
                text,
                size=work,
                seed=seed,
                steps=steps,
                guidance_scale=GUIDANCE_SCALE if guidance_scale is None else guidance_scale,
                condition=condition,
                on_step=on_step,
            )
            for name, row in MODALITIES.items():
                if name != given_name:
                    made[name] = self._decode(name, x_MBLD[row.index], work=work, size=size)
            results.append(Result(rgb_3hw=made["rgb"], depth_hw=made["depth"], seed=seed))
        return results

    def encode_prompt(self, prompt: str) -> TextFeatures:
        """Return a prompt's features on the device; each prompt is encoded once.

        A prompt that comes when the transformer is on a GPU already is encoded on the CPU: there may be no room.
        """
        if prompt not in self._features:
            encoders = self._loaded_text_encoders()
            encoded = encoders.encode(
                [prompt],
                with_mask=self.settings.is_attnmask_training,
                with_ids=self.settings.is_txt_ids_training,
            )
            self._features[prompt] = encoded.to(device=self.device, dtype=self.dtype)
        return self._features[prompt]

    def _sizes(
        self, given: Tensor | None, *, size: Size | None, processing_resolution: int | None
    ) -> tuple[Size, Size]:
        """Return the (rows, columns) of the results, and those the model works at before padding."""
        own = self.variant.size
        if given is None:
            size = size or (own, own)
            return size, size
        input_size = (given.shape[-2], given.shape[-1])
        if processing_resolution is None and size is not None:
            return size, size
        work = processing_size(*input_size, short_side=own if processing_resolution is None else processing_resolution)
        if work != input_size and (input_size, work) not in self._told_sizes:
            self._told_sizes.add((input_size, work))
            logger.info("Input of %d x %d pixels: the model works at %d x %d", *reversed(input_size), *reversed(work))
        return size or input_size, work

    def _encode(self, name: str, values: Tensor, *, size: Size) -> Tensor:
        """Files' values -> pixels -> latents -> tokens (1, L, D)."""
        values = resize(values.float(), height=size[0], width=size[1])
        pixels_3hw = pad_to_multiple(MODALITIES[name].to_pixels(values, transform=self.depth_transform))
        autoencoder = self._loaded_autoencoder()
        pixels_B3hw = pixels_3hw.unsqueeze(0).to(next(autoencoder.parameters()))
        return pack(autoencoder.encode(pixels_B3hw).float())

    def _decode(self, name: str, x_BLD: Tensor, *, work: Size, size: Size) -> Tensor:
        """Tokens -> latents -> pixels -> values in [0, 1] at the size of the results, on the CPU."""
        rows, columns = _tokens(work)
        autoencoder = self._loaded_autoencoder()
        z_BChw = unpack(x_BLD, height=rows, width=columns).to(next(autoencoder.parameters()))
        pixels_3hw = crop(autoencoder.decode(z_BChw)[0].float().cpu(), height=work[0], width=work[1])
        values = MODALITIES[name].from_pixels(pixels_3hw, transform=self.depth_transform)
        return resize(values, height=size[0], width=size[1])

    def _denoise(
        self,
        text: TextFeatures,
        *,
        size: Size,
        seed: int,
        steps: int,
        guidance_scale: float,
        condition: Condition | None,
        on_step: Callable[[int], None] | None,
    ) -> Tensor:
        """Sample one pair and return its tokens (M, 1, L, D), float32; the model alone sees the lower precision."""
        model = self._loaded_model()
        rows, columns = _tokens(size)
        shape = (len(MODALITIES), 1, self.config.in_channels // PATCH**2, PATCH * rows, PATCH * columns)
        noise_MBLD = pack(torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(self.device)
        ids = image_ids(rows, columns, device=self.device)
        guidance_B = torch.full((1,), guidance_scale, device=self.device, dtype=self.dtype)

        def velocity(x_MBLD: Tensor, t_MB: Tensor) -> Tensor:
            x_MBLD, t_MB = x_MBLD.to(self.dtype), t_MB.to(self.dtype)
            return model(x_MBLD, t_MB=t_MB, text=text, image_ids=ids, guidance_B=guidance_B).float()

        schedule = timestep_schedule(steps, rows * columns, shift=self.variant.shift_schedule)
        return sample(velocity, noise_MBLD, schedule=schedule, condition=condition, on_step=on_step)

    # Loading happens outside inference mode: its tensors would stay marked and could not be moved or trained on later.

    @torch.inference_mode(mode=False)
    def _loaded_text_encoders(self) -> TextEncoders:
        if self._text_encoders is None:
            encoders = load_text_encoders(
                self.paths.clip_l,
                self.paths.t5xxl,
                clip_tokenizer=self.paths.clip_tokenizer,
                t5_tokenizer=self.paths.t5_tokenizer,
                t5_length=self.paths.t5xxl_max_token_length,
                clip_activation=self.paths.clip_activation,
                dtype=torch.bfloat16 if self.dtype == torch.float16 else self.dtype,  # T5's activations overflow fp16
                device=self.device if self._model is None else "cpu",
            )
            # The published T5 file doesn't say that schnell reads fewer tokens; a file of our own says its length.
            if self.paths.t5xxl_max_token_length is None and self.variant.flux == self.config:
                encoders.t5_length = min(encoders.t5_length, self.variant.t5_length)
            self._text_encoders = encoders
        return self._text_encoders

    @torch.inference_mode(mode=False)
    def _loaded_model(self) -> JointDiT:
        if self._model is None:
            if self.device.type != "cpu":
                self._text_encoders = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            model = load_jointdit(
                flux=self.paths.pretrained_model_name_or_path, addons=self.paths.jointdit_addons_path, dtype=self.dtype
            )
            model.requires_grad_(False)
            quantize_base(model, self.base_precision, device=self.device)
            model.kernel = self.kernel
            blocks = [*model.double_blocks, *model.single_blocks]
            swap = clamp_swap(self.blocks_to_swap, available=len(blocks), device=self.device)
            place(model, blocks=blocks, device=self.device, swap=swap)
            self._model = model
        return self._model

    @torch.inference_mode(mode=False)
    def _loaded_autoencoder(self) -> Autoencoder:
        if self._autoencoder is None:
            dtype = torch.float32 if self.dtype == torch.float16 else self.dtype  # its activations overflow fp16
            self._autoencoder = load_autoencoder(self.paths.ae, dtype=dtype, device=self.device)
        return self._autoencoder


def _require_valid(*, image: Tensor | None, depth: Tensor | None, steps: int | None, condition_noise: float) -> None:
    """Refuse arguments of `Pipeline.run` that a wrong result would come of without a word."""
    if image is not None:
        if not image.is_floating_point() or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"image: is {_described(image)}; give floats of shape (3, h, w)")
        if not ((image >= 0) & (image <= 1)).all():
            raise ValueError(f"image: has values from {image.min():g} to {image.max():g}; all must lie in [0, 1]")
    if depth is not None:
        if not depth.is_floating_point() or depth.ndim != 2:
            raise ValueError(f"depth: is {_described(depth)}; give floats of shape (h, w)")
        if not depth.isfinite().all():
            raise ValueError(f"depth: holds {int((~depth.isfinite()).sum())} NaN or infinite values; fill them first")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: is {steps}; must be at least 1")
    if not 0 <= condition_noise < 1:
        raise ValueError(f"condition_noise: is {condition_noise}; must be in [0, 1)")


def _described(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"


def _require_possible(work: Size) -> None:
    rows, columns = _tokens(work)
    if rows * columns > MAX_TOKENS:
        raise UserError(
            f"--processing_resolution, --output_resolution: the model would work at {work[1]} x {work[0]} pixels; "
            "ask for at most 4096 x 4096 or as many pixels in another shape"
        )


def _tokens(size: Size) -> Size:
    """Return (rows, columns) of tokens that cover a picture of (rows, columns) pixels."""
    return -(-size[0] // PIXELS_PER_TOKEN), -(-size[1] // PIXELS_PER_TOKEN)
