"""The `ldae` command: one thin command per job, which imports what it needs when it runs, so that help is quick."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from ldae_hf.recipes import load_recipe, tier_names
from ldae_hf.recipes.display import diff_text, path_markdown, show_text, tree_text


# What a user can get wrong and mend (a value, a file, the network, a full disk); the message is the whole answer.
# Anything else is a bug and shows its traceback.
USER_ERRORS = (ValueError, OSError)


class PlainErrors(TyperGroup):
    """Prints a user's error on one line and ends with exit code 2."""

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


# Help is plain text: it can be copied, and rich need not be imported for it.
PLAIN = dict(cls=PlainErrors, no_args_is_help=True, rich_markup_mode=None)
app = typer.Typer(**PLAIN, pretty_exceptions_enable=False, add_completion=False)
recipes = typer.Typer(**PLAIN)
tokenizer_app = typer.Typer(**PLAIN)
weights = typer.Typer(**PLAIN)


@app.callback()
def ldae():
    """Latent denoising autoencoders (l-DAE): train them, measure them, publish them.

    \b
    ldae recipes tree                        what there is to train
    ldae recipes show l_dae --tier cpu       every value of one run
    """


@recipes.callback()
def recipes_help():
    """The paper's systems, one small recipe each, and the tiers that shrink them.

    A recipe names its parent and says what it changes. --tier shrinks any recipe to a smaller image set and machine;
    --set changes single values. The resolved recipe is saved with the weights.
    """


RecipeName = Annotated[str, typer.Argument(help="A recipe's name, or the path of your own .yaml file.")]
Tier = Annotated[
    str | None, typer.Option(help=f"Shrink the recipe: {', '.join(tier_names())}, or the path of your own .yaml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, for example train.epochs=2; may be repeated."),
]


