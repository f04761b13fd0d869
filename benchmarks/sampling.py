"""Sampling without an autoencoder: LDAEPipeline against diffusers' DiTPipeline of the same depth, width and tokens.

Both make as many images of the same latents (256 tokens of 16 values) in the same deterministic steps (DDIM,
`ddpm_linear`), from noise to tensors in 0 ... 1. DiTPipeline has class labels, as in the paper's baseline; ours runs
with the same labels, and without, as every model after the baseline. Neither has an autoencoder to decode with: DiT's
is replaced by one that does nothing, ours is a linear map of patches. bfloat16 means weights in bfloat16.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import measure
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from ldae_hf import SIZES, LDAEConfig, LDAEForPreTraining, LDAEImageProcessor, LDAEPipeline
from ldae_hf.patch_covariance import PatchCovariance


IMAGE_SIZE, PATCH_SIZE, LATENT_DIM, CLASSES = 256, 16, 16, 1000
GRID, DIT_PATCH = IMAGE_SIZE // PATCH_SIZE, 2


class NoAutoencoder:
    """What DiTPipeline asks of its autoencoder, of one that does nothing."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def awaken(model: torch.nn.Module) -> torch.nn.Module:
    """Zero gates and heads would make every block an identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def dit(size: str, dtype: torch.dtype, args) -> Callable[[], object]:
    shape = SIZES[size]
    model = DiTTransformer2DModel(
        num_attention_heads=shape["num_attention_heads"],
        attention_head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        num_layers=shape["num_hidden_layers"] + shape["decoder_num_hidden_layers"],
        in_channels=LATENT_DIM // DIT_PATCH**2,
        out_channels=LATENT_DIM // DIT_PATCH**2,
        sample_size=GRID * DIT_PATCH,
        patch_size=DIT_PATCH,
        num_embeds_ada_norm=CLASSES,
    )
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    transformer = awaken(model).to(args.device, dtype).eval()
    if args.compile:
        transformer.compile()
    pipeline = DiTPipeline(transformer=transformer, vae=NoAutoencoder(), scheduler=scheduler)
    labels = list(range(args.batch))
    return sampler(pipeline, args, class_labels=labels, guidance_scale=1.0)


def ldae(size: str, dtype: torch.dtype, args, labelled: bool) -> Callable[[], object]:
    processor = LDAEImageProcessor(IMAGE_SIZE, PATCH_SIZE, LATENT_DIM)
    crops = torch.randint(0, 256, (8, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    processor.set_basis(processor.accumulate(PatchCovariance(processor.patch_dim), crops))
    config = LDAEConfig(
        **SIZES[size],
        latent_dim=LATENT_DIM,
        num_classes=CLASSES if labelled else None,
        noise_schedule="ddpm_linear",
        input_space="latent",
        prediction_target="noise",
        conditioning_hidden_size=None,  # DiT's form
    )
    model = awaken(LDAEForPreTraining(config))
    model.set_processor(processor)
    with tempfile.TemporaryDirectory() as folder:  # as users get a pipeline in bfloat16
        LDAEPipeline(model, processor).save_pretrained(folder)
        pipeline = LDAEPipeline.from_pretrained(folder, dtype=dtype).to(args.device)
    if args.compile:
        pipeline.model.predict = torch.compile(pipeline.model.predict)
    if labelled:
        return sampler(pipeline, args, class_labels=list(range(args.batch)))
    return sampler(pipeline, args, batch_size=args.batch)


def sampler(pipeline, args, **options) -> Callable[[], object]:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return partial(pipeline, generator=generator, num_inference_steps=args.steps, output_type="pt", **options)


PIPELINES = {
    "ldae-hf LDAEPipeline": partial(ldae, labelled=False),
    "ldae-hf LDAEPipeline, class labels": partial(ldae, labelled=True),
    "diffusers DiTPipeline, class labels": dit,
}
PEER = "diffusers DiTPipeline, class labels"


def main():
    parser = measure.torch_parser(__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["half_l"], choices=SIZES)
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for size in args.sizes:
        for dtype in args.dtypes:
            runs = {name: build(size, getattr(torch, dtype), args) for name, build in PIPELINES.items()}
            clocks = {name: partial(measure.seconds, run, args.device) for name, run in runs.items()}
            times = measure.interleave(clocks, args.repeats)
            for name in runs:
                results.append(
                    {
                        "size": size,
                        "dtype": dtype,
                        "pipeline": name,
                        "images_per_second": args.batch / statistics.median(times[name]),
                        "this_over_peer": measure.ratio(times[PEER], times[name]),
                        "seconds": times[name],
                    }
                )
    rows = [
        [
            result["size"],
            result["dtype"],
            result["pipeline"],
            f"{result['images_per_second']:.4g}",
            measure.spread(result["this_over_peer"]),
        ]
        for result in results
    ]
    columns = ["size", "dtype", "pipeline", "images/s", "this over DiTPipeline (min–max)"]
    setting = f"{args.steps} steps, batch {args.batch}, {args.threads} threads, {args.device}"
    measure.report(args, columns, rows, results, [setting + f", {args.repeats} interleaved repetitions"])


if __name__ == "__main__":
    main()
