"""The tables of tiles, and what is chosen from them. The kernels of every row are compiled, for whatever GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashcore.backends import triton as backend
from flashcore.backends.triton import configs
from flashcore.backends.triton.configs import LEAST_SHARED_MEMORY, SHARED_MEMORY, TABLES, Tile, choose
from flashcore.backends.triton.score import functions
from flashcore.errors import FlashCoreWarning
from flashcore.mask import CAUSAL, FULL, Mask
from flashcore.problem import AttentionProblem
from flashcore.score import alibi, bias, bind, softcap

H200 = AttentionProblem(
    "bfloat16", "cuda", (9, 0), 132, 8, 2048, 2048, 16, 16, 128, 128, CAUSAL, 128**-0.5, needs_grad=True
)
UNKNOWN = (13, 7)


def test_every_problem_has_a_tile():
    """On every known GPU and on an unknown one, for every head_dim, type and number of rows."""
    for arch in (*TABLES, UNKNOWN, None):
        for head_dim in (1, 8, 16, 40, 64, 72, 128, 136, 192, 256):
            for dtype in ("bfloat16", "float16", "float32"):
                for seqlen_q in (1, 7, 500, 5000):
                    problem = replace(
                        H200,
                        arch=arch,
                        head_dim=head_dim,
                        head_dim_v=head_dim,
                        dtype=dtype,
                        seqlen_q=seqlen_q,
                    )
                    config = choose(problem)
                    parts = 3 + bool(config.dv)  # forward; dq; dkdv or dk; dv
                    assert config.why.count("; d") == parts - 1, config.why
                    assert config.forward.tile_m >= 16


def test_tables_fit_their_gpus():
    """Rows of a GPU's own table are never passed over, and the safe ones fit everywhere."""
    for arch, table in TABLES.items():
        for row in table:
            assert row.smem_kib * 1024 <= SHARED_MEMORY[arch], (arch, row)
    for row in configs._SAFE:
        assert row.smem_kib * 1024 <= LEAST_SHARED_MEMORY, row


def test_a_device_with_less_shared_memory_gets_a_smaller_tile():
    problem = replace(H200, head_dim=256, head_dim_v=256)
    assert choose(problem).dq == next(r.tile for r in TABLES[9, 0] if (r.kernel, r.head_dim) == ("dq", 256))
    small = choose(problem, shared_memory=LEAST_SHARED_MEMORY)
    assert small.dq in {row.tile for row in configs._SAFE}


