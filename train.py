"""Train JointDiT's add-ons: `accelerate launch train.py --image_folder ...`, or plain `python train.py ...`."""

import sys

from accelerate import Accelerator

from dataset.training_data import open_training_data
from library.allocator import keep_freed_memory
from library.args import parse
from library.cli import is_main_process, run_main, set_threads
from library.experiment import open_experiment
from library.launcher import as_launched
from library.training import Trainer
from library.training_args import TrainingArgs
from library.training_setup import base_dtype, load_trainable, make_accelerator
from library.training_watch import add_watches


def main() -> None:
    """Read the flags and take the experiment's folder."""
    args = as_launched(parse(sys.argv[1:], TrainingArgs, description="Train JointDiT's adapters and joint connections"))
    accelerator = make_accelerator(args)
    with open_experiment(args.experiment, resume=args.resume is not None, main_process=is_main_process()):
        train(args, accelerator)


def train(args: TrainingArgs, accelerator: Accelerator) -> None:
    """Open the data, load the model, train."""
    set_threads(args.num_threads)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    data = open_training_data(args, device=accelerator.device, dtype=base_dtype(accelerator))
    model, settings = load_trainable(args, accelerator)
    trainer = Trainer(
        args,
        accelerator=accelerator,
        model=model,
        settings=settings,
        pairs=data.pairs,
        prompts=data.prompts,
        encode=data.encode,
        networks=data.networks,
        text_precision=data.text_precision,
        encoders=data.encoders,
    )
    add_watches(trainer, held_out=data.held_out)
    trainer.run()


if __name__ == "__main__":
    run_main(main)