@recipes.command("tree")
def recipes_tree(
    ledger: Annotated[
        Path | None,
        typer.Option(help="Results to show beside the paper's; default benchmarks/results/ledger.jsonl, if there."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Only the path, as a markdown table.")] = False,
):
    """Show the path and what branches off it, the paper's number and ours, and what each step changes.

    \b
    ldae recipes tree
    ldae recipes tree --markdown --ledger results.jsonl
    """
    if ledger is None and (usual := Path("benchmarks/results/ledger.jsonl")).is_file():
        ledger = usual
    typer.echo(path_markdown(ledger) if markdown else tree_text(ledger))


@recipes.command("show")
def recipes_show(name: RecipeName, tier: Tier = None, overrides: Overrides = None):
    """Print every value of a recipe as YAML; a comment says who set what the root does not.

    \b
    ldae recipes show epochs_1600
    ldae recipes show size_b --tier cpu --set train.epochs=2
    """
    typer.echo(show_text(load_recipe(name, tier, overrides or [])))


@recipes.command("diff")
def recipes_diff(first: RecipeName, second: RecipeName, tier: Tier = None):
    """Print the values in which two recipes differ.

    \b
    ldae recipes diff l_dae size_l_epochs_1600
    ldae recipes diff random_crop size_b --tier desk
    """
    typer.echo(diff_text(load_recipe(first, tier), load_recipe(second, tier)))


PerceptualWeights = Annotated[
    Path | None,
    typer.Option(help="A folder with LPIPS's weights, for a tokenizer that is trained with it; see ldae weights."),
]


@app.command()
def pretrain(
    output_dir: Annotated[Path, typer.Option(help="The run's folder; the same command goes on with what it holds.")],
    recipe: RecipeName = "l_dae",
    tier: Tier = None,
    overrides: Overrides = None,
    dataset: Annotated[
        str | None, typer.Option(help="Images instead of the recipe's: a Hub name, or a folder of images or Parquet.")
    ] = None,
    streaming: Annotated[bool, typer.Option(help="Read the data set from the Hub while training.")] = False,
    num_images: Annotated[int | None, typer.Option(help="Of an epoch, for a stream that does not say it.")] = None,
    image_column: Annotated[str | None, typer.Option(help="The column of images; detected if not given.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The column of labels; detected if not given.")] = None,
    processor: Annotated[
        Path | None, typer.Option(help="A folder with a fitted processor, instead of a new fit.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder of `ldae tokenizer train`, instead of training one first.")
    ] = None,
    perceptual_weights: PerceptualWeights = None,
    cache_latents: Annotated[
        bool, typer.Option(help="Encode every image once; for latent targets and centre crops.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of initialisation, order, crops, timesteps and noise.")] = 0,
    per_device_batch_size: Annotated[
        int | None, typer.Option(help="Images of one forward pass; the rest of the global batch is accumulated.")
    ] = None,
    num_workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 2,
    mixed_precision: Annotated[str, typer.Option(help="bf16 or no.")] = "bf16",
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager or flash_attention_2; by default what suits the device.")
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations, for memory.")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile the model.")] = False,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; default one epoch.")] = None,
    keep_checkpoints: Annotated[int, typer.Option(help="How many checkpoints stay.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 20,
    probe_every: Annotated[
        int | None,
        typer.Option(help="Steps between online probes, on up to 10,000 images of each split; default none."),
    ] = None,
    report_to: Annotated[list[str] | None, typer.Option(help="A tracker beside the log, e.g. tensorboard.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this step, with a checkpoint.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after this time, with a checkpoint.")] = None,
):
    """Pre-train l-DAE; running the same command again resumes.

    \b
    ldae pretrain l_dae --tier cifar10 --output-dir runs/cifar10
    ldae pretrain random_crop --dataset path/to/images --output-dir runs/mine
    accelerate launch examples/pretrain.py size_l --output-dir runs/large    (several GPUs)
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.training import pretrain

    options |= {"overrides": overrides or (), "report_to": report_to or ()}
    if options.pop("probe_every"):
        from ldae_hf.evaluation.online import online_evaluation
        from ldae_hf.training import load_images

        data = load_recipe(recipe, tier, overrides or ()).data
        columns = dict(image_column=image_column, label_column=label_column)
        images = [
            load_images(dataset or data["dataset"], f"{data[split]}[:10000]", **columns)
            for split in ("train_split", "test_split")
        ]
        options |= {"evaluations": [online_evaluation(*images, num_workers=num_workers)], "evaluate_every": probe_every}
    pretrain(**options)


@tokenizer_app.callback()
def tokenizer_help():
    """Learned tokenizers: train one, measure what it keeps of an image, look at its filters.

    `ldae pretrain` trains the tokenizer of its recipe first, if it has one to learn; training it apart lets several
    recipes share it (ldae pretrain … --tokenizer FOLDER).
    """


@tokenizer_app.command("train")
def tokenizer_train(
    output_dir: Annotated[Path, typer.Option(help="The run's folder; the same command goes on with what it holds.")],
    recipe: RecipeName = "patch_ae",
    tier: Tier = None,
    overrides: Overrides = None,
    dataset: Annotated[
        str | None, typer.Option(help="Images instead of the recipe's: a Hub name, or a folder of images or Parquet.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="The column of images; detected if not given.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The column of labels; detected if not given.")] = None,
    processor: Annotated[
        Path | None, typer.Option(help="A folder with a fitted processor, instead of a new fit.")
    ] = None,
    perceptual_weights: PerceptualWeights = None,
    seed: Annotated[int, typer.Option(help="Of initialisation, order, crops and noise.")] = 0,
    per_device_batch_size: Annotated[
        int | None, typer.Option(help="Images of one forward pass; the rest of the global batch is accumulated.")
    ] = None,
    num_workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 2,
    mixed_precision: Annotated[str, typer.Option(help="bf16 or no.")] = "bf16",
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; default one epoch.")] = None,
    keep_checkpoints: Annotated[int, typer.Option(help="How many checkpoints stay.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.jsonl.")] = 20,
    report_to: Annotated[list[str] | None, typer.Option(help="A tracker beside the log, e.g. tensorboard.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after this step, with a checkpoint.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop after this time, with a checkpoint.")] = None,
):
    """Train the learned tokenizer of a recipe; running the same command again resumes.

    \b
    ldae tokenizer train patch_vae --tier cpu --output-dir runs/patch-vae
    ldae tokenizer train replace_noise_schedule --tier cpu --output-dir runs/conv-vae
    ldae pretrain patch_vae --tier cpu --tokenizer runs/patch-vae --output-dir runs/mine
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.training import train_tokenizer

    train_tokenizer(**options | {"overrides": overrides or (), "report_to": report_to or ()})


@tokenizer_app.command("evaluate")
def tokenizer_evaluate(
    tokenizer: Annotated[Path, typer.Argument(help="A folder that `ldae tokenizer train` wrote.")],
    dataset: Annotated[str, typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA.")],
    train_split: Annotated[str, typer.Option(help="Split that the probe learns from.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to test on.")] = "test",
    probe: Annotated[bool, typer.Option(help="Fit a linear probe on the latents too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the probe.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images of one pass.")] = 64,
    num_workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 2,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    ledger: Annotated[Path | None, typer.Option(help="Append the result to this JSON-lines file.")] = None,
):
    """Reconstruction error of a tokenizer, beside PCA at the same K.

    \b
    ldae tokenizer evaluate runs/patch-vae --dataset cifar10 --probe
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.reconstruction import reconstruction_table, run_reconstruction

    typer.echo(reconstruction_table(run_reconstruction(**options)))


@tokenizer_app.command("table")
def tokenizer_table(
    ledger: Annotated[Path, typer.Option(help="JSON lines that `evaluate --ledger` wrote.")] = Path(
        "benchmarks/results/ledger.jsonl"
    ),
):
    """Print the reconstruction errors in a ledger as a markdown table.

    \b
    ldae tokenizer table --ledger benchmarks/results/ledger.jsonl
    """
    from ldae_hf.evaluation.reconstruction import reconstruction_markdown

    typer.echo(reconstruction_markdown(ledger))


@tokenizer_app.command("filters")
def tokenizer_filters(
    tokenizers: Annotated[list[Path], typer.Argument(help="Folders of patch-wise tokenizers.")],
    output: Annotated[Path, typer.Option(help="The picture, .png or .svg.")] = Path("filters.png"),
    count: Annotated[int, typer.Option(help="Filters of each.")] = 8,
):
    """Paint the first filters of patch-wise tokenizers below those of their PCA (Figure 4).

    \b
    ldae tokenizer filters runs/patch-ae runs/patch-vae --output filters.png
    """
    from ldae_hf.evaluation.figures import filters_figure

    typer.echo(filters_figure(tokenizers, output, num_filters=count))


Encoder = Annotated[str, typer.Argument(help="An encoder's folder, or its name on the Hub.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA; default the encoder's recipe's."),
]
TrainSplit = Annotated[str | None, typer.Option(help="Split to learn from; slices such as train[:5000] work.")]
TestSplit = Annotated[str | None, typer.Option(help="Split to test on.")]
Timestep = Annotated[int | None, typer.Option(help="Timestep of the features; default the model's.")]
Noise = Annotated[str, typer.Option(help="clean, or frozen: noisy input, one noise per image.")]
Dtype = Annotated[str, typer.Option(help="Precision of the encoder: float32 or bfloat16.")]
Floors = Annotated[
    list[str] | None,
    typer.Option(
        "--floor", help="One of pixels, latents, untrained, random_patches, or none; may be repeated; default all."
    ),
]
EvaluationSeed = Annotated[int, typer.Option(help="Of the classifier, the floors and frozen noise.")]
Output = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]
Ledger = Annotated[Path | None, typer.Option(help="Append the result to this JSON-lines file.")]


def chosen_floors(options: dict) -> dict:
    """The options of a command with its --floor taken apart: none given are all of them, `none` is no floor."""
    chosen = options.pop("floors")
    return options if not chosen else options | {"floors": [name for name in chosen if name != "none"]}


@app.command()
def probe(
    encoder: Encoder,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    learning_rates: Annotated[list[float] | None, typer.Option("--learning-rate", help="May be repeated.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the cached features.")] = 90,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Floors = None,
    dtype: Dtype = "float32",
    seed: EvaluationSeed = 0,
    num_workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Linear probe of an encoder on cached features, beside its floors.

    The floors: raw pixels, the tokenizer's latents, the same encoder untrained, and random whitened patches of the same
    dimension.

    \b
    ldae probe runs/cifar10/encoder --dataset cifar10
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.run import run_linear_probe

    if not learning_rates:
        options.pop("learning_rates")
    options = chosen_floors(options)
    typer.echo(result_table(run_linear_probe(**options)))


@app.command()
def knn(
    encoder: Encoder,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    k: Annotated[int, typer.Option(help="Neighbours that vote.")] = 20,
    temperature: Annotated[float, typer.Option(help="Of their weights, exp(cosine / temperature).")] = 0.07,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Floors = None,
    dtype: Dtype = "float32",
    seed: EvaluationSeed = 0,
    num_workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Exact k-nearest-neighbour accuracy of an encoder, beside its floors.

    \b
    ldae knn runs/cifar10/encoder --dataset cifar10
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.run import run_knn

    typer.echo(result_table(run_knn(**chosen_floors(options))))


@weights.callback()
def weights_help():
    """Other people's weights, for example those of VGG-16 and LPIPS.

    A PyTorch checkpoint is a pickle, and a pickle can hold code; ldae reads safetensors only.
    """


@weights.command("convert")
def weights_convert(
    file: Annotated[Path, typer.Argument(help="A PyTorch checkpoint: .pth, .pt or .ckpt.")],
    output: Annotated[Path | None, typer.Option(help="Default: FILE with the ending .safetensors.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
):
    """Write the tensors of a PyTorch checkpoint as safetensors, without running any code that it may hold.

    The perceptual loss LPIPS takes two: VGG-16's, from download.pytorch.org/models, and vgg.pth of LPIPS v0.1, from
    lpips/weights/v0.1 of github.com/richzhang/PerceptualSimilarity.

    \b
    ldae weights convert vgg16-397923af.pth --output lpips/vgg16.safetensors
    ldae weights convert vgg.pth --output lpips/lpips.safetensors
    ldae tokenizer train retrain_vqgan --perceptual-weights lpips --output-dir runs/vqgan
    """
    from ldae_hf.weights import convert

    typer.echo(convert(file, output, force=force))


app.add_typer(recipes, name="recipes")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(weights, name="weights")


if __name__ == "__main__":
    app()