def test_the_number_of_keys_decides_where_it_was_measured_to():
    problem = replace(H200, head_dim=64, head_dim_v=64)
    short, middle, long = (
        choose(replace(problem, seqlen_q=n, seqlen_k=n, batch=2**14 // n)) for n in (512, 2048, 16384)
    )
    assert short.dq != middle.dq == long.dq
    assert short.forward == middle.forward != long.forward
    assert short.dkdv == middle.dkdv == long.dkdv
    assert choose(replace(problem, mask=FULL)).dkdv != middle.dkdv


def test_an_unknown_gpu_gets_safe_rows_and_no_tma():
    config = choose(replace(H200, arch=UNKNOWN))
    assert not any(tile.tma for tile in (config.forward, config.dq, config.dkdv))


def test_splits_when_the_grid_is_small():
    assert choose(H200).splits == 1
    decode = replace(H200, batch=8, seqlen_q=1, seqlen_k=8192, heads_q=32, heads_k=8)
    config = choose(decode)
    assert config.pack_gqa
    assert config.splits > 1
    assert "idle" in config.why
    assert choose(replace(decode, batch=16)).splits == 1  # 128 tiles: one per SM
    assert choose(replace(decode, batch=17)).splits > 1  # 136: the last four would run alone
    assert choose(replace(decode, batch=64)).splits == 1  # 512 tiles fill the GPU


@pytest.mark.parametrize("tiles", [1, 7, 32, 64, 105])
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 8, 100, 2048])
def test_splits_are_worth_it(tiles, blocks):
    """Every split has two blocks or more, and splitting never makes the busiest SM do more."""
    tile = Tile(64, 64, 4, 2)
    splits = configs.choose_splits(tiles, blocks, 132, tile)
    assert 1 <= splits <= configs.MAX_SPLITS
    assert splits == 1 or blocks // splits >= 2
    per_split = -(-blocks // splits)
    assert -(-tiles * splits // 132) * per_split <= -(-tiles // 132) * blocks


def test_no_splits_where_combining_them_takes_longer():
    """(1, 8, 512, 64) took 9.6 us in two splits and 7.3 in one (docs/log/0016)."""
    small = replace(H200, batch=1, heads_q=8, heads_k=8, head_dim=64, head_dim_v=64)
    assert choose(replace(small, seqlen_q=512, seqlen_k=512)).splits == 1
    assert choose(replace(small, seqlen_q=64, seqlen_k=8192)).splits > 1


@pytest.mark.parametrize(
    ("batch", "seqlen_k", "splits"), [(8, 8192, 2), (1, 131072, 16), (1, 8192, 16), (1, 500, 1)]
)
def test_decoding_takes_one_program_per_sm(batch, seqlen_k, splits):
    """The numbers of splits that were fastest on an H200."""
    problem = replace(H200, batch=batch, seqlen_q=1, seqlen_k=seqlen_k, heads_q=32, heads_k=8)
    assert choose(problem).splits == splits


def test_dv_has_a_pass_of_its_own_where_the_table_says_so():
    problem = replace(H200, head_dim=256, head_dim_v=256)
    config = choose(problem)
    assert f"dk {config.dkdv}; dv {config.dv}" in str(config)
    assert "; dk: " in config.why
    assert "; dv: " in config.why
    assert choose(H200).dv is None
    assert choose(replace(problem, dtype="float32")).dv is None


def test_user_table_puts_dv_back(tmp_path):
    problem = replace(H200, head_dim=256, head_dim_v=256)
    path = tmp_path / "table.json"
    mine = Tile(64, 64, 8, 2)
    configs.write_user_table(
        path, {configs.user_key("dkdv", problem): mine, configs.user_key("dv", problem): None}
    )
    config = choose(problem, user_table=path)
    assert (config.dkdv, config.dv) == (mine, None)


def test_user_table(tmp_path):
    path = tmp_path / "table.json"
    assert choose(H200, user_table=path) == choose(H200)
    mine = Tile(64, 32, 4, 2)
    configs.write_user_table(path, {configs.user_key("dq", H200): mine})
    config = choose(H200, user_table=path)
    assert config.dq == mine
    assert f"dq: tuned on this machine ({path})" in config.why
    assert config.dkdv == choose(H200).dkdv
    other_gpu = replace(H200, sm_count=78)
    assert choose(other_gpu, user_table=path) == choose(other_gpu)


BROKEN_TABLES = {
    "cut": lambda text: text[:-20],
    "empty": lambda text: "",
    "no table": lambda text: "[1, 2]",
    "no text": lambda text: "\udcff",
    "no tile": lambda text: text.replace("32", "[]"),
    "a foreign tile": lambda text: text.replace("tile_n", "BLOCK_N"),
    "a tile of floats": lambda text: text.replace("64", "64.0"),
    "no power of two": lambda text: text.replace("32", "48"),
    "none at all": lambda text: text[: text.index(": {")] + ": null}",
}


@pytest.mark.parametrize("damage", BROKEN_TABLES)
def test_a_user_table_that_is_none_warns_once_and_counts_for_nothing(damage, tmp_path):
    path = tmp_path / "table.json"
    tiles = {configs.user_key("dq", H200): Tile(64, 32, 4, 2)}
    configs.write_user_table(path, tiles)
    path.write_text(BROKEN_TABLES[damage](path.read_text()), errors="surrogateescape")
    configs._read_user_table.cache_clear()
    with pytest.warns(FlashCoreWarning, match=f"not used: {path}.*FLASHCORE_CACHE_DIR"):
        assert choose(H200, user_table=path) == choose(H200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose(replace(H200, batch=4), user_table=path)
        configs.write_user_table(path, tiles)  # replaces it
        assert choose(H200, user_table=path).dq == Tile(64, 32, 4, 2)


def test_a_user_table_that_others_may_write_counts_for_nothing(tmp_path):
    path = tmp_path / "table.json"
    configs.write_user_table(path, {configs.user_key("dq", H200): Tile(64, 32, 4, 2)})
    path.chmod(0o666)
    with pytest.warns(FlashCoreWarning, match="can be written by other users"):
        assert choose(H200, user_table=path) == choose(H200)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_table_in_another_users_home(tmp_path):
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.warns(FlashCoreWarning, match="Permission denied"):
            assert choose(H200, user_table=tmp_path / "table.json") == choose(H200)
    finally:
        os.seteuid(0)


def test_a_user_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tiles = {configs.user_key("dq", H200): Tile(64, 32, 4, 2)}
    configs.write_user_table(path, tiles)
    before = path.read_text()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        configs.write_user_table(path, {configs.user_key("forward", H200): Tile(64, 32, 4, 2)})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sections_fit_in_l2():
    assert configs.heads_per_section(replace(H200, mask=FULL), 128) == 1
    heads = configs.heads_per_section(H200, 128)
    assert heads * 2 * 2048 * 128 * 2 <= configs.L2_SHARE
    assert configs.heads_per_section(replace(H200, seqlen_k=10**6), 128) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"head_dim": 264, "head_dim_v": 264}, "264 > 256"),
        ({"head_dim_v": 264}, "head_dim_v 264 > 256"),
        ({"arch": (7, 5)}, "7.5 < 8.0"),
    ],
)
def test_rejects(change, reason):
    assert reason in backend.rejects(replace(H200, **change))


