"""The decoding kernel's own source, compiled for the CPU with its warp instructions emulated (emulation.h).

It shows the layouts of fragments, masks, bounds, and the merging of partial results; not what only a GPU has: its
instructions' true semantics, the order that its compiler chooses, memory ordering, speed.
"""

import ctypes
import functools
import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore.backends.hopper import tma
from flashcore.backends.hopper.decode_configs import MAX_HEAD_DIM, MAX_ROWS, DecodeConfig, choose_decode
from flashcore.backends.hopper.jit import score_source, sequence_source
from flashcore.backends.hopper.launch import diagonals
from flashcore.problem import AttentionProblem
from flashcore.score import PLAIN
from tests.cases import CASES
from tests.packed import PackedCase, assert_packed_forward
from tests.paged import PagedCase
from tests.tolerance import assert_forward

HERE = Path(__file__).parent
DEVICE = HERE.parents[2] / "flashcore" / "device"
DRIVER = """
extern "C" int decode(int clusters, int ctas, const u8* const (*memory)[2], const u16* q, const u16* k, const u16* v,
                      u16* out, float* lse, const u64* s, float scale_log2, int heads_k, int group_size, int seqlen_q,
                      int seqlen_k, int left, int right{parameters}) {{
  stray_reads = 0;
  std::copy(&memory[0][0], &memory[0][0] + 6, &readable[0][0]);
  gridDim.x = clusters * ctas;
  launch(clusters, ctas, Config::threads, Config::smem_bytes, [&] {{
    attention_decode_sm90(q, k, v, out, lse, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], scale_log2, heads_k,
                          group_size, seqlen_q, seqlen_k, left, right{names});
  }});
  return stray_reads;
}}
"""


def compiler() -> str | None:
    """A C++ compiler that has <barrier>."""
    path = shutil.which("g++")
    if path is None:
        return None
    probe = subprocess.run([path, "-std=c++20", "-fsyntax-only", "-xc++", "-"], input="#include <barrier>\n", text=True,
                           capture_output=True)  # fmt: skip
    return path if probe.returncode == 0 else None


pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ with C++20's <barrier>")


@functools.cache
def built(config: DecodeConfig) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="flashcore-emulated-"))
    try:
        for name in ("attention", "ptx"):
            (folder / name).mkdir()
        shutil.copy(HERE / "emulation.h", folder)
        for header in (DEVICE / "ptx").iterdir():
            (folder / "ptx" / header.name).write_text('#include "../emulation.h"\n')
        kernel = (DEVICE / "attention" / "decode_sm90.cuh").read_text()
        declaration = "extern __shared__ __align__(16) u8 raw_smem[];"
        assert kernel.count(declaration) == 1
        for name in ("mask.cuh", "score.cuh", "sequences.cuh"):
            shutil.copy(DEVICE / "attention" / name, folder / "attention")
        (folder / "attention" / "decode_sm90.cuh").write_text(
            kernel.replace(declaration, "u8* const raw_smem = shared_memory();")
        )
        constants = config.constants().items()
        members = "".join(f"static constexpr int {name} = {int(value)};" for name, value in constants)
        sequences = sequence_source(config.packed, config.page > 0)
        parameters, names = added_parameters(sequences)
        (folder / "all.cpp").write_text(
            '#include "emulation.h"\n'
            f"struct Config {{ using Element = Bf16; {members} }};\n{score_source(PLAIN)}{sequences}"
            f'#include "attention/decode_sm90.cuh"\n{DRIVER.format(parameters=parameters, names=names)}'
        )
        # With optimisation and contraction GCC fuses products into sums as NVRTC does, where the CPU can.
        options = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=fast", "-w", "-pthread", "-shared", "-fPIC"]
        subprocess.run([compiler(), *options, "all.cpp", "-o", "all.so"], cwd=folder, check=True)
        return ctypes.CDLL(folder / "all.so")
    finally:
        shutil.rmtree(folder)


def added_parameters(defined: str) -> tuple[str, str]:
    """The parameters that macros add to an entry's, and their names, each with a comma in front."""
    found = "".join(re.findall(r"#define \w+_PARAMETERS(.*)", defined))
    return found, "".join(f", {name}" for name in re.findall(r"(\w+)\s*(?:,|$)", found))


