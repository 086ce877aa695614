"""heed hardware: passes, accelerators, tile plans and this machine, as a user meets them."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree

import program
import pytest
from program import PROGRAM, ROOT

CASCADES = ROOT / "src" / "hardware" / "cascades"
PUBLISHED = ROOT.parent / "shared" / "data" / "fusemax"
COMMANDS = ["passes", "fusemax", "place", "tiles", "simulate", "touches", "cpu", "files"]

pytestmark = program.needs_program


def hardware(*arguments, **options):
    return program.heed("hardware", *arguments, **options)


def hardware_json(*arguments):
    return program.heed_json("hardware", *arguments)


def error_of(*arguments, **options):
    return program.error_of("hardware", *arguments, **options)


def published(name):
    path = PUBLISHED / name
    if not path.exists():
        pytest.skip(f"no published results at {path}")
    return list(csv.DictReader(path.open()))


# --- the commands as a whole ---------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert "--help" in hardware(command, "--help").stdout


def test_without_a_command_the_commands_are_listed():
    done = hardware(code=2)
    assert all(f"\n  {command} " in done.stderr for command in COMMANDS)


def test_names_that_are_neither_file_nor_mechanism(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "flash").mkdir()
    for command in ("passes", "place"):
        message = error_of(command, "folder", cwd=tmp_path)
        assert message.startswith("heed: 'folder' is a folder, unknown mechanism 'folder'")
        message = error_of(command, "nofile", cwd=tmp_path)
        assert message.startswith("heed: no file 'nofile', unknown mechanism 'nofile'")
    assert hardware("passes", "flash", cwd=tmp_path).stdout


def test_typing_mistakes_name_what_was_meant():
    assert "did you mean 'tiles'" in error_of("tlies")
    assert "did you mean '--kernel'" in error_of("tiles", "--kernl", "3")
    assert "did you mean 'binding'" in error_of("fusemax", "--config", "bindng")
    assert "did you mean 'bert'" in error_of("fusemax", "--model", "brt")
    assert "did you mean 'flash'" in error_of("passes", "falsh")
    assert error_of("fusemax", "--model", "brt").startswith("heed: --model: unknown model")
    assert "did you mean 'fusemax'" in error_of("files", "fusemx")


# --- passes --------------------------------------------------------------------------------------


def test_passes_of_the_papers_cascades():
    passes = {
        path.stem: hardware_json("passes", path)["passes"] for path in CASCADES.glob("*.cascade")
    }
    assert passes == {"three_pass": 3, "two_pass": 2, "one_pass": 1}
    teaching = ROOT / "src" / "cascade" / "testdata"
    assert hardware_json("passes", teaching / "teaching_two_pass.cascade")["passes"] == 2
    assert hardware_json("passes", teaching / "teaching_one_pass.cascade")["passes"] == 1


def test_passes_name_every_statement():
    report = hardware_json("passes", CASCADES / "three_pass.cascade", "--rank", "m")
    assert [(row["tensor"], row["pass"]) for row in report["statements"]] == [
        ("QK", 1), ("GM", 1), ("SN", 2), ("SD", 2), ("A", 3), ("AV", 3),
    ]  # fmt: skip
    other = hardware_json("passes", CASCADES / "three_pass.cascade", "--rank", "p")
    assert other["passes"] == 1
    assert "found no rank z" in error_of("passes", CASCADES / "three_pass.cascade", "--rank", "z")


def test_passes_over_a_rank_of_some_cascades():
    found = hardware_json("passes", "flash", "--rank", "m1")["cascades"]
    assert found and len(found) < len(hardware_json("passes", "flash")["cascades"])
    assert "has a rank 'm9'" in error_of("passes", "flash", "--rank", "m9")


def test_passes_of_all_mechanisms():
    listed = {entry["name"]: entry["cascades"] for entry in hardware_json("passes")}
    flash = {c["cascade"]: c["passes"] for c in listed["flash_attention"]}
    assert flash["softmax"] == 3 and flash["two_pass"] == 2 and flash["flash"] == 1
    table = hardware("passes").stdout
    assert all(name in table for name in listed)
    assert hardware_json("passes", "flash")["cascades"][0]["passes"] == 3


def test_definitions_of_further_options_are_no_fast_forms():
    rows = [line.split() for line in hardware("passes").stdout.splitlines()]
    assert ["further", "options", "with_options", "3"] in rows
    listed = {entry["name"]: entry["cascades"] for entry in hardware_json("passes")}
    when = {c["cascade"]: c["when"] for c in listed["flash_attention"]}
    assert when == {"softmax": "", "two_pass": "", "flash": "", "with_options": "further options"}
    placed = {row["cascade"] for row in hardware_json("place", "decode")}
    assert placed == {"softmax", "two_pass", "flash"}


def test_passes_of_broken_files(tmp_path):
    bad = tmp_path / "bad.cascade"
    bad.write_text("cascade bad\nrank m\nin A[m]\nX[m] = A[m] + ]\n")
    assert f"{bad}:4" in error_of("passes", bad)
    assert "No such file" in error_of("passes", tmp_path / "none.cascade")
    assert "folder" in error_of("passes", f"{tmp_path}/")


# --- accelerators --------------------------------------------------------------------------------


def test_all_120_published_rows():
    wanted = published("attention_and_encoder.csv")
    rows = {(r["config"], r["model"], r["length"]): r for r in hardware_json("fusemax")}
    assert len(wanted) == len(rows) == 120
    for want in wanted:
        row = rows[want["config"], want["model"], int(want["length"])]
        exact = want["config"] in ("architecture", "binding")
        for key, share in {
            "latency_s": 0.01, "util_2d": 0.01, "util_1d": 0.01, "traffic_bytes": 0.01,
            "energy_j": 0.05 if exact else 0.1, "e2e_latency_s": 0.01,
            "e2e_energy_j": 0.05 if exact else 0.1,
        }.items():  # fmt: skip
            assert row[key] == pytest.approx(float(want[key]), rel=share), (want["config"], key)
        parts = sum(row["energy_by_component_j"].values())
        assert parts == pytest.approx(row["energy_j"], rel=1e-12)


def test_the_headline_means_and_their_definition():
    text = hardware("fusemax").stdout
    assert "6.72x" in text and "5.30x" in text
    line = next(line for line in text.splitlines() if "over flat" in line)
    assert "6.72x faster at 0.79" in line and "5.30x at 0.83" in line
    assert "Arithmetic means over the 24 pairs" in text and "inferred" in text


def test_filters_and_other_lengths():
    (row,) = hardware_json("fusemax", "--config", "binding", "--model", "xlm", "--length", 5000)
    assert (row["config"], row["model"], row["length"]) == ("binding", "xlm", 5000)
    assert 0.9 < row["util_2d"] < 1


def test_area_sweep():
    wanted = published("area_sweep.csv")
    rows = {(r["model"], r["pe_dim"]): r for r in hardware_json("fusemax", "--area-sweep")}
    assert len(rows) == len(wanted) == 24
    for want in wanted:
        row = rows[want["model"], int(want["pe_dim"])]
        assert row["latency_s"] == pytest.approx(float(want["latency_s"]), rel=0.01)
        assert row["area_um2"] == pytest.approx(float(want["area_um2"]), rel=0.01)


def machine(tmp_path, **changes):
    text = json.loads(hardware("files", "fusemax").stdout)
    for key, value in changes.items():
        if value is None:
            del text[key]
        else:
            text[key] = value
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(text))
    return path


def test_a_machine_and_a_layer_from_files(tmp_path):
    layer = tmp_path / "layer.json"
    layer.write_text(
        json.dumps({"name": "mine", "batch": 2, "heads": 4, "head_dim": 32, "length": 2048})
    )
    rows = hardware_json("fusemax", "--workload", layer)
    assert {r["config"] for r in rows} == {
        "unfused", "flat", "cascade", "architecture", "binding",
    }  # fmt: skip
    assert all(r["model"] == "mine" and r["e2e_latency_s"] is None for r in rows)
    twice = machine(tmp_path, clock_hz=2 * 940e6, dram_bytes_per_second=2 * 400 * 2**30)
    base = hardware_json("fusemax", "--config", "binding", "--workload", layer)[0]
    fast = hardware_json("fusemax", "--config", "binding", "--workload", layer, "--arch", twice)[0]
    assert base["latency_s"] / fast["latency_s"] == pytest.approx(2)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"clock_hz": 0}, "clock_hz"),
        ({"clock_hz": -1}, "above 0"),
        ({"clock_hz": "940 MHz"}, "940 MHz"),
        ({"clock_hz": None, "clock": 940e6}, "says no unit"),
        ({"buffer_bytes": None}, "'buffer_bytes'"),
        ({"buffer_bytes": 10}, "need"),
        ({"word_bytes": 0}, "word_bytes"),
        ({"array_2d": {"rows": 0, "columns": 1, "cycles_per_operation": {}}}, "array_2d: rows"),
        ({"array_2d": {"rows": 1e30, "columns": 1, "cycles_per_operation": {}}}, "1e+30"),
        ({"colour": "blue"}, "unknown key 'colour'"),
    ],
)
def test_bad_machines(tmp_path, changes, expected):
    path = machine(tmp_path, **changes)
    message = error_of("fusemax", "--config", "binding", "--model", "bert", "--arch", path)
    assert expected in message


@pytest.mark.parametrize("text", ["", "{", "[]", "nul", '{"a":1,"a":2}', '{"name": "\ud800"}', "1e999"])
def test_broken_json(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text, errors="surrogatepass")
    assert str(path) in error_of("fusemax", "--arch", path)
    assert str(path) in error_of("fusemax", "--workload", path)


def test_bad_layers(tmp_path):
    def message(**layer):
        path = tmp_path / "layer.json"
        path.write_text(json.dumps({"name": "x", **layer}))
        return error_of("fusemax", "--workload", path)

    good = {"batch": 1, "heads": 1, "head_dim": 8, "length": 64}
    assert "heads" in message(**{**good, "heads": 0})
    assert "63 bits" in message(**{**good, "length": 10**9, "heads": 10**5})
    assert "length" in message(**{**good, "length": -4})
    assert "model_dim and ffn_dim" in message(**good, model_dim=8)
    assert "missing" in message(batch=1, heads=1, head_dim=8)
    error_of("fusemax", "--length", 0)
    assert "excludes" in error_of("fusemax", "--area-sweep", "--means")


def test_the_headline_means_alone():
    over = {entry["over"]: entry for entry in hardware_json("fusemax", "--means")}
    assert set(over) == {"flat", "unfused"} and all(e["pairs"] == 24 for e in over.values())
    flat, unfused = over["flat"], over["unfused"]
    assert flat["speedup"] == pytest.approx(6.723, abs=5e-4)
    assert flat["e2e_speedup"] == pytest.approx(5.302, abs=5e-4)
    assert flat["energy"] == pytest.approx(0.7875, abs=5e-3)
    assert flat["e2e_energy"] == pytest.approx(0.8335, abs=5e-3)
    assert unfused["speedup"] == pytest.approx(10.05, abs=0.05)
    assert unfused["e2e_speedup"] == pytest.approx(7.60, abs=0.05)
    assert "6.72x" in hardware("fusemax", "--means").stdout
    assert "binding" in error_of("fusemax", "--means", "--config", "flat")


def test_several_mechanisms_on_the_machine():
    both = hardware_json("place", "sigmoid", "lightning")
    assert both == hardware_json("place", "sigmoid") + hardware_json("place", "lightning")
    assert "did you mean 'sigmoid'" in error_of("place", "flash", "sigmod")


def test_what_mechanisms_would_gain():
    rows = hardware_json("place", "sigmoid")
    assert rows and all(row["gain"] > 1 for row in rows)
    full, causal = (hardware_json("place", "flash")[i] for i in (0, -1))
    assert full["overlapped_s"] <= full["in_turn_s"]
    assert {row["bound_by"] for row in rows} <= {"2D array", "1D array", "DRAM"}
    sizes = "b=64,h=12,p=4096,m=4096,e=64,f=64"
    (placed,) = hardware_json("place", CASCADES / "one_pass.cascade", "--sizes", sizes)
    (model,) = hardware_json("fusemax", "--config", "binding", "--model", "bert", "--length", 4096)
    assert placed["overlapped_s"] == pytest.approx(model["latency_s"], rel=1e-9)
    assert "size" in error_of("place", CASCADES / "one_pass.cascade", "--sizes", "p=4")
    assert "rank=size" in error_of("place", "flash", "--sizes", "p")
    assert "found 'z'" in error_of("place", "flash", "sigmoid", "--sizes", "z=4")
    assert hardware_json("place", "flash", "--sizes", "m=512") != hardware_json("place", "flash")


# --- schedules and passes, run -------------------------------------------------------------------


def test_the_column_reaches_the_closed_forms():
    rows = hardware_json("simulate", "--elements", "8,32")
    assert [r["schedule"] for r in rows] == ["one_tile", "interleaved"] * 2
    for row in rows:
        n, e = row["elements"], row["head_dim"]
        interval = 2 * e + 10 if row["schedule"] == "interleaved" else 3 * e + 10 + n
        assert row["interval"] == pytest.approx(interval)
        assert row["util_2d"] == pytest.approx((2 * e + 9) / interval)
    error_of("simulate", "--elements", "0")
    error_of("simulate", "--elements", "8", "--key-tiles", "1000000")
    error_of("simulate", "--elements", "8,x")
    for option in ("--elements", "--head-dim", "--key-tiles"):
        assert "2^26" in error_of("simulate", option, str(2**63 - 1))
    assert "2^26" in error_of("simulate", "--query-tiles", 65536, "--head-dim", 10**5,
                              "--key-tiles", 1, "--elements", 1)  # fmt: skip


def test_passes_and_footprint_are_measured():
    rows = hardware_json("touches")
    for row in rows:  # one tile that holds everything is visited once
        whole = row["sizes"] == "M=256 M0=256"
        assert row["passes_measured"] == (1 if whole else row["passes_counted"])
    by_tile = {(r["cascade"], r["sizes"]): r for r in rows}
    one = by_tile["one_pass", "M=256 M0=16"]
    three = by_tile["three_pass", "M=256"]
    assert one["peak_live_words"] < 256 <= three["peak_live_words"]
    assert three["operations"]["division"] == 4 * 256
    assert one["operations"]["division"] == 4 * 32
    longer = hardware_json("touches", "--sizes", "m=512,M0=16")
    assert longer[-1]["peak_live_words"] == one["peak_live_words"]
    error_of("touches", "--sizes", "m=0")
    assert "found 'q'" in error_of("touches", "--sizes", "q=4")
    assert "found 'q'" in error_of("touches", CASCADES / "one_pass.cascade", "--sizes", "q=4")
    assert "--sizes h=..." in error_of("touches", CASCADES / "one_pass.cascade", "--sizes", "b=1")
    error_of("touches", "--sizes", "p=100000,m=100000")


# --- tiles ---------------------------------------------------------------------------------------

HUNYUAN = ["--grid", "30,48,80", "--kernel", "18,24,24", "--q-tile", "4,8,8", "--kv-tile", "2,8,8"]


def test_tiles_of_a_published_case():
    found = hardware_json(
        "tiles", *HUNYUAN, "--stride", "16,8,8", "--dilation", "1,1,1", "--causal", "0,0,0",
        "--kv-tiling", "static", "--e2e-share", 0.607, "--steps", 50, "--dense-steps", 15,
    )  # fmt: skip
    assert found["visited_max"] == 81 and found["visited_mean"] == 81 and found["dense"] == 900
    assert found["block_sparse"] is True
    assert found["analytical_speedup"] == pytest.approx(900 / 81)
    assert found["flop_speedup"] == pytest.approx(900 / 81)
    share = 0.607 * 35 / 50
    assert found["e2e_sim"] == pytest.approx(1 / (1 - share + share / 11.1))


def test_tiles_against_pairs():
    """A small grid counted pair by pair, static and dynamic."""
    length, kernel, query, key = 20, 7, 4, 3

    def window(i):
        start = min(max(i - kernel // 2, 0), length - kernel)
        return set(range(start, start + kernel))

    static, dynamic = [], []
    for q in range(0, length, query):
        seen = set().union(*(window(i) for i in range(q, min(q + query, length))))
        static.append(len({k // key for k in seen}))
        dynamic.append(math.ceil(len(seen) / key))
    for tiling, counts in {"static": static, "dynamic": dynamic}.items():
        found = hardware_json(
            "tiles", "--grid", length, "--kernel", kernel, "--q-tile", query, "--kv-tile", key,
            "--kv-tiling", tiling,
        )  # fmt: skip
        assert found["visited_max"] == max(counts)
        assert found["visited_mean"] == pytest.approx(sum(counts) / len(counts))


def test_the_papers_tables_and_the_search():
    rows = hardware_json("tiles", "--paper")
    assert len(rows) == 21
    table = hardware("tiles", "--paper").stdout
    assert all(model in table for model in ("FLUX", "Cosmos", "Hunyuan"))
    strides = hardware_json("tiles", *HUNYUAN, "--search-stride")
    visited = [row["visited_max"] for row in strides]
    assert visited == sorted(visited, reverse=True) and visited[-1] == 81
    assert strides[-1]["stride"] == [16, 8, 8]
    flat = hardware_json(
        "tiles", "--grid", "64,64", "--kernel", "24", "--q-tile", 64, "--kv-tile", 64,
        "--kv-tiling", "flat",
    )  # fmt: skip
    assert flat["visited_max"] == 24 and flat["dense"] == 64


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--grid", "8", "--kernel", "9", "--q-tile", "2", "--kv-tile", "2"], "kernel_size"),
        (["--grid", "0", "--kernel", "1", "--q-tile", "2", "--kv-tile", "2"], "length"),
        (["--grid", "8", "--kernel", "4", "--q-tile", "0", "--kv-tile", "2"], "q-tile"),
        (["--grid", "8,8", "--kernel", "4", "--q-tile", "2", "--kv-tile", "2,2"], "q-tile"),
        (["--grid", "8", "--kernel", "4", "--stride", "5", "--q-tile", "2", "--kv-tile", "2"],
         "stride"),
        (["--grid", "8", "--kernel", "4", "--dilation", "3", "--q-tile", "2", "--kv-tile", "2"],
         "length / dilation"),
        (["--grid", "8", "--kernel", "4", "--causal", "2", "--q-tile", "2", "--kv-tile", "2"],
         "--causal"),
        (["--grid", "8,x", "--kernel", "4", "--q-tile", "2", "--kv-tile", "2"], "'8,x'"),
        (["--grid", "9" * 30, "--kernel", "4", "--q-tile", "2", "--kv-tile", "2"], "63 bits"),
        (["--grid", "4000000000,4000000000,4000000000", "--kernel", "1", "--q-tile", "1,1,1",
          "--kv-tile", "1,1,1"], "2^62"),
        (["--grid", "8", "--kernel", "4", "--q-tile", "2", "--kv-tile", "2", "--kv-tiling", "x"],
         "static, dynamic, flat"),
        (["--grid", "8", "--kernel", "4", "--q-tile", "2", "--kv-tile", "2", "--e2e-share", "2"],
         "e2e-share"),
        (["--grid", "8", "--kernel", "4", "--q-tile", "2", "--kv-tile", "2", "--steps", "5"],
         "--e2e-share"),
        (["--grid", "8"], "--kernel is needed"),
        (["--paper", "--grid", "7"], "--grid excludes --paper"),
        (["--paper", "--e2e-share", "0.5"], "excludes"),
    ],
)  # fmt: skip
def test_bad_tiles(arguments, expected):
    assert expected in error_of("tiles", *arguments)


# --- this machine --------------------------------------------------------------------------------


def test_this_machines_limits():
    start = time.monotonic()
    found = hardware_json("cpu", "--threads", 1)
    assert found["seconds"] <= time.monotonic() - start
    assert found["units"] and all(u["multiply_adds_per_second"] > 1e6 for u in found["units"])
    levels = [level["level"] for level in found["memory"]]
    assert levels[0] == "L1" and levels[-1] == "DRAM" and found["memory"][-1]["bytes"] is None
    assert all(level["bytes_per_second"] > 1e6 for level in found["memory"])
    error_of("cpu", "--isa", "sse")
    error_of("cpu", "--threads", 0)


# --- figures and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["fusemax", "--model", "bert"], ["fusemax", "--area-sweep"], ["cpu", "--threads", "1"]],
)
def test_figures_are_svg(tmp_path, arguments):
    path = tmp_path / "figure.svg"
    hardware(*arguments, "--plot", path)
    root = xml.etree.ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in path.read_text()
    assert "cannot write" in error_of(*arguments, "--plot", tmp_path / "no" / "figure.svg")


def test_the_page_says_what_the_program_says():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_hardware_docs.py", "--check"],
        capture_output=True, text=True, timeout=300, env={"HEED_PROGRAM": str(PROGRAM), **os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    page = (ROOT / "docs" / "hardware.md").read_text()
    for figure in re.findall(r"\]\((hardware/[^)]*)\)", page):
        assert (ROOT / "docs" / figure).is_file(), figure


def test_built_in_files_can_be_copied(tmp_path):
    names = hardware("files").stdout
    for name in ("baseline", "fusemax", "bert", "binding", "one_pass"):
        assert name in names
    path = tmp_path / "binding.json"
    path.write_text(hardware("files", "binding").stdout)
    copied = hardware_json("fusemax", "--mapping", path, "--model", "t5", "--length", 1024)
    built_in = hardware_json("fusemax", "--config", "binding", "--model", "t5", "--length", 1024)
    assert copied == built_in
    assert "flat.mapping" in error_of("files", "flat")
