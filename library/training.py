"""The joint training stage: a frozen backbone, trained adapters and joint connections, pairs of noise levels.

A step is a pure function of the weights and (seed, step): `optimize` reads as the whole method.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from library.average import RunningAverage
from library.batches import Batch, PromptFeatures, RawBatch, drop_text
from library.checkpoints import Checkpoints, make_recipe
from library.data_order import DataOrder, MicroBatches
from library.errors import UserError
from library.experiment import how_to_go_on, newest_state, writing
from library.flags import flag_values
from library.idle_flags import idle_flags
from library.interruption import StopRequest, stop_requests
from library.joint_loss import NoiseSettings, draw, joint_flow_loss, noisy_pairs
from library.jointdit.addons import AddonSettings, trainable_parameters
from library.jointdit.model import JointDiT
from library.loading import Pairs, load_batches, worker_count
from library.loss_guard import LossGuard
from library.optim import has_modes, make_optimizer, make_scheduler, shown
from library.trackers import finish_trackers, start_trackers
from library.training_args import TrainingArgs
from library.training_log import TrainingLog
from library.training_report import describe_method, estimate_memory
from library.training_setup import make_gradients, make_weight_by_weight
from library.training_state import Progress

log = logging.getLogger(__name__)

Look = Callable[[nn.Module, int], dict[str, float]]  # looks at the model after a step: previews, validation


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Something that looks at the model every so many steps or epochs (and before the first step, if `at_first`)."""

    look: Look
    steps: int | None = None
    epochs: int | None = None
    at_first: bool = False


