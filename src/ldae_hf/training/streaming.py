"""Images from a `datasets.IterableDataset`, whose rows come in shards and can only be read one after the other.

Shards are dealt out to processes and, within them, to the workers of the data loader. `datasets` loses the content of
its shuffle buffer when a stream is resumed, so the rows are shuffled here: block by block, each in an order that is a
pure function of the seed. The state of a stream is then a few integers, and reading one block again restores it.

Streams are read in worker processes only: a process that leaves a Parquet scan half-way may hang or abort when it ends
(apache/arrow issue 45214), which the workers of a data loader do not, since they end without cleaning up.
"""

import logging
from collections.abc import Iterator
from itertools import islice

import fsspec.asyn
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .hub_access import Patience
from .sampling import SampleMaker, collate, random_generator
from .sources import MAX_TRIES, BadImageError, ImageSource
from .workers import shield_from_signals


logger = logging.getLogger(__name__)


def process_shards(num_shards: int, rank: int, world_size: int) -> tuple[list[int], int]:
    """The shards that a process reads, and the step at which it takes rows from them.

    Whole shards if they can be shared evenly; else every process reads all shards and keeps one row in `world_size`.
    """
    if num_shards % world_size == 0:
        return list(range(rank, num_shards, world_size)), 1
    return list(range(num_shards)), world_size


def read_rows(
    source: ImageSource, shards: list[int], rank: int, world_size: int, start_place: int = 0, start_row: int = 0
) -> Iterator[tuple[int, int, str, dict]]:
    """One pass over `shards` from a row on: (place in `shards`, row of the shard, name, content) of every row that is
    in no quarantine. After a failure that passes, a shard is opened anew at the row that comes next."""
    # fsspec's event loop does not survive the fork of a worker.
    fsspec.asyn.reset_lock()
    step = process_shards(source.dataset.num_shards, rank, world_size)[1]
    left_out = source.quarantine.rows if source.quarantine else {}
    row, place = start_row, start_place
    patience = Patience(f"Reading {source.name}", source.name)
    while place < len(shards):
        try:
            for content in _shard_rows(source.dataset, shards[place], row, step, rank, world_size):
                patience.reset()
                name = f"{shards[place]}:{row * step + (rank if step > 1 else 0)}"
                if name in left_out:
                    source.quarantine.check(name, source.digest(content), source.name)
                else:
                    yield place, row, name, content
                row += 1
            place, row = place + 1, 0
        except Exception as error:
            patience.wait(error)


def _shard_rows(dataset, index: int, start_row: int, step: int, rank: int, world_size: int) -> Iterator[dict]:
    """What a process reads of a shard, from a row of its own on."""
    shard = dataset.shard(num_shards=dataset.num_shards, index=index)
    if start_row:
        shard = shard.skip(start_row * step)
    if step > 1:
        shard = split_dataset_by_node(shard, rank, world_size)
    # `iter` and not `__iter__`: the latter would deal out the rows to the workers once more.
    for columns in shard.iter(batch_size=16):
        for content in zip(*columns.values(), strict=True):
            yield dict(zip(columns, content, strict=True))


class OrderedStream(IterableDataset):
    """One pass over a process's share, in order; an unreadable image is left out and listed.

    Yields the dictionaries of `make` with `bad_images`. In one process and one worker, `sample_ids` number the rows of
    the stream.
    """

    def __init__(self, source: ImageSource, make: SampleMaker, rank: int = 0, world_size: int = 1):
        self.source, self.make, self.rank, self.world_size = source, make, rank, world_size

    def __iter__(self) -> Iterator[dict]:
        lane, lanes = get_worker_info().id, get_worker_info().num_workers
        shards, _ = process_shards(self.source.dataset.num_shards, self.rank, self.world_size)
        rows = read_rows(self.source, shards[lane::lanes], self.rank, self.world_size)
        # A sample waits until the next one is there, to take along what is unreadable between them or at the end.
        sample, bad_images = None, []
        for count, (_, _, name, content) in enumerate(rows):
            try:
                image, label = self.source.read(content)
            except BadImageError as error:
                bad_images.append(self.source.describe_bad(name, content, error))
                continue
            if sample is not None:
                yield sample | {"bad_images": bad_images}
                bad_images = []
            sample = self.make(image, label, 0, (count * lanes + lane) * self.world_size + self.rank)
        if sample is not None:
            yield sample | {"bad_images": bad_images}
        elif bad_images:
            raise ValueError(f"No image of {self.source.name} can be read; the first one: {bad_images[0]['reason']}")


