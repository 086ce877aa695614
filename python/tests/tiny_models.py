"""Models of transformers that are small and have random weights."""

import torch
import transformers


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


SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
SEQ2SEQ = dict(
    d_model=48,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    decoder_start_token_id=2,
    pad_token_id=1,
    vocab_size=97,
)
VISION = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
)
TEXT = {**SMALL, "num_key_value_heads": 4, "eos_token_id": 2}
T5 = dict(vocab_size=97, d_model=48, d_kv=12, d_ff=64, num_layers=2, num_heads=4)


def tiny(model, config, implementation, **options):
    """A model of random weights that are large enough for attention to matter."""
    torch.manual_seed(0)
    made = getattr(transformers, model)._from_config(
        getattr(transformers, config)(**options), attn_implementation=implementation
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
    return made.eval()


def tiny_mistral(implementation, **more):
    options = {**SMALL, "sliding_window": 5, **more}
    return tiny("MistralForCausalLM", "MistralConfig", implementation, **options)


def tiny_bloom(implementation):
    return tiny(
        "BloomForCausalLM", "BloomConfig", implementation, vocab_size=97, hidden_size=48, n_head=4
    )
