"""What a launch does on the host that needs no GPU: contexts of threads, and which tensors are read where they lie."""

import math
import re
import threading
from dataclasses import replace

import numpy
import pytest
import torch

core = pytest.importorskip("cuda.core", reason="needs cuda-core (extra cu13 or cu12)")

from flashcore.backends import hopper  # noqa: E402
from flashcore.backends.hopper import attention, decode, gemm, jit, launch, tma  # noqa: E402
from flashcore.backends.hopper.kernels import KERNELS, kernel_of  # noqa: E402
from flashcore.gemm_problem import GemmProblem  # noqa: E402
from flashcore.problem import AttentionProblem  # noqa: E402
from flashcore.score import bind  # noqa: E402
from tests.backends.hopper.test_decode_emulated import added_parameters  # noqa: E402
from tests.packed import PackedCase  # noqa: E402
from tests.paged import PagedCase  # noqa: E402


def test_a_thread_gets_the_context_of_each_device_before_it_launches(monkeypatch):
    given = []

    class Device:
        def __init__(self, index):
            self.index = index

        def set_current(self):
            given.append((threading.current_thread().name, self.index))

    class Stream:
        from_handle = staticmethod(lambda handle: handle)

    monkeypatch.setattr(core, "Device", Device)
    monkeypatch.setattr(core, "Stream", Stream)
    monkeypatch.setattr(launch, "_raw_stream", lambda device: 100 + device)
    monkeypatch.setattr(launch, "_streams", {})
    monkeypatch.setattr(launch, "_thread", threading.local())

    def work():
        assert [launch.current_stream(device) for device in (0, 0, 1, 1, 0)] == [100, 100, 101, 101, 100]

    for name in ("first", "second"):
        thread = threading.Thread(target=work, name=name)
        thread.start()
        thread.join()
    assert given == [(name, device) for name in ("first", "second") for device in (0, 1, 0)]


def readable(tensor):
    return tma.obstacle(tensor, broadcast=True) is None


def test_what_the_decoding_kernel_reads_where_it_lies():
    cache = torch.zeros(2, 8, 100, 64, dtype=torch.bfloat16)
    assert readable(cache.transpose(1, 2))
    assert readable(cache.transpose(1, 2)[:, 10:50])
    assert readable(cache[:1].transpose(1, 2).expand(5, -1, -1, -1))
    assert readable(cache[:, :1].transpose(1, 2).expand(-1, -1, 8, -1))
    packed = torch.zeros(2, 100, 1, 65, dtype=torch.bfloat16)
    assert not readable(packed[..., 1:])  # neither its address nor its rows are aligned
    assert not readable(packed[..., :64])
    assert readable(packed[:1, :1, :, :64])  # one row has no stride
    assert not readable(cache.transpose(1, 2)[..., ::2])


# ---- every launcher hands over what its kernel takes ---------------------------------------------------------------

TAKEN = {"int": numpy.int32, "u64": (numpy.uint64, int), "float": numpy.float32}  # else an address, or a tensor map


def parameters(source: str, entry: str) -> list[str]:
    """Types of the entry's parameters, but for those of a printed score."""
    text = (jit.DEVICE_SOURCES / source).read_text()
    found = re.search(rf"\n{entry}\((.*?)(?: SEQUENCE_PARAMETERS)?(?: SCORE_PARAMETERS)?\) \{{", text, re.DOTALL)[1]
    return [" ".join(parameter.split()[:-1]) for parameter in found.split(",")]


@pytest.fixture
def launched(monkeypatch):
    """What would have been launched, by launchers of tensors on the CPU."""
    calls = []
    monkeypatch.setattr(tma, "tensor_map", lambda tensor, rows: f"map of {tuple(tensor.shape)}")
    monkeypatch.setattr(tma, "matrix_map", lambda tensor, *box: f"map of {tuple(tensor.shape)}")
    for module in (attention, decode, gemm):
        monkeypatch.setattr(module, "compile_kernel", lambda config: None)
        monkeypatch.setattr(module, "current_stream", lambda device: "stream")
    monkeypatch.setattr(launch.Launcher, "_load", lambda self, device: (lambda *a: calls.append(a), "kernel", "config"))
    return calls


def check_arguments(launched, config, extras: int = 0) -> list:
    (_, _, _, *arguments) = launched[-1]
    types = parameters(config.source, config.entry)
    assert len(arguments) == len(types) + extras
    for argument, kind in zip(arguments, types, strict=False):
        expected = TAKEN.get(kind, str if "TensorMap" in kind else int)
        assert isinstance(argument, expected), (kind, argument)
    return arguments


