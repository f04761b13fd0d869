"""Where the time of a row at the desk tier goes: data, tokenizer, noise, network, AdamW, and what Python adds to them.

The run is `pretrain` itself at the tier's sizes (128 px, 64 tokens, width 256, 6+6 blocks) on imagenette128. A round is
`--steps` steps on end, timed as one, and after them each part alone, on the model as it stands; the clock waits for the
device. Learned tokenizers have their shapes and untrained weights. A recipe with a convolutional one runs twice:
encoding in the step, and from cached latents, for which the tier's crops and flips have to go.
"""

import os
import statistics
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import measure
import numpy as np
import torch
from PIL import Image

from ldae_hf import LearnedTokenizer
from ldae_hf.configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LEARNED_TOKENIZERS
from ldae_hf.latent_tokenizers import build_autoencoder
from ldae_hf.patch_tokenizers import TOKENIZERS
from ldae_hf.recipes import load_recipe
from ldae_hf.training.data import load_images, train_loader
from ldae_hf.training.metrics_log import read_lines
from ldae_hf.training.optimization import adamw
from ldae_hf.training.pretrain import pretrain
from ldae_hf.training.token_cache import TokenCache


TIER, DATASET = "desk", "imagenette128"
PARTS = ("data wait", "encode", "noise", "network", "AdamW")
CENTRE_CROPS = ["data.crop=centre", "data.flip=false"]


