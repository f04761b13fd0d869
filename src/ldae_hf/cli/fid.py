"""`ldae fid`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Ledger, NumWorkers, Output


def fid(
    source: Annotated[str, typer.Argument(help="A run's folder, a checkpoint, a pipeline's folder, or a Hub name.")],
    extractor: Annotated[
        Path, typer.Option(help="Inception's weights, or a folder of ldae extractor train; see ldae extractor --help.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="The reference: a Hub name, or a folder, as given, else inside $LDAE_DATA; default the recipe's."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the reference; default train.")] = None,
    test_split: Annotated[str | None, typer.Option(help="Split of the floors real and reconstruction.")] = None,
    num_samples: Annotated[
        int, typer.Option(help="Images to generate; a smaller count gives a larger distance.")
    ] = 50_000,
    steps: Annotated[int, typer.Option(help="Steps from noise to image.")] = 250,
    sampler: Annotated[str, typer.Option(help="ancestral (DDPM) or deterministic (DDIM).")] = "ancestral",
    guidance: Annotated[
        float, typer.Option(help="Of classifier-free guidance, for a model with labels; 1 is none.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the samples' noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images that are generated together.")] = 64,
    dtype: Annotated[str, typer.Option(help="Precision of the model: float32 or bfloat16.")] = "float32",
    weights: Annotated[
        str | None, typer.Option(help="ema or raw; default the moving average, if there is one.")
    ] = None,
    samples_dir: Annotated[
        Path | None, typer.Option(help="Where the images are kept; default in samples/ of the run.")
    ] = None,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Fréchet distance between generated images and a data set, beside its floors.

    The floors: real, the test images; reconstruction, the test images after the tokenizer; noise, the latents that
    generation begins with. The images are kept: the same command goes on where another was stopped, and a larger
    --num-samples adds to what there is. Several processes share the work:

    \b
    ldae fid runs/cifar10 --extractor inception.safetensors
    accelerate launch -m ldae_hf.cli fid runs/cifar10 --extractor inception.safetensors --ledger results.jsonl

    Exit code 75: stopped by Ctrl-C, and the same command goes on.
    """
    options = dict(locals())  # each option is the argument of the same name
    from torch import distributed

    from ldae_hf.evaluation.distances import distance_table
    from ldae_hf.evaluation.fid import run_fid
    from ldae_hf.training import EXIT_CODE

    try:
        row = run_fid(**options)
    except KeyboardInterrupt:
        typer.echo("\nStopped; the samples that were whole are kept, and the same command goes on.", err=True)
        raise typer.Exit(EXIT_CODE) from None
    if row is not None:  # else this is not the main process
        typer.echo(distance_table(row))
    if distributed.is_initialized():
        distributed.destroy_process_group()
