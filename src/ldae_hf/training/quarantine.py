"""Images that `ldae data check` found and a training leaves out: a JSON-lines file, and the rows that it names.

The first line says of what and when the file was made; each other line is something that was found: `index` (in a
stream "shard:row"), `path` if the row has one, `kind`, `severity`, `reason`, `left_out` and `digest`, by which the
image is known again. A line can be edited: what counts is its `left_out`.
"""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path


VERSION = 1


@dataclass(frozen=True)
class Quarantine:
    """What a quarantine file leaves out. [`read_quarantine`] makes it.

    Attributes:
        file, dataset: for messages.
        num_images: of the data set that was checked. fingerprint: of all its images' bytes, in order.
        rows: the digest of each image to leave out, by its index.
    """

    file: str
    dataset: str
    num_images: int
    fingerprint: str
    rows: dict[int | str, str]

    @property
    def sha256(self) -> str:
        """Of the data set and the rows, whenever and however often the file was written."""
        rows = sorted((str(index), digest) for index, digest in self.rows.items())
        return sha256(json.dumps([self.fingerprint, rows]).encode()).hexdigest()

    def check(self, index: int | str, digest: str, name: str) -> None:
        """Raises ValueError unless the row to leave out is the one that was checked."""
        if self.rows[index] != digest:
            raise ValueError(
                f"{self.file} was made for {self.dataset}, but image {index} of {name} is another one there: "
                "check this data set with `ldae data check`."
            )


def digest(content: bytes) -> str:
    """64 bits of an image file's sha256, in hexadecimal."""
    return sha256(content).hexdigest()[:16]


def quarantine_text(header: dict, findings: list[dict]) -> str:
    """A quarantine file: `header` with at least dataset, num_images and fingerprint, and a line for each finding."""
    lines = [{"ldae_quarantine": VERSION} | header, *findings]
    return "".join(json.dumps(line) + "\n" for line in lines)


def read_quarantine(file: str | Path, streaming: bool, name: str) -> Quarantine:
    """Reads a file of `ldae data check`.

    Args:
        streaming, name: of the data set that it is meant for.

    Raises:
        ValueError: there is no such file, it is no quarantine file or a damaged one, or rows of a stream are named
            otherwise.
    """
    file = Path(file)
    try:
        header, *findings = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        version, streamed = header["ldae_quarantine"], header["streaming"]
        rows = {finding["index"]: finding["digest"] for finding in findings if finding["left_out"]}
        quarantine = Quarantine(str(file), header["dataset"], header["num_images"], header["fingerprint"], rows)
    except FileNotFoundError as error:
        raise ValueError(f"There is no quarantine file {file}; `ldae data check` writes one.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no quarantine file, or a damaged one; `ldae data check` writes one.") from error
    if version != VERSION:
        raise ValueError(f"{file} was written by another version of ldae; write it anew with `ldae data check`.")
    if streamed != streaming:
        raise ValueError(
            f"{file} names the rows of a data set {'as a stream' if streamed else 'on disk'}, but {name} is read "
            f"{'as a stream' if streaming else 'from the disk'}: run `ldae data check` again, "
            f"{'with' if streaming else 'without'} --streaming."
        )
    return quarantine


def leave_out(source, file: str | Path):
    """An [`ImageSource`] without the images that a quarantine file names; see [`load_images`].

    Raises:
        ValueError: as [`read_quarantine`], or the file was made for another data set, or nothing is left.
    """
    quarantine = read_quarantine(file, source.streaming, source.name)
    if not source.streaming and source.num_images != quarantine.num_images:
        raise ValueError(
            f"{file} was made for {quarantine.dataset} with {quarantine.num_images} images, but {source.name} has "
            f"{source.num_images}: check this data set with `ldae data check`."
        )
    num_images = source.num_images and source.num_images - len(quarantine.rows)
    if num_images == 0:
        raise ValueError(f"{file} leaves out every image of {source.name}.")
    dataset = source.dataset
    if not source.streaming:  # the rows of a stream are compared when they come by
        numbers = sorted(quarantine.rows)
        for number in numbers[:: len(numbers) // 64 + 1]:
            quarantine.check(number, source.digest(dataset[number]), source.name)
        dataset = dataset.select([i for i in range(source.num_images) if i not in quarantine.rows])
    return replace(source, dataset=dataset, num_images=num_images, quarantine=quarantine)
