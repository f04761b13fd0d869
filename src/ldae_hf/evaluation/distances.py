"""Results of `ldae fid`: what the number is called, and with which others it may be compared."""

import json


def comparison(row: dict) -> str:
    """What the distances of two rows must have in common to be compared, as text that is equal where they have.

    It is the extractor, the reference, and of the samples their number, precision and weights and how they were drawn;
    not the seed, and not what belongs to the model: its classes and its noise.
    """
    protocol = row["protocol"]
    same = {key: protocol["samples"][key] for key in ("count", "sampler", "steps", "guidance", "dtype", "weights")}
    same["extractor"] = protocol["extractor"]
    # `datasets` makes its fingerprint of paths and times: the same images elsewhere have another.
    same["reference"] = {key: value for key, value in protocol["reference"].items() if key != "fingerprint"}
    return json.dumps(same, sort_keys=True, ensure_ascii=False)


def comparable(row_a: dict, row_b: dict) -> bool:
    """Whether the Fréchet distances of two rows of the ledger may be compared."""
    return comparison(row_a) == comparison(row_b)


def distance_label(protocol: dict, seed: bool = True) -> str:
    """The name of a distance, all that one needs to know to compare it, on one line.

    It is called FID-50K only if it is one: Inception's features of 50,000 samples.
    """
    extractor, reference, samples = (protocol[key] for key in ("extractor", "reference", "samples"))
    name = "FID" if (extractor["name"], samples["count"]) == ("Inception-v3", 50_000) else "FD"
    network = f"{extractor['name']} {extractor['fingerprint'][:8]}"
    split = f" {reference['split']}" if reference["split"] else ""
    size = f"{reference['image_size']} px"
    drawn = [samples["sampler"], f"{samples['steps']} steps", f"guidance {samples['guidance']:g}"]
    drawn += [f"{samples['weights']} weights"] if samples["weights"] else []
    drawn += [samples["dtype"]] if samples["dtype"] != "float32" else []
    drawn += [f"seed {samples['seed']}"] if seed else []
    parts = [
        ", ".join([network, *([extractor["layer"]] if "layer" in extractor else [])]),
        f"reference {reference['dataset']}{split}, {reference['images']:,} images at {size}, "
        f"{reference['preprocessing']}",
        ", ".join(drawn),
    ]
    return f"{name}-{_short(samples['count'])} ({'; '.join(parts)})"


def small_sample_warnings(counts: dict[str, int], dim: int) -> list[str]:
    """A sentence for each set of images that is smaller than the features' dimension."""
    return [
        f"There are fewer {name} ({count:,}) than values in a feature ({dim:,}): the covariance is singular, and the "
        "distance is mostly that of the number of images."
        for name, count in counts.items()
        if count < dim
    ]


def distance_table(row: dict) -> str:
    """A result of `run_fid` as plain text: the distance, those of its floors, and the name of the number."""
    rows = [("", "distance", "images")]
    generated = {"frechet_distance": row["frechet_distance"], "images": row["protocol"]["samples"]["count"]}
    for name, entry in {"generated": generated, **row["floors"]}.items():
        rows.append((name, f"{entry['frechet_distance']:.4g}", f"{entry['images']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{name:{widths[0]}}  {value:>{widths[1]}}  {images:>{widths[2]}}" for name, value, images in rows]
    return "\n".join([*lines, row["label"], *(f"warning: {warning}" for warning in row["warnings"])])


def _short(count: int) -> str:
    return f"{count / 1000:g}K" if count >= 1000 else str(count)
