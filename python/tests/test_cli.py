"""The program `heed`, as a user meets it: every command, its JSON, its errors and its exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import termios

import pytest
from program import ENVIRONMENT, PROGRAM, ROOT, error_of, heed, heed_json, needs_program

COMMANDS = ["run", "eval", "list", "show", "check", "bench", "explain", "cpu"]

pytestmark = needs_program
NAMES = [entry["name"] for entry in heed_json("list")] if PROGRAM.exists() else []


# --- the program as a whole ----------------------------------------------------------------------


def test_version_is_that_of_the_header():
    header = (ROOT / "include" / "heed" / "version.h").read_text()
    version = heed("--version").stdout.split()
    assert version[0] == "heed" and f'"{version[1]}"' in header


def test_help_names_every_command():
    text = heed("--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in text
    assert "Exit codes" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    text = heed(command, "--help").stdout
    assert "--help" in text and "Usage" in text
    # An option that takes several values in one word is not shown as one that takes several words.
    assert ("--dtype TYPE[,TYPE...]" in text) == (command in ("check", "bench"))
    assert ("--layout LAYOUT[,LAYOUT...]" in text) == (command == "check")


def test_no_command_is_a_usage_error():
    assert "Usage" in heed(code=2).stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["bnech"], "did you mean 'bench'"),
        (["lsit"], "did you mean 'list'"),
        (["check", "--jsn"], "did you mean '--json'"),
        (["run", "--max-token=3"], "did you mean '--max-tokens'"),
        (["--verson"], "did you mean '--version'"),
        (["check", "falsh"], "did you mean 'flash'"),
        (["show", "sigmoid_atention"], "did you mean 'sigmoid_attention'"),
        (["explain", "flash", "--q", "1,1,8,8", "--dtype", "bf61"], "did you mean 'bf16'"),
        (["check", "flash", "--case", "cuasal"], "did you mean 'causal'"),
        (["check", "flash", "--layout", "paded"], "did you mean 'padded'"),
        (["run", "-p", "x", "--model", "smollm"], "did you mean 'smollm2'"),
        (["run", "-p", "x", "--attention", "flahs"], "did you mean 'flash'"),
        (["run", "-p", "x", "--attention", "flash:windw=3"], "did you mean 'window'"),
    ],
)
def test_a_typing_mistake_names_what_was_meant(arguments, expected):
    assert expected in error_of(*arguments)


def test_unexpected_arguments_are_refused():
    assert "'extra'" in error_of("list", "extra")
    assert "NAME" in error_of("show")


def test_a_closed_pipe_ends_the_program_quietly():
    program = subprocess.Popen(
        [PROGRAM, "check", "flash", "--all"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=ENVIRONMENT,
    )
    program.stdout.close()
    assert program.wait(timeout=300) == -signal.SIGPIPE
    assert program.stderr.read() == b""


STORY = ["--model", "models/stories260K.gguf"]
ONCE = ["run", *STORY, "--no-chat", "-p", "Once", "--max-tokens", "3"]


def shell(command, before=""):
    words = before + " ".join(map(str, [PROGRAM, *command]))
    return subprocess.run(
        ["bash", "-c", words], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT
    )


@pytest.mark.parametrize(
    "command", [["list"], ["--version"], ["show", "flash", "--json"], ["hardware", "passes"], ONCE]
)
@pytest.mark.parametrize("place", ["> /dev/full", ">&-"])
def test_output_that_cannot_be_written_is_an_error(command, place):
    done = shell([*command, place])
    assert done.returncode == 2
    assert done.stderr.endswith("heed: cannot write to standard output\n")
    assert "internal error" not in done.stderr


def test_too_little_memory_says_how_much_was_needed():
    long = ["bench", "flash", "--q", "1,8,1000000,256", "--seconds", "0.001"]
    done = shell(long, before="ulimit -v 10000000; ")  # in KiB
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"heed: memory: \d{10,11} bytes are needed, .*\n", done.stderr)


@pytest.mark.parametrize("place", ["2> /dev/full", "2>&-"])
def test_messages_that_cannot_be_written_change_nothing_else(place):
    assert shell(["nothing", place]).returncode == 2
    assert shell(["show", "nothing", place]).returncode == 2
    done = shell([*ONCE, place])
    assert done.returncode == 0 and done.stdout.startswith(" upon a")


# --- progress on a terminal ----------------------------------------------------------------------

CLEAR = b"\r\x1b[K"


def on_a_terminal(columns, *arguments, kind="xterm"):
    """The program with standard error on a terminal of this width, and the other side of that."""
    parent, child = os.openpty()
    termios.tcsetwinsize(child, (24, columns))
    program = subprocess.Popen(
        [PROGRAM, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=child,
        cwd=ROOT, env={**ENVIRONMENT, "TERM": kind},
    )  # fmt: skip
    os.close(child)
    return program, parent


def rest_of(parent):
    shown = b""
    try:
        while part := os.read(parent, 4096):
            shown += part
    except OSError:  # the other side is closed
        pass
    os.close(parent)
    return shown


@pytest.mark.parametrize("columns", [10, 24, 40, 200])
def test_progress_is_no_wider_than_the_terminal(columns):
    program, parent = on_a_terminal(columns, "check", "merge", "--case", "one", "--dtype", "f32")
    shown = rest_of(parent)
    assert program.wait(timeout=300) == 0
    first, *lines, last = shown.split(CLEAR)
    assert first == last == b"" and lines and lines[0].startswith(b"checking ")
    assert all(len(line) < columns for line in lines)
    if columns == 24:
        assert lines[0] == b"checking   0 %  merge_a"
    if columns == 40:
        assert lines[0] == b"checking   0 %  merge_attention one flo"
    if columns == 200:
        assert lines[0] == b"checking [" + 30 * b"." + b"]   0 %  merge_attention one float32"


def test_no_progress_where_the_terminal_has_no_escape_sequences():
    program, parent = on_a_terminal(80, "check", "merge", "--dtype", "f32", kind="dumb")
    assert rest_of(parent) == b"" and program.wait(timeout=300) == 0


def test_ctrl_c_clears_the_progress():
    program, parent = on_a_terminal(60, "check")
    shown = os.read(parent, 4096)
    while b"%" not in shown:
        shown += os.read(parent, 4096)
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=300) == -signal.SIGINT
    assert (shown + rest_of(parent)).endswith(CLEAR)


def test_no_colours_outside_a_terminal():
    for arguments in (["show", "flash"], ["cpu"], ["check", "merge"]):
        done = heed(*arguments)
        assert "\x1b" not in done.stdout + done.stderr


# --- the registry's commands ---------------------------------------------------------------------


def test_list_is_json_in_a_pipe():
    entries = json.loads(heed("list").stdout)
    assert entries == heed_json("list")
    assert {"flash_attention", "sigmoid_attention"} <= set(NAMES)
    for entry in entries:
        assert set(entry) == {
            "name", "title", "sheet", "arxiv", "engine", "passes", "differentiable",
        }  # fmt: skip
        assert isinstance(entry["differentiable"], bool) and entry["title"]
    passes = {entry["name"]: entry["passes"] for entry in entries}
    assert passes["flash_attention"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_show(name):
    shown = heed_json("show", name)
    text = heed("show", name).stdout
    assert shown["name"] == name and shown["card"].strip() in text
    assert shown["cascades"]
    for cascade in shown["cascades"]:
        assert cascade["text"].strip() in text
        # A cascade written without the rank of the record's passes has none to count.
        statements = cascade["statements"]
        assert cascade["passes"] == max((row["pass"] for row in statements), default=None)
        assert len(cascade["counts"]) > 0
        assert len(statements) in (0, len(cascade["counts"]))
    for paper in shown["arxiv"]:
        assert paper in text


def test_show_counts_the_passes_of_attention():
    passes = {c["name"]: c["passes"] for c in heed_json("show", "flash")["cascades"]}
    assert passes == {"softmax": 3, "two_pass": 2, "flash": 1, "with_options": 3}


def test_show_counts_as_numbers():
    sizes = "b=1,h=2,p=8,m=16,e=4,f=4"
    counts = heed_json("show", "sigmoid", "--sizes", sizes)["cascades"][0]["counts"]
    products = sum(row["multiply-adds"] for row in counts)
    assert products >= 2 * (1 * 2 * 8 * 16 * 4)
    assert "rank" in error_of("show", "sigmoid", "--sizes", "b=1")
    # One complaint names the ranks of all cascades of a mechanism.
    assert error_of("show", "lightning", "--sizes", "b=1").endswith("b, e, h, m, p, f, j, i, t\n")
    assert "'zz'" in error_of("show", "lightning", "--sizes", "zz=1")
    assert "key=value" in error_of("show", "sigmoid", "--sizes", "b")
    assert "--sizes: option 'b': found 'x'" in error_of("show", "sigmoid", "--sizes", "b=x")


def test_show_counts_take_the_sizes_that_its_help_names():
    text = " ".join(heed("show", "--help").stdout.split())
    sizes = re.search(r"b=1,h=8\S+", text)[0]
    tiles = {}
    for more in ("", ",m1=1", ",m1=4"):
        cascades = heed_json("show", "flash", "--sizes", sizes + more)["cascades"]
        (counts,) = (c["counts"] for c in cascades if c["name"] == "flash")
        tiles[more] = sum(row["exponentials"] for row in counts)
    assert tiles[""] == tiles[",m1=1"] < tiles[",m1=4"]
    for name in ("decode", "sigmoid", "affine_scaled", "parallax", "head_gated", "linear"):
        heed("show", name, "--sizes", sizes)
    assert error_of("show", "flash", "--sizes", "b=1").endswith("needed b, e, h, m, p, f\n")


def test_show_latex_and_html():
    assert "\\" in heed("show", "flash", "--latex").stdout
    assert "<" in heed("show", "flash", "--html").stdout
    error_of("show", "flash", "--latex", "--html")


def test_check_all_kernels():
    rows = heed_json("check", "--layout", "padded")
    assert {row["mechanism"] for row in rows} == set(NAMES)
    assert {row["type"] for row in rows} == {"float64", "float32", "bfloat16", "float16"}
    assert set(heed_json("cpu")["instruction_sets"]) - {"amx"} <= {row["path"] for row in rows}
    for row in rows:
        assert row["replay"].startswith("heed check ")
        assert row["ok"] and 0 <= row["ratio"] <= 1 and not row["failure"], row


def test_check_replays_one_line():
    row = heed_json("check", "flash", "--dtype", "f32")[-1]
    command = row["replay"].split()
    assert command[:2] == ["heed", "check"]
    again = heed_json(*command[1:])
    assert [r for r in again if r["path"] == row["path"] and r["result"] == row["result"]] == [row]


def test_check_follows_the_seed():
    first, again, other = (
        [r["error"] for r in heed_json("check", "sigmoid", "--dtype", "f32", "--seed", seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_check_table():
    lines = heed("check", "sigmoid", "--dtype", "f32", "--isa", "portable").stdout.splitlines()
    assert lines[0].split()[:4] == ["mechanism", "case", "type", "path"]
    assert "within the bound" in lines[-1]
    assert all(line.split()[-1] == "ok" for line in lines[1:-1])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["check", "--isa", "sse"], "--isa: instruction set 'sse' is unknown"),
        (["check", "--isa", "sse"], "portable, avx2, avx512, amx"),
        (["check", "--isa", "amx", "--isa", "avx2"], "--isa: given 2 times, needed once"),
        (["run", "-p", "a", "-p", "b", "--prompt", "c"], "--prompt: given 3 times, needed once"),
        (["check", "--seed", "many"], "--seed: found 'many', needed a whole number"),
        (["check", "--seed", "-1"], "found '-1', needed a whole number"),
        (["run", "--seed", 2**64], f"found '{2**64}', needed a whole number from 0 to 2^64 - 1"),
        (["run", "--max-tokens", "-1"], "needed a whole number from 0 to 2^63 - 1"),
        (["check", "--threads", "0"], "found '0', needed a whole number from 1 to 1024"),
        (["check", "--threads", "1025"], "found '1025', needed a whole number from 1 to 1024"),
        (["bench", "--threads", "1025"], "--threads: found '1025'"),
        (["hardware", "cpu", "--threads", "1025"], "--threads: found '1025'"),
        (["check", "--layout", "foo"], "--layout: unknown layout 'foo'; known: contiguous, "),
        (["check", "--dtype", "f8"], "--dtype: unknown type 'f8'"),
        (["bench", "--dtype", "f8"], "; known: float64, "),
        (["bench", "--seconds", "abc"], "--seconds: found 'abc', needed a number"),
        (["bench", "--seconds", "5000"], "--seconds: Value 5000 not in range"),
        (["bench", "--options", "causal"], "--options: options 'causal': found 'causal'"),
    ],
)
def test_bad_arguments(arguments, expected):
    assert expected in error_of(*arguments)


def test_numbers_that_overflow():
    # One that overflows is not the largest that fits, nor is 0x10 one that people count with.
    for option in ("--context", "--top-k", "--threads"):
        assert option in error_of("run", option, "99999999999999999999")
        assert "needed a whole number" in error_of("run", option, "0x10")


def test_check_of_all_says_what_is_done_where_no_progress_is_drawn():
    few = ["check", "--case", "causal_gqa", "--dtype", "f32", "--isa", "portable"]
    lines = heed(*few).stderr.splitlines()
    assert "heed: checked flash_attention" in lines
    assert all(line.startswith("heed: checked ") for line in lines)
    assert heed(*few, "--json").stderr == heed("check", "merge").stderr == ""
    assert "minutes" in heed("check", "--help").stdout


def test_check_of_a_case_leaves_out_what_has_none():
    rows = heed_json("check", "--case", "causal_gqa", "--dtype", "f32", "--isa", "portable")
    assert rows and {row["case"] for row in rows} == {"causal_gqa"}
    assert "did you mean 'causal_gqa'" in error_of("check", "--case", "causal_gqe")
    assert heed_json("check", "--dtype", "f32", "--layout", "padded", "sigmoid", "--case", "causal")


def test_explain():
    answers = heed_json("explain", "flash", "--q", "1,8,512,80", "--dtype", "bf16", "--causal")
    assert [a["chosen"] for a in answers].count(True) == 1
    chosen = next(a for a in answers if a["can_run"])
    assert chosen["chosen"]
    for answer in answers:
        assert answer["can_run"] != bool(answer["reason"]), "a refusal has a reason"
    assert answers[-1]["path"].startswith("portable") and answers[-1]["can_run"]
    portable = heed_json("explain", "flash", "--q", "1,8,512,80", "--isa", "portable")
    assert next(a for a in portable if a["chosen"])["path"].startswith("portable")
    assert "chosen" in heed("explain", "flash", "--q", "1,8,512,80", "--k", "1,2,64,80").stdout


def test_explain_of_options():
    grid = ["explain", "na2d", "--q", "1,16,16,8,64", "--options"]
    near, far = (heed_json(*grid, f"kernel_size={size}")[0]["path"] for size in (3, 15))
    assert near.startswith("small windows") and not far.startswith("small windows")
    call = ["explain", "--q", "1,8,64,64", "--options"]
    assert "order is 9" in error_of(*call, "order=9", "taylor_state")
    for name in ("flash", "magnitude_aware_linear", "feature_map"):
        assert "unknown option 'foo'" in error_of(*call, "foo=1", name)
    for name in ("flash", "affine_scaled", "parallax", "head_gated", "sigmoid"):
        message = error_of(*call, "window=30,left=3", name)
        assert "window=30 and left=3" in message and "one of them is needed" in message
    assert "--causal" in error_of(*call, "causal=0", "flash", "--causal")


def test_explain_refuses_what_the_operator_refuses():
    assert "1 to 256 is supported" in error_of("explain", "sigmoid", "--q", "1,2,64,512")
    assert heed_json("explain", "flash", "--q", "1,2,64,512")
    message = error_of("explain", "flash", "--q", "1,2,64,32", "--k", "1,3,64,32")
    assert "q has 2 heads, k has 3" in message
    assert "head dim 11" in error_of("explain", "lightning", "--q", "1,8,512,64", "--k", "1,3,7,11")
    message = error_of("explain", "decode", "--q", "1,8,1,64", "--k", "1,2,9,64", "--v", "1,2,8,64")
    assert "number of keys 8 but k_cache has 9" in message
    assert "no values" in error_of("explain", "feature_map", "--q", "1,2,9,8", "--v", "1,2,9,8")
    heed("explain", "decode", "--q", "1,8,16,64")
    line = ["explain", "na1d", "--q", "1,4,64,32"]
    assert "those of an example, kernel_size=256: --options sets others" in error_of(*line)
    assert "example" not in error_of(*line, "--options", "kernel_size=5")
    shape = ["decode", "--q", "1,8,17,64"]
    assert error_of("explain", *shape) == error_of("bench", *shape)


@pytest.mark.parametrize(
    "shape", [",", "3", "1,2,3,x", "1,2,0,4", "-1,2,3,4", "1,,3,4", "99999999,9999,99,99"]
)
def test_bad_shapes(shape):
    assert "B,H,L,D" in error_of("explain", "flash", f"--q={shape}")


@pytest.mark.parametrize("shape, count", [("1,2,3", 3), ("1,2,3,4,5", 5)])
def test_shapes_of_another_rank(shape, count):
    assert f"found {count} numbers, needed 4" in error_of("explain", "flash", f"--q={shape}")


def test_cpu():
    found = heed_json("cpu")
    assert found["cores"] >= 1 and found["model"]
    assert found["instruction_sets"][0] == "portable"
    assert set(found["kernels"]) == set(NAMES)
    text = heed("cpu").stdout
    assert found["model"] in text and all(name in text for name in NAMES)


def test_cpu_follows_the_forced_instruction_set():
    found = heed_json("cpu", env={"HEED_ISA": "portable"})
    assert found["default"] == "portable"
    assert found["kernels"]["flash_attention"]["float32"].startswith("portable")
    for arguments in (["cpu"], ["cpu", "--json"]):
        assert "'sse'" in error_of(*arguments, env={"HEED_ISA": "sse"})


@pytest.mark.parametrize(
    "arguments",
    [ONCE, ["eval", *STORY, "--text", "LICENSE"], ["check", "merge"], ["bench", "merge"],
     ["explain", "flash", "--q", "1,1,8,8"], ["cpu"]],
)  # fmt: skip
def test_a_wrong_instruction_set_is_that_of_the_environment(arguments):
    message = error_of(*arguments, env={"HEED_ISA": "sse"})
    assert message.startswith("heed: HEED_ISA: instruction set 'sse' is unknown")


def test_check_follows_the_forced_instruction_set():
    few = ["check", "merge", "--dtype", "f32", "--layout", "padded"]
    rows = heed_json(*few, env={"HEED_ISA": "portable"})
    assert rows == heed_json(*few, "--isa", "portable")
    every = heed_json(*few, env={"HEED_ISA": ""})
    assert {row["path"] for row in rows} <= {row["path"] for row in every}
    widest = heed_json("cpu")["instruction_sets"][-1]
    assert heed_json(*few, "--isa", "portable", env={"HEED_ISA": widest}) == rows


def test_hardware_without_a_command_prints_its_help():
    assert heed("hardware", code=2).stderr == heed("hardware", "--help").stdout


def test_hardware_files_are_named_once():
    names = error_of("hardware", "files", "nope").split("there are ")[1].strip().split(", ")
    assert "flat" in names and len(names) == len(set(names))


def test_cascades_that_are_not_placed_are_named():
    lines = heed("hardware", "place", "--json").stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("heed: left out: ")
    assert "na1d_masked of na1d" in lines[0] and "rank whose passes are counted" in lines[0]


# --- what programs draw and write ----------------------------------------------------------------


def test_pictures_are_what_is_drawn(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    script = tools / "draw_masks.py"
    for name in ("draw_masks.py", "written_files.py"):
        (tools / name).write_text((ROOT / "tools" / name).read_text())

    def draw(tool, *arguments):
        return subprocess.run([sys.executable, tool, *arguments], capture_output=True, text=True)

    assert draw(ROOT / "tools" / "draw_masks.py", "--check").returncode == 0
    assert draw(script, "--check").returncode == 1 and not (tmp_path / "docs").exists()
    assert draw(script).returncode == 0 and draw(script, "--check").returncode == 0
    picture = tmp_path / "docs" / "masks" / "window.svg"
    picture.write_text("old")
    done = draw(script, "--check")
    assert done.returncode == 1 and "window.svg" in done.stdout and picture.read_text() == "old"
    assert draw(script, "--chek").returncode == 2


def test_bench():
    found = heed_json("bench", "flash", "--q", "1,2,64,16", "1,2,96,16", "--seconds", "0.001")
    assert {(tuple(r["shapes"]["q"])) for r in found["rows"]} == {(1, 2, 64, 16), (1, 2, 96, 16)}
    for row in found["rows"]:
        assert row["ms"]["runs"] >= 5
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["gflops"] > 0 and 0 <= row["max_error_over_bound"] <= 1
    text = heed("bench", "merge", "--seconds", "0.001").stdout.splitlines()
    assert found["cpu"] in text[0] and "heed" in text[0] and "median ms" in text[1]


def test_bench_counts_only_visible_pairs():
    """Operations = GFLOP/s x milliseconds: causal has (L + 1) / 2L of the full ones."""
    operations = {}
    for options in ("causal=0", "causal=1"):
        row = heed_json(
            "bench", "flash", "--q", "1,1,64,16", "--seconds", "0.001", "--options", options
        )["rows"][0]
        operations[options] = row["gflops"] * row["ms"]["median"]
    assert operations["causal=1"] / operations["causal=0"] == pytest.approx(65 / 128, rel=0.02)
    pair_products = 64 * 64 * (16 + 16)
    assert operations["causal=0"] * 1e6 == pytest.approx(2 * pair_products, rel=0.1)


def test_bench_against_pytorch():
    found = heed_json("bench", "flash", "--q", "1,2,64,16", "--seconds", "0.001", "--vs", "torch")
    assert found["versus"].startswith("PyTorch ")
    for row in found["rows"]:
        assert row["torch"]["ms"]["runs"] == row["ms"]["runs"] == row["torch"]["speed_up"]["runs"]
    error_of("bench", "flash", "--vs", "numpy")
