"""Who is chosen, why, and what is said of the others."""

import itertools
import json
import timeit
import warnings
from dataclasses import dataclass, replace

import pytest

from flashcore import backends
from flashcore.backends.hopper.backward_configs import choose_backward
from flashcore.bench.cases import SUITES
from flashcore.bench.record import RESULTS, WITHOUT_TRITON
from flashcore.errors import FlashCoreWarning, InvalidInputError, UnsupportedError
from flashcore.gemm_problem import GemmProblem
from flashcore.mask import CAUSAL, FULL, Mask
from flashcore.plan import _plan, override, plan
from flashcore.problem import AttentionProblem

PROBLEM = AttentionProblem(
    dtype="bfloat16", device="cpu", arch=None, sm_count=0, batch=2, seqlen_q=128, seqlen_k=128, heads_q=8, heads_k=2,
    head_dim=64, head_dim_v=64, mask=CAUSAL, scale=0.125,
)  # fmt: skip
ON_HOPPER = replace(PROBLEM, device="cuda", arch=(9, 0), sm_count=132)


@dataclass(frozen=True)
class Config:
    tile: int
    why: str


def test_first_backend_that_can(add_backend):
    add_backend("second")
    add_backend("first", rejects=lambda problem: None if problem.causal else "causal=False")
    chosen = plan(PROBLEM)
    assert (chosen.backend, chosen.rejected) == ("first", ())
    other = plan(replace(PROBLEM, mask=FULL))
    assert (other.backend, other.rejected) == ("second", (("first", "causal=False"),))


def test_unavailable_backend(add_backend):
    add_backend("broken", unavailable=lambda: "its library is missing")
    assert plan(PROBLEM).rejected[0] == ("broken", "its library is missing")


def test_the_machine_is_asked_after_the_problem(add_backend):
    def unavailable():
        raise AssertionError("looked for a GPU")

    add_backend("absent", unavailable=unavailable, rejects=lambda problem: "everything")
    assert plan(PROBLEM).rejected[0] == ("absent", "everything")


def test_one_warning_when_the_gpu_could_do_better(add_backend):
    """A missing library on a GPU that the backend is for; not a GPU, or a problem, that it is not for."""
    add_backend("slow")
    add_backend(
        "fast",
        unavailable=lambda: "cuda-bindings 12.9 do not match CUDA 13.0",
        rejects=lambda problem: None if problem.arch == (9, 0) else "not Hopper",
    )
    with pytest.warns(
        FlashCoreWarning, match=r"backend fast would .* cannot: cuda-bindings 12.9 do not match"
    ):
        assert plan(ON_HOPPER).backend == "slow"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan(replace(ON_HOPPER, mask=FULL)).backend == "slow"  # said before
        assert plan(replace(ON_HOPPER, arch=(8, 0))).backend == "slow"
        assert plan(PROBLEM).backend == "slow"


def test_real_backends_on_the_cpu():
    assert plan(PROBLEM).backend == "sdpa"
    assert plan(replace(PROBLEM, return_lse=True)).backend == "sdpa"
    with_lse = plan(replace(PROBLEM, return_lse=True, head_dim_v=32))
    assert with_lse.backend == "reference"
    names = tuple(backends.ATTENTION.providers)
    before = names[: names.index("reference")]
    assert tuple(name for name, _ in with_lse.rejected) == before
    assert "return_lse" in dict(with_lse.rejected)["sdpa"]


# ---- who defers to whom ------------------------------------------------------------------------------------------


@pytest.fixture
def usable(monkeypatch):
    """A function that pretends that a Hopper GPU is here, with hopper and these backends."""

    def use(*names: str) -> None:
        for name in ("hopper", "triton"):
            reason = None if name in ("hopper", *names) else "its library is missing"
            monkeypatch.setattr(backends.ATTENTION.load(name), "unavailable", lambda reason=reason: reason)
        _plan.cache_clear()

    return use


DECODING = replace(
    ON_HOPPER, batch=8, seqlen_q=1, seqlen_k=8192, heads_q=32, heads_k=8, head_dim=128, head_dim_v=128, mask=FULL,
)  # fmt: skip


