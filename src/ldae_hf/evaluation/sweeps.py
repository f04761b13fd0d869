"""Sweeps over one trained model, without training it again: a linear probe after each block of the whole network, at
each timestep of clean and of noisy input, for each layer and pool.

Features are cached; those of all blocks, layers and pools come from one forward pass per batch. Each point holds
4·n·D bytes of memory: large sets are swept over a slice.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..recipes import Recipe
from ..training.circumstances import circumstances
from .encoders import POOLS, open_encoder
from .encoders.ldae import LDAEEncoder
from .features import Features
from .ledger import append_to_ledger
from .linear_probe import LEARNING_RATES, linear_probe
from .rerun import rerun_command
from .run import evaluate_encoders
from .whole_network import load_stack


# l-DAE on ImageNet-1k: 24 blocks, 12 of them the encoder; 1000 noise levels (arXiv 2401.14404, appendix).
PAPER_BLOCKS, PAPER_LEVELS = 24, 1000
PAPER_DEPTH = {9: 58.5, 10: 62.0, 11: 64.1, 12: 64.5, 13: 63.6, 14: 61.9, 15: 59.7}
PAPER_TIMESTEPS = {
    "clean": {0: 64.1, 10: 64.5, 20: 64.1, 40: 63.3, 80: 62.2},
    "frozen": {0: 64.2, 10: 65.0, 20: 65.0, 40: 65.0, 80: 64.5},  # the paper's noise is probably fresh
}
FEW_BLOCKS = 8  # up to which a sweep takes them all


def depth_range(num_encoder_blocks: int, num_blocks: int) -> list[int]:
    """The blocks around the encoder's end that a sweep takes: an eighth of all to each side, but at least two, as the
    paper's 9 ... 15 of 24, so 4 ... 8 of 12; all of them where there are at most 8."""
    if num_blocks <= FEW_BLOCKS:
        return list(range(1, num_blocks + 1))
    reach = max(2, round(num_blocks / 8))
    return list(range(max(1, num_encoder_blocks - reach), min(num_blocks, num_encoder_blocks + reach) + 1))


def timestep_range(num_levels: int) -> list[int]:
    """The paper's timesteps 0, 10, 20, 40, 80 of 1000, as the same shares of another number of noise levels."""
    shares = (timestep / PAPER_LEVELS for timestep in PAPER_TIMESTEPS["clean"])
    return sorted({min(round(share * num_levels), num_levels - 1) for share in shares})


def run_depth_sweep(
    source: str | Path,
    dataset: str | Path | None = None,
    *,
    blocks: Sequence[int] = (),
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    **options,
) -> dict:
    """Linear probe on the features after blocks of the whole network: the encoder is its first half, and this shows
    where it would end best. Features are the mean over tokens after a LayerNorm without affine, which is what the next
    block normalises its input to.

    Args:
        source: as for [`load_stack`]; of an encoder alone, the sweep ends at its last block, and `note` says so.
        dataset: as for [`evaluate_encoders`]; default the recipe's.
        blocks: numbers from 1; default [`depth_range`].
        output: a JSON file for the result. ledger: a JSON-lines file that it is appended to.
        options: learning_rates, epochs and seed of [`linear_probe`]; device, timestep, noise, dtype, splits, columns
            and what belongs to loading of [`evaluate_encoders`].

    Returns:
        A row as of [`evaluate_encoders`] with `points`, each with `block`, `part` ("encoder" or "decoder"), `top1`,
        `held_out_top1`, `learning_rate`, and `paper_top1` where the paper has this share of the blocks; `best`, the
        number of the point that is best on held-out samples, and the `top1` of that.

    Raises:
        ValueError: from the weights, the data set or the probe; there is no such block.
    """
    stack = load_stack(source)
    last = stack.num_blocks if stack.is_whole else stack.num_encoder_blocks
    chosen = blocks or depth_range(stack.num_encoder_blocks, stack.num_blocks)
    chosen = list(blocks) or [block for block in chosen if block <= last]
    recipe = Recipe.load(stack.folder) if (stack.folder / "recipe.json").is_file() else None
    if dataset is None and recipe is not None:
        dataset = recipe.data["dataset"]
        options |= {key: options.get(key) or recipe.data[key] for key in ("train_split", "test_split")}

    def describe(name: str) -> dict:
        block = int(name.partition("/")[0])
        part = "encoder" if block <= stack.num_encoder_blocks else "decoder"
        return {"block": block, "part": part} | _paper(PAPER_DEPTH, block * PAPER_BLOCKS / stack.num_blocks)

    options["device"] = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    row = _swept("sweep_depth", [(stack.model, dict(layers=chosen), describe)], dataset, stack.processor, **options)
    training = stack.folder / "training.json"
    row["protocol"]["features"]["layer"] = chosen
    row |= {"name": str(source), "encoder_blocks": stack.num_encoder_blocks, "blocks": stack.num_blocks}
    row["training"] = json.loads(training.read_text()) if training.is_file() else None
    if recipe is not None:
        row |= {"recipe": recipe.name, "tier": recipe.tier, "overrides": recipe.overrides}
    if not stack.is_whole:
        row["note"] = f"Only an encoder is here: the sweep ends at its last block, {last} of {stack.num_blocks}."
    return _recorded(row, source, dataset, options | {"block": chosen}, output, ledger)