def made_images(count: int) -> datasets.Dataset:
    """JPEGs of 128x128 pixels, blurred noise, so that they cost what photographs do to decode."""
    random, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        stream = BytesIO()
        coarse.resize((128, 128), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
        files.append({"bytes": stream.getvalue(), "path": None})
    return datasets.Dataset.from_dict({"image": files}, datasets.Features({"image": datasets.Image()}))


def untrained_tokenizer(recipe) -> LearnedTokenizer:
    """A learned tokenizer of the recipe's shape; what its weights are does not change its cost."""
    config, settings, autoencoder = recipe.model_config(), recipe.tokenizer, None
    sizes = config.patch_size, config.latent_dim
    if config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        shape = (config.image_size, settings["stride"], settings["base_width"], settings["residual_blocks"])
        channels = config.latent_dim // (config.patch_size // settings["stride"]) ** 2
        autoencoder = build_autoencoder(*shape, channels)
    buffers = TOKENIZERS[config.tokenizer](config.patch_size, 3, config.latent_dim, "none").unfitted()
    return LearnedTokenizer(config.tokenizer, *sizes, buffers=buffers, autoencoder=autoencoder)


class Rounds:
    """An evaluation for `pretrain`: the time since its last call, which is `steps` steps, then that of each part.

    Attributes:
        seconds: of each part, of the `loader` and of a `step`, a value a round; the first round is not counted.
    """

    def __init__(self, recipe, images: datasets.Dataset, folder: Path, args):
        self.recipe, self.images, self.folder, self.args = recipe, images, folder, args
        self.seconds, self.left, self.batches = defaultdict(list), None, None

    def __call__(self, model, processor) -> dict:
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        if self.left is None:
            self.loading(model.config)
            self.optimizer = adamw(model, self.recipe.train["betas"])  # at learning rate 0 it moves nothing
        else:
            self.seconds["step"].append((time.perf_counter() - self.left) / self.args.steps)
        self.parts(model.train(), processor)
        if self.left is None:
            self.seconds.clear()
        self.left = time.perf_counter()
        return {}

    def loading(self, config) -> None:
        """A loader in this process: what one worker does."""
        data, cache = self.recipe.data, list(self.folder.glob("latents/[!.]*"))
        self.batches = iter(
            train_loader(
                load_images(self.images),
                image_size=config.image_size,
                num_timesteps=config.num_noise_levels,
                tokens_shape=(config.num_patches, config.latent_dim),
                timestep_block=config.timestep_block,
                global_batch_size=self.args.batch,
                micro_batch_size=self.args.batch,
                num_steps=self.args.repeats + 1,
                crop=data["crop"],
                crop_scale=data["crop_scale"],
                flip=data["flip"],
                cached_tokens=TokenCache(cache[0]) if cache else None,
            )
        )

    def clock(self, name: str, run):
        """What `run` answers; its seconds are kept."""
        answers = []
        self.seconds[name].append(measure.seconds(lambda: answers.append(run()), self.args.device))
        return answers[0]

    def parts(self, model, processor) -> None:
        ldae, device = model.ldae, model.device
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16")

        def encode():
            if "tokens" in batch:
                return None, batch["tokens"].to(device)
            pixel_values = processor.normalize_pixels(batch["pixel_values"].to(device))
            return pixel_values, ldae.tokenizer.encode(pixel_values)

        def corrupt():
            timesteps, noise = ldae.schedule.sample(tokens, batch["timesteps"], batch["noise"])
            noisy_tokens = ldae.schedule.add_noise(tokens, noise, timesteps)
            return timesteps, noise, ldae.network_input(ldae.tokenizer, noisy_tokens)

        def network():
            with autocast():
                conditioning = ldae.label_embedding(ldae.timestep_embedding(timesteps))
                hidden_states = ldae.encode(shown, conditioning, ldae.grid)
                prediction = model.decoder(hidden_states, conditioning).to(tokens.dtype)
                loss = model.loss(prediction, pixel_values, tokens, noise, timesteps)
            loss.backward()

        def update():
            torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        batch = self.clock("loader", lambda: next(self.batches))
        with autocast():
            pixel_values, tokens = self.clock("encode", encode)
            timesteps, noise, shown = self.clock("noise", corrupt)
        self.clock("network", network)
        self.clock("AdamW", update)


def measure_row(name: str, images: datasets.Dataset, cached: bool, args) -> dict:
    """One result: images/s of the run, the seconds of a step and of its parts, and of a batch in one loader process."""
    overrides = [f"train.global_batch_size={args.batch}", *(CENTRE_CROPS if cached else [])]
    recipe = load_recipe(name, TIER, overrides)
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # the table alone goes to standard output
        folder, tokenizer = Path(folder), None
        if recipe.model["tokenizer"] in LEARNED_TOKENIZERS:
            tokenizer = folder / "untrained"
            untrained_tokenizer(recipe).save_pretrained(tokenizer)
        rounds = Rounds(recipe, images, folder / "run", args)
        pretrain(
            name,
            tier=TIER,
            overrides=overrides,
            output_dir=folder / "run",
            dataset=images,
            tokenizer=tokenizer,
            cache_latents=cached,
            per_device_batch_size=args.batch,
            num_workers=args.workers,
            mixed_precision=args.mixed_precision,
            log_every=args.steps,
            checkpoint_every=10**9,
            evaluations=[rounds],
            evaluate_every=args.steps,
            max_steps=args.steps * (args.repeats + 1),
        )
        lines = [line for line in read_lines(folder / "run" / "metrics.jsonl") if "data_wait" in line][1:]
    seconds = rounds.seconds
    seconds["data wait"] = [line["data_wait"] * args.batch / line["images_per_second"] for line in lines]
    parts = zip(*(seconds[part] for part in PARTS), strict=True)
    seconds["rest"] = [step - sum(values) for step, values in zip(seconds["step"], parts, strict=True)]
    return {
        "recipe": recipe.title,
        "cached_latents": cached,
        "images_per_second": args.batch / statistics.median(seconds["step"]),
        "shares": {part: measure.ratio(seconds[part], seconds["step"], 100) for part in (*PARTS, "rest")},
        "loader_images_per_second": args.batch / statistics.median(seconds["loader"]),
        "workers_that_keep_up": measure.ratio(seconds["loader"], seconds["step"]),
        "seconds": dict(seconds),
    }


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["l_dae", "patch_ae", "replace_noise_schedule"])
    parser.add_argument("--batch", type=int, default=64, help="images of a step; the tier's are 512")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round; it begins with 2 batches per worker")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--images", type=int, default=512, help="images of an epoch, the data set's or made ones")
    parser.add_argument("--made", action="store_true", help=f"draw the images instead of reading {DATASET}")
    parser.add_argument("--mixed-precision", default="bf16", choices=["bf16", "no"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU
    folder = Path(os.environ.get("LDAE_DATA", "."), DATASET)
    if not args.made and not folder.is_dir():
        print(f"Nothing is measured: there is no {folder} ($LDAE_DATA names the folder that holds it); or give --made.")
        return

    images = made_images(args.images) if args.made else load_images(folder, f"train[:{args.images}]").dataset
    results = []
    for name in args.recipes:
        results.append(measure_row(name, images, False, args))
        if load_recipe(name, TIER).model["tokenizer"] in CONVOLUTIONAL_TOKENIZERS:
            results.append(measure_row(name, images, True, args))
    rows = [
        [
            result["recipe"].split()[0] + (", cached latents" if result["cached_latents"] else ""),
            f"{result['images_per_second']:.1f}",
            *map(measure.spread, result["shares"].values()),
            f"{result['loader_images_per_second']:.0f}",
            f"{result['workers_that_keep_up']['median']:.2f}",
        ]
        for result in results
    ]
    columns = ["recipe", "images/s", *(f"{part} %" for part in (*PARTS, "rest"))]
    columns += ["one loader process, images/s", "workers that keep up"]
    settings = f"tier {TIER}, batch {args.batch}, {args.threads} threads, {args.device}, {args.mixed_precision}, "
    settings += f"{args.workers} workers, {args.repeats} rounds of {args.steps} steps, "
    settings += f"{args.images} {'made images' if args.made else f'images of {DATASET}'}"
    notes = [settings, "Shares of a step: medians (min–max over the rounds); the rest is Python and the loop."]
    measure.report(args, columns, rows, results, notes)


if __name__ == "__main__":
    main()