def test_rejects_what_a_grid_cannot_count():
    assert "2^31" in backend.rejects(replace(H200, seqlen_q=2**24, batch=2**12, heads_q=16))


@pytest.mark.parametrize("variable", [None, "1", "true"])
def test_rejects_the_cpu_outside_these_tests(monkeypatch, variable):
    monkeypatch.setattr(backend, "INTERPRETER_IS_MENDED", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variable:
        monkeypatch.setenv("TRITON_INTERPRET", variable)
    assert "cpu" in backend.rejects(replace(H200, device="cpu", arch=None))


INTERPRETED = """
import sys, torch
if "first" in sys.argv: import triton.language
import flashcore
from flashcore.backends import triton
from flashcore.errors import UnsupportedError
q = torch.randn(1, 8, 2, 16).bfloat16()
plan = flashcore.explain(q, q, q)
print(plan.backend)
print(dict(plan.rejected)["triton"])
try:
    flashcore.attention(q, q, q, backend="triton")
except UnsupportedError as error:
    print("refused" if "TRITON_INTERPRET" in str(error) else error)
"""


@pytest.mark.parametrize("first", [(), ("first",)])
@pytest.mark.parametrize("variable", ["1", "true", "ON"])
def test_the_interpreter_is_for_tests(variable, first):
    """Somebody debugs a kernel of their own; Triton's interpreter has every truth value for its variable."""
    environment = {**os.environ, "TRITON_INTERPRET": variable}
    command = [sys.executable, "-c", INTERPRETED, *first]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    auto, reason, explicit = done.stdout.splitlines()
    assert auto != "triton"
    assert "unset TRITON_INTERPRET" in reason
    assert explicit == "refused"


def test_what_is_loaded_decides_not_what_the_variable_says_later(monkeypatch):
    class InterpretedFunction:
        pass

    class JITFunction:
        pass

    name = f"{backend.__name__}.attention_fwd"
    for loaded, variable, expected in ((JITFunction, "1", False), (InterpretedFunction, "0", True)):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(attention_fwd=loaded()))
        monkeypatch.setenv("TRITON_INTERPRET", variable)
        assert backend.interpreted() is expected


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("3.3.1", "too old"),
        ("3.4.0", None),
        ("3.5.1", None),
        ("3.7.1+git0123abc", None),
        ("3.8.0", None),
        ("3.9.0", "too new"),
        ("3.10.0", "too new"),
        ("4.0a1", "too new"),
    ],
)
def test_which_triton_is_supported(version, verdict, monkeypatch):
    installed = {"triton": version}
    for name in ("triton", "pytorch-triton"):
        installed = {name: version}
        monkeypatch.setattr(backend.importlib.metadata, "version", lambda name, known=installed: known[name])
        monkeypatch.setattr(backend.importlib.metadata, "PackageNotFoundError", KeyError)
        reason = backend._missing.__wrapped__()
        assert (verdict in reason and version in reason and "triton>=3.4,<3.9" in reason) if verdict else reason is None