# More rows for each key head than hopper's decoding kernel takes.
WIDE_GROUPS = replace(DECODING, heads_q=64, heads_k=4)


def test_decoding_has_a_kernel(usable):
    usable("triton")
    chosen = plan(DECODING)
    assert (chosen.backend, chosen.rejected) == ("hopper", ())
    assert "4 rows for each key head" in str(chosen)
    assert plan(replace(DECODING, needs_grad=True)).backward.backend == "hopper"


def test_wide_groups_go_to_triton(usable):
    usable("triton")
    chosen = plan(WIDE_GROUPS)
    assert (chosen.backend, chosen.rejected) == ("triton", ())
    assert chosen.why.startswith("hopper defers to it: triton is made for one query per sequence")
    assert chosen.config.pack_gqa
    assert "backend   triton: hopper defers to it" in str(chosen)
    assert plan(replace(WIDE_GROUPS, needs_grad=True)).backward.backend == "triton"


@pytest.mark.filterwarnings("error")
def test_wide_groups_stay_with_hopper_without_triton(usable, monkeypatch):
    usable()
    assert plan(WIDE_GROUPS).backend == "hopper"
    usable("triton")
    monkeypatch.setattr(backends.ATTENTION.load("triton"), "rejects", lambda problem: "head_dim 128")
    assert plan(WIDE_GROUPS).backend == "hopper"
    monkeypatch.setattr(backends.ATTENTION, "providers", {"hopper": "hopper", "sdpa": "sdpa"})
    _plan.cache_clear()
    assert plan(WIDE_GROUPS).backend == "hopper"


def test_who_is_named_computes(usable):
    usable("triton")
    assert (plan(WIDE_GROUPS, "hopper").backend, plan(WIDE_GROUPS, "hopper").why) == ("hopper", "requested")
    with override(backend="hopper"):
        assert plan(WIDE_GROUPS).backend == "hopper"
    assert plan(WIDE_GROUPS).backend == "triton"


def test_a_plan_for_elsewhere_follows_the_same_rules():
    assert plan(WIDE_GROUPS, anywhere=True).backend == "triton"
    assert plan(DECODING, anywhere=True).backend == "hopper"
    assert plan(WIDE_GROUPS, "hopper", anywhere=True).backend == "hopper"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # A long prompt, a chunk of one, and small problems, which the host bounds
        ({"seqlen_q": 8192, "mask": CAUSAL}, None),
        ({"seqlen_q": 512, "mask": CAUSAL}, None),
        ({"seqlen_q": 3, "seqlen_k": 512}, None),
        # Up to 8 rows for each key head: the decoding kernel, if it has work for the SMs
        ({"seqlen_k": 1}, None),
        ({"seqlen_q": 2}, None),
        ({"batch": 1, "heads_k": 32, "seqlen_k": 2049}, None),
        ({"batch": 1, "seqlen_k": 65535}, None),
        ({"batch": 1, "seqlen_k": 65536}, "splits the keys of 8 heads among all 132 SMs"),
        ({"batch": 9, "heads_q": 1, "heads_k": 1, "seqlen_k": 131072}, None),
        # One query for which it is not made
        ({"heads_k": 2}, "is made for one query per sequence"),
        ({"head_dim": 136, "head_dim_v": 136, "seqlen_k": 1}, "is made for one query per sequence"),
        # Packed heads: 128 rows at most. Two tiles for the busiest of 132 SMs, so 2048 keys count as 4096.
        ({"seqlen_q": 3, "seqlen_k": 2048}, "packs the 4 heads of a group: 12 rows"),
        ({"seqlen_q": 3, "seqlen_k": 2047}, None),
        ({"seqlen_q": 32}, "packs the 4 heads of a group: 128 rows"),
        ({"seqlen_q": 33}, None),
        # No groups: 16 rows at most
        ({"seqlen_q": 16, "heads_k": 32}, "has tiles of 16 rows for 16"),
        ({"seqlen_q": 17, "heads_k": 32}, None),
        # Split keys: a quarter of the SMs at most
        ({"batch": 1, "seqlen_q": 64, "heads_k": 32}, "splits the keys: 32 tiles of 64 rows for 132 SMs"),
        ({"batch": 1, "seqlen_q": 64, "heads_q": 33, "heads_k": 33}, "splits the keys: 33 tiles"),
        ({"batch": 1, "seqlen_q": 64, "heads_q": 34, "heads_k": 34}, None),
        ({"batch": 1, "seqlen_q": 65, "heads_k": 32}, None),
        ({"batch": 1, "seqlen_q": 64, "heads_k": 32, "seqlen_k": 4096}, "splits the keys"),
        ({"batch": 1, "seqlen_q": 64, "heads_k": 32, "seqlen_k": 4095}, None),
    ],
)
def test_to_whom_hopper_defers(usable, change, reason):
    usable("triton")
    chosen = plan(replace(DECODING, **change))
    assert chosen.backend == ("hopper" if reason is None else "triton")
    if reason is not None:
        assert chosen.why.startswith(f"hopper defers to it: triton {reason}")


