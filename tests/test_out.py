"""out=: the output is written where the caller says, and nowhere else; what is no place for it is named."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flashcore
from flashcore.backends import ATTENTION, hopper
from flashcore.compat import flash_attn
from flashcore.errors import InvalidInputError, UnsupportedError
from tests.cases import BY_NAME
from tests.packed import BY_NAME as PACKED
from tests.paged import BY_NAME as PAGED

DENSE = ("causal_129", "causal_empty_rows", "no_keys", "no_queries", "packed_causal", "float64_causal_empty_rows")


def calls(device="cpu"):
    """name -> ((q, k, v), options)"""
    found = {name: (BY_NAME[name].inputs(device), {"causal": True}) for name in DENSE}
    for name in ("sink", "window", "unused_rows", "no_keys", "rows_around", "no_sequences"):
        case = PACKED[name]
        found[f"packed_{name}"] = case.inputs(device), {**case.options(device), **case.packed(device)}
    for name in ("mixed_pages_of_16", "one_query_each", "unused_queries"):
        q, k, v, places, *_ = PAGED[name].inputs(device)
        found[f"paged_{name}"] = (q, k, v), {**PAGED[name].packed.options(device), **places}
    return found


def check(tensors, options):
    """The same bits in a place of the caller's, and nothing around it."""
    q, _, v = tensors
    expected = flashcore.attention(*tensors, **options)
    with_lse, lse = flashcore.attention(*tensors, **options, return_lse=True)
    assert expected.shape == (*q.shape[:-1], v.shape[-1])
    whole = torch.full((expected.numel() + 32,), 7.0, dtype=q.dtype, device=q.device)
    place = whole[16:-16].view(expected.shape)
    for _ in range(2):
        place.fill_(torch.nan)
        assert flashcore.attention(*tensors, **options, out=place) is place
        assert torch.equal(place, expected)
        place.fill_(torch.nan)
        out, found = flashcore.attention(*tensors, **options, out=place, return_lse=True)
        assert out is place
        assert torch.equal(place, with_lse)
        assert torch.equal(found, lse)
        assert (whole[:16] == 7).all()
        assert (whole[-16:] == 7).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", calls())
def test_on_the_cpu(name, backend):
    tensors, options = calls()[name]
    check(tensors, options | {"backend": backend})


@pytest.mark.gpu
@pytest.mark.parametrize("name", calls())
@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_on_a_gpu(name):
    """By everybody who takes it."""
    tensors, options = calls("cuda")[name]

    def takes(backend):
        try:
            return flashcore.explain(*tensors, **options, backend=backend)
        except UnsupportedError:
            return None

    backends = ["auto", *filter(takes, ATTENTION.providers)]
    assert "reference" in backends
    for backend in backends:
        check(tensors, options | {"backend": backend})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and hopper.unavailable() is not None, reason="no Hopper GPU")
@pytest.mark.parametrize("seqlen_q", [300, 1])
def test_nothing_is_allocated_for_it(seqlen_q):
    q, k, v = (torch.randn(2, n, 4, 64, dtype=torch.bfloat16, device="cuda") for n in (seqlen_q, 300, 300))
    out = flashcore.attention(q, k, v, backend="hopper")
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    flashcore.attention(q, k, v, backend="hopper", out=out)
    assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] == before


