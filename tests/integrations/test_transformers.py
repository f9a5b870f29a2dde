"""Tiny random models of Transformers with ``attn_implementation="fcore"``, held to ``"sdpa"``."""

import contextlib
import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")  # the extra "test" brings it

from transformers import masking_utils  # noqa: E402

import flashcore.integrations.transformers as integration  # noqa: E402
from flashcore.errors import FlashCoreWarning, UnsupportedError  # noqa: E402
from flashcore.mask import CAUSAL, Mask  # noqa: E402

LAYERS = 2
VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=48),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    ),
}  # fmt: skip
V5 = int(transformers.__version__.split(".")[0]) >= 5  # before, masks were made for more calls, and by other arguments
needs_v5 = pytest.mark.skipif(not V5, reason="as Transformers has it from version 5 on")
WARNS = pytest.mark.filterwarnings("ignore::flashcore.errors.FlashCoreWarning")


def build(config, implementation=integration.NAME, seed=0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that is not all but uniform, so that a wrong mask shows
    return model.eval()


@pytest.fixture(params=MODELS)
def pair(request):
    """The same model with FlashCore's and with PyTorch's attention."""
    return build(MODELS[request.param]), build(MODELS[request.param], "sdpa")


@pytest.fixture
def llama():
    return build(MODELS["llama"]), build(MODELS["llama"], "sdpa")


@pytest.fixture(autouse=True)
def _warn_again():
    integration._warn_once.cache_clear()


def tokens(*shape, seed=0):
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_prefill(pair, kernel):
    prompt = tokens(2, 17)
    ours, theirs = (model(prompt).logits for model in pair)
    close(ours, theirs)
    assert [(p.seqlen_q, p.seqlen_k, p.causal) for p in kernel] == [(17, 17, True)] * LAYERS


def test_attention_matters(llama):
    """The models' logits depend on their attention: elsewhere, equal ones mean something."""
    model, _ = llama
    prompt = tokens(1, 9)
    other = prompt.clone()
    other[0, 0] += 1
    assert (model(prompt).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 0.1


GENERATE = {"max_new_tokens": 6, "do_sample": False}


def test_generation(pair, kernel):
    prompt = tokens(2, 11)
    ours, theirs = (model.generate(prompt, **GENERATE) for model in pair)
    assert ours.shape == (2, 17)
    assert torch.equal(ours, theirs)
    calls = [(p.seqlen_q, p.seqlen_k, p.causal) for p in kernel]
    assert calls[::LAYERS] == [(11, 11, True), *((1, 11 + step, False) for step in range(1, 6))]
    assert len(calls) == 6 * LAYERS


@WARNS
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_with_a_static_cache(kernel, name):
    """Only the prompt is FlashCore's: after it, the cache has keys that a mask must hide."""
    prompt, models = tokens(2, 11), (build(MODELS[name]), build(MODELS[name], "sdpa"))
    ours, theirs = (model.generate(prompt, **GENERATE, cache_implementation="static") for model in models)
    assert torch.equal(ours, theirs)
    assert [(p.seqlen_q, p.seqlen_k, p.causal) for p in kernel] == [(11, 11, True)] * LAYERS * V5


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_generation_that_compiles_its_steps(llama):
    """What ``generate`` does by itself with a static cache on a GPU: the steps are one graph."""
    options = {**GENERATE, "cache_implementation": "static"}
    compiling = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    model, theirs = llama
    prompt = tokens(2, 11)
    assert torch.equal(
        model.generate(prompt, **options, compile_config=compiling), theirs.generate(prompt, **options)
    )
    torch._dynamo.reset()


@WARNS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair, kernel, side):
    prompt, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    for row, padding in enumerate((0, 5, 2)):
        hidden = slice(0, padding) if side == "left" else slice(12 - padding, 12)
        mask[row, hidden] = 0
    prompt = prompt * mask
    ours, theirs = (model(prompt, attention_mask=mask).logits for model in pair)
    close(ours[mask.bool()], theirs[mask.bool()])
    assert kernel == []
    if side == "left":
        assert torch.equal(*(model.generate(prompt, attention_mask=mask, **GENERATE) for model in pair))


@WARNS
def test_grouped_heads_reach_pytorch_repeated(monkeypatch):
    """With a mask and grouped heads PyTorch's fused kernels on a GPU decline."""
    heads = []

    def record(query, key, value, *args, **kwargs):
        heads.append((query.shape[1], key.shape[1], value.shape[1]))
        return query

    monkeypatch.setattr(integration, "torch_sdpa", record)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    integration.attention_forward(torch.nn.Module(), q, k, k, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    assert heads == [(4, 4, 4)]


def test_padding_is_hidden(llama):
    """What stands in the padding must not matter: without a mask function of its own, Transformers hands none out."""
    model, _ = llama
    prompt, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, :4] = 0
    with pytest.warns(FlashCoreWarning, match="PyTorch's SDPA computes calls with an attention mask"):
        one = model(prompt, attention_mask=mask).logits
    prompt[0, :4] = tokens(1, 4, seed=1)
    close(model(prompt, attention_mask=mask).logits[:, 4:], one[:, 4:])


@WARNS
def test_packed_sequences(llama, kernel):
    """Transformers finds them in the positions and makes a mask."""
    parts = tokens(1, 5), tokens(1, 8, seed=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    model, theirs = llama
    packed = model(torch.cat(parts, 1), position_ids=positions, use_cache=False).logits
    assert kernel == []
    close(packed, torch.cat([theirs(part).logits for part in parts], 1))


PACKED = {
    "llama": MODELS["llama"],
    "window": transformers.MistralConfig(**SIZES, sliding_window=4),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=6, attn_logit_softcapping=0.5,
                                        query_pre_attn_scalar=8),
    "gpt_oss": transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
                                         sliding_window=6),
}  # fmt: skip


