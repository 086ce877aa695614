"""Tokenizers of other projects with the vocabularies of GGUF files, and writers of such files."""
import itertools
import json
import struct
from pathlib import Path

import gguf

ROOT = Path(__file__).resolve().parent.parent.parent
PRETOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eot_id|>")


def train_bpe(size):
    """(tokens, merges) of a byte-level BPE trained on the texts of this repository."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = [(ROOT / name).read_text() for name in ("LICENSE", "models/README.md")]
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return tokens, [" ".join(merge) for merge in model["merges"]]


def byte_level_bpe(tokens, merges, pre, control=SPECIALS):
    """The `tokenizers` package's BPE with the pre-tokenizer that models of this kind declare."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shared = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True),
                   pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [pre_tokenizers.Split(Regex(shared % r"\p{N}{1,3}"), "isolated"), byte_level],
        "qwen2": [pre_tokenizers.Split(Regex(shared % r"\p{N}"), "isolated"), byte_level],
    }[pre]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in control if text in vocab])
    assert tokenizer.get_vocab_size() == len(vocab)
    return tokenizer


def write_bpe_gguf(path, tokens, merges, pre, control=SPECIALS, template=None, **ids):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in control else NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    _finish_tokenizer(writer, template, ids)


def write_spm_gguf(path, tokens, scores, types=None, template=None, **ids):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    guess = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    writer.add_token_types(types or [guess.get(token, NORMAL) for token in tokens])
    _finish_tokenizer(writer, template, {"unk": 0, "bos": 1, "eos": 2} | ids)


def _finish_tokenizer(writer, template, ids):
    for name, token in ids.items():
        getattr(writer, f"add_{name}_token_id")(token)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def read_vocabulary(path):
    """Metadata of a GGUF file by short name: tokens, types, scores, merges, chat_template."""
    fields = gguf.GGUFReader(path).fields
    names = {"tokens": "ggml.tokens", "types": "ggml.token_type", "scores": "ggml.scores",
             "merges": "ggml.merges", "chat_template": "chat_template"}
    found = {short: fields.get("tokenizer." + name) for short, name in names.items()}
    return {short: field.contents() for short, field in found.items() if field is not None}


def _message(*fields):
    """A protocol buffer of (number, value): str, bytes, float or int."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += _varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return out


def _varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def sentencepiece_of(path):
    """SentencePiece with the vocabulary of a llama GGUF file: BPE, byte fallback, no normalisation."""
    from sentencepiece import SentencePieceProcessor

    vocab = read_vocabulary(path)
    pieces = [
        (1, _message((1, text), (2, float(score)), (3, kind)))
        for text, score, kind in zip(vocab["tokens"], vocab["scores"], vocab["types"])
    ]
    trainer = _message((3, 2), (35, 1))  # model_type BPE, byte_fallback
    normalizer = _message((1, "identity"), (3, 1), (4, 0), (5, 1))  # space prefix, keep all spaces
    model = _message(*itertools.chain(pieces, [(2, trainer), (3, normalizer)]))
    return SentencePieceProcessor(model_proto=model)
