"""heed as attn_implementation of tiny random transformers models, against sdpa."""

import functools

import pytest
import torch

transformers = pytest.importorskip("transformers")

import heed.integrations.transformers  # noqa: E402
from tiny_models import (  # noqa: E402
    SEQ2SEQ,
    SMALL,
    T5,
    TEXT,
    VISION,
    tiny,
    tiny_bert,
    tiny_bloom,
    tiny_llama,
    tiny_mistral,
)

NAMES = heed.integrations.transformers.register(stochastic_window=4)


@pytest.fixture
def fixed_bias():
    """``heed_sigmoid`` with a bias that does not depend on the number of keys."""
    heed.integrations.transformers.register(sigmoid_bias=-2.0)
    yield
    heed.integrations.transformers.register(stochastic_window=4)


TOKENS = torch.randint(1, 97, (3, 14), generator=torch.Generator().manual_seed(1))


def padding(side):
    mask = torch.ones_like(TOKENS)
    for row, count in enumerate((0, 3, 6)):
        if side == "right":
            mask[row, TOKENS.shape[1] - count :] = 0
        else:
            mask[row, :count] = 0
    return mask


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("side", [None, "right", "left"])
def test_logits(make, side):
    mask = None if side is None else padding(side)
    found = make("heed")(TOKENS, attention_mask=mask).logits
    expected = make("sdpa")(TOKENS, attention_mask=mask).logits
    real = torch.ones_like(TOKENS).bool() if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