def assert_trained_alike(run, ours, theirs, lengths):
    """By what the collator returns, and as eager attention is over each sequence by itself."""
    parts = [tokens(n, seed=n) for n in lengths]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collate([{"input_ids": part} for part in parts])
    labels = batch.pop("labels")[0, 1:]
    assert batch["cu_seq_lens_q"].tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    mine = run(**batch, use_cache=False).logits
    right = torch.cat([theirs(part[None], use_cache=False).logits for part in parts], 1)
    close(mine, right)
    for model, logits in ((ours, mine), (theirs, right)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[0, :-1], labels).backward()
    for (what, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=what)


@needs_v5
@pytest.mark.parametrize("name", PACKED)
def test_training_on_packed_sequences(name, kernel):
    ours, theirs = build(PACKED[name]).train(), build(PACKED[name], "eager").train()
    assert_trained_alike(ours, ours, theirs, (5, 1, 11, 8))
    assert [(p.packed, p.batch, p.seqlen_q, p.mask.right) for p in kernel] == [(True, 4, 11, 0)] * LAYERS


@needs_v5
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_training_on_packed_sequences(kernel):
    """The model as one graph, with the mask that Transformers makes beside the lengths."""
    ours, theirs = build(PACKED["window"]).train(), build(PACKED["window"], "eager").train()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in ((5, 1, 11, 8), (3, 9, 2)):
        assert_trained_alike(compiled, ours, theirs, lengths)
    assert {(p.packed, p.batch, p.seqlen_q) for p in kernel} == {(True, 4, 11), (True, 3, 9)}
    torch._dynamo.reset()


def test_packed_sequences_by_their_lengths(kernel):
    """As vision towers have them: no mask, not causal, int64 offsets, a longest length that is a tensor."""
    q, k = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8)
    offsets = torch.tensor([0, 5, 12])
    call = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": torch.tensor(7), "max_length_k": 7}
    out, _ = integration.attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False, scaling=0.3, **call)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            q[:, :, at], k[:, :, at], k[:, :, at], scale=0.3, enable_gqa=True
        )
        for at in (slice(0, 5), slice(5, 12))
    ]
    close(out, torch.cat(parts, 2).transpose(1, 2))
    assert [(p.seqlen_q, p.seqlen_k, p.causal) for p in kernel] == [(7, 7, False)]


