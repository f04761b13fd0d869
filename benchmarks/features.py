"""Features of ViT encoders at 256 px: l-DAE's encoder against timm's and transformers' ViT of the same shape.

All of them get the same images, have the same blocks, width, heads and activation, and use torch's SDPA; ours works at
`config.feature_timestep` with its modulation computed anew in each block (not folded). bfloat16 means weights and
images in bfloat16, as after `from_pretrained(..., dtype=torch.bfloat16)`, which leaves our PCA and tables in float32.
timm is looked for in --peers (benchmarks/README.md says how to put it there).
"""

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import torch
from transformers import IJepaConfig, IJepaModel, ViTConfig, ViTModel

from ldae_hf import SIZES, LDAEConfig, LDAEModel


OURS = "ldae-hf LDAEModel"
IMAGE_SIZE, PATCH_SIZE, ACTIVATION = 256, 16, "gelu_pytorch_tanh"
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # what it defines lives as long as it does


def ldae_encoder(shape: dict) -> torch.nn.Module:
    return LDAEModel(LDAEConfig(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_act=ACTIVATION, **shape))


def transformers_encoder(config_class: type, model_class: type, shape: dict) -> torch.nn.Module:
    config = config_class(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act=ACTIVATION,
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["num_attention_heads"],
        intermediate_size=4 * shape["hidden_size"],
        attn_implementation="sdpa",
    )
    return model_class(config, add_pooling_layer=False)


def timm_encoder(shape: dict) -> torch.nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=shape["hidden_size"],
        depth=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        act_layer="gelu_tanh",
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
    )


ENCODERS = {
    OURS: ldae_encoder,
    "timm VisionTransformer": timm_encoder,
    "transformers ViTModel (+ class token)": partial(transformers_encoder, ViTConfig, ViTModel),
    "transformers IJepaModel": partial(transformers_encoder, IJepaConfig, IJepaModel),
}


def find_timm(folder: Path) -> str | None:
    """Makes timm importable; the reason where it cannot be."""
    if folder.is_dir():
        sys.path.append(str(folder))  # last, and after transformers, which must not find torchvision there
    if torch.version.cuda is None:  # torchvision's wheels are CUDA builds: without these two it does not even import
        for name in ("nms", "qnms"):
            TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        import timm.models.vision_transformer  # noqa: F401
    except ImportError as error:
        return f"timm is left out: {error}, also in --peers {folder} (see benchmarks/README.md)."
    return None


def build(name: str, size: str, dtype: str, args) -> Callable[[], object]:
    """One call of the result turns a batch of images into features."""
    torch.manual_seed(0)
    model = ENCODERS[name](SIZES[size]).to(args.device, getattr(torch, dtype)).eval()
    if name == OURS:
        model.tokenizer.float()
        model.schedule.float()
    pixel_values = torch.rand(args.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device) * 2 - 1
    pixel_values = pixel_values.to(getattr(torch, dtype))
    if args.compile:
        model.compile()

    @torch.inference_mode()
    def run():
        return model(pixel_values)

    return run


def compare(size: str, dtype: str, names: list[str], args) -> list[dict]:
    """One result per model: its seconds, images/s, our speed over its speed, its peak memory."""
    runs = {name: build(name, size, dtype, args) for name in names}
    times = measure.interleave(
        {name: partial(measure.seconds, run, args.device) for name, run in runs.items()}, args.repeats
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest_peer = min((name for name in names if name != OURS), key=medians.get)
    return [
        {
            "size": size,
            "dtype": dtype,
            "model": name,
            "images_per_second": args.batch / medians[name],
            "ours_over_this": measure.ratio(times[name], times[OURS]),
            "fastest_peer": name == fastest_peer,
            "peak_mib": None
            if args.no_memory
            else measure.peak_mib_in_a_process(name, "--sizes", size, "--dtypes", dtype),
            "seconds": times[name],
        }
        for name in names
    ]


def main():
    parser = measure.torch_parser(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["b", "l"], choices=SIZES)
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="folder of timm and torchvision")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reason = find_timm(args.peers)
    if args.memory_of:
        encoder = partial(build, args.memory_of, args.sizes[0], args.dtypes[0], args)
        print(json.dumps(measure.peak_mib(encoder, args.device)))
        return

    names = [name for name in ENCODERS if reason is None or not name.startswith("timm")]
    results = [row for size in args.sizes for dtype in args.dtypes for row in compare(size, dtype, names, args)]
    rows = [
        [
            result["size"],
            result["dtype"],
            result["model"] + (" (fastest peer)" if result["fastest_peer"] else ""),
            f"{result['images_per_second']:.2f}",
            measure.spread(result["ours_over_this"]),
            "" if result["peak_mib"] is None else f"{result['peak_mib']:.0f}",
        ]
        for result in results
    ]
    columns = ["size", "dtype", "model", "images/s", "ldae-hf over this (min–max)", "peak MiB"]
    settings = f"batch {args.batch}, {args.threads} threads, {args.device}, {args.repeats} interleaved repetitions"
    notes = [settings + (", torch.compile" if args.compile else ""), *([reason] if reason else [])]
    measure.report(args, columns, rows, results, notes)


if __name__ == "__main__":
    main()