def test_what_is_used_of_triton_is_in_all_supported_releases():
    """Modules looked up in 3.4.0, 3.5.1, 3.7.1 and 3.8.0. (``get_ptxas`` of the NVIDIA backend changed in between.)"""
    sources = "".join(path.read_text() for path in Path(backend.__file__).parent.glob("*.py"))
    used = re.findall(r"^\s*(?:from|import) triton([\w.]*)", sources, re.MULTILINE)
    known = {"", ".backends.compiler", ".compiler", ".language", ".tools.tensor_descriptor"}
    assert set(used) == known


def test_the_tests_triton_is_a_supported_one():
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    (wanted,) = re.findall(r'"triton>=3\.\d+,(<.+?)"', pyproject.read_text())
    assert backend._requirement().endswith(f",{wanted}")
    assert backend._unsupported(importlib.metadata.version("triton")) is None


def test_needs_what_triton_builds_its_launchers_with(monkeypatch, tmp_path):
    check = backend._no_compiler.__wrapped__
    assert check() is None  # the tests of this folder compile with it
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda *scheme: {"include": str(tmp_path)})
    assert "python3-dev" in check()
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "gcc" in check()
    monkeypatch.setenv("CC", "/opt/cc")
    assert check() is None


COMPILE = """
import json, re, sys
from dataclasses import asdict
from flashcore.backends.triton.compile import compile_kernel, resources
from flashcore.backends.triton.configs import TABLES, _SAFE, _float32
from flashcore.backends.triton.sass import disassemble, overwritten_operands
from flashcore.mask import CAUSAL, FULL
from flashcore.problem import AttentionProblem

arch = tuple(json.loads(sys.argv[1]))
rows = TABLES[arch] if sys.argv[2] == "table" else _SAFE
apart = {row.head_dim for row in rows if row.kernel == "dv"}


def problem_of(row, dtype, causal):
    heads_q = 16 if row.kernel == "forward" and row.tile.tile_m == 16 else 4
    mask = CAUSAL if causal else FULL
    return AttentionProblem(
        dtype, "cuda", arch, 132, 2, 2048, 2048, heads_q, 4, row.head_dim, row.head_dim, mask, 0.1
    )


def dtype_of(row):
    return "float32" if row.applies is _float32 else "bfloat16"


def is_for(row, causal):
    # Whether no row above it takes the problems that it applies to.
    problem = problem_of(row, dtype_of(row), causal)
    return row is next(r for r in (*(
        r for r in rows if (r.kernel, r.head_dim) == (row.kernel, row.head_dim) and r.applies(problem, 2048)
    ), row))


for row in rows:
    kernel = "dk" if row.kernel == "dkdv" and row.head_dim in apart else row.kernel
    decode = row.kernel == "forward" and row.tile.tile_m == 16
    masked = is_for(row, True)
    variants = [(dtype_of(row), masked)]
    if row.tile.lookahead:  # registers are allotted anew
        variants += [("bfloat16", not masked), ("float16", masked)]
    for dtype, causal in variants:
        problem = problem_of(row, dtype, causal)
        compiled = compile_kernel(kernel, problem, row.tile, arch, pack_gqa=decode)
        ttgir = compiled.asm["ttgir"]
        loops = [loop for loop in ttgir.split("scf.for") if "math.exp2" in loop and "warp_group_dot " in loop]
        # What follows the first one is for huge scores.
        loop = loops[0][:loops[0].rindex("scf.yield %")] if row.tile.lookahead else ""
        order = re.findall(r"math.exp2|warp_group_dot_wait|warp_group_dot ", loop)
        hazards = overwritten_operands(disassemble(compiled.asm["cubin"])) if arch == (9, 0) else []
        print(json.dumps({
            "row": f"{kernel} {row.head_dim} {dtype} {causal} {row.tile}", "kib": row.smem_kib,
            **asdict(resources(compiled)), "lookahead": row.tile.lookahead, "order": order, "hazards": hazards[:3],
        }))
"""