def test_packed_sequences_are_refused_by_name():
    q = torch.randn(1, 4, 5, 8)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    call = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
    for change, message in (
        ({"dropout": 0.1}, r"dropout \(0.1\) is not supported"),
        ({"position_bias": torch.ones(1, 4, 5, 5)}, "position_bias is not supported"),
        ({"cu_seq_lens_k": {"full_attention": offsets}}, r"cu_seq_lens_k \(dict\) is not supported"),
        ({"cu_seq_lens_k": None}, r"cu_seq_lens_k \(NoneType\) is not supported"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            integration.attention_forward(torch.nn.Module(), q, q, q, None, **call | change)


MASKS = {
    "all_keys": ({}, CAUSAL),
    "all_keys_said": ({"attention_mask": torch.ones(1, 9, dtype=torch.bool)}, CAUSAL),
    "window_of_all_keys": ({"local_size": 9}, CAUSAL),
    "window": ({"local_size": 8}, Mask(7, 0)),
    "window_of_one_key": ({"local_size": 1}, Mask(0, 0)),
    "window_of_a_cache": ({"local_size": 6, "q_offset": 25, "kv_offset": 20}, Mask(5, 0)),
    "padding": ({"attention_mask": torch.arange(9)[None] > 0}, None),
    "padding_outside_of_the_window": ({"attention_mask": torch.arange(9)[None] > 0, "local_size": 2}, None),
    "keys_behind_the_last_query": ({"q_offset": 4}, None),
    "offset_on_the_device": ({"q_offset": torch.tensor(5)}, None),
    "more_than_causal": ({"allow_is_causal_skip": False}, None),
    "more_than_a_window": ({"allow_is_causal_skip": False, "local_size": 8}, None),
}


@needs_v5
@pytest.mark.parametrize("name", MASKS)
def test_which_masks_are_flashcores_own(name):
    change, own = MASKS[name]
    arguments = {
        "batch_size": 1,
        "q_length": 4,
        "kv_length": 9,
        "q_offset": 5,
        "allow_is_causal_skip": True,
        **change,
    }
    window = arguments.get("local_size")
    if window:
        arguments["mask_function"] = masking_utils.sliding_window_causal_mask_function(window)
    mask = integration.mask(**arguments)
    assert mask.shape == (1, 1, 4, 9)
    q, k = torch.empty(1, 4, 4, 8), torch.empty(1, 4, 9, 8)
    assert integration._shown(mask, False, q, k, window) == own
    assert integration._shown(mask[:, :, 1:], False, q[:, :, 1:], k, window) is None, "made from it, but not it"
    assert integration._shown(mask, False, q, k[:, :, 1:], window) is None, "made for other keys"
    if own is not None:
        keep = own.of(4, 9).keep(torch.arange(4)[:, None], torch.arange(9))
        assert torch.equal(mask[0, 0], keep)
        layer_without_a_window = integration._shown(mask, False, q, k, None)
        assert layer_without_a_window == (CAUSAL if own == CAUSAL else None), "it may be one of chunks"


@WARNS
@needs_v5
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_on_top_of_a_cache(kernel, dropout):
    mask = integration.mask(batch_size=1, q_length=4, kv_length=9, q_offset=5)
    mask.flashcore_mask = CAUSAL
    q, k = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 9, 8)
    integration.attention_forward(torch.nn.Module(), q, k, k, mask, dropout)
    assert len(kernel) == (dropout == 0)


@pytest.mark.parametrize("padded", [False, True])
@WARNS
def test_more_tokens_on_top_of_a_dynamic_cache(pair, kernel, padded):
    """The next turn of a chat: the mask is aligned to the bottom right, which FlashCore has and SDPA has not."""
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :3] = not padded
    results = []
    for model in pair:
        cache = model(tokens(2, 9), attention_mask=mask[:, :9], use_cache=True).past_key_values
        kernel.clear()
        results.append(model(tokens(2, 7, seed=1), attention_mask=mask, past_key_values=cache).logits)
        if model is pair[0]:
            expected = [] if padded else [(7, 16, True)] * LAYERS * V5
            assert [(p.seqlen_q, p.seqlen_k, p.causal) for p in kernel] == expected
    close(*results)


@WARNS
def test_mask_of_the_new_tokens_only(llama, kernel):
    """Transformers takes what a mask leaves out for hidden."""
    results = []
    for model in llama:
        cache = model(tokens(2, 7), use_cache=True).past_key_values
        kernel.clear()
        short = torch.ones(2, 5, dtype=torch.long)
        results.append(model(tokens(2, 5, seed=1), attention_mask=short, past_key_values=cache).logits)
    close(*results)
    assert kernel == []


@WARNS
@needs_v5
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_traced_on_top_of_a_cache(llama):
    """What a trace has seen of a mask, that it has no padding, must not decide for the next one."""

    class Turn(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, first, second, mask):
            cache = self.model(first, attention_mask=mask[:, :9], use_cache=True).past_key_values
            return self.model(second, attention_mask=mask, past_key_values=cache).logits

    first, second, mask = tokens(2, 9), tokens(2, 7, seed=1), torch.ones(2, 16, dtype=torch.long)
    padded = mask.clone()
    padded[1, :3] = 0
    with torch.no_grad():
        turn, theirs = (Turn(model) for model in llama)
        traced = torch.jit.trace(turn, (first, second, mask), check_trace=False)
        close(traced(first, second, padded), theirs(first, second, padded))


@WARNS
def test_more_tokens_on_top_of_a_static_cache(llama, kernel):
    """Behind its last token a static cache has keys that nobody may see."""
    results = []
    for model in llama:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(tokens(1, 9), past_key_values=cache)
        results.append(model(tokens(1, 7, seed=1), past_key_values=cache).logits)
    close(*results)
    assert {(p.seqlen_q, p.seqlen_k) for p in kernel} == ({(9, 9)} if V5 else set())