@pytest.mark.parametrize("side", [None, "left"])
def test_training_step(make, side):
    mask = None if side is None else padding(side)
    models = [make("heed").train(), make("sdpa").train()]
    for model in models:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if hasattr(model.config, "attention_probs_dropout_prob"):
            for module in model.modules():
                if hasattr(module, "dropout") and isinstance(module.dropout, torch.nn.Dropout):
                    module.dropout.p = 0.0
        labels = TOKENS if mask is None else TOKENS.masked_fill(mask == 0, -100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(TOKENS, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
    for (name, found), expected in zip(models[0].named_parameters(), models[1].parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("side", [None, "left"])
def test_generate(side):
    mask = torch.ones_like(TOKENS) if side is None else padding(side)
    texts = [
        tiny_llama(name).generate(TOKENS, attention_mask=mask, max_new_tokens=8, do_sample=False)
        for name in ("heed", "sdpa")
    ]
    assert torch.equal(*texts)


def test_sigmoid_padding_changes_nothing():
    model = tiny_llama("heed_sigmoid")
    alone = model(TOKENS[2:, 6:]).logits
    # The bias is -log(keys) and positions count from the first real token: both are given.
    heed.integrations.transformers.register(sigmoid_bias=-2.0)
    model = tiny_llama("heed_sigmoid")
    alone = model(TOKENS[2:, 6:]).logits
    positions = (padding("left").cumsum(-1) - 1).clamp(min=0)
    padded = model(TOKENS, attention_mask=padding("left"), position_ids=positions).logits[2:, 6:]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    heed.integrations.transformers.register(stochastic_window=4)


def test_stochastic():
    model = tiny_llama("heed_stochastic")
    logits = model(TOKENS).logits
    assert logits.isfinite().all()
    # A window over everything is plain causal attention.
    heed.integrations.transformers.register(stochastic_window=2 * TOKENS.shape[1])
    wide = tiny_llama("heed_stochastic")(TOKENS).logits
    torch.testing.assert_close(wide, tiny_llama("heed")(TOKENS).logits, rtol=1e-4, atol=1e-5)
    heed.integrations.transformers.register(stochastic_window=4)
    with pytest.raises(ValueError, match="padded"):
        model(TOKENS, attention_mask=padding("left"))
    out = model.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert out.shape == (3, 17)


def test_compiled_model():
    torch.compiler.reset()
    model = tiny_llama("heed")
    expected = model(TOKENS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)


PIXELS = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(4))
TEXT_INPUT = dict(input_ids=TOKENS, attention_mask=padding("right"))
PAIR_INPUT = dict(**TEXT_INPUT, decoder_input_ids=TOKENS[:, :9])
IMAGE_TOKENS = torch.cat([torch.full((3, 4), 96), TOKENS % 90], 1)
MODELS = [
    ("Qwen3ForCausalLM", "Qwen3Config", SMALL, TEXT_INPUT),
    (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        dict(**SMALL, sliding_window=5, sliding_window_pattern=2),
        TEXT_INPUT,
    ),
    ("T5ForConditionalGeneration", "T5Config", T5, PAIR_INPUT),
    ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, PAIR_INPUT),
    (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(**SEQ2SEQ, num_mel_bins=8, max_source_positions=20, bos_token_id=2, eos_token_id=2),
        dict(input_features=PIXELS.reshape(3, 8, -1)[..., :40], decoder_input_ids=TOKENS[:, :9]),
    ),
    (
        "CLIPModel",
        "CLIPConfig",
        dict(text_config=TEXT, vision_config=VISION, projection_dim=16),
        dict(**TEXT_INPUT, pixel_values=PIXELS),
    ),
]
LLAVA = dict(
    text_config={**SMALL, "model_type": "llama"},
    vision_config={**VISION, "model_type": "clip_vision_model"},
    image_token_index=96,
    vision_feature_layer=-1,
)
LLAVA_INPUT = dict(input_ids=IMAGE_TOKENS, pixel_values=PIXELS)


def outputs(model, inputs):
    out = model(**inputs)
    return out.logits_per_image if "logits_per_image" in out else out.logits


@pytest.mark.parametrize("model, config, options, inputs", MODELS, ids=[m[0] for m in MODELS])
def test_models_of_the_interface(model, config, options, inputs):
    found = outputs(tiny(model, config, "heed", **options), inputs)
    expected = outputs(tiny(model, config, "sdpa", **options), inputs)
    if "decoder_input_ids" not in inputs and found.dim() == 3:
        real = inputs["attention_mask"].bool()
        found, expected = found[real], expected[real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


LATENT = dict(
    SMALL,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=10,
    head_dim=8,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    index_topk=3,
)


@pytest.mark.parametrize("side", [None, "left"])
def test_model_that_chooses_keys(side):
    inputs = {} if side is None else dict(attention_mask=padding(side))
    found, expected = (
        tiny("DeepseekV32ForCausalLM", "DeepseekV32Config", i, **LATENT)(TOKENS, **inputs).logits
        for i in ("heed", "sdpa")
    )
    real = slice(None) if side is None else padding(side).bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_model_of_wide_heads():
    options = {**SHARED_KEYS, "global_head_dim": 512}
    found, expected = (
        tiny("Gemma4ForCausalLM", "Gemma4TextConfig", i, **options)(TOKENS).logits
        for i in ("heed", "sdpa")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_model_of_two_models():
    name = "LlavaForConditionalGeneration"
    expected = tiny(name, "LlavaConfig", "sdpa", **LLAVA)
    logits = expected(**LLAVA_INPUT).logits
    found = tiny(name, "LlavaConfig", "heed", **LLAVA)
    torch.testing.assert_close(found(**LLAVA_INPUT).logits, logits, rtol=1e-4, atol=1e-4)
    for names in ("heed", {"text_config": "heed", "vision_config": "sdpa"}):
        expected.set_attn_implementation(names)
        assert expected.config.text_config._attn_implementation == "heed"
        torch.testing.assert_close(expected(**LLAVA_INPUT).logits, logits, rtol=1e-4, atol=1e-4)
    assert expected.config.vision_config._attn_implementation == "sdpa"


SHARED_KEYS = dict(
    SMALL,
    vocab_size_per_layer_input=97,
    num_hidden_layers=4,
    num_attention_heads=4,
    global_head_dim=12,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"] * 2,
    max_position_embeddings=128,
)


def test_model_that_drops_queries_where_layers_share_keys():
    models = [tiny("Gemma4ForCausalLM", "Gemma4TextConfig", i, **SHARED_KEYS) for i in ("heed", "eager")]
    found, expected = (model(TOKENS, logits_to_keep=3).logits for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    options = dict(cache_implementation="static", disable_compile=True, do_sample=False)
    found, expected = (
        model.generate(
            TOKENS, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, **options
        ).logits[0]
        for model in models
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [None, "left"])
def test_model_that_widens_its_mask(side):
    options = dict(SMALL, num_hidden_layers=4, num_key_value_heads=1, max_position_embeddings=128)
    inputs = dict(attention_mask=None if side is None else padding(side), use_cache=False)
    found, expected = (
        tiny("DeepseekV4ForCausalLM", "DeepseekV4Config", i, **options)(TOKENS, **inputs).logits
        for i in ("heed", "eager")
    )
    real = slice(None) if side is None else padding(side).bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_models_that_choose_a_class_are_refused(name):
    options = dict(VISION, patch_size=7, output_channels=8, mlp_dim=64, global_attn_indexes=[1])
    with pytest.raises(ValueError, match=f"{name}.*SamVisionModel"):
        tiny("SamVisionModel", "SamVisionConfig", name, **options, window_size=2)
    model = tiny("SamVisionModel", "SamVisionConfig", "eager", **options, window_size=2)
    with pytest.raises(ValueError, match=f"{name}.*SamVisionModel"):
        model.set_attn_implementation(name)


@pytest.mark.parametrize("name", NAMES)
def test_models_with_attention_of_their_own_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*BloomForCausalLM.*attention interface"):
        tiny_bloom(name)
    model = tiny_bloom("eager")
    with pytest.raises(ValueError, match=f"{name}.*BloomForCausalLM.*attention interface"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "eager"
    # KeyError without the check.
    options = dict(vocab_size=97, hidden_size=48, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="FalconForCausalLM"):
        tiny("FalconForCausalLM", "FalconConfig", name, **options)
    with pytest.raises(ValueError, match="BlipTextModel|BlipForConditionalGeneration"):
        text = {**TEXT, "encoder_hidden_size": 48}
        blip = dict(text_config=text, vision_config=VISION)
        tiny("BlipForConditionalGeneration", "BlipConfig", name, **blip)


def test_registering_twice_wraps_once_and_other_names_pass():
    before = transformers.PreTrainedModel.get_correct_attn_implementation
    heed.integrations.transformers.register(stochastic_window=4)
    assert transformers.PreTrainedModel.get_correct_attn_implementation is before
    model = tiny_bloom("eager")
    expected = model(TOKENS).logits
    model.set_attn_implementation("sdpa")  # transformers warns and keeps eager
    assert torch.equal(model(TOKENS).logits, expected)
    with pytest.raises(ValueError, match="sdpa|scaled_dot_product_attention"):
        tiny_bloom("sdpa")


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"sigmoid_bias": float("nan")}, ValueError, "sigmoid_bias is nan"),
        ({"sigmoid_bias": "x"}, TypeError, "sigmoid_bias is 'x'"),
        ({"stochastic_window": 0}, ValueError, "stochastic_window is 0"),
        ({"stochastic_window": 2.5}, TypeError, "stochastic_window is 2.5"),
        ({"stochastic_seed": "a"}, TypeError, "stochastic_seed is 'a'"),
    ],
)
def test_registering_says_what_is_wrong(wrong, error, says):
    with pytest.raises(error, match=says):
        heed.integrations.transformers.register(**wrong)


STATIC = [
    (tiny_llama, "heed_sigmoid"),
    (tiny_llama, "heed_stochastic"),
    (tiny_llama, "heed"),
    (tiny_mistral, "heed_sigmoid"),
    (tiny_mistral, "heed"),
]


@pytest.mark.parametrize("make, name", STATIC)
def test_static_cache(make, name, fixed_bias):
    model = make(name)
    caches = [
        transformers.DynamicCache(config=model.config),
        transformers.StaticCache(config=model.config, max_cache_len=40),
    ]
    for first, last in ((0, 5), (5, 6), (6, 11), (11, 14)):
        expected, found = (
            model(TOKENS[:, first:last], cache=cache).logits for cache in caches
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if name != "heed_stochastic":  # whose steps of several tokens see the whole cache
        whole = model(TOKENS, use_cache=False).logits[:, 11:]
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, side", [("heed_sigmoid", None), ("heed_sigmoid", "left"), ("heed_stochastic", None)]
)
def test_static_cache_generates_the_same(name, side, fixed_bias):
    options = dict(max_new_tokens=8, do_sample=False)
    if side is not None:
        options["attention_mask"] = padding(side)
    model = tiny_llama(name)
    found = model.generate(TOKENS, cache_implementation="static", **options)
    assert torch.equal(found, model.generate(TOKENS, **options))


CHUNKED = dict(
    **SMALL,
    num_local_experts=2,
    intermediate_size_mlp=32,
    attention_chunk_size=5,
    layer_types=["chunked_attention", "full_attention"],
    no_rope_layers=[1, 0],
)
REFUSED = [
    ("softcap", "Gemma2ForCausalLM", "Gemma2Config", dict(**SMALL, sliding_window=64), {}),
    (
        "s_aux",
        "GptOssForCausalLM",
        "GptOssConfig",
        dict(**SMALL, num_local_experts=2, num_experts_per_tok=1),
        {},
    ),
    ("position_bias", "T5ForConditionalGeneration", "T5Config", T5, PAIR_INPUT),
    ("chunked", "Llama4ForCausalLM", "Llama4TextConfig", CHUNKED, {}),
]


@pytest.mark.parametrize("name", ["heed_sigmoid", "heed_stochastic"])
@pytest.mark.parametrize(
    "word, model, config, options, inputs", REFUSED, ids=[row[0] for row in REFUSED]
)
def test_what_is_not_offered_is_refused(name, word, model, config, options, inputs):
    inputs = {**(inputs or {"input_ids": TOKENS}), "attention_mask": None}
    with pytest.raises(ValueError, match=f"{name}.*{word}"):
        tiny(model, config, name, **options)(**inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_stochastic_has_new_orders_in_training(compiled):
    model = tiny_llama("heed_stochastic")
    forward = model
    if compiled:
        torch.compiler.reset()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager")

    def logits(call):
        return call(TOKENS, use_cache=False).logits

    assert torch.equal(logits(forward), logits(model))
    model.train()
    torch.manual_seed(3)
    first, second = logits(forward), logits(forward)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(logits(model), first)


def test_a_checkpoint_has_the_same_orders_again():
    gradients = []
    for again in (False, True):
        model = tiny_llama("heed_stochastic").train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected)


PACKED = torch.cat([torch.arange(7), torch.arange(7)])[None]
ENDS = torch.tensor([0, 7, 14], dtype=torch.int32)
PACKINGS = {
    "position_ids": dict(position_ids=PACKED),
    "cu_seq_lens": dict(cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS),
    "both": dict(position_ids=PACKED, cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS),
}


@pytest.mark.parametrize("options", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_packed_sequences(make, options):
    alone = make("heed")(TOKENS[:1, 7:], use_cache=False).logits
    found = make("heed")(TOKENS[:1], use_cache=False, **options).logits[:, 7:]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    for name in ("heed_sigmoid", "heed_stochastic"):
        with pytest.raises(ValueError, match=f"{name}.*pack"):
            make(name)(TOKENS[:1], use_cache=False, **options)


@pytest.mark.parametrize("mask", [lambda b, h, q, k: k <= q, functools.partial(max)])
def test_masks_of_other_code_are_refused(mask):
    # What transformers' create_causal_mask takes as or_mask_function and and_mask_function.
    make = transformers.masking_utils.create_causal_mask
    config = tiny_llama("heed_sigmoid").config
    with pytest.raises(ValueError, match="heed_sigmoid.*mask"):
        make(config, torch.zeros(1, 4, 48), None, None, and_mask_function=mask)


def test_packed_sequences_are_one_batch():
    with pytest.raises(ValueError, match="cu_seq_lens_q.* 3,"):
        tiny_llama("heed")(TOKENS, cu_seq_lens_q=ENDS, use_cache=False)


@pytest.mark.parametrize(
    "name, keyword",
    [
        *(("heed", keyword) for keyword in ("sinks", "block_indices")),
        *(("heed_sigmoid", keyword) for keyword in ("sinks", "indices", "block_indices")),
    ],
)
def test_keywords_that_a_name_does_not_take(name, keyword):
    with pytest.raises(ValueError, match=f"{name}: the model gives {keyword}"):
        tiny_llama(name)(TOKENS, **{keyword: torch.zeros(1)})


def test_sigmoid_honours_the_window(fixed_bias):
    model = tiny_mistral("heed_sigmoid")
    logits = model(TOKENS, use_cache=False).logits
    # The last token of two layers of windows of 5 sees the last 9 tokens.
    changed = TOKENS.clone()
    changed[:, 5] = TOKENS[:, 5] % 96 + 1
    far = model(changed, use_cache=False).logits
    assert not torch.equal(far[:, 13], logits[:, 13])
    changed = TOKENS.clone()
    changed[:, 4] = TOKENS[:, 4] % 96 + 1
    assert torch.equal(model(changed, use_cache=False).logits[:, 13], logits[:, 13])


def test_sigmoid_window_without_causal_is_symmetric():
    module = torch.nn.Module()
    q, k, v = torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(1))
    attend = transformers.AttentionInterface()["heed_sigmoid"]
    found, _ = attend(module, q, k, v, None, is_causal=False, sliding_window=3)
    expected = heed.sigmoid_attention(q, k, v, window=(2, 2)).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_layers_without_numbers_share_no_order():
    config = transformers.CLIPTextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="heed_stochastic",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with pytest.raises(ValueError, match="CLIPAttention has no layer_idx"):
        transformers.CLIPTextModel(config).eval()(TOKENS)


def test_stochastic_and_windows():
    with pytest.raises(ValueError, match="sliding_window is 5.*14"):
        tiny_mistral("heed_stochastic")(TOKENS)
    model = tiny_mistral("heed_stochastic", sliding_window=14)
    wide = tiny_mistral("heed_stochastic", sliding_window=None)
    assert torch.equal(model(TOKENS).logits, wide(TOKENS).logits)


@pytest.mark.parametrize("name", NAMES)
def test_training_under_autocast(name):
    model, full = (tiny_llama(name, attention_dropout=0.0).train() for _ in range(2))
    mask = None if name == "heed_stochastic" else padding("left")
    labels = TOKENS if mask is None else TOKENS.masked_fill(mask == 0, -100)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS, attention_mask=mask, labels=labels).loss
    loss.backward()
    torch.manual_seed(3)  # of the orders
    expected = full(TOKENS, attention_mask=mask, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0.0)
    for found, wanted in zip(model.parameters(), full.parameters()):
        error = (found.grad - wanted.grad).norm()
        assert error < 0.1 * wanted.grad.norm() + 1e-5  # bfloat16 has 8 bits


def test_compiled_sigmoid():
    torch.compiler.reset()
    model = tiny_mistral("heed_sigmoid")
    expected = model(TOKENS, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ["heed_sigmoid", "heed_stochastic"])
def test_compiled_models_refuse_packed_sequences(name):
    torch.compiler.reset()
    model = tiny_llama(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    positions = torch.arange(14)[None]
    found = compiled(TOKENS[:1], position_ids=positions, use_cache=False).logits
    expected = model(TOKENS[:1], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match=f"{name}.*packed sequences"):
        compiled(TOKENS[:1], position_ids=PACKED, use_cache=False)


def test_compiled_models_know_padding(fixed_bias):
    torch.compiler.reset()
    model = tiny_llama("heed_sigmoid")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mask in (padding("left"), torch.ones_like(TOKENS)):
        found = compiled(TOKENS, attention_mask=mask, use_cache=False).logits
        expected = model(TOKENS, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()
    model = tiny_llama("heed_stochastic")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones_like(TOKENS)
    found = compiled(TOKENS, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found, model(TOKENS, use_cache=False).logits)
    with pytest.raises(RuntimeError, match="heed_stochastic.*padded"):
        compiled(TOKENS, attention_mask=padding("left"), use_cache=False)
