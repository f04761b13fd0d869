"""A run's model as the folder of a pipeline."""

from pathlib import Path

from ..manifest import write_folder, write_text
from ..pipeline_ldae import LDAEPipeline
from ..progress import quietly
from .generators import load_generator


def write_pipeline(source: str | Path, output_dir: str | Path, *, weights: str | None = None) -> LDAEPipeline:
    """Writes a model with its processor, scheduler and autoencoder as one folder, whole or not at all.

    `LDAEPipeline.from_pretrained` loads it. Recipe and figures of the training lie beside it, if they are known.

    Args:
        source, weights: as [`load_generator`] takes them.

    Raises:
        ValueError: the folder exists, or what `load_generator` raises.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise ValueError(f"{output_dir} is there already, and nothing is written over it; name a new folder.")
    generator = load_generator(source, weights=weights, device="cpu")

    def write(folder: Path) -> None:
        with quietly():
            generator.pipeline.save_pretrained(folder)
        for name in ("recipe.json", "training.json"):
            if generator.folder is not None and (generator.folder / name).is_file():
                write_text(folder / name, (generator.folder / name).read_text())

    write_folder(output_dir, write)
    return generator.pipeline
