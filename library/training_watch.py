"""What looks at the model during training: previews, and the loss on held-out pairs."""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import nn

from library.batches import Batch, PromptFeatures, RawBatch
from library.flux.autoencoder import Autoencoder
from library.flux.latents import PIXELS_PER_LATENT
from library.flux.weights import load_autoencoder, variant_of
from library.loading import Pairs, batches_of, readable
from library.preview import Previewer, PreviewSettings
from library.training import Trainer, Watch
from library.validation import validation_loss
from library.weight_paths import frozen_paths

log = logging.getLogger(__name__)


def add_watches(trainer: Trainer, *, held_out: Pairs | None) -> None:
    """Give a trainer the watches its flags ask for."""
    args = trainer.args
    if args.val_every_n_steps is not None and held_out is not None:
        trainer.watches.append(Watch(look=_validation(trainer, held_out), steps=args.val_every_n_steps))
    if args.sample_every_n_steps is not None or args.sample_every_n_epochs is not None or args.sample_at_first:
        look = _previewer(trainer, held_out or trainer.pairs)
        steps, epochs = args.sample_every_n_steps, args.sample_every_n_epochs
        trainer.watches.append(Watch(look=look, steps=steps, epochs=epochs, at_first=args.sample_at_first))


def fixed_batches(
    pairs: Pairs,
    indices: Sequence[int],
    *,
    batch_size: int,
    on_device: Callable[[Batch | RawBatch], Batch],
    rank: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Read samples in their first form as batches, `on_device`: those that fall to process `rank`."""
    for members in islice(batches_of(pairs, indices, batch_size=batch_size), rank, None, processes):
        yield on_device(pairs.collate([pairs.read(index) for index in members]))


def _share(trainer: Trainer) -> dict[str, int]:
    """Which share of the work falls to this process: all of it to each where they share the model itself."""
    if trainer.args.shard_model:
        return {"rank": 0, "processes": 1}
    return {"rank": trainer.accelerator.process_index, "processes": trainer.accelerator.num_processes}


def _may_stop(trainer: Trainer) -> bool:
    """Whether to leave off now: not alone where processes share the model and make everything together."""
    return bool(trainer.stop) and not trainer.args.shard_model


def _validation(trainer: Trainer, held_out: Pairs) -> Callable[[nn.Module, int], dict[str, float]]:
    args, accelerator = trainer.args, trainer.accelerator
    indices = readable(held_out, count=args.val_samples, max_bad_samples=args.max_bad_samples)

    def look(model: nn.Module, step: int) -> dict[str, float]:
        seen = 0

        def batches() -> Iterator[Batch]:
            nonlocal seen
            own = fixed_batches(
                held_out, indices, batch_size=args.train_batch_size, on_device=trainer.on_device, **_share(trainer)
            )
            for batch in own:
                if _may_stop(trainer):
                    return
                seen += len(batch.names)
                yield batch

        own = validation_loss(model, batches(), guidance=args.guidance_scale)
        sums = torch.tensor([seen, *(seen * loss for loss in own.values())], device=accelerator.device)
        total, *shares = accelerator.reduce(sums, reduction="sum").tolist()
        if total < len(indices):
            log.warning("Validation of step %d is left unfinished: asked to stop", step)
            return {}
        losses = {name: share / total for name, share in zip(own, shares, strict=True)}
        log.info("Step %d, held-out loss: %s", step, ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
        return {f"val_{name}": loss for name, loss in losses.items()}

    return look


def _previewer(trainer: Trainer, pairs: Pairs) -> Previewer:
    args, accelerator = trainer.args, trainer.accelerator
    autoencoder = next((network for network in trainer.networks if isinstance(network, Autoencoder)), None)
    if autoencoder is None:
        autoencoder = load_autoencoder(frozen_paths(args, "ae")["ae"], dtype=torch.float32, device=accelerator.device)
        trainer.networks.append(autoencoder)
    # One pair more than is shown, for its size, so that --sample_pairs 0 works too.
    indices = readable(pairs, count=max(1, args.sample_pairs), max_bad_samples=args.max_bad_samples)
    shown = list(fixed_batches(pairs, indices, batch_size=1, on_device=trainer.on_device))
    size = tuple(shown[0].rgb_BChw.shape[-2:])
    if args.output_resolution is not None:
        width, height = args.output_resolution
        size = (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    prompts = trainer.prompts
    evaluation = prompts.evaluation.to(accelerator.device) if prompts.evaluation is not None else None
    settings = PreviewSettings(
        folder=args.experiment / "sample",
        latent_size=(size[0], size[1]),
        steps=args.sample_steps,
        guidance=args.sample_guidance_scale,
        shift_schedule=variant_of(trainer.bare_model.config).shift_schedule,
        depth_transform=args.depth_transform,
        seed=args.seed,
    )
    return Previewer(
        settings,
        autoencoder=autoencoder,
        prompts=PromptFeatures(empty=trainer.empty, prompts=prompts.prompts, evaluation=evaluation),
        pairs=shown[: args.sample_pairs],
        writes=accelerator.is_main_process or not args.shard_model,
        asked_to_stop=lambda: _may_stop(trainer),
        **_share(trainer),
    )
