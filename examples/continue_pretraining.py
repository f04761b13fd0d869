"""Pre-training that goes on where somebody else's ended, on your images.

    python examples/continue_pretraining.py you/your-encoder --dataset path/to/images --output-dir runs/onward
    accelerate launch examples/continue_pretraining.py you/your-encoder --output-dir runs/onward     (several GPUs)

Takes what `ldae push` published: the recipe in recipe.json, and of pretraining/ the whole model, with its decoder, its
PCA and its moving average. The optimizer, and with it the warm-up, begin anew. A run's folder does as well as a
repository. The same from the command line: ldae pretrain RECIPE --start-from you/your-encoder.
"""

import json
from pathlib import Path

import typer

from ldae_hf.hub import fetch
from ldae_hf.recipes import Recipe
from ldae_hf.training import checkpoints, pretrain


def go_on(
    source: str,
    dataset: str | None = None,
    epochs: int | None = None,
    output_dir: Path = Path("runs/onward"),
    push_to_hub: str | None = None,
):
    """Train on with the recipe of a published model, by default on its own data set, and push the result if asked."""
    folder = Path(source)
    if not folder.is_dir():
        folder = fetch(source, allow_patterns=["recipe.json", "training.json", "pretraining/**"])
    elif (folder / "checkpoints").is_dir():
        folder = checkpoints(folder / "checkpoints")[-1]
    recipe = Recipe.load(folder)
    trained_on = json.loads((folder / "training.json").read_text()).get("dataset")  # the recipe's, or another
    if dataset is None and trained_on is not None and trained_on != recipe.data["dataset"]:
        if trained_on.startswith("path/to/"):
            raise typer.BadParameter(f"{source} was trained on somebody's own images, {trained_on}: give --dataset.")
        dataset = trained_on
    overrides = [*recipe.overrides, *([f"train.epochs={epochs}"] if epochs else [])]
    encoder = pretrain(
        recipe.name,
        tier=recipe.tier,
        overrides=overrides,
        dataset=dataset,
        start_from=folder,
        output_dir=output_dir,
        push_to_hub=push_to_hub,
    )
    typer.echo(f"encoder: {encoder}; the same command goes on with a run that was stopped")


if __name__ == "__main__":
    typer.run(go_on)