class _ShuffledStream(IterableDataset):
    """Endless batches of one process, each with its lane and the state in which this leaves the lane.

    A lane is the share of one worker: shards in an order that changes with the epoch, rows shuffled in blocks.
    """

    def __init__(self, source: ImageSource, make: SampleMaker, layout: dict, lanes: list[dict], batches_done: int):
        self.source, self.make, self.layout = source, make, layout
        self.lanes, self.batches_done = lanes, batches_done

    def __iter__(self) -> Iterator[tuple[int, dict, dict]]:
        # The data loader asks its workers in turn and begins with the first: after k batches, that is lane k.
        lane = (get_worker_info().id + self.batches_done) % len(self.lanes)
        samples = self._samples(lane, self.lanes[lane])
        while True:
            batch = list(islice(samples, self.layout["batch_size"]))
            yield lane, batch[-1][1], collate([sample for sample, _ in batch])

    def _samples(self, lane: int, state: dict) -> Iterator[tuple[dict, dict]]:
        """Samples of a lane, each with the state behind it; one takes along the unreadable images before it."""
        lanes, rank, world_size = len(self.lanes), self.layout["rank"], self.layout["world_size"]
        role, roles = rank * lanes + lane, world_size * lanes
        count, bad_images = state["count"], []
        for epoch, name, content, position in self._shuffled_rows(lane, role, roles, state):
            try:
                image, label = self.source.read(content)
            except BadImageError as error:
                bad_images.append(self.source.describe_bad(name, content, error))
                if len(bad_images) == MAX_TRIES:
                    raise ValueError(
                        f"{MAX_TRIES} images in a row of {self.source.name} cannot be read; the last one: {error}"
                    ) from error
                continue
            sample = self.make(image, label, epoch, count * roles + role)
            count += 1
            yield sample | {"bad_images": bad_images}, position | {"count": count}
            bad_images = []

    def _shuffled_rows(self, lane: int, role: int, roles: int, state: dict) -> Iterator[tuple[int, str, dict, dict]]:
        """Rows of a lane, epoch after epoch, in shuffled blocks: (epoch, name, content, state behind it)."""
        seed, rank, world_size = (self.layout[name] for name in ("seed", "rank", "world_size"))
        shards = process_shards(self.source.dataset.num_shards, rank, world_size)[0][lane :: len(self.lanes)]
        while True:
            epoch = state["epoch"]
            order = random_generator(seed, "shards", epoch, role).permutation(len(shards))
            ordered = [shards[i] for i in order]
            rows = read_rows(self.source, ordered, rank, world_size, state["shard"], state["row"])
            while block := list(islice(rows, self.layout["shuffle_buffer"])):
                order = random_generator(seed, "buffer", epoch, state["block"] * roles + role).permutation(len(block))
                for offset in range(state["offset"], len(block)):
                    _, _, name, content = block[order[offset]]
                    yield epoch, name, content, state | {"offset": offset + 1}
                place, row, _, _ = block[-1]
                state = {"epoch": epoch, "shard": place, "row": row + 1, "block": state["block"] + 1, "offset": 0}
            if state["block"] == 0:
                raise ValueError(f"Worker {lane} of process {rank} found no rows in its shards of {self.source.name}.")
            state = {"epoch": epoch + 1, "shard": 0, "row": 0, "block": 0, "offset": 0}


class StreamingLoader:
    """Micro-batches of one process from a stream, up to `num_batches`; can be saved and resumed exactly.

    A lane that is through its shards begins anew, so that every process always has a batch. `sample_ids` are running
    positions, different in all workers of all processes.

    Args:
        source: over a stream. make: makes samples of images.
        batch_size: images of a micro-batch. num_batches: how many, counted from the beginning of the training.
        num_workers: at least one; at most as many as a process has shards are used.
        shuffle_buffer: rows of a block, which a worker holds in memory as compressed images.

    Raises:
        ValueError: `shuffle_buffer` is less than 1.
    """

    def __init__(
        self,
        source: ImageSource,
        make: SampleMaker,
        batch_size: int,
        num_batches: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
        shuffle_buffer: int = 1000,
        pin_memory: bool = False,
    ):
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}, but must be at least 1 row.")
        shards, _ = process_shards(source.dataset.num_shards, rank, world_size)
        if num_workers > len(shards):
            logger.warning("%s has %d shard(s) for a process: as many workers.", source.name, len(shards))
        self.num_workers = max(1, min(num_workers, len(shards)))
        self.source, self.make, self.num_batches, self.pin_memory = source, make, num_batches, pin_memory
        self.layout = {
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "num_workers": self.num_workers,
            "num_shards": source.dataset.num_shards,
            "batch_size": batch_size,
            "shuffle_buffer": shuffle_buffer,
        }
        start = {"epoch": 0, "shard": 0, "row": 0, "block": 0, "offset": 0, "count": 0}
        self.batches_done, self.lanes = 0, [start] * self.num_workers

    def __len__(self) -> int:
        return max(0, self.num_batches - self.batches_done)

    def __iter__(self) -> Iterator[dict]:
        """Goes on behind the last batch that was given out."""
        stream = _ShuffledStream(self.source, self.make, self.layout, list(self.lanes), self.batches_done)
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=shield_from_signals,
            generator=torch.Generator(),  # else each start draws a seed from the generator that a run saves and resumes
        )
        for lane, state, batch in islice(loader, len(self)):
            self.lanes[lane] = state
            self.batches_done += 1
            yield batch

    def state_dict(self) -> dict:
        """Where the last batch that was given out ends: integers only, for JSON. Each process has its own."""
        return {"layout": dict(self.layout), "batches_done": self.batches_done, "lanes": list(self.lanes)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where a saved state ends.

        Raises:
            ValueError: the state was saved by another layout of processes, workers, batches or shards.
        """
        for name, value in self.layout.items():
            if state["layout"][name] != value:
                raise ValueError(
                    f"The stream's position was saved with {name}={state['layout'][name]}, not {value}; "
                    "a stream can only be resumed on the layout that saved it."
                )
        self.batches_done, self.lanes = state["batches_done"], list(state["lanes"])
