"""Pre-train l-DAE on one or many GPUs; running the same command again resumes.

    accelerate launch examples/pretrain.py random_crop --dataset ILSVRC/imagenet-1k --output-dir runs/half_l
    python examples/pretrain.py l_dae --tier cifar10 --output-dir runs/cifar10       (one CPU or GPU)

The same as `ldae pretrain`; see --help.
"""

import sys

from ldae_hf.cli import app


if __name__ == "__main__":
    app(["pretrain", *sys.argv[1:]])
