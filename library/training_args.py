"""The flags of `train.py`: those of the released training command, and ours."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from library.args import (
    AutoencoderArgs,
    Flags,
    NoEffect,
    RuntimeArgs,
    TextEncoderArgs,
    TransformerArgs,
    flag,
)
from library.errors import UserError
from library.jointdit.attention import WEIGHTINGS
from library.jointdit.model import LoraRanks
from library.modality import DEPTH_TRANSFORMS
from library.sizes import MAX_TOKENS, PIXELS_PER_TOKEN
from library.timesteps import CLEAN_SHIFT, SAMPLINGS, SHIFT
from library.trackers import TRACKERS

PRECISIONS = {"float": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DataArgs(Flags):
    """Training data."""

    image_folder: Path = flag(
        help="prepared folder: processed_images, depthmaps, text_prompts, cache", metavar="FOLDER"
    )
    is_latent_training: bool = flag(
        False, help="train on the latents and text features cached by preprocess_step2.py; otherwise encode on the fly"
    )
    depth_transform: str = flag(
        "none", help="none: disparity, near is large; inverse: near is small", choices=DEPTH_TRANSFORMS
    )
    posterior: str = flag(
        "sample", help="what the on-the-fly latents are: a sample of the autoencoder's posterior or its mean",
        choices=("sample", "mean"),
    )  # fmt: skip
    is_txt_ids_training: bool = flag(False, help="give the model the position ids that came with the text features")
    is_attnmask_training: bool = flag(False, help="mask the padding of the T5 features")
    text_dropout: float = flag(
        0.1, help="probability of training a sample on the empty prompt instead of its own", minimum=0.0, maximum=1.0
    )
    max_data_loader_n_workers: int = flag(
        2, help="threads that read samples ahead, at most the CPU cores there are but one; 0 reads in between",
        minimum=0,
    )  # fmt: skip
    max_bad_samples: int = flag(
        0, help="damaged or missing samples that are named and skipped; one more stops the training (per process)",
        minimum=0,
    )  # fmt: skip
    trust_cache: bool = flag(
        False, help="train on an imported cache although nobody knows which models made it (dataset.import_released)"
    )
    flip_aug: bool = flag(
        False, help="mirror half of the pairs, image and depth together; not with --is_latent_training"
    )
    prompt_folder: Path = flag(
        Path("."), help="where preprocess_step3.py left empty_prompts and evaluation_prompts", metavar="FOLDER"
    )
    evaluation_prompts: Path = flag(
        Path("dataset/evaluation_prompts.txt"), help="prompts of the previews, one a line", metavar="FILE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip_aug and self.is_latent_training:
            raise UserError("--flip_aug: cached latents can't be mirrored; leave it or --is_latent_training away")
        if self.posterior != "sample" and self.is_latent_training:
            raise UserError(
                f"--posterior {self.posterior}: has no effect on cached latents; give it to preprocess_step2.py, or "
                "leave --is_latent_training away"
            )


@dataclass(frozen=True, kw_only=True)
class RecipeArgs(Flags):
    """Recipe."""

    train_batch_size: int = flag(1, help="pairs per process and backward pass", minimum=1)
    gradient_accumulation_steps: int = flag(1, help="backward passes per optimizer step", minimum=1)
    max_train_epochs: int | None = flag(None, help="how often every pair is seen", minimum=1)
    max_train_steps: int | None = flag(None, help="optimizer steps; given both, this one counts", minimum=1)
    learning_rate: float = flag(1e-5, help="learning rate", minimum=0.0)
    optimizer_type: str = flag(
        "adamw", help="adamw, adafactor, adamw8bit, lion8bit, ... or module.Class", metavar="NAME"
    )
    optimizer_args: tuple[str, ...] = flag((), help="arguments of the optimizer as key=value", metavar="KEY=VALUE")
    lr_scheduler: str = flag("constant", help="schedule of transformers: constant_with_warmup, cosine, linear, ...")
    lr_scheduler_args: tuple[str, ...] = flag(
        (), help="arguments of the schedule as key=value, such as min_lr_rate=0.1 for cosine_with_min_lr",
        metavar="KEY=VALUE",
    )  # fmt: skip
    lr_warmup_steps: int = flag(0, help="optimizer steps over which the learning rate rises from 0", minimum=0)
    max_grad_norm: float = flag(1.0, help="clip the gradients' total norm to this; 0 doesn't clip", minimum=0.0)
    fused_backward_pass: bool = flag(
        False, help="step each weight within the backward pass and free its gradient: less memory, the same result"
    )
    addons_precision: str = flag(
        "float", help="what the trained add-ons are held in; bf16 halves them and their gradients, and rounds every "
        "step stochastically, as the released add-ons were trained", choices=("float", "bf16"),
    )  # fmt: skip
    max_loss_factor: float = flag(
        10.0, help="stop when a step's loss is more than this many times the mean of the last 100; 0 never does",
        minimum=0.0,
    )  # fmt: skip
    ema_decay: float = flag(
        0.0, help="decay per step of the weights' running average, which is what is saved and previewed; 0 keeps none",
        minimum=0.0, below=1.0,
    )  # fmt: skip
    seed: int = flag(42, help="decides order, noise, time steps, text dropout and the adapters' start", minimum=0)
    lora_rank: int = flag(LoraRanks().blocks, help="rank of the adapters in the blocks", minimum=1)
    vector_in_ranks: tuple[int, int] = flag(
        (LoraRanks().vector_in, LoraRanks().vector_out),
        help="ranks of the adapters of vector_in.in_layer and vector_in.out_layer",
        minimum=1,
    )
    txt_in_rank: int = flag(LoraRanks().text_in, help="rank of the adapter of txt_in", minimum=1)
    gradient_checkpointing: bool = flag(
        False, help="recompute the blocks in the backward pass: less memory, a third slower"
    )
    checkpoint_every: int = flag(
        1, help="with --gradient_checkpointing: recompute every n-th block only; memory and time lie between",
        minimum=1,
    )  # fmt: skip
    timestep_sampling: str = flag(
        "shift",
        help="density of the noise levels: logit-normal moved by --discrete_flow_shift (the paper's), by FLUX.1-dev's "
        "shift for the image size, or not at all; or uniform",
        choices=tuple(SAMPLINGS),
    )
    discrete_flow_shift: float = flag(
        SHIFT, help="shift of the noise levels of --timestep_sampling shift, towards noise above 1", minimum=1e-6
    )
    clean_flow_shift: float = flag(
        CLEAN_SHIFT,
        help="shift of the cleaner modality's noise level where the two differ (half of the pairs)",
        minimum=1e-6,
    )
    unbalanced_sampling: bool = flag(
        True, help="half of the pairs get one common noise level, half two; --no_unbalanced_sampling draws both freely"
    )
    weighting: str = flag(
        "released",
        help="scheduling weights of the joint connection: the released code's, the paper's formula, none (1), or a "
        "control: reversed, constant, or unconnected (0: the joint connection off)",
        choices=tuple(WEIGHTINGS),
    )
    guidance_scale: float = flag(1.0, help="guidance embedding, for backbones that have one", minimum=0.0)
    model_prediction_type: str = flag("raw", help="what the loss is taken on: the velocity", choices=("raw",))


@dataclass(frozen=True, kw_only=True)
class OutputArgs(Flags):
    """Results, previews and resuming."""

    output_dir: Path = flag(Path("experiments"), help="folder of all experiments", metavar="FOLDER")
    exp_name: str = flag("joint", help="this experiment's folder in it")
    output_name: str = flag("jointdit_addons", help="name of the add-ons file written at the end")
    save_every_n_steps: int | None = flag(None, help="save the add-ons every n optimizer steps", minimum=1)
    save_every_n_epochs: int | None = flag(None, help="save the add-ons every n epochs", minimum=1)
    save_precision: str = flag("bf16", help="precision of the saved add-ons", choices=tuple(PRECISIONS))
    save_state: bool = flag(False, help="save, with every add-ons file, what resuming needs (state_step_N)")
    save_last_n: int | None = flag(None, help="keep only the newest n states", minimum=1)
    save_last_n_addons: int | None = flag(
        None, help="keep only the newest n add-ons files of the steps between; the last one always stays", minimum=1
    )
    resume: str | None = flag(
        None, help="go on from a state folder, or from the experiment's latest", metavar="PATH|latest"
    )
    log_with: tuple[str, ...] = flag(
        (), help="experiment trackers that get what log.jsonl gets (each needs its package)", choices=TRACKERS
    )
    sample_every_n_steps: int | None = flag(None, help="previews of the three tasks every n optimizer steps", minimum=1)
    sample_every_n_epochs: int | None = flag(None, help="previews every n epochs", minimum=1)
    sample_at_first: bool = flag(False, help="previews before the first step")
    sample_steps: int = flag(20, help="denoising steps of the previews", minimum=1)
    sample_guidance_scale: float = flag(3.5, help="guidance embedding of the previews", minimum=0.0)
    sample_pairs: int = flag(
        2,
        help="pairs of --validation_folder (else of the training folder) whose depth and image are previewed",
        minimum=0,
    )
    output_resolution: tuple[int, int] | None = flag(
        None, help="width and height of the jointly generated previews (default: the training pairs' size)", minimum=16
    )
    validation_folder: Path | None = flag(
        None, help="prepared folder of held-out pairs, for the validation loss and the previews", metavar="FOLDER"
    )
    val_every_n_steps: int | None = flag(None, help="validation loss every n optimizer steps", minimum=1)
    val_samples: int = flag(64, help="held-out pairs the validation loss is taken on, at most", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TrainingArgs(OutputArgs, RecipeArgs, DataArgs, RuntimeArgs, TextEncoderArgs, AutoencoderArgs, TransformerArgs):
    """All flags of `train.py`."""

    mixed_precision: str | None = flag(  # type: ignore[assignment]
        None, help="autocast of the computation (default: what accelerate launch says)", choices=("no", "fp16", "bf16")
    )
    full_bf16: bool = flag(
        False,
        help="hold the frozen base in bf16 and compute in bf16; the add-ons stay in float32, where small steps count, "
        "unless --addons_precision says bf16",
    )

    no_effect: ClassVar = {
        "highvram": NoEffect(reason="what the training step needs stays on the device anyway", values=0),
        "save_model_as": NoEffect(reason="files are always safetensors"),
        "persistent_data_loader_workers": NoEffect(
            reason="the threads that read always stay: the stream of samples has no end", values=0
        ),
        "cache_latents": NoEffect(reason="run dataset/preprocess_step2.py and give --is_latent_training", values=0),
        "cache_text_encoder_outputs": NoEffect(
            reason="run dataset/preprocess_step2.py and give --is_latent_training", values=0
        ),
    }

    shard_model: bool = flag(
        False,
        help="give each process a part of model, gradients and optimizer state instead of all of them (FSDP2)",
    )
    shard_optimizer: bool = flag(
        False,
        help="give each process a part of gradients and optimizer state, and the whole model (ZeRO 2; needs DeepSpeed)",
    )
    reshard_after_forward: bool = flag(
        True,
        help="with --shard_model, give the other processes' parts of a block back after its forward pass; "
        "--no_reshard_after_forward keeps them for the backward pass: less exchange, more memory",
    )
    compile: bool = flag(
        False, help="compile the blocks (needs a C++ compiler): minutes at the start, then a quarter faster or more"
    )
    text_encoder_device: str | None = flag(
        None, help="where captions and prompts that aren't cached are encoded: cpu (in float32), cuda:1, ... (default: "
        "where training computes)", metavar="DEVICE",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_train_steps is None and self.max_train_epochs is None:
            raise UserError("--max_train_epochs: how long to train isn't said; give it or --max_train_steps")
        if self.timestep_sampling != "shift" and self.discrete_flow_shift != SHIFT:
            raise UserError(
                f"--discrete_flow_shift {self.discrete_flow_shift}: has no effect on --timestep_sampling "
                f"{self.timestep_sampling}; leave it away, or use --timestep_sampling shift"
            )
        if self.full_bf16 and self.mixed_precision not in (None, "bf16"):
            raise UserError(
                f"--mixed_precision {self.mixed_precision}: --full_bf16 computes in bf16; leave one of them away"
            )
        if self.val_every_n_steps is not None and self.validation_folder is None:
            raise UserError(
                f"--val_every_n_steps {self.val_every_n_steps}: needs held-out pairs; give --validation_folder"
            )
        if self.checkpoint_every > 1 and not self.gradient_checkpointing:
            raise UserError(f"--checkpoint_every {self.checkpoint_every}: needs --gradient_checkpointing; give it too")
        self._check_fused()
        self._check_preview_size()
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.text_encoder_device or "cpu"):
            raise UserError(
                f"--text_encoder_device {self.text_encoder_device}: is no device; give cpu, cuda, cuda:1, ... or mps"
            )
        for name, value in (("exp_name", self.exp_name), ("output_name", self.output_name)):
            if value in ("", "..") or Path(value).name != value:
                raise UserError(f"--{name} {value!r}: must be a plain name, without folders")

    def _check_fused(self) -> None:
        """Refuse what needs all gradients at once."""
        if not self.fused_backward_pass:
            return
        if self.gradient_accumulation_steps > 1:
            raise UserError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: --fused_backward_pass frees each "
                "gradient at once; leave one of them away"
            )
        if self.max_grad_norm:
            raise UserError(
                f"--max_grad_norm {self.max_grad_norm}: clipping needs all gradients, --fused_backward_pass frees each "
                "at once; give --max_grad_norm 0"
            )

    def _check_preview_size(self) -> None:
        if self.output_resolution is None:
            return
        width, height = self.output_resolution
        if any(side % PIXELS_PER_TOKEN for side in (width, height)):
            raise UserError(f"--output_resolution {width} {height}: each side must be a multiple of 16")
        if width * height > MAX_TOKENS * PIXELS_PER_TOKEN**2:
            raise UserError(f"--output_resolution {width} {height}: ask for no more pixels than 4096 x 4096")

    def text_encoder_place(self, *, device: torch.device, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
        """Return the text encoders' device and precision: by default those of training, given here.

        On a CPU named by the flag it is float32, since half precision is slow there.

        Raises:
            UserError: the device isn't there.
        """
        if self.text_encoder_device is None:
            return device, dtype
        place = torch.device(self.text_encoder_device)
        there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if place.type != "cpu" and (place.index or 0) >= there[place.type]:
            raise UserError(
                f"--text_encoder_device {self.text_encoder_device}: this PyTorch sees {there[place.type]} "
                f"{place.type.upper()} devices; name another, or leave it away"
            )
        return place, torch.float32 if place.type == "cpu" else dtype

    @property
    def ranks(self) -> LoraRanks:
        """Ranks of fresh adapters."""
        first, second = self.vector_in_ranks
        return LoraRanks(blocks=self.lora_rank, vector_in=first, vector_out=second, text_in=self.txt_in_rank)

    @property
    def experiment(self) -> Path:
        """Folder of this experiment's results."""
        return self.output_dir / self.exp_name
