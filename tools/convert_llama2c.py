"""Converts a llama2.c checkpoint and its tokenizer to a GGUF file of 32-bit floats.

    python tools/convert_llama2c.py stories260K.bin tok512.model models/stories260K.gguf

The checkpoint format is version 0 of llama2.c: seven int32 (dim, hidden_dim, n_layers, n_heads,
n_kv_heads, vocab_size, seq_len; a negative vocab_size says that the classifier has weights of its own),
then float32 weights. Its RoPE turns neighbouring pairs (2i, 2i+1) of each head, which is what GGUF files
of llama models hold too, so Q and K stay as they are. The tokenizer is a SentencePiece model.
"""
import argparse
import struct

import gguf
import numpy as np
from sentencepiece import SentencePieceProcessor

ROPE_BASE = 10000.0
RMS_EPS = 1e-5


def read_checkpoint(path):
    """Returns (config, tensors): arrays named as in GGUF, shaped [out, in]."""
    with open(path, "rb") as file:
        names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")
        config = dict(zip(names, struct.unpack("<7i", file.read(28))))
        weights = np.fromfile(file, dtype="<f4")
    shared_classifier = config["vocab"] > 0
    config["vocab"] = abs(config["vocab"])
    dim, hidden, layers, vocab = (config[k] for k in ("dim", "hidden", "layers", "vocab"))
    head_dim = dim // config["heads"]
    kv_dim = head_dim * config["kv_heads"]

    position = 0

    def take(*shape):
        nonlocal position
        count = int(np.prod(shape))
        part = weights[position : position + count]
        if part.size != count:
            raise SystemExit(f"{path}: ends inside a tensor of shape {shape}")
        position += count
        return part.reshape(shape)

    tensors = {"token_embd.weight": take(vocab, dim)}
    per_layer = (
        ("attn_norm", (dim,)),
        ("attn_q", (dim, dim)),
        ("attn_k", (kv_dim, dim)),
        ("attn_v", (kv_dim, dim)),
        ("attn_output", (dim, dim)),
        ("ffn_norm", (dim,)),
        ("ffn_gate", (hidden, dim)),
        ("ffn_down", (dim, hidden)),
        ("ffn_up", (hidden, dim)),
    )
    for name, shape in per_layer:
        for layer, values in enumerate(take(layers, *shape)):
            tensors[f"blk.{layer}.{name}.weight"] = values
    tensors["output_norm.weight"] = take(dim)
    take(config["context"], head_dim // 2)  # cosines and sines of RoPE, which follow from the base
    take(config["context"], head_dim // 2)
    if not shared_classifier:
        tensors["output.weight"] = take(vocab, dim)
    if position != weights.size:
        raise SystemExit(f"{path}: {weights.size - position} values are left over")
    return config, tensors


def add_tokenizer(writer, path, vocab):
    model = SentencePieceProcessor(model_file=path)
    if model.vocab_size() != vocab:
        raise SystemExit(f"{path}: has {model.vocab_size()} pieces, the checkpoint has {vocab}")
    kinds = (
        (model.is_unknown, gguf.TokenType.UNKNOWN),
        (model.is_control, gguf.TokenType.CONTROL),
        (model.is_unused, gguf.TokenType.UNUSED),
        (model.is_byte, gguf.TokenType.BYTE),
    )
    types = []
    for i in range(vocab):
        types.append(next((kind for test, kind in kinds if test(i)), gguf.TokenType.NORMAL))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in range(vocab)])
    writer.add_token_scores([model.get_score(i) for i in range(vocab)])
    writer.add_token_types(types)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("tokenizer", help="SentencePiece model")
    parser.add_argument("output")
    parser.add_argument("--name", default="stories260K")
    args = parser.parse_args()

    config, tensors = read_checkpoint(args.checkpoint)
    writer = gguf.GGUFWriter(args.output, "llama")
    writer.add_name(args.name)
    writer.add_license("mit")
    writer.add_block_count(config["layers"])
    writer.add_context_length(config["context"])
    writer.add_embedding_length(config["dim"])
    writer.add_feed_forward_length(config["hidden"])
    writer.add_head_count(config["heads"])
    writer.add_head_count_kv(config["kv_heads"])
    writer.add_rope_dimension_count(config["dim"] // config["heads"])
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_vocab_size(config["vocab"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, args.tokenizer, config["vocab"])
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