@pytest.mark.parametrize(
    ("arch", "rows"),
    [
        ((8, 0), "table"),
        ((8, 9), "table"),
        ((9, 0), "table"),
        ((10, 0), "table"),
        ((12, 0), "table"),
        ((8, 6), "safe"),
    ],
)
def test_every_row_compiles(arch, rows):
    """Within the shared memory its row states and almost without spills; on Hopper with the overlap it asks for, and no
    register written while a product reads it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(arch), rows]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= len(TABLES[arch] if rows == "table" else configs._SAFE)
    for kernel in kernels:
        assert kernel["shared"] <= kernel["kib"] * 1024, kernel
        assert kernel["spilled"] <= 48, kernel
        assert not kernel["hazards"], kernel
        if kernel["lookahead"]:  # exponentials come first, and nothing in the loop waits for its last product
            assert kernel["order"][0] == "math.exp2", kernel
            assert kernel["order"][-1] == "warp_group_dot ", kernel


FEATURES = """
import json, sys
from dataclasses import asdict, replace
import torch
from flashcore.backends.triton.compile import compile_kernel, resources
from flashcore.backends.triton.configs import SHARED_MEMORY, choose
from flashcore.backends.triton.sass import disassemble, overwritten_operands
from flashcore.mask import CAUSAL, FULL, Mask
from flashcore.problem import AttentionProblem
from flashcore.score import alibi, bias, bind, softcap
from flashcore.sequences import DENSE, PackedSpec, PagedSpec