@WARNS
@needs_v5
@pytest.mark.parametrize("option", [("num_beams", 3), ("prefill_chunk_size", 4), ("prompt_lookup_num_tokens", 3)])
def test_other_ways_to_generate(llama, option):
    options = dict([option])
    prompt = tokens(1, 11)
    prompt[0, 6:] = prompt[0, :5]  # something to look up
    assert torch.equal(*(model.generate(prompt, **GENERATE, **options) for model in llama))


def test_training_under_autocast(llama, kernel):
    losses = []
    for model in llama:
        model.train()
        prompt = tokens(2, 13)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(prompt, labels=prompt).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
    assert [problem.dtype for problem in kernel] == ["bfloat16"] * LAYERS


def test_training(pair, kernel):
    gradients = []
    for model in pair:
        model.train()
        prompt = tokens(2, 13)
        model(prompt, labels=prompt).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(kernel) == LAYERS
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name])


@WARNS
def test_gradient_checkpointing(llama, kernel):
    gradients = []
    for model in llama:
        model.train()
        model.gradient_checkpointing_enable()
        prompt = tokens(2, 13)
        model(prompt, labels=prompt, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    close(*gradients)
    assert len(kernel) == 2 * LAYERS * V5


@WARNS
def test_dropout(llama, kernel):
    """The same random numbers as with "sdpa", as it is PyTorch that draws them."""
    losses = []
    for model in llama:
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(1)
        prompt = tokens(2, 13)
        losses.append(model(prompt, labels=prompt).loss)
        if len(losses) == 1:
            assert kernel == []
    close(*losses)


@needs_v5
def test_not_causal(kernel):
    """An encoder: no mask at all, unless there is padding."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
    )
    models = []
    for implementation in (integration.NAME, "sdpa"):
        torch.manual_seed(0)
        models.append(
            transformers.AutoModel.from_config(
                copy.deepcopy(config), attn_implementation=implementation
            ).eval()
        )
    close(*(model(tokens(2, 9)).last_hidden_state for model in models))
    assert [p.causal for p in kernel] == [False] * LAYERS


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_layers(llama, kernel):
    """Compile layers, not the model: of a model that is traced, Transformers makes a mask for every call."""
    model, theirs = llama
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    for length in (9, 12, 17):
        prompt = tokens(2, length)
        close(model(prompt, use_cache=False).logits, theirs(prompt, use_cache=False).logits)
    assert len(kernel) == 3 * LAYERS * V5
    torch._dynamo.reset()


@needs_v5
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_generation_by_compiled_layers(llama, kernel):
    """Every step reaches FlashCore, whatever the number of keys."""
    model, theirs = llama
    prompt, options = tokens(2, 11), {**GENERATE, "max_new_tokens": 12}
    expected = theirs.generate(prompt, **options)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(model.generate(prompt, **options), expected)
    assert [(p.seqlen_q, p.seqlen_k) for p in kernel[::LAYERS]] == [(11, 11), *((1, 11 + i) for i in range(1, 12))]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_model(llama):
    model, theirs = llama
    prompt = tokens(2, 9)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(whole(prompt, use_cache=False).logits, theirs(prompt, use_cache=False).logits)
    torch._dynamo.reset()


# ---- windows, softcap, sinks, position biases --------------------------------------------------------------------

WINDOW = 8
FEATURES = {
    "gemma2": transformers.Gemma2Config(
        **SIZES, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=0.5, query_pre_attn_scalar=8
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, head_dim=8, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1,
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
}  # fmt: skip
# What each layer's calls have, in order.
HAVE = {
    "gemma2": ({"score", "window"}, {"score"}),
    "gemma3": ({"window"}, set()),
    "gpt_oss": ({"sink", "window"}, {"sink"}),
    "mistral": ({"window"}, {"window"}),
    "qwen2": (set(), {"window"}),
}
# What PyTorch's SDPA does not have. FlashCore computes it with any mask.
NOT_IN_SDPA = {"gemma2", "gpt_oss"}


@pytest.fixture(params=FEATURES)
def featured(request):
    """The name of a model, and it with FlashCore's and with eager attention."""
    config = FEATURES[request.param]
    return request.param, build(config), build(config, "eager")


@needs_v5
def test_features_prefill(featured, kernel):
    name, *models = featured
    close(*(model(tokens(2, 19)).logits for model in models))
    assert [(p.seqlen_q, p.seqlen_k, p.mask.right) for p in kernel] == [(19, 19, 0)] * LAYERS
    assert [p.features for p in kernel] == list(HAVE[name])
    assert {p.mask.left for p in kernel if "window" in p.features} == {WINDOW - 1}


@needs_v5
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_features_at_the_edge_of_the_window(featured, kernel, length):
    _, *models = featured
    close(*(model(tokens(2, length)).logits for model in models))
    assert len(kernel) == LAYERS
    assert all(("window" in p.features) <= (length > WINDOW) for p in kernel)


@needs_v5
def test_features_generation(featured, kernel):
    """From inside of the window to far outside: the cache keeps no more keys than it shows."""
    name, *models = featured
    options = {**GENERATE, "max_new_tokens": 12}
    prompt = tokens(2, 5)
    assert torch.equal(*(model.generate(prompt, **options) for model in models))
    assert len(kernel) == 12 * LAYERS
    sliding = ["window" in has for has in HAVE[name]]
    last = kernel[-LAYERS:]
    assert [p.seqlen_k for p in last] == [WINDOW if s else 16 for s in sliding]
    assert not any("window" in p.features for p in last), "nothing is hidden from the only query"


@WARNS
@needs_v5
@pytest.mark.parametrize("padded", [False, True])
def test_features_on_top_of_a_dynamic_cache(featured, kernel, padded):
    name, *models = featured
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = not padded
    results = []
    for model in models:
        cache = transformers.DynamicCache(config=model.config)
        model(tokens(2, 13), attention_mask=mask[:, :13], past_key_values=cache)
        kernel.clear()
        results.append(model(tokens(2, 7, seed=1), attention_mask=mask, past_key_values=cache).logits)
        if model is models[0]:
            found = [p.features for p in kernel]
            assert found == (list(HAVE[name]) if not padded else with_masks_added(name))
    close(*results)


def with_masks_added(name):
    """The features of the calls that reach FlashCore with a mask that is added to the scores."""
    return [(has - {"window"}) | {"score"} for has in HAVE[name]] if name in NOT_IN_SDPA else []


@WARNS
@needs_v5
@pytest.mark.parametrize("side", ["left", "right"])
def test_features_padded_batch(featured, kernel, side):
    name, *models = featured
    prompt, mask = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    for row, padding in enumerate((0, 5, 2)):
        mask[row, slice(0, padding) if side == "left" else slice(14 - padding, 14)] = 0
    prompt = prompt * mask
    ours, theirs = (model(prompt, attention_mask=mask).logits for model in models)
    close(ours[mask.bool()], theirs[mask.bool()])
    assert [p.features for p in kernel] == with_masks_added(name)
    if side == "left":
        assert torch.equal(*(model.generate(prompt, attention_mask=mask, **GENERATE) for model in models))


@WARNS
@needs_v5
def test_features_generation_with_a_static_cache(featured):
    _, *models = featured
    options = {**GENERATE, "cache_implementation": "static"}
    for length in (5, 11):
        prompt = tokens(2, length)
        assert torch.equal(*(model.generate(prompt, **options) for model in models))


@WARNS
@needs_v5
def test_features_packed_sequences(featured):
    _, *models = featured
    prompt = torch.cat((tokens(1, 5), tokens(1, 11, seed=1)), 1)
    positions = torch.cat((torch.arange(5), torch.arange(11)))[None]
    close(*(model(prompt, position_ids=positions, use_cache=False).logits for model in models))


@WARNS
@needs_v5
@pytest.mark.parametrize("padded", [False, True])
def test_features_training(featured, kernel, padded):
    _, *models = featured
    gradients = []
    prompt, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :3] = not padded
    for model in models:
        model.train()
        labels = prompt.masked_fill(mask == 0, -100)
        labels[:, 1:][mask[:, :-1] == 0] = -100  # the first token after padding is predicted from the padding
        model(prompt, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert padded or len(kernel) == LAYERS
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name])
    sinks = [gradient for name, gradient in gradients[0].items() if "sinks" in name]
    assert all(gradient.any() for gradient in sinks)
    assert len(sinks) == (LAYERS if isinstance(models[0].config, transformers.GptOssConfig) else 0)


