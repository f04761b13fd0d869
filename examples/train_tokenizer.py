"""Learned tokenizers in a few minutes on a CPU: a linear autoencoder of patches and its VAE, beside PCA (section 4.2).

    python examples/train_tokenizer.py                     (CIFAR-10 in $LDAE_DATA)
    python examples/train_tokenizer.py --dataset path/to/images

Trains both at the same K on the same patches, prints what each keeps of the test images, and paints their first filters
below those of PCA (Figure 4). A convolutional one takes longer, on one or many GPUs the same way:

    accelerate launch -m ldae_hf.cli tokenizer train remove_adversarial_loss --tier desk --output-dir runs/conv-vae
"""

from pathlib import Path

import typer

from ldae_hf.evaluation.figures import filters_figure, save_figure
from ldae_hf.evaluation.reconstruction import reconstruction_table, run_reconstruction
from ldae_hf.training import train_tokenizer


def train(dataset: str = "cifar10", tier: str = "cpu", output_dir: Path = Path("runs/tokenizers"), seed: int = 0):
    """Train the patch-wise autoencoder and VAE, measure and paint them beside PCA; running it again resumes."""
    runs = []
    for recipe in ("patch_ae", "patch_vae"):
        # The second one takes the first one's PCA: the same mean patch, and one fit less.
        processor = runs[0] / "processor" if runs else None
        options = dict(tier=tier, dataset=dataset, processor=processor, seed=seed)
        runs.append(train_tokenizer(recipe, output_dir=output_dir / recipe, **options).parent)
    results = [run_reconstruction(run, dataset, output=run / "reconstruction.json") for run in runs]
    picture = save_figure(filters_figure(runs), output_dir / "filters.png")

    for result in results:
        typer.echo(f"\n{reconstruction_table(result)}")
    typer.echo(f"\npicture   {picture}")
    typer.echo(f"train on  ldae pretrain patch_ae --tier {tier} --tokenizer {runs[0]} --output-dir runs/mine")


if __name__ == "__main__":
    typer.run(train)
