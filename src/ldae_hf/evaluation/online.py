"""A probe and k-NN while the encoder is being trained, on a part of the data and without floors."""

from collections.abc import Callable

from transformers import PreTrainedModel

from ..training.data import ImageSource
from .encoders import PooledFeatures, open_encoder
from .features import extract
from .knn import knn
from .linear_probe import linear_probe


def online_evaluation(
    train_source: ImageSource,
    test_source: ImageSource,
    *,
    epochs: int = 30,
    k: int = 20,
    batch_size: int = 256,
    num_workers: int = 2,
    seed: int = 0,
) -> Callable[..., dict[str, float]]:
    """An evaluation for the training loop: model and processor -> `probe_top1` and `knn_top1`, in percent.

    The model is an l-DAE's or a Vision Transformer of transformers, MAE for example, with or without its head; the
    processor is what [`open_encoder`] takes for it.

    Args:
        train_source, test_source: what [`load_images`] gives, `"train[:10000]"` for example: every call extracts the
            features of both anew.
        epochs, seed: of [`linear_probe`]. k: of [`knn`].
        batch_size: images of a forward pass. num_workers: processes that decode images.
    """

    def evaluate(model: PreTrainedModel, processor) -> dict[str, float]:
        encoder, tensors = open_encoder(model, processor=processor), []
        loading = dict(batch_size=batch_size, num_workers=num_workers, cache_dir=None, progress=False)
        for source in (train_source, test_source):
            maps = [PooledFeatures(encoder)]
            [found] = extract(maps, source, encoder.image_size, device=encoder.device, **loading)
            tensors += [found.features, found.labels]
        probe = linear_probe(*tensors, epochs=epochs, seed=seed, device=encoder.device, progress=False)
        return {
            "probe_top1": probe["top1"],
            "knn_top1": knn(*tensors, k=k, variants=("pooled",), device=encoder.device)["top1"],
        }

    return evaluate
