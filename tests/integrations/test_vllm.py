"""vLLM's plug-in, against the real package where it is installed: CONTRIBUTING.md says how, for a CPU.

vLLM's engine takes a backend of another name on GPUs only. On a CPU FlashCore stands in for the one that it has there.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flashcore
from flashcore import backends
from flashcore.errors import UnsupportedError
from tests.packed import PackedCase, assert_packed_forward

pytest.importorskip("vllm", reason="vLLM is not installed: CONTRIBUTING.md says how to test its plug-in")

from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from flashcore.integrations import vllm as plugin

PAGE, PAGES = 32, 24
# Single tokens, a prompt, chunks of prompts, a request that fills a graph up, and 3 rows of no request.
BATCH = PackedCase("batch", (1, 70, 33, 5, 0, 1), (130, 70, 90, 5, 0, 1), causal=True, after=3, scale=0.2)
LAYOUTS = {
    "HND": lambda heads, width: torch.full((PAGES, heads, PAGE, width), torch.nan),
    "NHD": lambda heads, width: torch.full((PAGES, PAGE, heads, width), torch.nan).transpose(1, 2),
}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class Layer:
    """What the backend looks at of vLLM's layer."""

    def __init__(self, device: str):
        self._k_scale = self._v_scale = torch.ones((), device=device)