FLOAT32 = replace(ON_HOPPER, dtype="float32")
TENSOR_CORES = "multiplies float32 on tensor cores, and triton does not"


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (FLOAT32, f"{TENSOR_CORES}: 512 rows for each key head"),
        (replace(FLOAT32, return_lse=True), TENSOR_CORES),
        (replace(FLOAT32, needs_grad=True), TENSOR_CORES),
        (replace(FLOAT32, mask=CAUSAL, seqlen_q=128, seqlen_k=256), TENSOR_CORES),
        # The LSE is not PyTorch's to give, or it would hold every score
        (replace(FLOAT32, mask=CAUSAL, seqlen_q=128, seqlen_k=256, return_lse=True), None),
        (replace(FLOAT32, head_dim=66, head_dim_v=66), None),
        # Reading takes the time
        (replace(FLOAT32, seqlen_q=4, seqlen_k=8192), None),
        (replace(FLOAT32, seqlen_q=5, seqlen_k=8192), TENSOR_CORES),
        # No record
        *((replace(ON_HOPPER, arch=arch), "is known to be good") for arch in ((8, 0), (8, 9), (10, 0), (12, 0))),
        (replace(ON_HOPPER, arch=(8, 0), seqlen_q=1), "triton has not been measured on sm_80"),
        (replace(FLOAT32, arch=(8, 6), seqlen_q=1), "triton has not been measured on sm_86"),
        (replace(ON_HOPPER, arch=(8, 0), head_dim=66, head_dim_v=66), "is known to be good"),
    ],
)
def test_to_whom_triton_defers(problem, reason):
    """PyTorch's kernels where float32 is multiplied much, and where nothing is recorded."""
    chosen = plan(problem, anywhere=True)
    assert chosen.backend == ("triton" if reason is None else "sdpa")
    if reason is not None:
        assert chosen.why.startswith("triton defers to it: sdpa ")
        assert reason in chosen.why
    assert plan(problem, "triton", anywhere=True).backend == "triton"
    window = replace(problem, mask=Mask(7, 0), seqlen_q=128, seqlen_k=128)
    assert backends.ATTENTION.load("triton").defers(window) is None  # PyTorch computes what it hides


def test_measured_architectures_have_records():
    records = (json.loads(path.read_text())["meta"] for path in RESULTS.glob("*/forward.json"))
    measured = {tuple(map(int, meta["compute_capability"].split("."))) for meta in records}
    assert measured == backends.ATTENTION.load("triton").MEASURED


def test_the_suites_of_prefill_measure_hopper():
    for name in ("forward", "small", "long", "sustained", "gqa"):
        for case in SUITES[name].cases:
            problem = replace(
                ON_HOPPER, dtype=case.dtype, batch=case.batch, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k,
                heads_q=case.heads, heads_k=case.kv_heads, head_dim=case.head_dim, head_dim_v=case.head_dim,
                mask=CAUSAL if case.causal else FULL,
            )  # fmt: skip
            assert plan(problem, anywhere=True).backend == "hopper", (name, case.name)
            assert name not in WITHOUT_TRITON  # it has Triton beside it


