"""Optimizers and learning-rate schedules by name."""

import ast
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.errors import UserError

log = logging.getLogger(__name__)

# Short names; anything else is read as `module.Class`.
OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adam": "torch.optim.Adam",
    "sgd": "torch.optim.SGD",
    "muon": "library.muon.MuonAdam",
    "adafactor": "transformers.optimization.Adafactor",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw": "bitsandbytes.optim.PagedAdamW",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion": "bitsandbytes.optim.Lion",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "pagedlion8bit": "bitsandbytes.optim.PagedLion8bit",
    "prodigy": "prodigyopt.Prodigy",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
    "radamschedulefree": "schedulefree.RAdamScheduleFree",
    "sgdschedulefree": "schedulefree.SGDScheduleFree",
}
# The extra of this project that brings an optional package.
_EXTRAS = {"bitsandbytes": "gpu", "prodigyopt": "train", "schedulefree": "train"}

_USUAL_PRODIGY_RATE = 1.0  # Mishchenko & Defazio, "Prodigy", arXiv 2306.06101: the method's own estimate, unscaled
# Schedules of transformers that are told a metric at every step, which training doesn't have.
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# Schedules for which transformers drops arguments without a word.
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")

# What an optimizer gets unless told otherwise. AdamW fused: one kernel over all parameters, on the CPU too. Adafactor:
# the learning rate is that of the flags, since one is always given.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "torch.optim.AdamW": {"fused": True},
    "transformers.optimization.Adafactor": {"relative_step": False, "scale_parameter": False, "warmup_init": False},
}


def parse_arguments(arguments: Sequence[str], *, flag: str) -> dict[str, Any]:
    """Read `key=value` strings; values are Python literals (`1e-4`, `False`, `(0.9, 0.95)`), else plain strings.

    Raises:
        UserError: an argument has no `=`.
    """
    parsed: dict[str, Any] = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or not key.strip().isidentifier():
            raise UserError(f"{flag} {argument}: not of the form key=value; write e.g. weight_decay=0.01")
        try:
            parsed[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            parsed[key.strip()] = value.strip()
    return parsed


def find_optimizer(name: str) -> Callable[..., Optimizer]:
    """Import the optimizer class called `name`: a short name of `OPTIMIZERS` (any case) or `module.Class`.

    Raises:
        UserError: no such name, its package isn't installed, or it is no optimizer.
    """
    path = OPTIMIZERS.get(name.lower(), name)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise UserError(f"--optimizer_type {name}: unknown; choose one of {', '.join(OPTIMIZERS)} or module.Class")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        extra = _EXTRAS.get(module.partition(".")[0])
        remedy = f"pip install -e '.[{extra}]'" if extra else "install its package"
        raise UserError(f"--optimizer_type {name}: {path} can't be imported ({error}); {remedy}") from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise UserError(f"--optimizer_type {name}: {path} is no optimizer of PyTorch's kind; name a class that is one")
    return kind


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, arguments: Sequence[str] = ()
) -> Optimizer:
    """Make the optimizer `name` over `parameters` with `--optimizer_args` as `key=value` strings.

    One that has modes (schedule-free ones) is in its training mode; `shown` changes it for a while.

    Raises:
        UserError: unknown optimizer, or arguments it doesn't take.
    """
    kind = find_optimizer(name)
    options = _DEFAULTS.get(OPTIMIZERS.get(name.lower(), name), {}) | parse_arguments(
        arguments, flag="--optimizer_args"
    )
    try:
        optimizer = kind(list(parameters), lr=learning_rate, **options)
    except (TypeError, ValueError) as error:
        known = ", ".join(list(inspect.signature(kind).parameters)[2:])
        raise UserError(
            f"--optimizer_args {' '.join(arguments)}: {name} refused them ({error}); it takes {known}"
        ) from error
    if name.lower() == "prodigy" and learning_rate < _USUAL_PRODIGY_RATE / 10:
        log.warning("--learning_rate %s: prodigy multiplies the rate it finds by this; 1 is usual", learning_rate)
    if has_modes(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def has_modes(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps other weights for use than for training, and switches by `train()` and `eval()`."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


@contextmanager
def shown(optimizer: Optimizer) -> Iterator[None]:
    """Within the block the weights are those to save and look at; afterwards they are bit for bit as before.

    Only an optimizer with modes changes anything.
    """
    if not has_modes(optimizer):
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [weight.detach().clone() for weight in weights]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():  # switching back and forth rounds
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def make_scheduler(
    name: str,
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    arguments: Sequence[str] = (),
) -> LRScheduler:
    """Make the schedule `name` of transformers with `--lr_scheduler_args` as `key=value` strings.

    Kinds: constant, constant_with_warmup, linear, cosine, cosine_with_min_lr, polynomial, warmup_stable_decay, ...

    Raises:
        UserError: unknown name, or arguments it doesn't take.
    """
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    names = [kind.value for kind in SchedulerType if kind.value not in _BY_METRIC]
    if name not in names:
        raise UserError(f"--lr_scheduler {name}: unknown; choose one of {', '.join(names)}")
    if name == "constant" and warmup_steps:
        log.warning(
            "--lr_warmup_steps %d: has no effect with --lr_scheduler constant; use constant_with_warmup", warmup_steps
        )
    options = parse_arguments(arguments, flag="--lr_scheduler_args")
    if options and name in _WITHOUT_ARGUMENTS:
        raise UserError(f"--lr_scheduler_args {' '.join(arguments)}: --lr_scheduler {name} takes none; leave them away")
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as error:
        given = f" {' '.join(arguments)}" if arguments else ""
        raise UserError(f"--lr_scheduler_args{given}: --lr_scheduler {name} refused ({error})") from error