@pytest.mark.parametrize("scale", [None, 0.5, -0.5])
@pytest.mark.parametrize("seqlen_q", [300, 1])
def test_attention_hands_over_what_its_kernels_take(launched, seqlen_q, scale):
    q, k, v = (torch.randn(2, n, 4, 64).bfloat16() for n in (seqlen_q, 300, 300))
    problem = AttentionProblem.hypothetical(q.shape, k.shape, arch=(9, 0), causal=True, scale=scale)
    config = hopper.configure(problem)
    run = hopper.prepare(problem, config)
    run(q, k, v, scale)
    arguments = check_arguments(launched, config, extras=scale is not None and scale < 0)
    of_scale = parameters(config.source, config.entry).index("float")
    wanted = 1.0 if scale == -0.5 else 64**-0.5 if scale is None else scale  # one that is not positive changes scores
    assert arguments[of_scale] == numpy.float32(wanted / math.log(2))
    if scale == -0.5:
        assert arguments[-1] == -0.5
        return
    run(q, k, v, 3.0)  # the same launcher
    assert check_arguments(launched, config)[of_scale] == numpy.float32(3.0 / math.log(2))


@pytest.mark.parametrize("seqlen_q", [300, 1])
def test_attention_writes_where_the_caller_says(launched, monkeypatch, seqlen_q):
    seen = []
    monkeypatch.setattr(tma, "tensor_map", lambda tensor, rows: seen.append(tensor.data_ptr()) or "map")
    q, k, v = (torch.randn(2, n, 4, 64).bfloat16() for n in (seqlen_q, 300, 300))
    problem = AttentionProblem.hypothetical(q.shape, k.shape, arch=(9, 0), causal=True)
    config = hopper.configure(problem)
    run, places = hopper.prepare(problem, config), [torch.empty_like(q) for _ in range(2)]
    for place in places:
        out, _ = run(q, k, v, None, out=place)
        assert out is place
        assert place.data_ptr() in (*seen, *check_arguments(launched, config))


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("longest", [300, 1])
def test_where_packed_sequences_lie_is_handed_over(launched, monkeypatch, longest, page_size):
    if longest > 1 and page_size:
        pytest.skip("the kernel with tiles reads no pages")
    monkeypatch.setattr(tma, "packed_map", lambda tensor, rows: f"map of {tuple(tensor.shape)}")
    case = PackedCase("", (longest, 1), (40, 300), causal=True, sink=True)
    if page_size:
        q, k, v, places, *_ = PagedCase("", case, page_size).inputs()
    else:
        (q, k, v), places = case.inputs(), case.packed()
    spec, extras = bind(None, case.options()["sink"])
    extras = (*places["queries"].tensors, *places["keys"].tensors, *extras)
    problem = AttentionProblem.from_tensors(q, k, v, causal=True, **places, score=spec, extras=extras)
    problem = replace(problem, arch=(9, 0), sm_count=132)
    config = hopper.configure(problem)
    hopper.prepare(problem, config)(q, k, v, problem.scale, *extras)
    added, _ = added_parameters(jit.sequence_source(True, page_size is not None))
    kinds = [" ".join(parameter.split()[:-1]) for parameter in added.split(",")[1:]]
    arguments = check_arguments(launched, config, extras=len(kinds) + 1)[-len(kinds) - 1 :]
    for argument, kind in zip(arguments, kinds, strict=False):
        assert isinstance(argument, TAKEN.get(kind, int)), (kind, argument)
    addresses = [tensor.data_ptr() for tensor in extras]
    of_keys = addresses[1:3] if page_size else [addresses[1], 0]
    assert [arguments[i] for i in (0, 1, 4, 5, -1)] == [addresses[0], 0, *of_keys, addresses[-1]]
    assert [int(arguments[i]) for i in (2, 3, 7)] == [len(q), longest, 300]


def test_products_hand_over_what_their_kernel_takes(launched):
    problem = GemmProblem("bfloat16", "bfloat16", "cuda", (9, 0), 132, 1, 256, 256, 64)
    chosen = gemm.configure(problem)
    a, b = torch.randn(256, 64).bfloat16(), torch.randn(64, 256).bfloat16()
    assert gemm.prepare(problem, chosen)(a, b, None).shape == (256, 256)
    check_arguments(launched, chosen.config)


def test_tensor_maps_are_kept_but_not_of_copies(monkeypatch):
    monkeypatch.setattr(launch, "_MAX_MAPS", 2)
    made = []
    maps = launch.TensorMaps(lambda tensor: (made.append(tensor) or len(made), tensor))
    tensors = [torch.zeros(3) for _ in range(3)]
    for tensor in (*tensors[:2], *tensors[:2]):
        assert maps(tensor)[1] is tensor
    assert len(made) == 2
    maps(tensors[2])
    maps(tensors[0])  # all but the third were forgotten
    assert len(made) == 4
    copies = launch.TensorMaps(lambda tensor: (made.append(tensor), tensor.clone()))
    copies(tensors[0])
    copies(tensors[0])
    assert len(made) == 6


def test_every_kernel_file_has_a_row():
    files = {path.relative_to(jit.DEVICE_SOURCES).as_posix() for path in jit.DEVICE_SOURCES.glob("*/*_sm90.cuh")}
    entries = {name for name in files if "__global__" in (jit.DEVICE_SOURCES / name).read_text()}
    assert {kernel.source for kernel in KERNELS.values()} == entries
    for kernel in KERNELS.values():
        assert kernel.table.name.endswith("configs.py")
        for _, config in kernel.declared(None):
            assert kernel_of(config) is kernel