# ---- a backend by name -------------------------------------------------------------------------------------------


def test_requested_backend():
    chosen = plan(PROBLEM, "reference")
    assert (chosen.backend, chosen.why, chosen.rejected) == ("reference", "requested", ())


def test_requested_backend_that_cannot():
    with pytest.raises(UnsupportedError) as caught:
        plan(replace(PROBLEM, return_lse=True, head_dim_v=32), "sdpa")
    message = str(caught.value)
    assert message.startswith(
        "attention: backend='sdpa' cannot compute this: bfloat16 on cpu, q (2, 128, 8, 64)"
    )
    assert "\n  sdpa: return_lse=True with head_dim_v 32 != head_dim 64" in message
    assert 'Use backend="auto"' in message


def test_no_backend_can(add_backend, monkeypatch):
    add_backend("one", rejects=lambda problem: "head_dim 64 > 32")
    add_backend("two", unavailable=lambda: "no GPU")
    monkeypatch.setattr(backends.ATTENTION, "providers", {"two": "two", "one": "one"})
    with pytest.raises(UnsupportedError, match=r"no backend can .*\n  two: no GPU\n  one: head_dim 64 > 32$"):
        plan(PROBLEM)


@pytest.mark.parametrize("problem", [PROBLEM, replace(PROBLEM, seqlen_q=0)])
def test_unknown_backend(problem):
    with pytest.raises(
        InvalidInputError, match=r"backend='cutlass' does not exist \(supported: auto, .*, reference"
    ):
        plan(problem, "cutlass")


@pytest.mark.parametrize("change", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}])
def test_nothing_to_multiply(change):
    assert plan(replace(PROBLEM, **change)).backend == "empty"


def test_lengths_that_do_not_fit_32_bits_are_refused():
    """On a GPU by everybody, before anything is launched."""
    for change in ({"seqlen_k": 2**31}, {"seqlen_q": 2**31}, {"seqlen_q": 2**31 - 2**16 + 1}):
        problem = replace(ON_HOPPER, heads_q=1, heads_k=1, **change)
        reason = f"seqlen {max(problem.seqlen_q, problem.seqlen_k)} > {2**31 - 2**16}"
        for backend in ("hopper", "triton", "sdpa", "reference"):
            with pytest.raises(UnsupportedError, match=f"{backend}: {reason}"):
                plan(problem, backend, anywhere=True)
        with pytest.raises(UnsupportedError, match="no backend can compute this"):
            plan(problem, anywhere=True)
    assert plan(replace(ON_HOPPER, batch=1, seqlen_k=2**31 - 2**16), anywhere=True).backend in ("hopper", "triton")


def test_a_plan_of_another_scale_is_about_that_scale(add_backend):
    asked = []
    add_backend("fake", rejects=asked.append)
    for scale in (0.125, 0.3, 2.0):
        assert plan(replace(PROBLEM, scale=scale)).problem.scale == scale
    assert len(asked) == 1
    add_backend("none", rejects=lambda problem: "all")
    with pytest.raises(UnsupportedError, match=r"scale 0\.3"):
        plan(replace(PROBLEM, scale=0.3), "none")


@pytest.mark.parametrize("mask", [FULL, CAUSAL])
def test_planning_a_new_length_takes_no_time(mask):
    """About 0.1 ms, with the configs of four rows for a causal mask; the bound only catches work per tile."""
    problem = replace(ON_HOPPER, batch=8, heads_q=16, heads_k=16, mask=mask, needs_grad=True)
    lengths = itertools.count(3000)

    def one() -> None:
        length = next(lengths)
        plan(replace(problem, seqlen_q=length, seqlen_k=length), anywhere=True)

    assert min(timeit.repeat(one, number=1, repeat=100)) < 1e-3


