"""What a row of the ledger measured: its number, of which seed, on which data, and whether it is of a floor."""

Seed = int | str  # of the pre-training; of an encoder that was not trained here, the beginning of its fingerprint

# What is compared: how a task is called, and the key of its number, in percent, of which more is better.
TASKS = {
    "linear_probe": ("linear probe", "top1"),
    "full_linear_probe": ("full linear probe", "top1"),
    "knn": ("k-NN", "top1"),
    "few_shot": ("few-shot", "top1"),
    "attentive_probe": ("attentive probe", "top1"),
    "fine_tune": ("fine-tuning", "top1"),
    "segmentation_probe": ("segmentation probe, mean IoU", "mean_iou"),
    "retrieval": ("retrieval, mean average precision", "mean_average_precision"),
}


def numbers_of(row: dict) -> dict[str, str]:
    """The keys of the row's numbers that are compared, and what each is called."""
    name, key = TASKS[row["task"]]
    shares = [f"{100 * entry['fraction']:g}" for entry in row.get("fractions", ())]  # of the labels, in few-shot
    return {f"top1_{share}_percent": f"{name}, {share} %" for share in shares} or {key: name}


def dataset_of(row: dict) -> str:
    """The data set that a row was tested on, or whose images it was measured against."""
    return next((row["protocol"][key]["dataset"] for key in ("test", "reference") if key in row["protocol"]), "unnamed")


def seed_of(row: dict) -> Seed:
    seed = (row.get("training") or {}).get("seed")
    return seed if seed is not None else str(encoder_of(row))[:8]


def encoder_of(row: dict) -> str | None:
    """The fingerprint of the encoder."""
    return row["protocol"]["features"].get("encoder")


def floor_of(row: dict) -> str | None:
    """The name of the floor that a row measured in an encoder's place, as the full probe and fine-tuning do; None of an
    encoder's own row, which has its floors beside its number."""
    if row.get("model", {}).get("start") == "new weights":
        return "from scratch"
    is_untrained = not row.get("recipe") and row.get("name") == "untrained encoder"
    return row["protocol"]["features"].get("floor") or (row["name"] if is_untrained else None)