def address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def sequence_arguments(places, problem, head_dim, *cleared):
    """What packed sequences add to a kernel's arguments (``launch.sequence_arguments``); nothing without."""
    if not places:
        return ()
    found = []
    for rows, spec, longest in (
        (places["queries"], problem.queries, problem.seqlen_q),
        (places["keys"], problem.keys, problem.seqlen_k),
    ):
        first, second = (*rows.tensors, None)[:2]
        found += [address(first), address(second), spec.total, longest]
    found += [address(tensor) for tensor in (*cleared, None, None, None)[:3]]
    found += [problem.heads_q, problem.heads_k, head_dim * 2]
    if problem.paged:
        found += [ctypes.c_uint64(places["keys"].table.stride(0)), problem.keys.page_size, problem.keys.pages]
    return found


def decode(q, k, v, causal=False, cluster=1, scale=None, window=None, places=None):
    """(out, lse) of the emulated kernel, which may read nothing but what the tensors hold."""
    problem = AttentionProblem.from_tensors(
        q, k, v, causal=causal, window=window, scale=scale, return_lse=True, **places or {}
    )
    left, right = map(int, diagonals(problem))
    out = torch.full(problem.out_shape, torch.nan, dtype=q.dtype)
    lse = torch.full(problem.lse_shape, torch.nan)
    bounds = []
    for tensor in (q, k, v):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        bounds += [tensor.data_ptr(), tensor.data_ptr() + 2 * (last + 1)]
    strides = [stride for tensor in (q, k, v) for stride in (0, *tensor.stride()[:-1])[-3:]]
    stray = built(choose_decode(replace(problem, sm_count=132)).variant).decode(
        problem.batch * problem.heads_k, cluster, (ctypes.c_void_p * 6)(*bounds), *map(address, (q, k, v, out, lse)),
        (ctypes.c_uint64 * 9)(*strides), ctypes.c_float(problem.scale / math.log(2)), problem.heads_k,
        problem.group_size, problem.seqlen_q, problem.seqlen_k, left, right,
        *sequence_arguments(places, problem, problem.head_dim_v, out),
    )  # fmt: skip
    assert stray == 0
    return out, lse


def random_inputs(batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, generator=generator).bfloat16()
    shape = batch, heads_k, seqlen_k, head_dim
    return q, *(torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for _ in "kv")


def suits(case) -> bool:
    rows = case.seqlen_q * case.heads_q // case.heads_k
    return (
        0 < rows <= MAX_ROWS
        and case.score is None
        and not case.sink
        and case.head_dim_v in (None, case.head_dim)
        and min(case.batch, case.seqlen_k) > 0
        and case.head_dim % 8 == 0
        and case.head_dim <= MAX_HEAD_DIM
        and case.head_dim_v in (None, case.head_dim)
        and case.dtype == "bfloat16"
        and not any(tma.obstacle(tensor, broadcast=True) for tensor in case.inputs())
    )


@pytest.mark.parametrize("case", [case for case in CASES if suits(case)], ids=str)
def test_named_cases(case):
    q, k, v = case.inputs()
    for cluster in (1, 4):
        out, lse = decode(q, k, v, case.causal, cluster, case.scale, case.window)
        assert_forward(out, lse, q, k, v, **case.options())


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128])
@pytest.mark.parametrize(
    ("shape", "causal", "cluster"),
    [
        ((1, 1, 1, 1, 1), False, 1),
        ((2, 1, 15, 8, 2), False, 1),
        ((1, 2, 333, 8, 2), True, 2),
        ((2, 8, 65, 2, 2), True, 4),
        ((1, 5, 3, 2, 2), True, 2),  # two rows see nothing
        ((1, 1, 1025, 3, 1), True, 8),
        ((1, 7, 300, 1, 1), True, 16),  # CTAs without keys
    ],
    ids=str,
)
def test_right(shape, causal, cluster, head_dim):
    q, k, v = random_inputs(*shape, head_dim)
    assert_forward(*decode(q, k, v, causal, cluster), q, k, v, causal=causal)


