"""Features of all images in a folder, one row for each.

    python examples/features.py photographs --output features.safetensors

Needs none of ldae-hf's extras. The five lines with `processor`, `model`, `inputs` and `pooler_output` are all
that other programs need; the rest reads a folder and writes a file, which `safetensors.torch.load_file` opens.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel

import ldae_hf  # noqa: F401 (AutoModel knows l-DAE then)


def extract(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    encoder: str = "model_cards/ldae-cifar10",
    output: Path = Path("features.safetensors"),
    batch_size: int = 64,
):
    """Write `features` (n,D), and in the metadata the names of the n files, in the same order."""
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in readable)
    if not files:
        raise typer.BadParameter(f"{folder} holds no image files.", param_hint="folder")

    processor, model = AutoImageProcessor.from_pretrained(encoder), AutoModel.from_pretrained(encoder)
    features = []
    with torch.no_grad():
        for start in range(0, len(files), batch_size):
            images = [Image.open(file) for file in files[start : start + batch_size]]
            inputs = processor(images, return_tensors="pt")
            features.append(model(**inputs).pooler_output)  # (B, D); last_hidden_state has each patch's, (B, N, D)

    features = torch.cat(features)
    save_file({"features": features}, output, metadata={"files": json.dumps([str(file) for file in files])})
    typer.echo(f"{output}: features of {features.shape[0]} images, {features.shape[1]} values each")


if __name__ == "__main__":
    typer.run(extract)
