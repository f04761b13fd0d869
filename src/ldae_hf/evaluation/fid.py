"""From a model that generates to the Fréchet distance of its images, beside its floors: `ldae fid`."""

import json
import time
from hashlib import sha256
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed

from ..pipeline_ldae import LDAEPipeline
from ..recipes import Recipe
from ..training.circumstances import circumstances
from ..training.data import ImageSource, load_images
from ..training.session import TIMEOUT
from .distances import distance_label, small_sample_warnings
from .extractors import Extractor, load_extractor
from .features import FEATURE_CACHE
from .frechet import FeatureStatistics, frechet_distance
from .generation_floors import noise_floor, real_floors, reference_statistics, statistics_of
from .generators import load_generator
from .ledger import append_to_ledger
from .rerun import rerun_command
from .samples import SampleStore, Sampling, ShardedSamples


NOISE_IMAGES = 10_000  # at most


def run_fid(
    source: str | Path | LDAEPipeline,
    dataset: str | Path | dict | None = None,
    *,
    extractor: str | Path | Extractor,
    split: str | None = None,
    test_split: str | None = None,
    num_samples: int = 50_000,
    steps: int = 250,
    sampler: str = "ancestral",
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    dtype: str = "float32",
    weights: str | None = None,
    samples_dir: str | Path | None = None,
    num_workers: int = 2,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = FEATURE_CACHE,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> dict | None:
    """The Fréchet distance between generated images and a data set, in squared units of the extractor's features.

    The images are kept, and made only where they are missing. Processes that accelerate or torchrun started share them.

    Args:
        source, dtype, weights: as for [`load_generator`].
        dataset: the reference, what [`load_images`] opens; by default the recipe's.
        extractor: as for [`load_extractor`].
        split, test_split: of the reference and of the floors; default `"train"` and `"test"`, or the recipe's where it
            names the data set.
        num_samples: how many images are generated.
        steps, sampler, guidance, seed: as in [`Sampling`]. Sample i of a model with classes is of class i modulo these.
        batch_size: images of a forward pass. num_workers: processes that decode images.
        samples_dir: where the samples are kept; by default in `samples/` of the run.
        device: by default the GPU if there is one.
        cache_dir: where features of the data set are kept; None keeps nothing.
        output: a JSON file for the result. ledger: a JSON-lines file that it is appended to.
        progress: show progress bars.

    Returns:
        In the main process the result as plain JSON values: `frechet_distance`, that of each of the `floors` with its
        number of `images`, `label` (the number's name), `warnings`, `protocol`, `images_per_second` of the generation
        (None if nothing had to be generated), and the circumstances. In others None.

    Raises:
        ValueError: from the model, the extractor, the data set or the samples' folder; before anything is generated.
            Or another process failed, at any time: its message says why.
    """
    began, state = time.monotonic(), processes()
    # Of the hosts, whatever the devices use: a process that has ended is noticed at once, and not after a timeout.
    group = distributed.new_group(backend="gloo", timeout=TIMEOUT) if state.num_processes > 1 else None
    if device is None and state.num_processes > 1:
        device = state.device
    generator = load_generator(source, weights=weights, dtype=dtype, device=device)
    pipeline, facts = generator.pipeline, generator.facts
    device = pipeline.device
    sampling = Sampling(sampler, steps, guidance, seed)
    sampling.check(pipeline)
    given_extractor, extractor = extractor, load_extractor(extractor, device)
    drawn = sampling.facts(pipeline, facts["model"])
    samples_dir = default_samples_dir(generator.folder, drawn) if samples_dir is None else Path(samples_dir)
    store = SampleStore(samples_dir, drawn, pipeline.processor.image_size, num_samples)
    store.check()
    if state.is_main_process:
        named = named_images(dataset, split, test_split, generator.folder)
        reference, test = open_images(*named)
        store.begin()
    from_all(group, None)  # wait for the others
    store.check()  # a process may have found a newer checkpoint than the main one did
    if state.is_main_process:  # the others begin to generate
        loading = dict(num_workers=num_workers, cache_dir=cache_dir, progress=progress, batch_size=batch_size)
        compared, described = reference_statistics(extractor, reference, pipeline, **loading)
        floors, floors_described = real_floors(extractor, test, pipeline, **loading)
        floors["noise"] = noise_floor(extractor, pipeline, seed, min(num_samples, NOISE_IMAGES), batch_size)

    layout = dict(process=state.process_index, num_processes=state.num_processes, progress=progress)
    samples = ShardedSamples(store, sampling, pipeline, batch_size=batch_size, **layout)
    generated = statistics_of(extractor, (batch for images, _ in samples for batch in images.split(batch_size)), device)
    generated, images_per_second = together(generated, samples, group)
    if not state.is_main_process:
        return None

    options = dict(zip(("dataset", "split", "test_split"), named, strict=True))
    options |= dict(extractor=given_extractor, num_samples=num_samples, steps=steps, sampler=sampler, guidance=guidance)
    options |= dict(seed=seed, batch_size=batch_size, dtype=facts["dtype"], weights=facts["weights"])
    options |= dict(num_workers=num_workers)
    counts = {"samples": num_samples, "reference images": compared.count, "test images": floors["real"].count}
    protocol = {
        "extractor": extractor.protocol
        | {"name": extractor.name, "fingerprint": sha256(extractor.fingerprint.encode()).hexdigest()},
        "reference": described,
        "floors": floors_described,
        "samples": {"count": num_samples, "weights": facts["weights"]}
        | {key: drawn[key] for key in ("seed", "sampler", "steps", "guidance", "labels", "dtype", "scheduler")},
        "model": facts["model"],
        "encoder": facts["encoder"],
    }
    row = {
        **{key: facts[key] for key in ("recipe", "tier", "overrides", "training")},
        "task": "frechet_distance",
        "name": facts["name"],
        "label": distance_label(protocol),
        "frechet_distance": frechet_distance(generated, compared),
        "floors": {
            name: {"frechet_distance": frechet_distance(floor, compared), "images": floor.count}
            for name, floor in floors.items()
        },
        "warnings": small_sample_warnings(counts, extractor.dim),
        "seconds": round(time.monotonic() - began, 1),
        "images_per_second": images_per_second,
        "protocol": protocol,
        "rerun": rerun_command("fid", options, [source]),
    }
    row = append_to_ledger(row, ledger) if ledger else circumstances() | row
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return row


def processes() -> PartialState:
    """The processes that accelerate or torchrun started, which know of each other from here on; one knows of no other.

    Without a GPU they exchange through gloo, which accelerate starts only if it is told that it is on a CPU.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=TIMEOUT)


def default_samples_dir(folder: Path | None, facts: dict) -> Path:
    """`samples/` of a checkpoint's run, or of another local folder, and in it a name of what the samples are.

    Raises:
        ValueError: the model came from no folder.
    """
    if folder is None:
        raise ValueError(
            "Samples are kept beside a run; for a name on the Hub or a loaded pipeline, name a samples_dir."
        )
    folder = folder.resolve()
    folder = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    return folder / "samples" / sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def named_images(
    dataset: str | Path | dict | None, split: str | None, test_split: str | None, folder: Path | None
) -> tuple[str | Path | dict, str, str]:
    """The data set, the split of the reference and that of the floors; what is not given, the recipe says.

    Raises:
        ValueError: nothing names a data set.
    """
    defaults = {"train_split": "train", "test_split": "test"}
    if dataset is None:
        if folder is None or not (folder / "recipe.json").is_file():
            raise ValueError("No data set is given, and no recipe beside the weights names one; name a data set.")
        defaults = Recipe.load(folder).data
        dataset = defaults["dataset"]
    return dataset, split or defaults["train_split"], test_split or defaults["test_split"]


def open_images(dataset: str | Path | dict, split: str, test_split: str) -> tuple[ImageSource, ImageSource]:
    """The images of the reference and of the floors.

    Raises:
        ValueError: the data set has no such split, or is a stream.
    """
    found = [load_images(dataset, chosen) for chosen in (split, test_split)]
    if any(source.streaming for source in found):
        raise ValueError("A distance needs all images of its reference: give a data set that is not a stream.")
    return tuple(found)


def from_all(group: distributed.ProcessGroup | None, value: object) -> list:
    """What each process hands in, in the order of ranks; all of them call it. Without a group there is one.

    Raises:
        ValueError: a process is not there any more.
    """
    if group is None:
        return [value]
    values = [None] * group.size()
    try:
        distributed.all_gather_object(values, value, group=group)
    except RuntimeError as error:  # gloo's, with addresses and line numbers
        raise ValueError("Another process of this measurement has failed; its message says why.") from error
    return values


def together(
    statistics: FeatureStatistics, samples: ShardedSamples, group: distributed.ProcessGroup | None
) -> tuple[FeatureStatistics, float | None]:
    """Of all processes, the same in each: the statistics, and how many images were generated in a second."""
    parts, made, seconds = zip(*from_all(group, (statistics.state_dict(), samples.made, samples.seconds)), strict=True)
    total = FeatureStatistics(statistics.extractor, statistics.dim)
    for part in parts:
        total.merge(FeatureStatistics.from_state_dict(part, statistics.extractor))
    return total, round(sum(made) / max(seconds), 2) if sum(made) else None