arch = tuple(json.loads(sys.argv[1]))
by_distance = lambda score, batch, head, query, key: torch.where(query - key < 100, score, score - 1.0)
for head_dim, head_dim_v, mask, score, sink, rows in (
    (64, 64, Mask(127, 0), None, torch.zeros(4), DENSE),
    (128, 128, Mask(64, 64), None, None, DENSE),
    (256, 256, Mask(4095, 0), softcap(50.0), None, DENSE),
    (128, 128, CAUSAL, alibi(torch.rand(4)), None, DENSE),
    (64, 64, FULL, bias(torch.empty(1, 4, 2048, 2048, dtype=torch.bfloat16)), None, DENSE),
    (128, 128, FULL, bias(torch.empty(1, 1, 2048, 2048, dtype=torch.bfloat16)), None, DENSE),
    (256, 256, CAUSAL, by_distance, None, DENSE),
    (192, 128, CAUSAL, None, None, DENSE),
    (64, 128, FULL, None, None, DENSE),
    (256, 64, CAUSAL, None, None, DENSE),
    (128, 128, CAUSAL, None, None, PackedSpec(3000)),
    (64, 64, FULL, alibi(torch.rand(2, 4)), torch.zeros(4), PackedSpec(3000, used=True)),
    (256, 256, Mask(100, 0), None, None, PackedSpec(3000)),
    (128, 128, CAUSAL, None, None, PagedSpec(300, 16)),
    (128, 128, FULL, alibi(torch.rand(2, 4)), torch.zeros(4), PagedSpec(300, 64)),
    (64, 64, Mask(100, 0), None, None, PagedSpec(300, 1)),
    (256, 256, CAUSAL, None, None, PagedSpec(300, 256)),
):
    spec, _ = bind(score, sink)
    paged = isinstance(rows, PagedSpec)
    problem = AttentionProblem(
        "bfloat16", "cuda", arch, 132, 2, 2048, 2048, 4, 2, head_dim, head_dim_v, mask, 0.1, spec,
        needs_grad=not paged, queries=PackedSpec(3000) if paged else rows, keys=rows,
    )
    config = choose(problem)
    kernels = {"forward": config.forward}
    if problem.needs_grad:
        kernels |= {"dq": config.dq, "dkdv": config.dkdv}
        if config.dv is not None:
            kernels["dk"], kernels["dv"] = kernels.pop("dkdv"), config.dv
    decoding = [("forward", choose(replace(problem, seqlen_q=1)).forward)] if paged else []
    for kernel, tile in (*kernels.items(), *decoding):
        compiled = compile_kernel(kernel, problem, tile, arch)
        hazards = overwritten_operands(disassemble(compiled.asm["cubin"])) if arch == (9, 0) else []
        print(json.dumps({
            "what": f"{kernel} {tile} of {problem}", "limit": SHARED_MEMORY[arch], **asdict(resources(compiled)),
            "hazards": hazards[:3], "tanh": "tanh.approx" in compiled.asm["ptx"],
        }))
"""


def test_a_score_and_its_derivative_have_two_names():
    """Functions of one module and name are one function to Triton: the one that a kernel calls first."""
    spec, _ = bind(softcap(50.0), None)
    made = functions(replace(H200, score=spec))
    assert made.change.__name__ != made.slope.__name__


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)])
def test_features_compile(arch):
    """In the tiles that are chosen for them, as plain problems do."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FEATURES, json.dumps(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= 30
    for kernel in kernels:
        assert kernel["shared"] <= kernel["limit"], kernel
        assert kernel["spilled"] <= 48, kernel
        assert not kernel["hazards"], kernel
        assert kernel["tanh"] == ("tanh" in kernel["what"]), kernel


def test_a_window_is_tiled_as_what_it_lets_be_seen():
    """Splits share the keys of the window, and the table's rows for few keys are for few visible ones."""
    decode = replace(H200, batch=1, seqlen_q=1, seqlen_k=131072, heads_q=32, heads_k=8)
    assert choose(decode).splits == 16
    windowed = choose(replace(decode, mask=Mask(1023, 0)))
    assert 1 < windowed.splits < 16
    assert windowed == choose(replace(decode, seqlen_k=1024))
    short = replace(H200, head_dim=64, head_dim_v=64, seqlen_q=16384, seqlen_k=16384, batch=1)
    assert choose(replace(short, mask=Mask(1023, 0))).forward == choose(replace(short, seqlen_k=1024)).forward
    assert choose(short).forward != choose(replace(short, mask=Mask(1023, 0))).forward


def test_sections_of_heads():
    """Long tiles first only where some are longer than others."""
    assert configs.heads_per_section(H200, 128) > 1
    for mask in (FULL, Mask(1023, 0), Mask(5, None)):
        assert configs.heads_per_section(replace(H200, mask=mask), 128) == 1
    wide = replace(H200, head_dim_v=256)
    assert configs.heads_per_section(wide, 128) < configs.heads_per_section(H200, 128)