class Trainer:
    """Everything one training run needs, and the loop over its steps."""

    def __init__(
        self,
        args: TrainingArgs,
        *,
        accelerator: Accelerator,
        model: JointDiT,
        settings: AddonSettings,
        pairs: Pairs,
        prompts: PromptFeatures,
        encode: Callable[[RawBatch], Batch] | None = None,
        networks: Sequence[nn.Module] = (),
        text_precision: torch.dtype | None = None,
        encoders: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a run; `encode` makes batches of what isn't cached, by `networks`; text ran in `text_precision`.

        `encoders` are fingerprints by flag, which must be the same when a run is resumed.
        """
        self.args = args
        self.accelerator = accelerator
        self.pairs = pairs
        self.prompts = prompts
        self.encode = encode
        self.networks = [*networks]
        self.order = DataOrder(
            count=len(pairs.names),
            batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=accelerator.num_processes,
            rank=accelerator.process_index,
            seed=args.seed,
            buckets=pairs.buckets,
        )
        self.total = args.max_train_steps or self.order.steps_for(args.max_train_epochs or 1)
        self.noise = NoiseSettings(
            seed=args.seed,
            sampling=args.timestep_sampling,
            shift=args.discrete_flow_shift,
            clean_shift=args.clean_flow_shift,
            unbalanced=args.unbalanced_sampling,
            text_dropout=args.text_dropout,
        )
        self.bare_model = model
        self.settings = settings
        self.trained: dict[str, nn.Parameter] = dict(trainable_parameters(model))
        self.average = RunningAverage(self.trained, decay=args.ema_decay) if args.ema_decay else None
        optimizer = self.new_optimizer(self.trained.values())
        self.scheduler = make_scheduler(
            args.lr_scheduler,
            optimizer,
            warmup_steps=args.lr_warmup_steps,
            total_steps=self.total,
            arguments=args.lr_scheduler_args,
        )
        self.raw_optimizer = optimizer
        if self.average is not None and has_modes(optimizer):
            raise UserError(
                f"--ema_decay {args.ema_decay}: --optimizer_type {args.optimizer_type} averages the weights itself; "
                "leave it away"
            )
        self.by_weight = make_weight_by_weight(
            args, accelerator, optimizer, self.trained, new_optimizer=self.new_optimizer
        )
        # The model is on its device already, perhaps with some blocks left behind in CPU memory (--blocks_to_swap): DDP
        # has no business with what is frozen. What exchanges its gradients itself must not be wrapped.
        frozen = [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name not in self.trained]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        exchanges = args.shard_model or args.shard_optimizer
        prepared = accelerator.prepare_model(model, device_placement=False, evaluation_mode=exchanges)
        self.optimizer = accelerator.prepare(optimizer)
        self.gradients = make_gradients(args, accelerator, prepared, self.optimizer, self.trained)
        self.model = self.gradients.model
        self.empty = prompts.empty.to(accelerator.device)
        self.guard = LossGuard(factor=args.max_loss_factor)
        self.checkpoints = Checkpoints(
            args,
            accelerator=accelerator,
            model=model,
            settings=settings,
            progress=Progress(
                parameters=self.trained,
                average=self.average.tensors if self.average is not None else None,
                optimizer=self.by_weight or self.gradients.saved,
                scheduler=self.scheduler,
                scaler=accelerator.scaler,
            ),
            recipe=make_recipe(
                args,
                names=pairs.names,
                processes=accelerator.num_processes,
                total=self.total,
                precision=accelerator.mixed_precision,
                base=settings.base,
                encodes_text=encode is not None,
                text_precision=text_precision,
                encoders=encoders,
            ),
            weights_to_show=self.weights_to_show,
        )
        self.stop = StopRequest()
        self.watches: list[Watch] = []
        self.step = 0

    def new_optimizer(self, weights: Iterable[nn.Parameter]) -> Optimizer:
        """Make the optimizer of the flags for some weights."""
        args = self.args
        return make_optimizer(
            args.optimizer_type, weights, learning_rate=args.learning_rate, arguments=args.optimizer_args
        )

    # ---- one step -----------------------------------------------------------------------------------------------

    def micro_loss(self, batch: Batch, *, step: int, part: int) -> Tensor:
        """Loss of one micro-batch, with the noise, noise levels and text dropout of (step, part)."""
        draws = draw(self.noise, step=step, indices=self.order.indices(part), shape=batch.rgb_BChw.shape[1:])
        device = self.accelerator.device
        noisy = noisy_pairs(batch, noise_MBChw=draws.noise_MBChw.to(device), t_MB=draws.t_MB.to(device))
        text = drop_text(batch.text, empty=self.empty, drop_B=draws.drop_B)
        return joint_flow_loss(self.model, noisy, text=text, guidance=self.args.guidance_scale)

    def optimize(self, batches: Iterator[Batch | RawBatch], step: int) -> dict[str, float]:
        """Do one optimizer step and return its numbers."""
        parts = self.order.accumulation
        if self.by_weight is not None:
            self.by_weight.number = step
        seen: list[tuple[Tensor, tuple[str, ...]]] = []
        for part in range(parts):
            batch = self.on_device(next(batches))
            with self.gradients.part(last=part == parts - 1):
                loss = self.micro_loss(batch, step=step, part=part)
                # A fused pass steps as it goes: with a loss that isn't finite it must not begin.
                if not self.args.fused_backward_pass or torch.isfinite(loss):
                    self.gradients.backward(loss / parts)
            seen.append((loss.detach(), batch.names))
        mean = self.mean_over_processes(torch.stack([loss for loss, _ in seen]).mean())
        if (fault := self.guard.fault(mean)) is not None:
            raise self.failure(step, f"the loss of step {step + 1} {fault}", seen)
        numbers = {"loss": mean, "lr": float(self.scheduler.get_last_lr()[0])}
        if self.args.max_grad_norm:
            numbers["grad_norm"] = self.gradients.clip(self.args.max_grad_norm)
            if not math.isfinite(numbers["grad_norm"]) and self.accelerator.scaler is None:  # a scaler skips such steps
                raise self.failure(step, f"the gradient of step {step + 1} is {numbers['grad_norm']}", seen)
        (self.by_weight or self.gradients).step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step + 1)
        return numbers

    def failure(self, step: int, what: str, seen: list[tuple[Tensor, tuple[str, ...]]]) -> UserError:
        """Say what is wrong, the samples it comes from on any process, and where to go on."""
        everywhere = gather_object([(float(loss), names) for loss, names in seen])
        worst = max((loss if math.isfinite(loss) else math.inf for loss, _ in everywhere))
        names = [name for loss, names in everywhere if not loss < worst for name in names]
        return UserError(
            f"--learning_rate {self.args.learning_rate}, --max_loss_factor {self.args.max_loss_factor:g}: {what} "
            f"(samples {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); "
            f"{newest_state(self.args.experiment)}; look at these samples, or lower the rate, and "
            f"{how_to_go_on(self.args.experiment)}"
        )

    def on_device(self, batch: Batch | RawBatch) -> Batch:
        """Encode what isn't cached, and move what comes out to the device."""
        if not isinstance(batch, Batch):
            assert self.encode is not None, "pixels and prompts need encoders"
            batch = self.encode(batch)
        return batch.to(self.accelerator.device)

    def mean_over_processes(self, value: Tensor) -> float:
        """Mean of a number over all processes."""
        return float(self.accelerator.reduce(value, reduction="mean"))

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or until asked to stop."""
        self.step = self.checkpoints.resume(total=self.total)
        self.describe()
        args = self.args
        start_trackers(
            self.accelerator, args.log_with, folder=args.experiment, run=args.exp_name, facts=flag_values(args)
        )
        workers = worker_count(args.max_data_loader_n_workers)
        micro_batches = MicroBatches(order=self.order, start=self.step, stop=self.total)
        pin = self.accelerator.device.type == "cuda"
        batches = load_batches(
            self.pairs, micro_batches, workers=workers, pin=pin, max_bad_samples=args.max_bad_samples
        )
        journal = TrainingLog(
            args.experiment / "log.jsonl",
            accelerator=self.accelerator,
            start=self.step,
            total=self.total,
            samples_per_step=self.order.global_batch,
        )
        with stop_requests(self.stop), closing(batches):
            try:
                self.watch(journal, first=True)
                while self.step < self.total and not self.asked_to_stop():
                    numbers = self.optimize(batches, self.step)
                    self.step += 1
                    journal.step(self.step, **numbers)
                    self.save_if_due(journal)
                    self.watch(journal)  # after the state is safe: previews take more memory than a step
                self.finish()
            finally:
                journal.close()
                finish_trackers(self.accelerator)

    def describe(self) -> None:
        """Say what is trained on what, how, for how long, in how much memory, and where results go."""
        args, order, accelerator = self.args, self.order, self.accelerator
        log.info(
            "Training %s of %s parameters on %d pairs: %d steps of %d (%d a batch, accumulation %d, processes %d), "
            "%.2f epochs, precision %s, on %s; results in %s",
            f"{sum(weight.numel() for weight in self.trained.values()):,}",
            f"{sum(weight.numel() for weight in self.bare_model.parameters()):,}",
            order.count, self.total, order.global_batch, order.batch_size, order.accumulation, order.processes,
            self.total * order.global_batch / order.count, accelerator.mixed_precision, accelerator.device,
            args.experiment,
        )  # fmt: skip
        for name, why in idle_flags(args, guided=self.bare_model.config.guidance_embed).items():
            log.warning("--%s has no effect: %s", name, why)
        log.info("Method: %s", describe_method(self.settings, self.bare_model.ranks, args))
        memory = estimate_memory(
            self.bare_model,
            trained=self.trained.values(),
            make_optimizer=self.new_optimizer,
            device=accelerator.device,
            average=self.average is not None,
            one_gradient_at_a_time=args.fused_backward_pass,
            encoders=self.networks,
            parts=accelerator.num_processes if args.shard_optimizer else 1,
        )
        log.info("Expected memory of each process on %s before activations: %s", accelerator.device, memory)

    def watch(self, journal: TrainingLog, *, first: bool = False) -> None:
        """Let the watches that are due look at the model (its running average, if there is one)."""
        if first:
            due = [watch for watch in self.watches if watch.at_first and self.step == 0]
        else:
            due = [watch for watch in self.watches if self.is_due(steps=watch.steps, epochs=watch.epochs)]
        if not due:
            return
        for watch in due:
            with writing(self.args.experiment, experiment=self.args.experiment), self.weights_to_show():
                journal.note(step=self.step, **watch.look(self.bare_model, self.step))
        self.accelerator.wait_for_everyone()
        journal.pause()

    def asked_to_stop(self) -> bool:
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return bool(self.stop)
        flag = torch.tensor(float(bool(self.stop)), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, reduction="sum")) > 0

    def finish(self) -> None:
        """Write the last add-ons; of an unfinished run the state instead."""
        if self.step < self.total:
            path = self.checkpoints.save_state(self.step)
            log.info("Stopped by %s at step %d; go on with --resume latest (%s)", self.stop, self.step, path)
            return
        if self.args.save_state:
            self.checkpoints.save_state(self.step)
        path = self.checkpoints.save_addons(self.args.output_name, self.step)
        log.info("Finished %d steps: %s", self.step, path)

    def is_due(self, *, steps: int | None, epochs: int | None) -> bool:
        """Whether something done every so many steps or epochs is due after the step just done."""
        if steps is not None and self.step % steps == 0:
            return True
        if epochs is None:
            return False
        return self.order.epoch_at(self.step) // epochs > self.order.epoch_at(self.step - 1) // epochs

    def save_if_due(self, journal: TrainingLog) -> None:
        """Save add-ons, and the state with them, at the steps and ends of epochs the flags name."""
        args = self.args
        if not self.is_due(steps=args.save_every_n_steps, epochs=args.save_every_n_epochs):
            return
        self.checkpoints.save_step_addons(self.step)
        if args.save_state and self.step < self.total:
            self.checkpoints.save_state(self.step)
        journal.pause()

    def weights_to_show(self) -> Any:
        """Context in which the model has the weights that are saved and previewed."""
        return self.average.in_place() if self.average is not None else shown(self.raw_optimizer)
