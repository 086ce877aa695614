"""Makes src/llm/testdata: expected results of independent implementations, and seeds for the fuzzers.

    python tools/make_llm_testdata.py

Needs the packages gguf (tensor formats), tokenizers (byte-level BPE) and sentencepiece (llama).
quants.gguf    for each tensor type T: tensor T, and T.expected, the same values as float32
bpe.gguf       vocabulary and merges of a small byte-level BPE, trained on this repository's texts
tokens.txt     lines "KIND HEX_TEXT IDS...": KIND is a pre-tokenizer of bpe.gguf, or llama for
               models/stories260K.gguf
seeds_gguf/, seeds_tokenizer/    inputs the fuzzers start from
"""
import sys
from pathlib import Path

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "src/llm/testdata"
sys.path.insert(0, str(ROOT / "python/tests"))
import tokenizer_oracles as oracles  # noqa: E402

QUANTS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# Byte offsets of the float16 numbers inside a block.
HALVES = {
    "F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}
TEXTS = (
    "Hello world", " Hello  world ", "The year 2024 had 366 days, 8,784 hours.", "it's WE'LL I'Ve 'TIS",
    "def f(x):\n    return x[1:] + \"\\t\"\n\n\n", "tabs\t\tand\r\nlines\r\n\r\n  end  ", "   ", "\n", "a",
    "na\u00efve caf\u00e9 \u00fcber \u0130stanbul", "\u4f60\u597d\uff0c\u4e16\u754c\u30021234",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0661\u0662\u0663",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 ok", "\u00bd \u2167 x\u00b2", "a\u00a0b\u3000c\u2003d",
    "!!!???... --- <|im_start|> <s> </s> [INST]", "once upon a time " * 3, "z" * 50, "\u0000\u0001\u007f",
    "Once upon a time, there was a little girl named Lily.",
)


def random_blocks(rng, name, blocks):
    """Random bytes, but scales that are finite float16 numbers of every size and both signs."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    data = rng.integers(0, 256, (blocks, size), dtype=np.uint8)
    if name == "BF16":
        data[:, 1] &= 0xBF  # an exponent below the largest: no NaN, no infinity
    for offset in HALVES.get(name, ()):
        data[:, offset + 1] &= 0xBF
    return data


def write_quants(path, values):
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "test")
    for name in QUANTS:
        kind = gguf.GGMLQuantizationType[name]
        per_block = gguf.GGML_QUANT_SIZES[kind][0]
        data = random_blocks(rng, name, max(values // per_block, 1))
        if name == "F16" and values >= 6:  # includes the largest, the smallest and both zeros
            data[:6] = np.array([0, 0x8000, 1, 0x83FF, 0x7BFF, 0xFBFF], "<u2").view(np.uint8).reshape(6, 2)
        expected = gguf.quants.dequantize(data, kind).reshape(1, -1)
        if name == "F16":
            writer.add_tensor(name, data.view("<f2").reshape(1, -1))
        else:
            writer.add_tensor(name, data.reshape(1, -1), raw_dtype=kind)
        writer.add_tensor(name + ".expected", expected.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokens(path, vocabulary):
    lines = []
    for pre in oracles.PRETOKENIZERS:
        oracle = oracles.byte_level_bpe(*vocabulary, pre)
        oracle.encode_special_tokens = True  # their texts are plain text here
        lines += [(pre, text, oracle.encode(text).ids) for text in TEXTS]
    oracle = oracles.sentencepiece_of(ROOT / "models/stories260K.gguf")
    lines += [("llama", text, oracle.encode(text)) for text in TEXTS if "\0" not in text]
    with open(path, "w", encoding="ascii") as file:
        for kind, text, ids in lines:
            print(kind, text.encode().hex(), *ids, file=file)


def write_seeds():
    seeds = OUT / "seeds_gguf"
    seeds.mkdir(exist_ok=True)
    write_quants(seeds / "quants.gguf", values=1)
    words = ["a", "b", "ab", "<|im_start|>", "<|im_end|>", "system", "Ġ"]
    oracles.write_bpe_gguf(
        seeds / "bpe.gguf", words, ["a b"], "smollm", control={"<|im_start|>", "<|im_end|>"},
        template="{{'<|im_start|>system\\nBe kind.<|im_end|>\\n' + message['content']}}")
    oracles.write_spm_gguf(
        seeds / "spm.gguf", ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"],
        [0, 0, 0, -1, -2, -3, -4, -5], template="[INST] <<SYS>>")
    seeds = OUT / "seeds_tokenizer"
    seeds.mkdir(exist_ok=True)
    for i, text in enumerate(TEXTS):
        (seeds / f"{i:02}.txt").write_bytes(bytes([i]) + text.encode())


def main():
    OUT.mkdir(exist_ok=True)
    write_quants(OUT / "quants.gguf", values=1024)
    vocabulary = oracles.train_bpe(800)
    oracles.write_bpe_gguf(OUT / "bpe.gguf", *vocabulary, "gpt-2")
    write_tokens(OUT / "tokens.txt", vocabulary)
    write_seeds()


if __name__ == "__main__":
    main()
