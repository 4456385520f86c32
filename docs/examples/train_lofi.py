"""Fine-tune a CLIP model on nodes that don't communicate, and average them once.

torchrun --nnodes N --nproc-per-node GPUS train_lofi.py MODEL TASK OUT [--steps N]

Each machine is a node. OUT then holds node0, node1, ... and merged. train_lofi.sbatch starts this
under Slurm. `weightops lofi` does the same without a script.
"""

import argparse

from weightops import config_for, connected, lofi, open_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("task")
parser.add_argument("out")
parser.add_argument("--steps", type=int)
parser.add_argument("--device", default="auto")
arguments = parser.parse_args()

model = open_checkpoint(arguments.model)
with connected() as node:
    average = lofi.run(
        arguments.task,
        arguments.out,
        model=model,
        training=config_for(model, steps=arguments.steps),
        strategy=node,
        resume=True,  # a job that Slurm starts again continues
        device=arguments.device,
    )
if average is not None:  # in the one process that wrote it
    print(f"{arguments.out}/merged: the average of {len(average.weights)} nodes")
    for name, reason in average.left_out.items():
        print(f"without {name}: {reason}")
