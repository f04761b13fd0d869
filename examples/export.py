"""An encoder without this package: folded into transformers' and timm's own classes, and into ONNX.

    python examples/export.py model_cards/ldae-cifar10

At a fixed timestep l-DAE's encoder is a plain Vision Transformer. The same from the command line: ldae export.
"""

from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import typer
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, AutoModel

import ldae_hf  # noqa: F401 (AutoModel knows l-DAE then)
from ldae_hf.export import fold, parity, parity_text, write_onnx, write_timm, write_transformers


def export(
    encoder: Annotated[str, typer.Argument()] = "model_cards/ldae-cifar10",
    output_dir: Path = Path("exports/ldae-cifar10"),
):
    """Fold an encoder, write it for three libraries, and compare what they make of two photographs."""
    model, processor = AutoModel.from_pretrained(encoder).eval(), AutoImageProcessor.from_pretrained(encoder)
    inputs = processor(load_sample_images().images, return_tensors="pt")
    features = model(**inputs).pooler_output.detach()  # (2, D)

    # In memory: plain torch, with no timestep, no modulation, no PCA.
    tokens, pooled = fold(model)(inputs["pixel_values"])
    typer.echo(f"folded: {tuple(tokens.shape)}, within {(pooled - features).abs().max():.1e}")

    # For transformers: from here on ldae_hf is not needed.
    write_transformers(output_dir / "vit", model, processor)
    stock, stock_processor = (auto.from_pretrained(output_dir / "vit") for auto in (AutoModel, AutoImageProcessor))
    pixels = stock_processor(load_sample_images().images, return_tensors="pt")["pixel_values"]
    far = (pixels - inputs["pixel_values"]).abs().max()
    typer.echo(f"its own pixels: within {far:.1e}, at the border of the square that is cut out")
    with torch.no_grad():
        found = stock(**inputs).last_hidden_state.mean(dim=1)
    typer.echo(f"{output_dir / 'vit'}: {type(stock).__name__}, within {(found - features).abs().max():.1e}")

    # For timm, which is told about the folder as local-dir:FOLDER.
    write_timm(output_dir / "timm", model, processor)

    # For ONNX Runtime, with images of any number and size.
    write_onnx(output_dir / "onnx", model, processor)
    session = onnxruntime.InferenceSession(output_dir / "onnx" / "model.onnx")
    _, found = session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})
    typer.echo(f"{output_dir / 'onnx'}: within {(torch.from_numpy(found) - features).abs().max():.1e}")

    # How far others are from the model, in the tokens and relative to the largest value; model cards say this of all.
    typer.echo(parity_text(parity(model, targets=["transformers", "timm"])))


if __name__ == "__main__":
    typer.run(export)
