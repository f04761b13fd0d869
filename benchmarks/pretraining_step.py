"""A full pre-training step at 256 tokens: l-DAE against diffusers' DiT and transformers' MAE at mask ratio 0.

A step is forward, loss, backward, fused AdamW and zero_grad. The transformers have the same width, heads (of 64),
activation and number of blocks (12+12 or 24); bfloat16 means autocast. DiT gets ready-made noisy latents (patch 2 on
32x32x4), so that tokenizing and noising count against us only; MAE sees all tokens and a class token, and its loss is
taken over all patches, because its own is over the masked ones, which are none.

"per FLOP" compares FLOP/s, from each model's counted FLOPs. "step / products" is the step's time over the sum of its
own matrix products, forward and backward, each measured alone: the floor that no rival sets.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial

import measure
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from ldae_hf import LDAEConfig, LDAEForPreTraining


HEAD_DIM, ACTIVATION = 64, "gelu_pytorch_tanh"
Loss = Callable[[], torch.Tensor]


def images(args) -> torch.Tensor:
    return torch.rand(args.batch, 3, 256, 256, device=args.device) * 2 - 1


def ldae(width: int, attention: str, args) -> tuple[torch.nn.Module, Loss]:
    config = LDAEConfig(
        hidden_size=width,
        num_hidden_layers=args.blocks,
        decoder_num_hidden_layers=args.blocks,
        num_attention_heads=width // HEAD_DIM,
        hidden_act=ACTIVATION,
        attn_implementation=attention,
    )
    model, pixel_values = LDAEForPreTraining(config).to(args.device), images(args)
    return model, lambda: model(pixel_values).loss


def dit(width: int, args) -> tuple[torch.nn.Module, Loss]:
    model = DiTTransformer2DModel(
        num_attention_heads=width // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=2 * args.blocks,
        activation_fn="gelu-approximate",
        in_channels=4,
        sample_size=32,
        patch_size=2,
    ).to(args.device)
    latents, noise = torch.randn(2, args.batch, 4, 32, 32, device=args.device)
    timesteps, labels = torch.randint(1000, (2, args.batch), device=args.device)
    return model, lambda: F.mse_loss(model(latents, timestep=timesteps, class_labels=labels).sample, noise)


def mae(width: int, args) -> tuple[torch.nn.Module, Loss]:
    config = ViTMAEConfig(
        image_size=256,
        patch_size=16,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=args.blocks,
        num_attention_heads=width // HEAD_DIM,
        decoder_hidden_size=width,
        decoder_intermediate_size=4 * width,
        decoder_num_hidden_layers=args.blocks,
        decoder_num_attention_heads=width // HEAD_DIM,
        hidden_act=ACTIVATION,
        mask_ratio=0.0,
        attn_implementation="sdpa",
    )
    model, pixel_values = ViTMAEForPreTraining(config).to(args.device), images(args)
    return model, lambda: F.mse_loss(model(pixel_values).logits, model.patchify(pixel_values))


MODELS = {
    "ldae-hf, sdpa": partial(ldae, attention="sdpa"),
    "ldae-hf, eager": partial(ldae, attention="eager"),
    "diffusers DiTTransformer2DModel": dit,
    "transformers ViTMAEForPreTraining": mae,
}


class TrainingStep:
    """One call is one step of one model."""

    def __init__(self, name: str, width: int, dtype: str, args):
        torch.manual_seed(0)
        self.model, self.loss = MODELS[name](width, args=args)
        self.optimizer = torch.optim.AdamW(self.model.train().parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        self.autocast = partial(torch.autocast, args.device, torch.bfloat16, enabled=dtype == "bfloat16")

    def forward_backward(self):
        with self.autocast():
            loss = self.loss()
        loss.backward()

    def __call__(self):
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self) -> tuple[int, measure.MatrixProducts]:
        """FLOPs and matrix products of a step."""
        flops, products = FlopCounterMode(display=False), measure.MatrixProducts()
        with measure.WrittenOutAttention(), flops, products:
            self.forward_backward()
        self.optimizer.zero_grad()
        return flops.get_total_flops(), products


def compare(width: int, dtype: str, names: list[str], args) -> list[dict]:
    """One result per model: seconds, FLOPs, ours over it (per image and per FLOP), step / products, peak memory."""
    steps = {name: TrainingStep(name, width, dtype, args) for name in names}
    flops, products = zip(*(step.count() for step in steps.values()), strict=True)
    flops, products = dict(zip(names, flops, strict=True)), dict(zip(names, products, strict=True))
    runs = {}
    for name, step in steps.items():
        if args.compile:
            step.model.compile()
        runs[name, "step"] = partial(measure.seconds, step, args.device)
        runs[name, "products"] = partial(products[name].seconds, args.device)
    times = measure.interleave(runs, args.repeats)
    medians = {name: statistics.median(times[name, "step"]) for name in names}
    ours = min((name for name in names if name.startswith("ldae-hf")), key=medians.get)
    over = {name: partial(measure.ratio, times[name, "step"], times[ours, "step"]) for name in names}
    return [
        {
            "width": width,
            "dtype": dtype,
            "model": name,
            "ours": ours,
            "images_per_second": args.batch / medians[name],
            "gflop_per_image": flops[name] / args.batch / 1e9,
            "ours_over_this": over[name](),
            "ours_over_this_per_flop": over[name](flops[ours] / flops[name]),
            "step_over_products": measure.ratio(times[name, "step"], times[name, "products"]),
            "peak_mib": None
            if args.no_memory
            else measure.peak_mib_in_a_process(name, "--widths", width, "--dtypes", dtype),
            "seconds": times[name, "step"],
            "products_seconds": times[name, "products"],
        }
        for name in names
    ]


def main():
    parser = measure.torch_parser(__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[384, 1024])
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the encoder, and again of the decoder")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"], choices=["sdpa", "eager"], help="ours")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        build = partial(TrainingStep, args.memory_of, args.widths[0], args.dtypes[0], args)
        print(json.dumps(measure.peak_mib(build, args.device)))
        return

    names = [name for name in MODELS if not name.startswith("ldae-hf") or name.split(", ")[1] in args.attention]
    results = [row for width in args.widths for dtype in args.dtypes for row in compare(width, dtype, names, args)]
    rows = [
        [
            str(result["width"]),
            result["dtype"],
            result["model"],
            f"{result['images_per_second']:.2f}",
            f"{result['gflop_per_image']:.1f}",
            measure.spread(result["ours_over_this"]),
            measure.spread(result["ours_over_this_per_flop"]),
            measure.spread(result["step_over_products"]),
            "" if result["peak_mib"] is None else f"{result['peak_mib']:.0f}",
        ]
        for result in results
    ]
    columns = ["width", "dtype", "model", "images/s", "GFLOP/image", "ldae-hf over this", "the same per FLOP"]
    columns += ["step / products", "peak MiB"]
    settings = f"{args.blocks}+{args.blocks} blocks, batch {args.batch}, {args.threads} threads, {args.device}"
    settings += f", {args.repeats} interleaved repetitions" + (", torch.compile" if args.compile else "")
    notes = [settings, 'Medians (min–max over the pairs). "ldae-hf" is the faster of its rows.']
    measure.report(args, columns, rows, results, notes)


if __name__ == "__main__":
    main()
