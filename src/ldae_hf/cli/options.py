"""What the commands share: how they show an error, and options that mean the same everywhere."""

import os
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from ldae_hf.recipes import tier_names


# What a user can get wrong and mend (a value, a file, the network, a full disk); the message is the whole answer.
# Anything else is a bug and shows its traceback.
USER_ERRORS = (ValueError, OSError)
# What a plain installation leaves out -> the extra that brings it (pyproject.toml).
EXTRAS = dict.fromkeys(("accelerate", "datasets", "diffusers", "tensorboard"), "train")
EXTRAS |= dict.fromkeys(("evaluate", "matplotlib", "scipy", "sklearn"), "eval")
EXTRAS |= dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export")


class PlainErrors(TyperGroup):
    """Prints a user's error on one line and ends with exit code 2, or with 130 after Ctrl-C."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read our output has gone: no error
            raise
        except USER_ERRORS as error:
            message = str(error)
            if message.startswith("Caught "):  # a data loader's worker sends its traceback, the message comes last
                message = message.strip().splitlines()[-1].partition(": ")[2]
            typer.echo(f"Error: {' '.join(message.split())}", err=True)
            raise typer.Exit(2) from error
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in EXTRAS:
                raise
            remedy = f"pip install 'ldae-hf[{EXTRAS[missing]}]'"
            typer.echo(f"Error: This needs {missing}, which is not installed; {remedy} brings it.", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:  # of what does not save itself, as trainings do
            typer.echo("\nStopped; what was complete is kept, and nothing else was written.", err=True)
            raise typer.Exit(130) from None


# Help is plain text: it can be copied, and rich need not be imported for it.
PLAIN = dict(cls=PlainErrors, no_args_is_help=True, rich_markup_mode=None)


def can_be_written(file: Path | None) -> Path | None:
    """The file of an option, if it can be written there: that is said before hours of work and not after.

    Raises:
        ValueError: it cannot.
    """
    if file is not None:
        there = next(path for path in (file.absolute(), *file.absolute().parents) if path.exists())
        if file.is_dir() or there.is_dir() == file.exists() or not os.access(there, os.W_OK):
            raise ValueError(f"{file} cannot be written; name a file in a folder where you may write.")
    return file


def is_figure(file: Path | None) -> Path | None:
    """The file of a figure, if it has the ending of one and can be written.

    Raises:
        ValueError: it cannot.
    """
    if file is not None and file.suffix not in (".png", ".svg"):
        raise ValueError(f"--figure {file} must end in .png or .svg.")
    return can_be_written(file)


RecipeName = Annotated[str, typer.Argument(help="A recipe's name, or the path of your own .yaml file.")]
Tier = Annotated[
    str | None, typer.Option(help=f"Shrink the recipe: {', '.join(tier_names())}, or the path of your own .yaml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, for example train.epochs=2; may be repeated."),
]

# ---- of a training
RunFolder = Annotated[Path, typer.Option(help="The run's folder; the same command goes on with what it holds.")]
TrainingData = Annotated[
    str | None, typer.Option(help="Images instead of the recipe's: a Hub name, or a folder of images or Parquet.")
]
ImageColumn = Annotated[str | None, typer.Option(help="The column of images; detected if not given.")]
LabelColumn = Annotated[str | None, typer.Option(help="The column of labels; detected if not given.")]
Processor = Annotated[Path | None, typer.Option(help="A folder with a fitted processor, instead of a new fit.")]
PerceptualWeights = Annotated[
    Path | None,
    typer.Option(help="A folder with LPIPS's weights, for a tokenizer that is trained with it; see ldae weights."),
]
PerDeviceBatchSize = Annotated[
    int | None, typer.Option(help="Images of one forward pass; the rest of the global batch is accumulated.")
]
Quarantine = Annotated[Path | None, typer.Option(help="A file of `ldae data check`: images to leave out.")]
NumWorkers = Annotated[int, typer.Option(help="Processes that decode images.")]
MixedPrecision = Annotated[str, typer.Option(help="bf16 or no.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints; default one epoch.")]
KeepCheckpoints = Annotated[int, typer.Option(help="How many checkpoints stay.")]
LogEvery = Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")]
ReportTo = Annotated[list[str] | None, typer.Option(help="A tracker beside the log, e.g. tensorboard.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after this step, with a checkpoint.")]
MaxMinutes = Annotated[float | None, typer.Option(help="Stop after this time, with a checkpoint.")]

# ---- of results
Output = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.", callback=can_be_written)]
Ledger = Annotated[
    Path | None, typer.Option(help="Append the result to this JSON-lines file.", callback=can_be_written)
]
Figure = Annotated[Path | None, typer.Option(help="Draw it too, .png or .svg.", callback=is_figure)]