@needs_v5
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_features_of_compiled_layers(featured, kernel):
    """All that a model has is FlashCore's in a compiled layer, too: a mask that says what it shows is not read."""
    name, *models = featured
    for layer in models[0].model.layers:
        layer.self_attn.compile(backend="aot_eager", fullgraph=True)
    for length in (5, 12, 17):
        prompt = tokens(2, length)
        kernel.clear()
        losses = [model(prompt, labels=prompt, use_cache=False).loss for model in models]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        hidden = {"window"} if length <= WINDOW else set()
        assert [p.features for p in kernel] == [has - hidden for has in HAVE[name]]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@needs_v5
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_features_generation_by_compiled_layers(kernel):
    model, theirs = build(FEATURES["mistral"]), build(FEATURES["mistral"], "eager")
    prompt, options = tokens(2, 11), {**GENERATE, "max_new_tokens": 5}
    expected = theirs.generate(prompt, **options)
    for layer in model.model.layers:
        layer.self_attn.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(model.generate(prompt, **options), expected)
    assert len(kernel) == 5 * LAYERS
    torch._dynamo.reset()


@needs_v5
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_features_under_autocast(name, kernel):
    """Sinks keep the parameters' dtype beside queries in autocast's."""
    losses = []
    for model in (build(FEATURES[name]), build(FEATURES[name], "eager")):
        model.train()
        prompt = tokens(2, 13)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(prompt, labels=prompt, use_cache=False).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
    assert [problem.dtype for problem in kernel] == ["bfloat16"] * LAYERS


