"""The share of a pre-training step that the exponential moving average takes, at 256 tokens and 64 images per device.

A step is forward, loss, backward, fused AdamW, zero_grad and `ExponentialMovingAverage.update`; bfloat16 is autocast.
Where 64 images would take a minute, `--batch` measures fewer: AdamW and the average do not depend on the images, and
forward and backward are taken to grow with them; the share at 64 images is then worked out, and said to be.

The floor is an addition in place of one flat tensor with as many elements to another: like the average it reads both
and writes one, 12 bytes per parameter, and it says what memory allows.
"""

import statistics
from functools import partial

import measure
import torch

from ldae_hf import LDAEConfig, LDAEForPreTraining
from ldae_hf.training.optimization import ExponentialMovingAverage, adamw, update


HEAD_DIM, IMAGES_PER_DEVICE, BYTES_PER_PARAMETER = 64, 64, 12


def compare(width: int, dtype: str, args) -> dict:
    """One result: seconds of the parts of a step, the floor of the average, and its share of the step."""
    torch.manual_seed(0)
    config = LDAEConfig(
        hidden_size=width,
        num_hidden_layers=args.blocks,
        decoder_num_hidden_layers=args.blocks,
        num_attention_heads=width // HEAD_DIM,
    )
    model = LDAEForPreTraining(config).to(args.device).train()
    optimizer, average = adamw(model, [0.9, 0.95], 0.05), ExponentialMovingAverage(model, decay=0.9999)
    pixel_values = torch.rand(args.batch, 3, config.image_size, config.image_size, device=args.device) * 2 - 1
    count = sum(parameter.numel() for parameter in model.parameters())
    ours, theirs = torch.zeros(2, count, device=args.device)
    forward = torch.compile(model) if args.compile else model

    def forward_backward():
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(pixel_values).loss
        loss.backward()

    def step():
        forward_backward()
        update(optimizer, 1e-4)
        average.update(model)

    # AdamW's gradients are those that a step has left; alone, it must not drop them.
    runs = {
        "step": (step, 1),
        "forward and backward": (forward_backward, 1),
        "AdamW": (optimizer.step, args.calls),
        "EMA": (partial(average.update, model), args.calls),
        "floor": (partial(ours.add_, theirs), args.calls),
    }
    clocks = {name: partial(measure.seconds, run, args.device, calls) for name, (run, calls) in runs.items()}
    seconds = measure.interleave(clocks, args.repeats)
    grown = [
        both * IMAGES_PER_DEVICE / args.batch + adam + ema
        for both, adam, ema in zip(*(seconds[part] for part in ("forward and backward", "AdamW", "EMA")), strict=True)
    ]
    return {
        "width": width,
        "dtype": dtype,
        "parameters": count,
        "share_of_step": measure.ratio(seconds["EMA"], seconds["step"], 100),
        "share_at_64_images": measure.ratio(seconds["EMA"], grown, 100),
        "ema_over_floor": measure.ratio(seconds["EMA"], seconds["floor"]),
        "gigabytes_per_second": BYTES_PER_PARAMETER * count / statistics.median(seconds["floor"]) / 1e9,
        "seconds": seconds,
    }


def main():
    parser = measure.torch_parser(__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[384])
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the encoder, and again of the decoder")
    parser.add_argument(
        "--calls", type=int, default=10, help="calls of AdamW, of the average and of its floor in a round"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [compare(width, dtype, args) for width in args.widths for dtype in args.dtypes]
    rows = [
        [
            str(result["width"]),
            result["dtype"],
            f"{result['parameters'] / 1e6:.1f}",
            *(f"{1e3 * statistics.median(result['seconds'][part]):.1f}" for part in ("step", "AdamW", "EMA", "floor")),
            f"{result['gigabytes_per_second']:.1f}",
            measure.spread(result["ema_over_floor"]),
            measure.spread(result["share_of_step"]),
            measure.spread(result["share_at_64_images"]),
        ]
        for result in results
    ]
    columns = ["width", "dtype", "M parameters", "step ms", "AdamW ms", "EMA ms", "floor ms", "floor GB/s"]
    columns += ["EMA / floor", f"% of the step, {args.batch} images", f"% of a step of {IMAGES_PER_DEVICE} images"]
    measured = "measured" if args.batch == IMAGES_PER_DEVICE else f"worked out from {args.batch}"
    settings = f"{args.blocks}+{args.blocks} blocks, 256 tokens, {args.threads} threads, {args.device}"
    settings += f", {args.repeats} interleaved repetitions" + (", torch.compile" if args.compile else "")
    notes = [settings, f"Medians (min–max over the rounds). The share at {IMAGES_PER_DEVICE} images is {measured}."]
    measure.report(args, columns, rows, results, notes)


if __name__ == "__main__":
    main()