def tables(case: PackedCase) -> list[list[int]]:
    """The pages of each request, shuffled. Page 0 is nobody's."""
    pages = random.Random(0).sample(range(1, PAGES), PAGES - 1)
    return [[pages.pop() for _ in range(-(-n // PAGE))] for n in case.keys]


def batch_of(case: PackedCase, device: str) -> CommonAttentionMetadata:
    """As vLLM describes it."""
    starts = torch.tensor([0, *itertools.accumulate(case.lengths_q)], dtype=torch.int32)
    rows = [(*pages, *[10**6] * (6 - len(pages))) for pages in tables(case)]
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(case.keys, dtype=torch.int32, device=device),
        num_reqs=len(case.keys),
        num_actual_tokens=sum(case.lengths_q),
        max_query_len=max(case.lengths_q),
        max_seq_len=max(case.keys),
        block_table_tensor=torch.tensor(rows, dtype=torch.int32, device=device),
        slot_mapping=torch.zeros(0, dtype=torch.int64, device=device),
    )


def slots(case: PackedCase) -> list[int]:
    """Where each packed key goes; the rows of no request go nowhere."""
    of_requests = (
        pages[i // PAGE] * PAGE + i % PAGE
        for pages, n in zip(tables(case), case.keys, strict=True)
        for i in range(n)
    )
    return [*of_requests, *[-1] * case.after]


def build(case: PackedCase, device: str) -> plugin.FlashCoreMetadata:
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=case.heads_k, head_size=case.head_dim, dtype=torch.bfloat16
    )
    return plugin.FlashCoreBuilder(spec, ["layer"], None, torch.device(device)).build(0, batch_of(case, device))


def layer_of(case: PackedCase, **options) -> plugin.FlashCoreImpl:
    return plugin.FlashCoreImpl(case.heads_q, case.head_dim, case.scale, case.heads_k, **options)


def filled(impl, case: PackedCase, k, v, layout: str) -> torch.Tensor:
    """A cache into which the keys and values were written, beside more tokens than there are slots."""
    kv_cache = LAYOUTS[layout](case.heads_k, 2 * case.head_dim).to(k)
    mapping = torch.tensor(slots(case), device=k.device)
    more = torch.full_like(k[:2], torch.nan)
    impl.do_kv_cache_update(Layer(k.device), torch.cat([k, more]), torch.cat([v, more]), kv_cache, mapping)
    return kv_cache


def attend(impl, case: PackedCase, device: str, layout: str = "HND"):
    """out, q, k and v of the case by the plug-in."""
    q, k, v = case.inputs(device)
    kv_cache = filled(impl, case, k, v, layout)
    output = torch.full_like(q, torch.nan)
    assert impl.forward(Layer(device), q, None, None, kv_cache, build(case, device), output) is output
    return output, q, k, v


def test_registered():
    plugin.register()
    plugin.register()
    member = AttentionBackendEnum["FLASHCORE"]
    assert member.get_class() is plugin.FlashCoreBackend
    assert member.get_class().get_name() == member.name


def test_chosen_by_its_name():
    from vllm.config import AttentionConfig

    plugin.register()
    assert AttentionConfig(backend="flashcore").backend is AttentionBackendEnum["FLASHCORE"]


def test_found_by_vllm():
    """In a process that names nobody."""
    try:
        found = importlib.metadata.distribution("flashcore-attention").entry_points
    except importlib.metadata.PackageNotFoundError:
        found = ()
    if "flashcore" not in [point.name for point in found if point.group == "vllm.general_plugins"]:
        pytest.skip("FlashCore is not installed, but on the path")
    code = """
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
print(AttentionBackendEnum["FLASHCORE"].get_class().get_name())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "FLASHCORE"


def asked(**changed) -> list[str]:
    """Why vLLM would not take the backend for such a layer."""
    config = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
        "has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0), "attn_type": AttentionType.DECODER,
    }  # fmt: skip
    return plugin.FlashCoreBackend.validate_configuration(**{**config, **changed})


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"dtype": torch.float16, "kv_cache_dtype": "float16"}, {"dtype": torch.float32}, {"head_size": 256},
        {"head_size": 40}, {"block_size": 48}, {"block_size": None}, {"has_sink": True}, {"has_sliding_window": True},
        {"device_capability": DeviceCapability(8, 0)}, {"use_kv_connector": True},
        {"kv_cache_dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_what_it_says_it_can(changed):
    assert asked(**changed) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"head_size": 320}, {"dtype": torch.float64}, {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "float16"},
        {"block_size": 8}, {"block_size": 24}, {"use_mla": True}, {"use_sparse": True}, {"use_mm_prefix": True},
        {"use_per_head_quant_scales": True}, {"device_capability": DeviceCapability(7, 5)},
        {"attn_type": AttentionType.ENCODER_ONLY}, {"attn_type": AttentionType.ENCODER_DECODER},
        {"use_non_causal": True}, {"use_batch_invariant": True}, {"use_dcp": True}, {"use_pcp": True},
        {"use_rswa": True},
    ],
)  # fmt: skip
def test_what_it_says_it_cannot(changed):
    assert asked(**changed) != []


@pytest.mark.parametrize("head_dim", [8, 64, 256, 257, 320])
def test_it_says_what_the_kernels_say(head_dim):
    problem = replace(BATCH, head_dim=head_dim).problem()
    on_hopper = replace(problem, device="cuda", arch=(9, 0), sm_count=132)
    kernel = any(backends.ATTENTION.refusal(name, on_hopper) is None for name in ("hopper", "triton"))
    assert plugin.FlashCoreBackend.supports_head_size(head_dim) == kernel


@pytest.fixture
def on_a_gpu_with(monkeypatch):
    """A function that makes this a machine whose Triton lacks something, or nothing."""

    def change(missing: str | None) -> None:
        monkeypatch.setattr(backends.ATTENTION.load("triton"), "unavailable", lambda: missing)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        flashcore.plan._plan.cache_clear()
        plugin._plan.cache_clear()

    yield change
    plugin._plan.cache_clear()


@pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")
def test_a_gpu_without_a_kernel_is_refused(on_a_gpu_with):
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    support = plugin.FlashCoreBuilder.get_cudagraph_support
    on_a_gpu_with(None)
    assert asked() == []
    assert support(None, spec) is AttentionCGSupport.ALWAYS
    on_a_gpu_with("no compiler")
    (reason,) = asked()
    assert reason.startswith("FlashCore has no kernel here: ")
    assert "triton: no compiler" in reason
    assert support(None, spec) is AttentionCGSupport.NEVER


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has a GPU")
def test_no_graphs_without_a_gpu():
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    assert plugin.FlashCoreBuilder.get_cudagraph_support(None, spec) is AttentionCGSupport.NEVER


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_keys_and_values_are_written(layout, device):
    """A row of a head has its key, and then its value; nothing else is touched."""
    impl, (_, k, v) = layer_of(BATCH), BATCH.inputs(device)
    k[-BATCH.after :], v[-BATCH.after :] = 1.0, 2.0
    kv_cache = filled(impl, BATCH, k, v, layout)
    expected = LAYOUTS["HND"](BATCH.heads_k, 2 * BATCH.head_dim).to(k)
    for row, slot in enumerate(slots(BATCH)):
        if slot >= 0:
            expected[slot // PAGE, :, slot % PAGE] = torch.cat([k[row], v[row]], dim=-1)
    assert torch.equal(kv_cache.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch(layout, device):
    out, q, k, v = attend(layer_of(BATCH), BATCH, device, layout)
    assert_packed_forward(BATCH, out, None, q, k, v)
    assert (out[-BATCH.after :] == 0).all()


@pytest.mark.parametrize("heads_k", [1, 4])
def test_heads(heads_k, device):
    case = replace(BATCH, heads_k=heads_k)
    assert_packed_forward(case, *_with_no_lse(attend(layer_of(case), case, device)))


def _with_no_lse(results):
    out, *inputs = results
    return out, None, *inputs


def test_features(device):
    case = replace(BATCH, window=(39, 0))
    assert_packed_forward(case, *_with_no_lse(attend(layer_of(case, sliding_window=40), case, device)))
    case = replace(BATCH, score="softcap")
    assert_packed_forward(case, *_with_no_lse(attend(layer_of(case, logits_soft_cap=2.0), case, device)))
    case = replace(BATCH, sink=True)
    sinks = case.options(device)["sink"]
    assert_packed_forward(case, *_with_no_lse(attend(layer_of(case, sinks=sinks), case, device)))
    halves = layer_of(case, sinks=sinks.half())  # which are no bfloat16
    assert halves._sink(torch.bfloat16).dtype == torch.float32
    assert halves._sink(torch.float16) is halves.sinks


@pytest.mark.parametrize("cap", [None, 2.0])
def test_alibi_behind_a_softcap(cap, device):
    slopes = [0.5, 0.25, 0.125, 0.0625]
    out, q, k, v = attend(layer_of(BATCH, alibi_slopes=slopes, logits_soft_cap=cap), BATCH, device)
    expected = torch.zeros_like(q, dtype=torch.float64)
    for rows, rows_k in zip(BATCH.places(BATCH.lengths_q), BATCH.places(BATCH.keys), strict=True):
        one, keys, values = (t[r].double().transpose(0, 1) for t, r in ((q, rows), (k, rows_k), (v, rows_k)))
        keys, values = (t.repeat_interleave(2, dim=0) for t in (keys, values))
        scores = one @ keys.mT * BATCH.scale
        scores = scores if cap is None else cap * (scores / cap).tanh()
        distance = torch.arange(one.shape[1])[:, None] + keys.shape[1] - one.shape[1] - torch.arange(keys.shape[1])
        distance = distance.to(device)
        scores = scores - torch.tensor(slopes, device=device)[:, None, None].double() * distance.abs()
        scores = scores.masked_fill(distance < 0, -torch.inf)
        expected[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_other_pages_of_the_same_batch(device):
    impl, builder = layer_of(BATCH), plugin.FlashCoreBuilder(None, [], None, torch.device(device))
    q, k, v = BATCH.inputs(device)
    kv_cache = filled(impl, BATCH, k, v, "HND")
    metadata = build(BATCH, device)
    moved = torch.cat([kv_cache[5:], kv_cache[:5]])
    table = (metadata.keys.table - 5).remainder(PAGES).to(torch.int32)
    changed = builder.update_block_table(metadata, table, torch.zeros(0))
    output = impl.forward(Layer(device), q, None, None, moved, changed, torch.empty_like(q))
    assert_packed_forward(BATCH, output, None, q, k, v)
    assert changed.queries is metadata.queries
    assert metadata.keys.table is not table


def test_memory_profile(device):
    output = torch.full((3, 4, 64), torch.nan, device=device)
    impl = layer_of(BATCH)
    assert (impl.forward(Layer(device), output, None, None, torch.empty(0), None, output) == 0).all()


def test_what_is_refused():
    with pytest.raises(UnsupportedError, match=r"FLASHCORE.*encoder_only.*another --attention-backend"):
        layer_of(BATCH, attn_type=AttentionType.ENCODER_ONLY)
    with pytest.raises(UnsupportedError, match="a cache in fp8"):
        layer_of(BATCH, kv_cache_dtype="fp8")
    with pytest.raises(UnsupportedError, match="a quantised output"):
        layer_of(BATCH).forward(None, None, None, None, None, None, None, output_scale=torch.ones(1))
    builder = plugin.FlashCoreBuilder(None, [], None, torch.device("cpu"))
    for causal in (False, torch.ones(6, dtype=torch.int32)):
        with pytest.raises(UnsupportedError, match=r"FLASHCORE: .*causal attention"):
            builder.build(0, batch_of(BATCH, "cpu").replace(causal=causal))


@pytest.mark.parametrize(("given", "bound"), [(0, 0), (1, 1), (15, 15), (16, 16), (17, 18), (100, 104), (4097, 4608)])
def test_bounds(given, bound):
    """No less than is given, and at most an eighth more."""
    assert plugin._bound(given) == bound


def test_batches_of_almost_one_length_are_planned_alike():
    assert len({plugin._bound(n) for n in range(1, 8193)}) < 90
    assert all(n <= plugin._bound(n) <= n * 9 / 8 for n in range(1, 8193))


ENGINE = """
import json, os, sys, tempfile
import torch
from transformers import AutoModelForCausalLM, Gemma2Config
from vllm import LLM, SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

calls = 0
if sys.argv[1] == "flashcore":
    from flashcore.integrations import vllm as plugin

    class StandIn(plugin.FlashCoreBackend):
        get_name = staticmethod(lambda: "CPU_ATTN")

    class Impl(plugin.FlashCoreImpl):
        def forward(self, *args, **kwargs):
            global calls
            calls += 1
            if sys.argv[2] == "no window":
                self._window = None
            return super().forward(*args, **kwargs)

    StandIn.get_impl_cls = staticmethod(lambda: Impl)
    plugin.StandIn = StandIn
    register_backend(AttentionBackendEnum.CPU_ATTN, "flashcore.integrations.vllm.StandIn")

config = Gemma2Config(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, max_position_embeddings=512, head_dim=32, sliding_window=24, attn_logit_softcapping=3.0,
    query_pre_attn_scalar=8, initializer_range=0.15, architectures=["Gemma2ForCausalLM"],
)
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    llm = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256, block_size=32,
        max_num_batched_tokens=64, max_num_seqs=4, seed=0, enable_prefix_caching=True,
    )
prompts = [{"prompt_token_ids": torch.randint(512, (n,)).tolist()} for n in (5, 100, 33, 64, 1, 17)]
prompts.append({"prompt_token_ids": prompts[1]["prompt_token_ids"][:70]})  # of which pages are cached
sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True, detokenize=False)
outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
tokens = [list(output.token_ids) for output in outputs]
logprobs = [[step[token].logprob for token, step in zip(o.token_ids, o.logprobs)] for o in outputs]
print("RESULT", json.dumps({"tokens": tokens, "logprobs": logprobs, "calls": calls}))
"""


def generate(*arguments: str) -> dict:
    """What a model of Gemma 2's shape says, by vLLM's engine on a CPU."""
    root = str(Path(flashcore.__file__).parents[1])
    settings = {
        "PYTHONPATH": root, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "",
    }  # fmt: skip
    command = [sys.executable, "-c", ENGINE, *arguments]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about vLLM on a CPU")
@pytest.mark.timeout(900)
def test_the_engine_on_a_cpu():
    """Prompts in chunks, mixed batches, cached prefixes, alternating windows, softcap and grouped heads."""
    theirs, ours, broken = generate("vllm", ""), generate("flashcore", ""), generate("flashcore", "no window")
    assert ours["tokens"] == theirs["tokens"]
    assert ours["calls"] > 20
    there = torch.tensor(theirs["logprobs"])
    assert (torch.tensor(ours["logprobs"]) - there).abs().max() < 1e-4
    assert (torch.tensor(broken["logprobs"]) - there).abs().max() > 1e-3  # it would be seen


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_bounds_of_a_capture_serve_another_batch(captured, device):
    """Whose tokens, lengths and pages come in the same tensors: single tokens, chunks and a prompt."""
    impl, batch = layer_of(BATCH), batch_of(BATCH, device)
    q, k, v = BATCH.inputs(device)
    kv_cache = filled(impl, BATCH, k, v, "HND")
    output, held = torch.full_like(q, torch.nan), torch.zeros_like(q)
    wide = batch.replace(
        query_start_loc=torch.zeros_like(batch.query_start_loc), seq_lens=torch.zeros_like(batch.seq_lens),
        block_table_tensor=torch.zeros_like(batch.block_table_tensor), max_query_len=len(q), max_seq_len=6 * PAGE,
    )  # fmt: skip
    metadata = plugin.FlashCoreBuilder(None, [], None, torch.device(device)).build(0, wide)

    def replay():
        impl.forward(Layer(device), held, None, None, kv_cache, metadata, output)

    replay()
    assert (output == 0).all()
    if captured:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replay()
        replay = graph.replay
    held.copy_(q)
    for name in ("query_start_loc", "seq_lens", "block_table_tensor"):
        getattr(wide, name).copy_(getattr(batch, name))
    replay()
    assert_packed_forward(BATCH, output, None, q, k, v)