def test_memoised(add_backend):
    asked = []
    add_backend("fake", rejects=asked.append)
    assert plan(PROBLEM) is plan(replace(PROBLEM))
    assert asked == [PROBLEM]


def test_printed(add_backend, without_kernels):
    add_backend("fake", configure=lambda problem: Config(64, "small tiles fill the machine"))
    add_backend("shy", rejects=lambda problem: "causal")
    text = str(plan(replace(PROBLEM, needs_grad=True)))
    assert text.splitlines() == [
        "problem   bfloat16 on cpu, q (2, 128, 8, 64), k (2, 128, 2, 64), v (2, 128, 2, 64), scale 0.125, causal, "
        "needs_grad",
        f"backend   fake: the first of {', '.join(backends.ATTENTION.providers)} that can",
        "config    Config(tile=64, why='small tiles fill the machine'): small tiles fill the machine",
        "backward  sdpa-recompute: the first of torch-flash, sdpa-recompute, reference-recompute, reference that "
        "can",
        "          SdpaConfig(expand_heads=False): SDPA's flash kernel reads grouped heads where they are",
        "          not torch-flash: a tensor that is not on an NVIDIA GPU",
        "rejected  shy: causal",
    ]


# ---- backward ----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch):
    """Ours, whose backward would be taken on a machine with a GPU."""
    kept = {backends.ATTENTION: ("triton",), backends.ATTENTION_BACKWARD: ("hopper", "triton")}
    for operation, names in kept.items():
        others = {name: module for name, module in operation.providers.items() if name not in names}
        monkeypatch.setattr(operation, "providers", others)


def backward(problem: AttentionProblem) -> str:
    return plan(replace(problem, needs_grad=True)).backward.backend


def test_no_backward_without_gradient(add_backend):
    add_backend("fake")
    assert plan(ON_HOPPER).backward is None
    assert "backward  none: no input requires a gradient" in str(plan(ON_HOPPER))


def test_autograd_for_torch_operations():
    assert backward(PROBLEM) == "autograd"


def test_own_backward_first(add_backend, without_kernels):
    add_backend("other", backward=None)
    add_backend("fake", backward=None)
    chosen = plan(replace(ON_HOPPER, needs_grad=True))
    names = "fake, other, torch-flash, sdpa-recompute, reference-recompute, reference"
    assert (chosen.backward.backend, chosen.backward.why) == ("fake", f"the first of {names} that can")


def test_the_backward_of_another_backend(add_backend, without_kernels):
    add_backend("next", backward=None)
    add_backend("other", backward=None, rejects=lambda problem: "causal" if problem.causal else None)
    add_backend("fake")
    chosen = plan(replace(ON_HOPPER, needs_grad=True, mask=FULL))
    assert (chosen.backend, chosen.backward.backend, chosen.backward.rejected) == ("fake", "other", ())
    chosen = plan(replace(ON_HOPPER, needs_grad=True, mask=CAUSAL))
    assert (chosen.backward.backend, chosen.backward.rejected) == ("next", (("other", "causal"),))
    with override(backward="next"):
        assert backward(replace(ON_HOPPER, mask=FULL)) == "next"
    with override(backward="other"), pytest.raises(UnsupportedError, match="\n  other: causal"):
        backward(replace(ON_HOPPER, mask=CAUSAL))


