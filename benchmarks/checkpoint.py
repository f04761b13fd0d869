"""How long a checkpoint stops the training: ours against `accelerate.save_state`, with the same tensors.

Model, moments of AdamW and an EMA, all in fp32. Ours copies them to the memory of the host and goes on; a thread then
writes, hashes and flushes them. The floor is that copy alone, into memory that is there. `accelerate.save_state`
writes in place and returns when it has written; it neither hashes nor flushes. "Step while writing" is the median step
beside the thread over the median step without.
"""

import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

import measure
import torch
from accelerate import Accelerator

from ldae_hf import LDAEConfig, LDAEForPreTraining
from ldae_hf.training.checkpointing import CheckpointWriter, optimizer_tensors, save_checkpoint
from ldae_hf.training.optimization import ExponentialMovingAverage, adamw, update


class StatefulAverage:
    """An EMA as accelerate wants it."""

    def __init__(self, ema: ExponentialMovingAverage):
        self.ema = ema

    def state_dict(self) -> dict:
        return self.ema.average

    def load_state_dict(self, state: dict) -> None:
        self.ema.load(state)


def compare(width: int, folder: Path, args) -> dict:
    """One result: seconds of a stall, of the copy, of accelerate's, and until it is on the disk."""
    torch.manual_seed(0)
    config = LDAEConfig(
        hidden_size=width,
        num_hidden_layers=args.blocks,
        decoder_num_hidden_layers=args.blocks,
        num_attention_heads=width // 64,
    )
    accelerator = Accelerator(cpu=args.device == "cpu", project_dir=folder)
    model = LDAEForPreTraining(config).to(args.device).train()
    optimizer, ema = adamw(model, [0.9, 0.95]), ExponentialMovingAverage(model, decay=0.9999)
    prepared, _ = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(StatefulAverage(ema))
    pixel_values = torch.rand(args.batch, 3, config.image_size, config.image_size, device=args.device) * 2 - 1

    def step():
        with torch.autocast(args.device, torch.bfloat16):
            loss = prepared(pixel_values).loss
        loss.backward()
        update(optimizer, 1e-4)
        ema.update(model)

    step()
    tensors = [*model.state_dict().values(), *optimizer_tensors(model, optimizer).values(), *ema.average.values()]
    cuda = args.device == "cuda"
    host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda and tensor.is_cuda) for tensor in tensors]
    writer = CheckpointWriter(folder / "ours", keep=1, writes=True)
    saved, during, on_disk = 0, [], []

    def copy():
        for target, tensor in zip(host, tensors, strict=True):
            target.copy_(tensor.detach(), non_blocking=True)

    def save():
        nonlocal saved
        saved += 1
        save_checkpoint(writer, saved, model, optimizer, ema, {"step": saved}, lambda path: None)

    def stall() -> float:
        answer = measure.seconds(save, args.device)
        waited = 0.0
        while writer._thread.is_alive():  # steps beside the thread
            during.append(measure.seconds(step, args.device))
            waited += during[-1]
        waited += measure.seconds(writer.wait, args.device)
        on_disk.append(answer + waited)
        return answer

    def theirs():
        shutil.rmtree(folder / "theirs", ignore_errors=True)
        accelerator.save_state(str(folder / "theirs"))

    runs = {
        "stall": stall,
        "copy": partial(measure.seconds, copy, args.device),
        "accelerate.save_state": partial(measure.seconds, theirs, args.device),
        "step": partial(measure.seconds, step, args.device),
    }
    seconds = measure.interleave(runs, args.repeats)
    return {
        "width": width,
        "gigabytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9,
        "stall_over_copy": measure.ratio(seconds["stall"], seconds["copy"]),
        "accelerate_over_stall": measure.ratio(seconds["accelerate.save_state"], seconds["stall"]),
        "step_while_writing": statistics.median(during) / statistics.median(seconds["step"]),
        "seconds": seconds | {"until it is on the disk": on_disk[1:], "step while writing": during},
    }


def main():
    parser = measure.torch_parser(__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[384])
    parser.add_argument("--blocks", type=int, default=12, help="blocks of the encoder, and again of the decoder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for width in args.widths:
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(width, Path(folder), args))
    rows = []
    for result in results:
        medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
        rows.append(
            [
                str(result["width"]),
                f"{result['gigabytes']:.2f}",
                f"{medians['stall']:.3f}",
                measure.spread(result["stall_over_copy"]),
                f"{medians['accelerate.save_state']:.3f}",
                measure.spread(result["accelerate_over_stall"]),
                f"{medians['until it is on the disk']:.2f}",
                f"{result['step_while_writing']:.2f}",
            ]
        )
    columns = [
        "width",
        "GB",
        "stall s",
        "over the copy",
        "save_state s",
        "over our stall",
        "on disk after s",
        "step while writing",
    ]
    measure.report(args, columns, rows, results)


if __name__ == "__main__":
    main()