@pytest.mark.gpu
def test_a_place_that_is_not_aligned_is_named():
    q, k, v = (torch.randn(1, 64, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    whole = torch.empty(q.numel() + 1, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(InvalidInputError, match=r"out must be aligned to 16 bytes.* 2 modulo 16"):
        flashcore.attention(q, k, v, out=whole[1:].view(q.shape))
    with pytest.raises(InvalidInputError, match="given a negated view"):
        flashcore.attention(q, k, v, out=torch._neg_view(whole[:-1]).view(q.shape))


@pytest.mark.gpu
def test_a_captured_graph_writes_it():
    q, k, v = (torch.randn(1, 64, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = torch.empty_like(q)
    flashcore.attention(q, k, v, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flashcore.attention(q, k, v, out=out)
    q.copy_(torch.randn_like(q))
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, flashcore.attention(q, k, v))


def inputs():
    return torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 24)


INVALID = {
    "shape": (lambda: torch.empty(2, 5, 4, 16), r"out must be float32 \(2, 5, 4, 24\) on cpu, contiguous .*, 4, 16\)"),
    "dtype": (lambda: torch.empty(2, 5, 4, 24).double(), r"out must be float32 .* \(given float64"),
    "device": (lambda: torch.empty(2, 5, 4, 24, device="meta"), r"out must be .* on cpu, .* on meta"),
    "strides": (lambda: torch.empty(2, 4, 5, 24).transpose(1, 2), r"contiguous .*, strides \(480, 24, 120, 1\)"),
    "list": (lambda: [1], r"out must be float32 .* \(given list\)"),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_no_place_is_named(name):
    make, message = INVALID[name]
    with pytest.raises(InvalidInputError, match=message):
        flashcore.attention(*inputs(), out=make())


def test_gradients_are_refused():
    out = torch.zeros(2, 5, 4, 24)
    for i in range(3):
        tensors = list(inputs())
        tensors[i].requires_grad_()
        with pytest.raises(UnsupportedError, match="out= has no gradients"):
            flashcore.attention(*tensors, out=out)
        with torch.no_grad():
            assert torch.equal(flashcore.attention(*tensors, out=out), flashcore.attention(*tensors))
    with pytest.raises(UnsupportedError, match="out= has no gradients"):
        flashcore.attention(*inputs(), sink=torch.zeros(4, requires_grad=True), out=out)
    with pytest.raises(UnsupportedError, match="out= has no gradients"):
        flashcore.attention(*inputs(), out=torch.zeros(2, 5, 4, 24, requires_grad=True))


def test_recordings_write_it():
    tensors, out = inputs(), torch.full((2, 5, 4, 24), torch.nan)
    expected = flashcore.attention(*tensors, causal=True)
    with FlopCounterMode(display=False):
        assert flashcore.attention(*tensors, causal=True, out=out) is out
    assert torch.equal(out, expected)
    with FlopCounterMode(display=False), pytest.raises(InvalidInputError, match="out must be float32"):
        flashcore.attention(*tensors, causal=True, out=out[1:])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def program(q, k, v, out):
        flashcore.attention(q * 2, k, v, causal=True, out=out)
        return out + 1

    out.fill_(torch.nan)
    expected = flashcore.attention(tensors[0] * 2, *tensors[1:], causal=True)
    torch.testing.assert_close(program(*tensors, out), expected + 1)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("lse", [False, True])
def test_flash_attns_functions(lse):
    q, k, v = inputs()
    out = torch.empty(2, 5, 4, 24)
    results = flash_attn.flash_attn_func(q, k, v, causal=True, return_lse=lse, out=out)
    assert (results[0] if lse else results) is out
    torch.testing.assert_close(out, flashcore.attention(q, k, v, causal=True))

    offsets = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 7, 14], dtype=torch.int32)
    flat = [t.flatten(0, 1) for t in (q, k, v, out)]
    expected = out.clone()
    flat[3].fill_(torch.nan)
    call = {"causal": True, "return_lse": lse, "out": flat[3]}
    results = flash_attn.flash_attn_varlen_func(*flat[:3], *offsets, 5, 7, **call)
    assert (results[0] if lse else results) is flat[3]
    torch.testing.assert_close(out, expected)

    lengths, table = torch.tensor([7, 3], dtype=torch.int32), torch.tensor([[0], [1]], dtype=torch.int32)
    caches = [torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 9)) for t in (k, v)]
    for options in ({"cache_seqlens": 7}, {"cache_seqlens": lengths}, {"cache_seqlens": lengths, "block_table": table}):
        call = {"causal": True, "return_softmax_lse": lse, **options}
        expected = flash_attn.flash_attn_with_kvcache(q, *caches, **call)
        out.fill_(torch.nan)
        results = flash_attn.flash_attn_with_kvcache(q, *caches, **call, out=out)
        assert (results[0] if lse else results) is out
        torch.testing.assert_close(results, expected)
        with pytest.raises(InvalidInputError, match=r"out must be float32 \(2, 5, 4, 24\)"):
            flash_attn.flash_attn_with_kvcache(q, *caches, **call, out=out.transpose(1, 2).contiguous().transpose(1, 2))

    keys = {"seqused_k": lengths, "block_table": table, "return_lse": lse}
    expected = flash_attn.flash_attn_varlen_func(flat[0], *caches, offsets[0], None, 5, 16, **keys)
    results = flash_attn.flash_attn_varlen_func(flat[0], *caches, offsets[0], None, 5, 16, **keys, out=flat[3])
    assert (results[0] if lse else results) is flat[3]
    torch.testing.assert_close(results, expected)
    with pytest.raises(UnsupportedError, match="out= has no gradients"):
        flash_attn.flash_attn_varlen_func(
            flat[0].requires_grad_(), *caches, offsets[0], None, 5, 16, **keys, out=flat[3]
        )