def test_the_wider_head_dim_has_the_tile():
    for head_dim, head_dim_v in ((64, 256), (256, 64)):
        problem = replace(H200, head_dim=head_dim, head_dim_v=head_dim_v)
        assert choose(problem) == choose(replace(H200, head_dim=256, head_dim_v=256))
    ampere = replace(H200, arch=(8, 0), head_dim=64)
    assert choose(ampere).dv is not None
    assert choose(replace(ampere, head_dim_v=64)).dv is None


def test_scores_that_take_registers_have_narrower_tiles():
    def tiles(score, **changes):
        config = choose(replace(H200, score=bind(score, None)[0], **changes))
        return config.forward.tile_n, config.dq.tile_n, config.dkdv.tile_m, config.why

    plain = tiles(None)
    assert tiles(softcap(30.0))[:3] == tiles(alibi(torch.rand(16)))[:3] == plain[:3]
    dense = tiles(bias(torch.empty(1, 1, 2048, 2048)))
    assert dense[:3] == tuple(n // 2 for n in plain[:3])
    assert "narrower" in dense[3]
    wide = {"head_dim": 256, "head_dim_v": 256}
    assert tiles(softcap(30.0), **wide)[0] == tiles(None, **wide)[0] == 2 * tiles(alibi(torch.rand(16)), **wide)[0]


LOOP = """
        /*0000*/                   IMAD.MOV.U32 R8, RZ, RZ, 0x1 ;   /* 0x1 */
        /*0010*/                   {top} ;                          /* 0x1 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], R88, gsb0 ;  /* 0x1 */
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;  /* 0x1 */
        /*0040*/                   F2FP.BF16.F32.PACK_AB R8, R1, R2 ;     /* 0x1 */
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;  /* 0x1 */
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR8], R24, gsb0 ;  /* 0x1 */
        /*0070*/              @!P0 BRA 0x10 ;                       /* 0x1 */
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;  /* 0x1 */
        /*0090*/                   IMAD.MOV.U32 R8, RZ, RZ, 0x1 ;   /* 0x1 */
        /*00a0*/                   EXIT ;                           /* 0x1 */
"""


@pytest.mark.parametrize(
    ("top", "pending", "written"),
    [
        ("MUFU.EX2 R16, R12", "0x0", 0),  # reads it
        ("MUFU.EX2 R9, R3", "0x0", 1),
        ("@P1 FADD R15, R3, R4", "0x1", 1),
        ("LDS.128 R4, [R9]", "0x0", 0),
        ("LDS.128 R8, [R3]", "0x0", 1),
        ("CS2R R14, SRZ", "0x0", 1),
        ("SHFL.BFLY PT, R12, R2, 0x2, 0x1f", "0x0", 1),
        ("ISETP.GE.AND P0, PT, R12, R0, PT", "0x0", 0),
        ("ST.E [R10.64], R12", "0x0", 0),
        ("NOP", "0x1", 0),  # waits for all but the newest group
        ("NOP", "0x2", 1),  # does not wait for P V
    ],
)
def test_finds_registers_written_under_a_product(top, pending, written):
    pytest.importorskip("triton")
    from flashcore.backends.triton.sass import overwritten_operands

    assert len(overwritten_operands(LOOP.format(top=top, pending=pending))) == written


@pytest.mark.parametrize(("heads", "far"), [(16, False), (65_536, True), (266_306, True)])
def test_gradients_of_rows_far_apart_have_64_bit_offsets(heads, far):
    """Wherever a tile's last row lies 2^31 elements behind its first; elsewhere they would take registers."""
    attention = pytest.importorskip("flashcore.backends.triton.attention")
    problem = replace(H200, heads_q=heads, heads_k=heads, head_dim=128, head_dim_v=128)
    tiles = {row.tile for rows in (*TABLES.values(), configs._SAFE) for row in rows}
    last = max(max(tile.tile_m, tile.tile_n) for tile in tiles) - 1
    assert far or last * heads * 128 + 127 < 2**31
    for tile in tiles:
        assert attention.backward_constants(problem, tile, tile.tile_m)["FAR"] is far
