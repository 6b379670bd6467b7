"""ResumableLoader: Detectron2's batches, and where they are."""

import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler

from kd_det.engine.loader import ResumableLoader
from tests.steps import rng_unchanged

SHAPES = [(3, 2), (2, 3), (2, 3), (3, 2), (2, 3), (3, 3), (2, 3), (4, 2), (2, 3)]
IMAGES = [{"index": i, "width": w, "height": h} for i, (w, h) in enumerate(SHAPES)]


def mapper(image: dict) -> dict:
    """An augmentation that draws from all three generators."""
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002
    return {**image, "drawn": drawn}


def stock(group: bool = True, workers: int = 0, seed: int = 5, **kwargs: object) -> object:
    return build_detection_train_loader(
        IMAGES,
        mapper=mapper,
        sampler=TrainingSampler(len(IMAGES), seed=seed),
        total_batch_size=2,
        aspect_ratio_grouping=group,
        num_workers=workers,
        **kwargs,
    )


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def take(batches: object, count: int) -> list:
    """Batches, with a step between them that draws random numbers as a model's may."""
    taken = []
    for _ in range(count):
        taken.append(next(batches))
        torch.rand(3)
    return taken


def indices(batches: list) -> list[list[int]]:
    return [[image["index"] for image in batch] for batch in batches]


@pytest.mark.parametrize("group", [True, False])
def test_same_batches_and_random_numbers_as_detectron2(group):
    seed_all(3)
    expected = take(iter(stock(group)), 12)
    after = torch.rand(()), random.random()
    seed_all(3)
    found = take(iter(ResumableLoader.of(stock(group))), 12)
    assert found == expected
    assert (torch.rand(()), random.random()) == after


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_a_resumed_loader_goes_on_bit_for_bit(group, stop, tmp_path):
    seed_all(3)
    whole = iter(ResumableLoader.of(stock(group)))
    expected = take(whole, 14)[stop:]
    seed_all(3)
    loader = ResumableLoader.of(stock(group))
    take(iter(loader), stop)
    torch.save(loader.state_dict(), tmp_path / "state.pth")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    seed_all(77)
    resumed = ResumableLoader.of(stock(group, seed=8))  # another shuffle, were it not restored
    resumed.load_state_dict(torch.load(tmp_path / "state.pth"))  # by PyTorch's safe loader
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    assert take(iter(resumed), 14 - stop) == expected


def test_images_wait_in_both_groups():
    """The case above means something: images of both groups were waiting when it stopped."""
    loader = ResumableLoader.of(stock())
    seen = set()
    for _ in zip(range(12), loader, strict=False):
        seen |= {SHAPES[i][0] > SHAPES[i][1] for i, _ in loader.state_dict()["waiting"]}
    assert seen == {True, False}


def test_a_state_that_was_not_started_is_saved_again():
    loader = ResumableLoader.of(stock())
    take(iter(loader), 3)
    state = loader.state_dict()
    resumed = ResumableLoader.of(stock())
    resumed.load_state_dict(state)
    again = resumed.state_dict()
    assert again["drawn"] == state["drawn"] > 0
    assert [i for i, _ in again["waiting"]] == [i for i, _ in state["waiting"]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_may_resume_with_smaller_batches(size):
    waited = set()
    for stop in range(1, 12):
        larger, smaller = (ResumableLoader.of(stock()) for _ in range(2))
        larger.batch_size, smaller.batch_size = 4, size
        take(iter(larger), stop)
        smaller.load_state_dict(larger.state_dict())
        waited.add(len(larger.state_dict()["waiting"]))
        batches = iter(smaller)
        found = indices([next(batches) for _ in range(12)])
        assert {len(batch) for batch in found} == {size}
        # A group that holds more than a batch goes on, and for itself.
        assert {SHAPES[i][0] > SHAPES[i][1] for i, *_ in found} == {True, False}
        assert all(len({SHAPES[i][0] > SHAPES[i][1] for i in batch}) == 1 for batch in found)
    assert max(waited) == 3  # as many as a group can hold


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_with_workers_the_indices_go_on(group, workers):
    expected = indices(take(iter(ResumableLoader.of(stock(group))), 12))  # in sampler's order
    loader = ResumableLoader.of(stock(group, workers))
    assert indices(take(iter(loader), 5)) == expected[:5]
    resumed = ResumableLoader.of(stock(group, workers, seed=8))
    resumed.load_state_dict(loader.state_dict())
    with rng_unchanged():
        batches = iter(resumed)
        rest = [next(batches) for _ in range(7)]
    assert indices(rest) == expected[5:]


def test_workers_of_a_resumed_run_do_not_repeat_augmentations():
    seed_all(3)
    first = take(iter(ResumableLoader.of(stock(False, 1))), 2)
    loader = ResumableLoader.of(stock(False, 1))
    loader.load_state_dict({**ResumableLoader.of(stock(False, 1)).state_dict(), "drawn": 4})
    seed_all(4)  # what a checkpoint restores
    drawn = {image["drawn"] for batch in take(iter(loader), 2) for image in batch}
    assert not drawn & {image["drawn"] for batch in first for image in batch}


def test_iterating_again_continues():
    expected = indices(take(iter(ResumableLoader.of(stock())), 6))
    loader = ResumableLoader.of(stock())
    found = indices(take(iter(loader), 2) + take(iter(loader), 4))
    assert found == expected


def test_the_collate_function_is_kept():
    for group in (True, False):
        loader = ResumableLoader.of(stock(group, collate_fn=lambda batch: ("batch", batch)))
        kind, batch = next(iter(loader))
        assert kind == "batch"
        assert len(batch) == 2


def test_a_random_subset_is_the_same_subset(tmp_path):
    def loader() -> ResumableLoader:
        sampler = RandomSubsetTrainingSampler(len(IMAGES), 0.5)
        return ResumableLoader.of(
            build_detection_train_loader(IMAGES, mapper=mapper, sampler=sampler, total_batch_size=2)
        )

    first, second = loader(), loader()
    torch.save(first.state_dict(), tmp_path / "state.pth")
    second.load_state_dict(torch.load(tmp_path / "state.pth"))
    assert indices(take(iter(second), 8)) == indices(take(iter(first), 8))


def test_another_number_of_images_is_an_error():
    state = ResumableLoader.of(stock()).state_dict()
    with pytest.raises(ValueError, match=r"has 9 images, but had 10 when"):
        ResumableLoader.of(stock()).load_state_dict({**state, "images": 10})


@pytest.mark.parametrize("loader", [[1, 2], torch.utils.data.DataLoader(IMAGES), iter([])])
def test_foreign_loaders_are_left_alone(loader):
    assert ResumableLoader.of(loader) is None