@needs_v5
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_of_another_dtype(dtype):
    q, sinks = torch.randn(1, 4, 9, 8), torch.tensor([0.5, -1.0, 2.0, 0.0])
    run = integration.attention_forward
    out, _ = run(torch.nn.Module(), q, q, q, None, s_aux=sinks.to(dtype))
    assert torch.equal(out, run(torch.nn.Module(), q, q, q, None, s_aux=sinks)[0])


@needs_v5
def test_features_matter(featured):
    """Without its windows, softcap and sinks the model says something else."""
    name, model, _ = featured
    before = model(tokens(2, 19)).logits
    for layer in model.model.layers:
        attention = layer.self_attn
        if name == "gemma2":
            attention.attn_logit_softcapping = None
        elif name == "gpt_oss":
            attention.sinks.data.fill_(-100.0)
        else:
            model.config.sliding_window = attention.sliding_window = 64
    assert (model(tokens(2, 19)).logits - before).abs().max() > 0.01


@needs_v5
@pytest.mark.parametrize("name", sorted(NOT_IN_SDPA))
def test_dropout_with_what_pytorch_does_not_have(name):
    model = build(FEATURES[name]).train()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(UnsupportedError, match=r"dropout \(0.5\) is not supported"):
        model(tokens(1, 5))


def chunked(mask):
    """Which keys a query sees that sees its own chunk of 4 keys only."""
    i = torch.arange(9)
    return mask & (i[:, None] // 4 == i // 4)


@WARNS
@needs_v5
def test_chunks_are_no_window(kernel):
    """Their size stands where a window's does; the layer has no window."""
    made = integration.mask(
        batch_size=1, q_length=9, kv_length=9, q_offset=0, local_size=4, allow_is_causal_skip=True,
        mask_function=masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int)),
    )  # fmt: skip
    assert torch.equal(made[0, 0], chunked(torch.ones(9, 9, dtype=torch.bool).tril()))
    q = torch.randn(1, 4, 9, 8)
    out, _ = integration.attention_forward(torch.nn.Module(), q, q, q, made)
    close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, made).transpose(1, 2))
    assert kernel == []


def build_t5(implementation=integration.NAME, **options):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
        **options,
    )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8 if "relative_attention_bias" in name else 2)
    return model.eval()


@needs_v5
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_position_bias(kernel, compiled):
    models = build_t5(), build_t5("eager")
    for layer in models[0].modules():
        if compiled and type(layer).__name__ == "T5Attention":
            layer.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(*(model(input_ids=tokens(2, 11), decoder_input_ids=tokens(2, 7, seed=1)).logits for model in models))
    assert [(p.seqlen_q, p.seqlen_k, p.causal) for p in kernel] == [
        *[(11, 11, False)] * LAYERS, *[(7, 7, True), (7, 11, False)] * LAYERS
    ]  # fmt: skip
    assert all(p.features == {"score"} for p in kernel)
    torch._dynamo.reset()


@WARNS
@needs_v5
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_position_bias(padded):
    models = build_t5(), build_t5("eager")
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = not padded
    assert torch.equal(*(model.generate(tokens(2, 11), attention_mask=mask, **GENERATE) for model in models))


@needs_v5
@pytest.mark.parametrize("padded", [False, True])
def test_position_bias_that_learns(kernel, padded):
    """PyTorch's: a score function's tensors get no gradient."""
    gradients = []
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = not padded
    for model in (build_t5(), build_t5("eager")):
        model.train()
        with contextlib.nullcontext() if gradients else pytest.warns(FlashCoreWarning, match="a position bias"):
            model(input_ids=tokens(2, 11), attention_mask=mask, labels=tokens(2, 7, seed=1)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name])
    assert gradients[0]["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].any()
    assert all("score" in p.features and p.seqlen_k == 11 for p in kernel), "cross-attention: zeros"


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_sliding_window_without_a_mask(kernel):
    """Transformers makes a mask for every window that hides keys: without one, eager attention sees them all."""
    q = torch.randn(1, 4, 9, 8)
    integration.attention_forward(torch.nn.Module(), q, q, q, None, sliding_window=9)
    assert len(kernel) == 1
    with pytest.raises(
        UnsupportedError, match=r"sliding_window \(8 < 9 keys\).*attn_implementation=\"sdpa\""
    ):
        integration.attention_forward(torch.nn.Module(), q, q, q, None, sliding_window=8)


def test_attention_weights(llama):
    model, _ = llama
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(tokens(1, 5), output_attentions=True)
    model.config.output_attentions = None
    with pytest.raises(ValueError, match=r"output_attentions.*not supported"):
        model.config.output_attentions = True


@needs_v5
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["argument", "config"])
def test_attention_weights_of_layers_that_are_not_told(name, how):
    config = copy.deepcopy(MODELS[name])
    config._attn_implementation_internal = "eager"
    if how == "config":
        config.output_attentions = True
    model = build(config)
    options = {"output_attentions": True} if how == "argument" else {}
    for where in (contextlib.nullcontext(), FlopCounterMode(display=False)):
        with pytest.raises(UnsupportedError, match="output_attentions"), where:
            model(tokens(1, 5), **options)
        with pytest.raises(UnsupportedError, match="output_attentions"), where:  # a mask of the caller's own
            model(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool), **options)