def test_many_blocks_of_the_same_maximum():
    """Large scores that hardly differ: what a block multiplies in must not be a factor beside 1."""
    q, k, v = random_inputs(1, 1, 8192, 2, 1, 64)
    q, k = torch.full_like(q, 8.0), k / 64 - 0.97
    out, lse = decode(q, k, v, scale=1.0)
    assert_forward(out, lse, q, k, v, scale=1.0)
    scores = torch.einsum("bqhd,bkd->bhqk", q.double(), k[:, :, 0].double())
    assert (lse - scores.logsumexp(-1)).abs().max() < 5e-5


def test_infinity_in_the_last_value_stays_and_nan_stays_in_its_row():
    q, k, v = random_inputs(1, 1, 77, 8, 2, 64)
    clean, _ = decode(q, k, v)
    q[0, 0, 6] = torch.nan
    v[0, 76, 0, 5] = torch.inf
    out, lse = decode(q, k, v)
    assert (out[0, 0, :4, 5] == torch.inf).all()
    assert out[0, 0, 6].isnan().all()
    assert lse[0, 6].isnan().all()
    out[0, 0, :4, 5], out[0, 0, 6] = clean[0, 0, :4, 5], clean[0, 0, 6]
    assert torch.equal(out, clean)


def test_expanded_and_packed_tensors():
    packed = torch.randn(2, 200, 3, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = packed[:, 5:6, 0], packed[:, 10:150, 1, :1].expand(-1, -1, 2, -1), packed[:1, 20:160, 2, :2]
    v = v.expand(2, -1, -1, -1)
    assert_forward(*decode(q, k, v, cluster=2), q, k, v)


@pytest.mark.parametrize("window", [(0, 0), (15, None), (16, 0), (17, 3), (None, 2), (500, 0)], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 100, 2, 1), (2, 1, 333, 8, 2), (1, 7, 5, 1, 1)], ids=str)
def test_windows(shape, window):
    """mask.cuh against the definition; keys outside of all windows may hold anything and are not read."""
    q, k, v = random_inputs(*shape, 64)
    left = shape[2] - shape[1] - (window[0] if window[0] is not None else shape[2])
    for tensor in (k, v):
        tensor[:, : max(0, left // 16 * 16)] = torch.nan
    for cluster in (1, 2):
        out, lse = decode(q, k, v, cluster=cluster, window=window)
        assert_forward(out, lse, q, k.nan_to_num(), v.nan_to_num(), window=window)


def test_scores_beyond_what_the_exponent_can_round():
    """One key has all the weight, and a maximum gives exactly 1."""
    q, k, v = random_inputs(2, 1, 256, 4, 2, 64)
    q, k = q * 3e4, k * 3e4
    out, lse = decode(q, k, v)
    assert lse.isfinite().all()
    assert_forward(out, lse, q, k, v)


DECODING = [
    ((1, 1, 0, 1), (300, 1, 50, 64)),
    ((2, 1, 2), (0, 33, 700)),
    ((1,), (16 * 8 * 40 + 5,)),  # more than 32 blocks of a warp
]


@pytest.mark.parametrize(
    ("lengths", "cluster"), [*zip(DECODING, (4, 1, 1), strict=True)], ids=["several", "few", "long"]
)
@pytest.mark.parametrize("page_size", [None, 1, 16, 64])
def test_packed_queries(page_size, lengths, cluster):
    """On packed keys, and on keys in pages."""
    packed = PackedCase("", *lengths, heads_q=4, heads_k=2, head_dim=64, causal=True, before=2, after=3)
    check_packed(packed, page_size, cluster)


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("window", [(40, 0), (7, 1)], ids=str)
def test_windows_on_pages(window, head_dim):
    check_packed(PackedCase("", (1, 2), (100, 70), head_dim=head_dim, window=window), 16, 2)


def check_packed(packed: PackedCase, page_size: int | None, cluster: int) -> None:
    if page_size is None:
        q, k, v = packed.inputs()
        memory, places = (q, k, v), packed.packed()
    else:
        q, k_cache, v_cache, places, k, v = PagedCase("", packed, page_size).inputs("cpu")
        memory = q, k_cache, v_cache
    out, lse = decode(*memory, packed.causal, cluster, window=packed.window, places=places)
    assert_packed_forward(packed, out, lse, q, k, v)