def run_timestep_sweep(
    source: str | Path,
    dataset: str | Path | None = None,
    *,
    timesteps: Sequence[int] = (),
    noises: Sequence[str] = ("clean", "frozen"),
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    **options,
) -> dict:
    """Linear probe on features at several timesteps, of clean input and of input with the noise of that level, each
    image always with the same noise (fresh noise in every epoch belongs to the full probe). As [`run_depth_sweep`].

    Args:
        source: an l-DAE encoder's folder or name, or a run's folder. timesteps: default [`timestep_range`].
        noises: out of "clean" and "frozen". The others as for [`run_depth_sweep`].

    Returns:
        As [`run_depth_sweep`], with points of `timestep`, `noise` and `sigma`, the standard deviation of that noise.

    Raises:
        ValueError: the encoder is no l-DAE, or has no such timestep.
    """
    source = _encoder_of(source)
    encoder = open_encoder(source, processor=options.get("processor"), device="cpu")
    if not isinstance(encoder, LDAEEncoder):
        raise ValueError(f"{source} is no l-DAE; only an l-DAE has timesteps.")
    schedule, chosen = encoder.model.schedule, list(timesteps)
    chosen = chosen or timestep_range(len(schedule))
    schedule.as_timesteps(torch.tensor(chosen), "cpu")  # raises

    def describing(timestep: int, noise: str) -> Callable[[str], dict]:
        point = {"timestep": timestep, "noise": noise, "sigma": round(schedule.sigmas[timestep].item(), 4)}
        return lambda name: point | _paper(PAPER_TIMESTEPS[noise], timestep * PAPER_LEVELS / len(schedule))

    conditions = [(timestep, noise) for noise in noises for timestep in chosen]
    parts = [(source, dict(timestep=t, noise=noise), describing(t, noise)) for t, noise in conditions]
    row = _swept("sweep_timestep", parts, dataset, options.pop("processor", None), **options)
    row["protocol"]["features"] |= {"timestep": chosen, "noise": list(noises)}
    if len(schedule) == 1:
        row["note"] = f"{schedule.name} has one noise level, so there is one timestep."
    return _recorded(row, source, dataset, options | {"timestep": chosen, "noise": list(noises)}, output, ledger)


def run_layer_sweep(
    source: str | Path,
    dataset: str | Path | None = None,
    *,
    layers: Sequence[int] = (),
    pools: Sequence[str] = (),
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    **options,
) -> dict:
    """Linear probe on features of every layer under every pool, of any encoder. As [`run_depth_sweep`].

    Args:
        source: what [`open_encoder`] opens, or a run's folder. layers: numbers of blocks from 1; default all.
        pools: of [`PooledFeatures`]; default all that the encoder has. The others as for [`run_depth_sweep`].

    Returns:
        As [`run_depth_sweep`], with points of `layer` and `pool`.
    """
    source = _encoder_of(source)
    encoder = open_encoder(source, processor=options.get("processor"), device="cpu")
    layers = list(layers) or list(range(1, encoder.num_layers + 1))
    pools = list(pools) or [pool for pool in POOLS if encoder.has_class_token or not pool.startswith("class")]

    def describe(name: str) -> dict:
        layer, _, pool = name.partition("/")
        return {"layer": int(layer), "pool": pool}

    part, processor = (source, dict(layers=layers, pools=pools), describe), options.pop("processor", None)
    row = _swept("sweep_layers", [part], dataset, processor, **options)
    options |= {"layer": layers, "pool": pools, "processor": processor}
    return _recorded(row, source, dataset, options, output, ledger)