def test_training_on_hopper(monkeypatch):
    hopper, triton = backends.ATTENTION.load("hopper"), backends.ATTENTION.load("triton")
    monkeypatch.setattr(hopper, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    problem = replace(ON_HOPPER, needs_grad=True)
    chosen = plan(problem)
    assert (chosen.backend, chosen.backward.backend) == ("hopper", "hopper")
    assert chosen.backward.config == choose_backward(problem)
    problem = replace(problem, head_dim_v=128)
    chosen = plan(problem)
    assert (chosen.backend, chosen.backward.backend) == ("hopper", "triton")
    assert chosen.backward.config == triton.configure(problem)
    ampere = replace(ON_HOPPER, needs_grad=True, arch=(8, 0))
    assert plan(ampere, "triton").backward.backend == "triton"
    assert (plan(ampere).backend, plan(ampere).backward.backend) == ("sdpa", "autograd")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": "float16"}, None),
        ({"seqlen_q": 5, "mask": FULL}, None),
        ({"heads_k": 1, "head_dim": 256, "head_dim_v": 256}, None),
        ({"arch": (8, 6), "head_dim": 192, "head_dim_v": 192}, None),
        ({"seqlen_q": 5}, "causal with seqlen_q != seqlen_k"),
        ({"dtype": "float32"}, "dtype float32"),
        ({"head_dim_v": 32}, "a head_dim of v that differs from q's"),
        ({"head_dim": 68, "head_dim_v": 68}, "head_dim 68, not a multiple of 8"),
        ({"head_dim": 264, "head_dim_v": 264}, "head_dim 264 > 256"),
        ({"arch": (8, 6), "head_dim": 256, "head_dim_v": 256}, "head_dim 256 > 192"),
        ({"arch": (7, 5)}, "compute capability 7.5 < 8.0"),
        ({"scale": -1.0}, "scale -1 <= 0"),
        ({"device": "cpu", "arch": None}, "a tensor that is not on an NVIDIA GPU"),
    ],
)
def test_torch_flash_where_it_can(add_backend, without_kernels, change, reason):
    add_backend("fake")
    chosen = plan(replace(ON_HOPPER, needs_grad=True, **change))
    if reason is None:
        assert chosen.backward.backend == "torch-flash"
    else:
        assert chosen.backward.backend == "sdpa-recompute"
        assert chosen.backward.rejected == (("torch-flash", reason),)


# ---- override ----------------------------------------------------------------------------------------------------


def test_override_config(add_backend):
    add_backend("fake", configure=lambda problem: Config(64, "the table's"))
    with override(config=Config(32, "tried out")):
        assert plan(PROBLEM).config == Config(32, "tried out")
        with override(config=Config(16, "inside")):
            assert plan(PROBLEM).config.tile == 16
        assert plan(PROBLEM).config.tile == 32
    assert plan(PROBLEM).config.tile == 64


def test_override_ends_with_an_exception(add_backend):
    add_backend("fake", configure=lambda problem: Config(64, "the table's"))
    with pytest.raises(KeyError), override(config=Config(32, "")):
        raise KeyError
    assert plan(PROBLEM).config.tile == 64


def test_override_config_of_a_backend_without_one():
    with (
        override(config=Config(32, "")),
        pytest.raises(InvalidInputError, match="backend reference has no config"),
    ):
        plan(PROBLEM, "reference")


def test_override_backend():
    with override(backend="reference"):
        assert plan(PROBLEM).backend == "reference"
        assert plan(PROBLEM, "sdpa").backend == "sdpa"


def test_override_backward(add_backend):
    add_backend("fake", backward=None)
    for choice in ("fake", "torch-flash", "sdpa-recompute"):
        with override(backward=choice):
            assert backward(ON_HOPPER) == choice


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ("fake", InvalidInputError, "attention_backward: backend='fake' does not exist"),
        ("torch-flash", UnsupportedError, "\n  torch-flash: dtype float32"),
        ("magic", InvalidInputError, "'magic' does not exist .*auto, torch-flash, sdpa-recompute, reference-recompute"),
    ],
)
def test_override_backward_that_cannot(add_backend, without_kernels, choice, error, message):
    add_backend("fake")
    with override(backward=choice), pytest.raises(error, match=message):
        backward(replace(ON_HOPPER, dtype="float32"))


def test_override_of_another_operation():
    product = GemmProblem("bfloat16", "bfloat16", "cuda", (9, 0), 132, 1, 64, 64, 64)
    with override(backend="torch", operation="matmul"), override(backend="reference"):
        assert plan(product, anywhere=True).backend == "torch"
        assert plan(PROBLEM).backend == "reference"
        with override(operation="matmul"):
            assert plan(product, anywhere=True).backend == "hopper"
    with pytest.raises(InvalidInputError, match=r"operation='conv' .*attention, matmul"), override(operation="conv"):
        pass
