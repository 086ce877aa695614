"""heed as attn_implementation of tiny random transformers models, against sdpa."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import heed.integrations.transformers  # noqa: E402

heed.integrations.transformers.register(stochastic_window=4)


def tiny_llama(implementation, **more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attn_implementation=implementation,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **more,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_bert(implementation):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation=implementation,
    )
    return transformers.BertForMaskedLM(config).eval()


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