def _swept(task: str, parts: list[tuple], dataset, processor, *, learning_rates=(), epochs=90, **options) -> dict:
    """One row of the points of all parts, each a source, its options for `evaluate_encoders`, and what to say of a
    point by the name of its feature map."""
    seed, progress = options.setdefault("seed", 0), options.setdefault("progress", True)
    training = dict(learning_rates=tuple(learning_rates) or LEARNING_RATES, epochs=epochs, seed=seed, progress=progress)

    def probing(describe: Callable[[str], dict]) -> Callable:
        def probe(train: dict[str, Features], test: dict[str, Features], device: torch.device) -> dict:
            maps = [{name: one.features for name, one in split.items()} for split in (train, test)]
            labels = [next(iter(split.values())).labels for split in (train, test)]
            found = linear_probe(maps[0], labels[0], maps[1], labels[1], **training, device=device)
            points = []
            for name in train:
                tried = [one for one in found["grid"] if one["features"] == name]
                selected = max(tried, key=lambda one: one["held_out_top1"])
                point = {key: selected[key] for key in ("top1", "held_out_top1", "learning_rate")}
                points.append(describe(name) | {"dim": maps[0][name].shape[1]} | point)
            selection = f"of each point the best of {len(training['learning_rates'])} learning rates, and the best "
            selection += "point, on held-out training samples, then trained on all"
            protocol = found["protocol"] | {"selection": selection}
            return {"points": points, "protocol": protocol, "seconds": found["seconds"]}

        return probe

    rows = [
        evaluate_encoders(task, probing(describe), source, dataset, processor=processor, floors=(), **own, **options)[0]
        for source, own, describe in parts
    ]
    points = [point for row in rows for point in row["points"]]
    best = max(range(len(points)), key=lambda number: points[number]["held_out_top1"])
    seconds = round(sum(row["seconds"] for row in rows), 1)
    selected = {"dim": points[best]["dim"], "top1": points[best]["top1"], "best": best}
    return rows[0] | selected | {"points": points, "seconds": seconds}


def _recorded(row: dict, source, dataset, options: dict, output, ledger) -> dict:
    """The row with the command that gives it again, in the ledger and the file that are asked for."""
    train, test = row["protocol"]["train"], row["protocol"]["test"]
    probe = row["protocol"][row["task"]]
    resolved = {"dataset": train["dataset"] if dataset is None else dataset}
    for key, described in (("train_split", train), ("test_split", test)):
        resolved[key] = options.get(key) or described["split"]
    resolved |= {"learning_rate": probe["learning_rates"], "epochs": probe["epochs"], "seed": probe["seed"]}
    resolved["timestep"] = options.get("timestep")
    if resolved["timestep"] is None:
        resolved["timestep"] = row["protocol"]["features"]["timestep"]
    left_out = {"progress", "device", "cache_dir", "learning_rates", *resolved}
    words = resolved | {key: value for key, value in options.items() if key not in left_out}
    command = row["task"].replace("sweep_", "sweep ").replace("timestep", "timesteps")
    row["rerun"] = rerun_command(command, words, [source])
    row = append_to_ledger(row, ledger) if ledger else circumstances() | row
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False)
        Path(output).write_text(text + "\n", encoding="utf-8")
    return row


def _paper(numbers: dict[int, float], place: float) -> dict:
    """The paper's number at its own block or timestep, if there is one just there."""
    return {"paper_top1": numbers[place]} if place in numbers else {}


def _encoder_of(source: str | Path) -> str | Path:
    """An encoder as it is given; of a run's folder the encoder in it."""
    inside = Path(source) / "encoder"
    return inside if (inside / "config.json").is_file() else source
