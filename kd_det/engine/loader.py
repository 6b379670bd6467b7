"""A training loader that knows where it is: Detectron2's stream of batches, resumable."""

import itertools
import logging
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.common import AspectRatioGroupedDataset, MapDataset, ToIterableDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from kd_det.data.views import photometric_views
from kd_det.rng import get_rng_state, preserved_rng, set_rng_state

logger = logging.getLogger(__name__)

# Settings of a DataLoader that are taken over; batch_size, collate_fn and dataset are not.
_OPTIONS = (
    "num_workers pin_memory timeout worker_init_fn multiprocessing_context generator "
    "prefetch_factor persistent_workers pin_memory_device"
).split()

Sample = tuple[int, dict[str, Any] | None, dict[str, Any]]
"""Index in the data set, random states before it was mapped (if in this process), mapped image."""


class ResumableLoader:
    """
    Yields the batches of Detectron2's training loader, and can be continued in another process.

    Its state is how many indices of the sampler have been drawn, and which images wait in the
    aspect-ratio groups for their batch to fill up. On resume the sampler is replayed without
    reading any image, and the waiting images are read again.

    * Without workers (``NUM_WORKERS 0``) the waiting images are augmented with the random states
      that they were augmented with, so what follows is the same bit for bit. Batches and random
      numbers are those of Detectron2's own loader.
    * With workers the stream of indices continues after the last batch that was handed out;
      augmentations are drawn anew. Images come in the sampler's order whatever the number of
      workers is.

    Iterating a second time continues; it does not start over.

    Args:
        dataset: map-style, gives mapped images by index.
        sampler: an endless, cheap, seeded stream of this process's indices.
        batch_size: images per batch of this process.
        group: whether a batch holds only wide or only tall images.
        collate: from a list of mapped images to what the model gets.
        options: of the `DataLoader` (``num_workers``, ``pin_memory``, ...).
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Iterable[int],
        batch_size: int,
        *,
        group: bool = False,
        collate: Any = list,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.group = group
        self.collate = collate
        self.options = dict(options or {})
        self.drawn = 0
        self._waiting: tuple[list[Sample], list[Sample]] = ([], [])
        self._to_refill: list[tuple[int, dict[str, Any] | None]] = []
        # Starting a DataLoader draws its workers' seed from the global state. In a run from the
        # beginning that is part of Detectron2's stream of random numbers; later it must not be.
        self.starts_quietly = False

    @classmethod
    def of(cls, loader: Any) -> "ResumableLoader | None":
        """
        The same stream as a loader of Detectron2's ``build_detection_train_loader``; ``None`` for
        any other loader (an iterable data set, a loader of your own).
        """
        collate: Any = list
        if isinstance(loader, IterableDataset) and hasattr(loader, "_map_func"):
            collate, loader = loader._map_func, loader._dataset  # type: ignore[attr-defined]
        group = isinstance(loader, AspectRatioGroupedDataset)
        inner = loader.dataset if group else loader
        if type(inner) is not DataLoader or not isinstance(inner.dataset, ToIterableDataset):
            return None
        if not inner.dataset.shard_sampler:
            return None
        batch_size = loader.batch_size
        options = {name: getattr(inner, name) for name in _OPTIONS if hasattr(inner, name)}
        if not group:
            collate = inner.collate_fn
            if options.get("prefetch_factor"):  # counted in batches there, in images here
                options["prefetch_factor"] *= batch_size
        samples = inner.dataset
        return cls(
            samples.dataset,
            samples.sampler,
            batch_size,
            group=group,
            collate=collate,
            options=options,
        )

    def __iter__(self) -> Iterator[Any]:
        quiet = self.starts_quietly or self.drawn > 0
        if quiet:
            with preserved_rng():
                samples = self._start()
                self._refill()
        else:
            samples = self._start()
        for sample in samples:
            self.drawn += 1
            bucket = self._waiting[self._bucket(sample[2])]
            bucket.append(sample)
            while len(bucket) >= self.batch_size:  # more, if batches were larger before a resume
                batch = [image for _, _, image in bucket[: self.batch_size]]
                # Before it is handed out: the consumer may stop, or save.
                del bucket[: self.batch_size]
                collated = self.collate(batch)
                if collated is not None:  # by which a mapping of Detectron2's leaves one out
                    yield collated

    def _start(self) -> Iterator[Sample]:
        stream = _Samples(self.dataset, self.sampler, self.drawn)
        return iter(
            DataLoader(stream, batch_size=1, collate_fn=operator.itemgetter(0), **self.options)
        )

    def _bucket(self, image: dict[str, Any]) -> int:
        return int(self.group and image["width"] <= image["height"])

    def _refill(self) -> None:
        for index, state in self._to_refill:
            if state is not None:
                set_rng_state(state)
            image = self.dataset[index]
            self._waiting[self._bucket(image)].append((index, state, image))
        self._to_refill = []

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: numbers and tensors only."""
        waiting = [(i, state) for bucket in self._waiting for i, state, _ in bucket]
        return {
            "drawn": self.drawn,
            "waiting": waiting + self._to_refill,
            "sampler": _seeds(self.sampler),
            "images": len(self.dataset),  # type: ignore[arg-type]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continue from a state; takes effect when the iteration starts.

        Raises:
            ValueError: if the training set has another number of images.
        """
        images = len(self.dataset)  # type: ignore[arg-type]
        if state["images"] != images:
            raise ValueError(
                f"The training set has {images} images, but had {state['images']} when the "
                "checkpoint was written: a run resumes with the data that it began with. Restore "
                "DATASETS.TRAIN, or start a new run with MODEL.WEIGHTS set to the checkpoint."
            )
        self.drawn = state["drawn"]
        self._waiting = ([], [])
        self._to_refill = list(state["waiting"])
        vars(self.sampler).update(state["sampler"])


def resumable(loader: Any, cfg: CfgNode) -> ResumableLoader | None:
    """
    `ResumableLoader.of`, whose images have two views where ``KD.VIEWS`` asks for them, whoever
    built the loader and with whatever mapper.

    Raises:
        ValueError: if they are asked for and the loader is not of ``build_detection_train_loader``.
    """
    result, views = ResumableLoader.of(loader), photometric_views(cfg)
    if views is not None:
        if result is None:
            raise ValueError(
                f"KD.VIEWS.ENABLED is True, but the training loader ({type(loader).__name__}) is "
                "not of Detectron2's build_detection_train_loader with a map-style dataset: set it "
                "to False and wrap your mapper in kd_det.data.PhotometricViews."
            )
        result.dataset = MapDataset(result.dataset, views)
    return result


class _Samples(IterableDataset):
    """The samples behind the ``drawn`` first ones; with workers, each takes every W-th."""

    def __init__(self, dataset: Dataset, sampler: Iterable[int], drawn: int) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.drawn = drawn

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in itertools.islice(self.sampler, self.drawn + first, None, step):
            state = get_rng_state(cuda=False) if worker is None else None
            yield index, state, self.dataset[index]


def _seeds(sampler: Any) -> dict[str, Any]:
    """
    What makes a sampler's stream: its seeds, which Detectron2 draws at random when ``SEED`` is not
    set, and the subset that one of its samplers draws.
    """
    return {
        name: value
        for name, value in vars(sampler).items()
        if (isinstance(value, int) and "seed" in name)
        or (isinstance(value, torch.Tensor) and name == "_indexes_subset")
    }
