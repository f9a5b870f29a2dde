"""How kernels are started: when through Triton's JIT, when directly, and with which arguments."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from flashcore.backends.triton import attention, launch
from flashcore.backends.triton.launch import Launch, descriptor

CONSTANTS = {"TMA": True, "TILE": 16}


class Jit:
    """Stands for a Triton kernel: keeps what it was called with, and returns what stands for a compiled one."""

    def __init__(self, compiles: bool = True):
        self.compiles = compiles
        self.jit: list[tuple] = []
        self.direct: list[tuple] = []

    def __getitem__(self, grid):
        def through_jit(*arguments, **keywords):
            self.jit.append((grid, arguments, keywords))
            return Compiled(self.direct) if self.compiles else None

        return through_jit


class Compiled:
    def __init__(self, calls: list[tuple]):
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


def tensors(offset: int = 0) -> list[torch.Tensor]:
    """q and k, (1, 4, 2, 16) of bfloat16, `offset` elements behind a multiple of 16 bytes."""
    return [torch.zeros(1 * 4 * 2 * 16 + offset).bfloat16()[offset:].view(1, 4, 2, 16) for _ in range(2)]


@pytest.fixture
def kernel() -> Jit:
    return Jit()


def launcher(kernel: Jit, constants: dict = CONSTANTS) -> Launch:
    return Launch(kernel, (3, 2, 1), (0.5, 7), constants, {"num_warps": 4}, ((1, 16, 16),))


def start(launch: Launch, q: torch.Tensor, k: torch.Tensor) -> None:
    launch((q, k), (q.stride(), k.stride()))


def test_the_second_call_is_direct_and_says_the_same(kernel):
    run = launcher(kernel)
    first, second = tensors(), tensors()
    start(run, *first)
    start(run, *second)
    assert len(kernel.jit) == len(kernel.direct) == 1
    grid, arguments, keywords = kernel.jit[0]
    assert (grid, keywords) == ((3, 2, 1), {"num_warps": 4, **CONSTANTS})
    assert arguments[0] is first[0]
    assert arguments[1].base is first[1]
    q, k = second
    grid, direct = kernel.direct[0]
    assert grid == (3, 2, 1)
    assert direct[0] == q.data_ptr()
    assert direct[1].base is k
    assert vars(direct[1]) == vars(descriptor(k, 16, 16))
    assert direct[2:] == (q.stride(), k.stride(), 0.5, 7, True, 16)
    assert arguments[2:] + tuple(CONSTANTS.values()) == direct[2:]


def test_other_strides_are_compiled_for(kernel):
    run = launcher(kernel)
    q, k = tensors()
    start(run, q, k)
    other = k.transpose(1, 2).contiguous().transpose(1, 2)
    start(run, q, other)
    start(run, q, other)
    assert len(kernel.jit) == 2
    assert kernel.direct[0][1][3] == other.stride()


def test_addresses_that_are_no_multiples_of_16_go_through_the_jit(kernel):
    """A kernel compiled for aligned tensors would read them by vectors; one compiled for them is not kept."""
    run = launcher(kernel)
    for offset in (1, 1, 0, 1, 8, 0):
        start(run, *tensors(offset))
    assert [keywords["TMA"] for _, _, keywords in kernel.jit] == [False, False, True, False]
    assert len(kernel.direct) == 2  # 8 elements are 16 bytes


def test_tensors_that_the_copy_engine_cannot_read(kernel):
    run = launcher(kernel)
    for _ in range(2):
        q, k = tensors()
        start(run, q, k[..., ::2])
    assert [keywords["TMA"] for _, _, keywords in kernel.jit] == [False]
    assert kernel.direct[0][1][1] == k.data_ptr()
    assert kernel.direct[0][1][-2:] == (False, 16)


def test_captured_tensors_come_as_one_tuple(kernel):
    """Also from the second call on, and only where they are aligned too."""
    run = launcher(kernel)
    captured, others = tuple(tensors()), tuple(tensors())
    q, k = tensors()
    strides = q.stride(), k.stride(), tuple(t.stride() for t in captured)
    for extra in (captured, others, tuple(tensors(offset=1))):
        run((q, k), strides, 0.25, captured=extra)
    assert [arguments[2] is extra for _, arguments, _ in kernel.jit for extra in (captured,)] == [True, False]
    assert kernel.jit[0][1][3:] == (*strides, 0.25, 0.5, 7)
    ((_, direct),) = kernel.direct
    assert direct[2] == tuple(t.data_ptr() for t in others)
    assert direct[3:7] == (*strides, 0.25)


def test_without_a_compiled_kernel_every_call_goes_through_the_jit():
    """As in Triton's interpreter."""
    kernel = Jit(compiles=False)
    run = launcher(kernel)
    for _ in range(3):
        start(run, *tensors())
    assert len(kernel.jit) == 3


def test_tensors_are_not_kept_alive(kernel):
    run = launcher(kernel)
    q, k = tensors()
    start(run, q, k)
    start(run, q, k)
    kernel.jit.clear()
    kernel.direct.clear()
    gone = weakref.ref(k)
    del k
    gc.collect()
    assert gone() is None


def test_what_is_remembered_is_bounded(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_MAX_KNOWN", 4)
    run = launcher(kernel)
    for i in range(10):
        q, _ = tensors()
        start(run, q, torch.zeros(1, 4, 2, 16 * (i + 1)).bfloat16()[..., :16])
    assert len(kernel.jit) == 10
    assert len(run._known) <= 4


@pytest.mark.parametrize("name", ["attention_fwd", "combine", "attention_bwd_dq", "attention_bwd_dkdv"])
def test_constants_come_last_and_in_order(name, monkeypatch):
    """A compiled kernel takes all its arguments by position, constants too."""
    from flashcore.backends.triton import configs
    from flashcore.mask import CAUSAL
    from flashcore.problem import AttentionProblem

    made = []
    monkeypatch.setattr(attention, "Launch", lambda *args: made.append(args))
    problem = AttentionProblem(
        "bfloat16", "cuda", (9, 0), 132, 1, 64, 64, 4, 2, 64, 64, CAUSAL, 0.1, needs_grad=True
    )
    config = configs.TritonConfig(*[configs.Tile(64, 64, 4, 2)] * 3, splits=2)
    attention.prepare_forward.__wrapped__(problem, config)
    attention.prepare_backward.__wrapped__(problem, config)
    function, _, scalars, constants, *_ = next(args for args in made if args[0] is getattr(attention, name))
    names = list(function.arg_names)
    tail = names[-len(constants) :]
    assert tail == list(constants)
    before = names[-len(constants) - len(scalars) : -len(constants)]
    assert not any(n.startswith(("strides", "scale")) for n in before)
    if name != "combine":  # which has neither
        *floats, first = [n for n in names if n.startswith("scale")][::-1]
        between = names[names.index(first) : -len(constants) - len(scalars)]
        assert between == [first, *floats[::-1]]
        strides = names[names.index("captured") + 1 : names.index(first)]
        assert all(n.startswith("strides") for n in strides)
