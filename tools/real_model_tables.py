"""Prints the tables of docs/real-model.md: perplexity of a text for mixes of attention over the layers,
and memory and decoding at growing lengths for a cache and for states.

    .venv/bin/python tools/real_model_tables.py perplexity TEXT
    .venv/bin/python tools/real_model_tables.py states TEXT --lengths 1024 16384 131072

TEXT is any file; perplexity takes its first 50,000 bytes, states as many tokens as each length asks for.
Run it on an idle machine: tokens per second are those of this run.
"""

import argparse
import json
import math
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIXES = [
    "flash",
    "flash:window=256",
    "stochastic:window=256",
    "stochastic:window=512",
    "15xflash:window=256/15xstochastic:window=256",
    "15xstochastic:window=256/15xflash:window=256",
    "flash:window=256/stochastic:window=256",
    "15xflash/15xstochastic:window=256",
    "15xstochastic:window=256/15xflash",
    "flash/stochastic:window=256",
    "flash/flash:window=256",
    "flash:window=256/na1d:kernel_size=257,dilation=8",
    "lightning",
    "linear",
    "taylor_state",
    "29xflash/lightning",
]
STATES = ["flash", "lightning", "linear", "taylor_state"]
BYTES_A_TOKEN = 3.27  # of English plays under SmolLM2's tokenizer; only chooses how much text is read


def heed(program, *arguments):
    done = subprocess.run([program, *map(str, arguments), "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def beginning(text, size, folder):
    path = pathlib.Path(folder) / f"{size}.txt"
    path.write_bytes(text.read_bytes()[:size].decode(errors="ignore").encode())
    return path


def perplexity(arguments, folder):
    text = beginning(arguments.text, 50_000, folder)
    print("| `--attention` | perplexity | nats per token | tokens/s |\n| --- | --- | --- | --- |")
    for mix in arguments.attention or MIXES:
        found = heed(arguments.program, "eval", "--model", arguments.model, "--dtype", "bf16",
                     "--text", text, "--context", 2048, "--attention", mix)  # fmt: skip
        value = found["perplexity"]
        shown = f"{value:.2f}" if value < 1e5 else f"{value:.1e}"
        print(f"| `{mix}` | {shown} | {math.log(value):.2f} | {found['tokens_per_s']:.0f} |", flush=True)


def states(arguments, folder):
    print("| `--attention` | prompt tokens | cache MB | states MB | prompt tokens/s | decode tokens/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    context = 2 * max(arguments.lengths)
    for name in arguments.attention or STATES:
        for length in arguments.lengths:
            text = beginning(arguments.text, int(length * BYTES_A_TOKEN), folder)
            found = heed(arguments.program, "run", "--model", arguments.model, "--no-chat", "-f", text,
                         "--context", context, "--max-tokens", 64, "--attention", name)  # fmt: skip
            print(f"| `{name}` | {found['prompt_tokens']} | {found['cache_bytes'] / 1e6:.1f} "
                  f"| {found['state_bytes'] / 1e6:.1f} | {found['prefill_tokens_per_s']:.0f} "
                  f"| {found['decode_tokens_per_s']:.1f} |", flush=True)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["perplexity", "states"])
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--program", default=ROOT / "build" / "heed")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--attention", nargs="+", help="instead of the rows of the documentation")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 16384])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"perplexity": perplexity, "states": states}[arguments.table](arguments, folder)


if __name__ == "__main__":
    main()