def test_errors_are_pytorchs():
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        integration.attention_forward(torch.nn.Module(), q, k, k, None)


@needs_v5
@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        transformers.CodeGenConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    ],
    ids=["bloom", "codegen"],
)
def test_models_with_attention_of_their_own_only(config):
    """Transformers gives them the mask that it asks us for, and they would take it for another kind of mask."""
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, None
    model = build(config)
    with pytest.raises(UnsupportedError, match="has attention of its own only"):
        model(tokens(1, 5))
    with pytest.raises(UnsupportedError, match="has attention of its own only"), FlopCounterMode(display=False):
        model(tokens(1, 5))
    with pytest.raises(Exception, match="has attention of its own only"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(1, 5))
    torch._dynamo.reset()


_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
WITH_TABLES = {
    "falcon": transformers.FalconConfig(**_SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gptj": transformers.GPTJConfig(**_SMALL, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
    "gpt_neo": transformers.GPTNeoConfig(
        **_SMALL, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "git": transformers.GitConfig(
        **_SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vision_config={**_VISION, "intermediate_size": 48},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITH_TABLES)
def test_models_with_a_table_of_layers(name):
    """They do not ask the attention functions, and would end with KeyError: 'fcore'."""
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r'"fcore": this model has a table .*Use "eager"'):
            build(WITH_TABLES[name])
    build(WITH_TABLES[name], "eager")(tokens(1, 5))


def test_encoders_with_a_table_of_layers():
    for kind, options in (("Data2VecVision", {}), ("SamVision", {"output_channels": 8, "mlp_dim": 48})):
        config = getattr(transformers, f"{kind}Config")(**_VISION, **options)
        with pytest.raises(UnsupportedError, match="this model has a table"):
            getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation=integration.NAME)


def test_a_program_s_own_model_with_a_table_of_layers():
    """Also where the model derives from the one that has the table."""

    class Mine(transformers.FalconForCausalLM):
        pass

    with pytest.raises(UnsupportedError, match="this model has a table"):
        Mine._from_config(copy.deepcopy(WITH_TABLES["falcon"]), attn_implementation=integration.NAME)


def test_no_table_of_transformers_is_overlooked():
    """Every file of models that looks a class up by the implementation's name has a table that is found."""
    root = Path(transformers.__file__).parent
    looks_up = re.compile(r"(?<!FUNCTIONS)\[(?:self\.)?config\._attn_implementation\]\(")
    found = 0
    for path in sorted(root.glob("models/*/modeling_*.py")):
        if looks_up.search(path.read_text()):
            module = importlib.import_module("transformers." + ".".join(path.relative_to(root).with_suffix("").parts))
            model = type("Model", (), {"__module__": module.__name__})
            assert integration._tables(model), path.name
            found += 1
    assert found > 3


def test_arguments_of_other_models():
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(UnsupportedError, match="head_mask is not supported"):
        integration.attention_forward(torch.nn.Module(), q, q, q, None, head_mask=torch.ones(4))


def test_name():
    """Transformers refuses "flashcore"; a mask function of the same name is what padded batches depend on."""
    assert "flash" not in integration.NAME
    assert transformers.AttentionInterface()[integration.NAME] is integration.attention_forward
    assert transformers.AttentionMaskInterface()[integration.NAME] is integration.mask
    model = build(MODELS["llama"], "sdpa")
    model.set_attn_implementation(integration.NAME)
    assert model.config._attn_implementation == integration.NAME


# ---- on a GPU ----------------------------------------------------------------------------------------------------

GPU_CONFIG = transformers.LlamaConfig(
    vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=4, head_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


@pytest.fixture
def gpu_models():
    """The model in bfloat16 with FlashCore's and with PyTorch's attention, and in float32 with PyTorch's."""
    models = []
    for implementation, dtype in (
        (integration.NAME, torch.bfloat16),
        ("sdpa", torch.bfloat16),
        ("sdpa", torch.float32),
    ):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(GPU_CONFIG, attn_implementation=implementation)
        models.append(model.bfloat16().to("cuda", dtype).eval())  # the same rounded weights
    return models


def within_noise(ours, theirs, exact):
    """FlashCore's error is at most twice PyTorch's, in the same dtype."""
    errors = [(result.double() - exact.double()).abs().max().item() for result in (ours, theirs)]
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.gpu
@WARNS
def test_logits_on_a_gpu(gpu_models):
    prompt = torch.randint(2, 1024, (2, 777), device="cuda")
    with torch.no_grad():
        within_noise(*(model(prompt).logits for model in gpu_models))


@pytest.mark.gpu
@WARNS
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_on_a_gpu(gpu_models, cache):
    """With the static cache `generate` compiles the steps into CUDA graphs.

    The tokens are PyTorch's where it is not rounding that decides between the best two: the errors of each are less
    than half of what lies between these.
    """
    prompt = torch.randint(2, 1024, (2, 129), device="cuda")
    options = {
        **GENERATE, "cache_implementation": cache, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    results = [model.generate(prompt, **options) for model in gpu_models]
    generated, compared = results[0].sequences, 0  # the logits of the steps, given the same tokens
    for step in range(GENERATE["max_new_tokens"]):
        with torch.no_grad():
            theirs, exact = (model(generated[:, : 129 + step]).logits[:, -1] for model in gpu_models[1:])
        within_noise(results[0].logits[step], theirs, exact)
        best = exact.topk(2).values
        clear = best[:, 0] - best[:, 1] > 4 * (theirs - exact).abs().amax(1)
        assert torch.equal(generated[clear, 129 + step], theirs.argmax(1)[clear])
        compared += int(clear.sum())
    assert compared >= GENERATE["max_new_tokens"]  # of two rows


@pytest.mark.gpu
@WARNS
def test_training_on_a_gpu(gpu_models):
    prompt = torch.randint(2, 1024, (2, 512), device="cuda")
    for model in gpu_models:
        model.train()
        model(prompt, labels=prompt).loss.backward()
    for ours, theirs, exact in zip(*(model.parameters() for model in gpu_models), strict=True):
        within_noise(ours.grad, theirs.grad, exact.grad)


@pytest.mark.gpu
@WARNS
def test_padded_batch_on_a_gpu(gpu_models):
    prompt = torch.randint(2, 1024, (2, 300), device="cuda")
    mask = torch.ones_like(prompt)
    mask[1, :100] = 0
    with torch.no_grad():
        within_noise(*(model(prompt, attention_mask=mask).logits[mask.bool()] for model in gpu_models))


GPU_SIZES = {**GPU_CONFIG.to_diff_dict(), "num_hidden_layers": 2}
GPU_SIZES = {name: GPU_SIZES[name] for name in (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "pad_token_id", "bos_token_id",
)}  # fmt: skip
GPU_FEATURES = {
    "gemma2": transformers.Gemma2Config(**GPU_SIZES, sliding_window=128, attn_logit_softcapping=2.0),
    # Every expert of every token: which ones it is must not depend on rounding.
    "gpt_oss": transformers.GptOssConfig(
        **GPU_SIZES, sliding_window=128, num_local_experts=2, num_experts_per_tok=2,
    ),
    "mistral": transformers.MistralConfig(**GPU_SIZES, sliding_window=128),
}  # fmt: skip


@pytest.mark.gpu
@WARNS
@needs_v5
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", GPU_FEATURES)
def test_features_on_a_gpu(name, padded):
    """Logits and gradients."""
    prompt = torch.randint(2, 1024, (2, 777), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(prompt)
    mask[1, :100] = 0 if padded else 1
    labels = prompt.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100
    models = []
    for implementation, dtype in (
        (integration.NAME, torch.bfloat16),
        ("eager", torch.bfloat16),
        ("eager", torch.float32),
    ):
        torch.manual_seed(0)
        config = copy.deepcopy(GPU_FEATURES[name])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        models.append(model.bfloat16().to("cuda", dtype).train())
    results = [model(prompt, attention_mask=mask, labels=labels, use_cache=False) for model in models]
    within_noise(*(result.logits[mask.bool()] for result in results))
    for result in results:
        result.loss.backward()
    for (parameter, ours), theirs, exact in zip(
        models[0].named_parameters(), *(model.parameters() for model in models[1:]), strict=True
    ):
        assert ours.grad.isfinite().all(), parameter
        errors = [(t.grad.double() - exact.grad.double()).norm().item() for t in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 1e-6, (parameter, errors)
