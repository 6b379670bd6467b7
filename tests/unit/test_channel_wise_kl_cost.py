"""Channel-wise KL: what it costs, in operators and bytes, and the memory that it lends."""

import gc
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.engine.dry_run import StoragePeak
from kd_det.losses import buffers, channel_wise_eager, channel_wise_kl, channel_wise_kl_levels
from tests.unit.test_channel_wise_kl import random_pair

VIEWS = "view select slice unbind squeeze unsqueeze expand detach as_strided _unsafe_view".split()


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def operators(monkeypatch, rows, **kwargs):
    student, teacher = random_pair((2, 8, 6, 6), dtype=torch.float32)
    monkeypatch.setitem(channel_wise_eager._BLOCK_BYTES, "cpu", rows * 36 * 4)
    monkeypatch.setattr(channel_wise_eager, "_LARGEST_SHARE", 0)  # whatever the number of threads
    with Operators() as operators:
        channel_wise_kl(student.requires_grad_(), teacher, **kwargs)
    return operators.count


@pytest.mark.parametrize(
    ("kwargs", "count"),
    [
        # two softmaxes, four maxima, t - s, - shift, * p, its sum, q - p; two on (rows, 1)
        ({}, 13),
        ({"tau": 2.0}, 15),
        ({"region": torch.ones(2, 1, 6, 6)}, 15),
        ({"channel_weight": torch.ones(2, 8)}, 14),
    ],
)
def test_operators_per_block(monkeypatch, kwargs, count):
    two_blocks = operators(monkeypatch, 8, **kwargs)
    four_blocks = operators(monkeypatch, 4, **kwargs)
    per_block = (four_blocks - two_blocks).total() / 2
    assert per_block == count
    assert (four_blocks - two_blocks)["softmax"] == 2 * 2
    assert two_blocks.total() - 2 * per_block <= 30  # once per level


def test_a_pyramid_is_one_node():
    students, teachers = zip(*[random_pair((2, 8, s, s)) for s in (8, 4, 2)], strict=True)
    values = channel_wise_kl_levels([x.requires_grad_() for x in students], teachers)
    assert "ChannelWiseKL" in type(values.grad_fn).__name__
    assert len([f for f, _ in values.grad_fn.next_functions if f is not None]) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_copy_of_the_map_and_scratch(monkeypatch, dtype):
    student, teacher = random_pair((2, 64, 16, 16), dtype=dtype)
    size = student.nbytes
    monkeypatch.setitem(channel_wise_eager._BLOCK_BYTES, "cpu", size // 64)
    monkeypatch.setattr(channel_wise_eager, "_LARGEST_SHARE", 0)  # whatever the number of threads
    monkeypatch.setattr(buffers.GRADIENTS, "smallest", 1)  # lent memory would be seen as well
    leaf = student.requires_grad_()
    with StoragePeak() as tracker:
        loss = channel_wise_kl(leaf, teacher, tau=2.0)
        torch.autograd.grad(5 * loss, leaf)
    assert size < tracker.peak < 1.2 * size
    with StoragePeak() as tracker:
        loss = channel_wise_kl(leaf, teacher)
        torch.autograd.grad(loss, leaf, retain_graph=True)
    assert 2 * size < tracker.peak < 2.2 * size  # a kept graph keeps its own


def test_a_gradient_is_its_owners():
    # The backward gives its memory away once; what it gave is not touched again.
    student, teacher = random_pair()
    student.requires_grad_()
    loss = channel_wise_kl(student, teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    (last,) = torch.autograd.grad(loss, student)
    assert_close(second, 3 * expected)
    assert_close(last, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


def test_threads_share_a_block(monkeypatch):
    x = torch.empty(4, 256, 100, 168)
    rows = {}
    for threads in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        _, channels = channel_wise_eager.blocks(x, x.dtype)[0]
        rows[threads] = channels.stop
    assert rows[1] == (1 << 20) // (100 * 168 * 4)
    assert rows[2] == (2 << 20) // (100 * 168 * 4)
    assert rows[64] * 100 * 168 * 4 * 5 < 0.22 * x.nbytes


# -- lent memory ----------------------------------------------------------------------------------


@pytest.fixture
def lent():
    return buffers.Buffers(smallest=1)


def test_memory_is_lent_again_when_the_last_tensor_is_gone(lent):
    like = torch.zeros(4, 5)
    x = lent.empty_like(like)
    address = x.data_ptr()
    view = x[1:]
    del x
    gc.collect()
    assert lent.free_bytes == 0  # the view needs it
    other = lent.empty_like(like)
    assert other.data_ptr() != address
    del view
    gc.collect()
    assert lent.free_bytes == like.nbytes
    assert lent.empty_like(like).data_ptr() == address


def test_what_is_kept_follows_the_sizes_that_are_asked_for(lent):
    small, large = torch.zeros(10), torch.zeros(1000)
    assert lent.empty_like(small).shape == (10,)
    assert lent.free_bytes == small.nbytes
    lent.empty_like(large)  # takes the small one's place
    assert lent.free_bytes == large.nbytes
    lent.empty_like(small)  # of the large one's memory
    assert lent.free_bytes == large.nbytes
    lent.clear()
    assert lent.free_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_lent_memory_has_the_maps_layout(lent, dtype, memory_format):
    like = torch.zeros(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=memory_format)
    x = lent.empty_like(like)
    assert (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype)
    assert x.is_contiguous(memory_format=memory_format)


def test_small_and_foreign_tensors_are_pytorchs_own():
    pool = buffers.Buffers()
    pool.empty_like(torch.zeros(2, 3))
    assert pool.empty_like(torch.zeros(1 << 22, device="meta")).device.type == "meta"
    assert pool.free_bytes == 0


def test_gradients_on_lent_memory(monkeypatch, lent):
    monkeypatch.setattr("kd_det.losses.channel_wise.GRADIENTS", lent)
    kept = []
    for seed in range(3):
        student, teacher = random_pair(seed=seed)
        student.requires_grad_()
        (2 * channel_wise_kl(student, teacher)).backward()
        q, p = (x.detach().flatten(2).softmax(-1).view_as(x) for x in (student, teacher))
        kept.append((student, 2 / 6 * (q - p)))
    for student, expected in kept:  # nothing was lent twice
        assert_close(student.grad, expected)
    assert lent.free_bytes == 0
    kept.clear()
    del student
    gc.collect()
    assert lent.free_bytes > 0
