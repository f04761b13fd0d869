"""The blocks of a trained model, encoder and decoder, as one stack to look into."""

import json
from pathlib import Path
from typing import NamedTuple

from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEForPreTraining, LDAEModel
from ..training.publishing import load_published, newest_in_run
from .encoders.ldae import load_ldae


class Stack(NamedTuple):
    """`model` and `processor` for [`open_encoder`], and the `folder` of their weights. The network has `num_blocks`,
    the first `num_encoder_blocks` of which are the encoder's; the model has them all if `is_whole`, else only those."""

    model: LDAEModel
    processor: LDAEImageProcessor
    folder: Path
    num_encoder_blocks: int
    num_blocks: int
    is_whole: bool


def load_stack(source: str | Path) -> Stack:
    """The blocks of a run's newest checkpoint, of a checkpoint, or of an encoder's folder. The weights are those of the
    moving average, if there is one.

    Raises:
        ValueError: the folder holds none of these; or what loading raises.
    """
    folder = Path(source)
    if (folder / "checkpoints").is_dir():
        folder = newest_in_run(folder / "checkpoints")
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if config.get("model_type") != "ldae":
        raise ValueError(
            f"{source} is no folder of an l-DAE run, checkpoint or encoder; name one. Other encoders have no decoder "
            "to go on into: `ldae sweep layers` goes through their blocks."
        )
    is_whole = "LDAEForPreTraining" in config["architectures"]
    if is_whole:
        pretraining, _ = load_published(folder)
        model, processor = pretraining.ldae, LDAEImageProcessor.from_pretrained(folder)
    else:
        model, processor = load_ldae(folder, device="cpu")
    num_encoder_blocks = model.config.num_hidden_layers
    num_blocks = num_encoder_blocks + model.config.decoder_num_hidden_layers
    if is_whole:
        model = whole_network(pretraining)
    return Stack(model, processor, folder, num_encoder_blocks, num_blocks, is_whole)


def whole_network(model: LDAEForPreTraining) -> LDAEModel:
    """The encoder with the decoder's blocks after its own, as one encoder: its block k is the network's block k. All
    blocks are of one kind, under one condition. The encoder of the given model is what is changed.

    Raises:
        ValueError: the decoder's blocks have another width.
    """
    encoder = model.ldae
    if encoder.config.decoder_width != encoder.config.hidden_size:
        raise ValueError(
            f"The decoder is {encoder.config.decoder_width} wide and the encoder {encoder.config.hidden_size}: its "
            "blocks do not go on in the same features; sweep the encoder alone, with `ldae sweep layers`."
        )
    encoder.layers.extend(model.decoder.layers)
    encoder.config.num_hidden_layers = len(encoder.layers)
    return encoder
