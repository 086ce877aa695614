"""heed bench as a user meets it: passes, sweeps, plans, figures. Timings themselves are not tested."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree

import program
import pytest
from program import ROOT

QUICK = ["--seconds", "0.001"]

pytestmark = program.needs_program


def bench(*arguments, **options):
    return program.heed("bench", *arguments, **options)


def bench_json(*arguments):
    return program.heed_json("bench", *arguments, *QUICK)


def error_of(*arguments):
    return program.error_of("bench", *arguments)


def sound(samples):
    return samples["runs"] >= 5 and 0 < samples["p20"] <= samples["median"] <= samples["p80"]


# --- rows ----------------------------------------------------------------------------------------


def test_backward_rows_follow_forward_rows():
    rows = bench_json("flash", "--backward", "--q", "1,2,64,16")["rows"]
    assert [row["pass"] for row in rows] == ["forward", "backward"] * (len(rows) // 2)
    for forward, backward in zip(rows[::2], rows[1::2], strict=True):
        assert forward["options"] == backward["options"] and sound(backward["ms"])
        assert backward["roofline"]["operations"] == 2 * forward["roofline"]["operations"]
        assert backward["roofline"]["bytes"] > forward["roofline"]["bytes"]
        assert 0 <= backward["max_error_over_bound"] <= 1


def test_what_has_no_backward_has_no_such_row():
    rows = bench_json("decode", "--backward", "--q", "1,2,1,16", "--k", "1,1,40,16")["rows"]
    assert rows and all(row["pass"] == "forward" for row in rows)


def test_what_has_no_backward_is_said():
    shape = ["--q", "1,2,1,16", "--k", "1,1,40,16", *QUICK]
    both = bench("decode", "flash", "--backward", *shape)
    assert both.stderr == "heed: --backward: decode_attention has none, only its forward was timed\n"
    assert bench("decode", *shape).stderr == ""
    sweep = ["--sweep", "length", "--lengths", "8,16", "--q", "1,2,1,8", *QUICK]
    assert bench("decode", "--backward", *sweep).stderr == both.stderr
    assert bench("flash", "--backward", *sweep).stderr == ""


def test_rows_say_which_path_was_asked_for():
    rows = bench_json("kernelized_rpe_attention", "--q", "1,1,64,16")["rows"]
    paths = {row["options"]: row["path"] for row in rows if "path=" in row["options"]}
    assert paths["features=nprf,path=fft"] == "fft"
    assert paths["features=nprf,path=direct"].startswith("direct, ")


def test_rooflines_are_bounds_from_counts():
    (row,) = bench_json("flash", "--q", "1,2,64,16", "--options", "causal=0")["rows"]
    roof = row["roofline"]
    scores, values = 2 * 64 * 64 * 16, 2 * 64 * 64 * 16
    assert roof["operations"] == pytest.approx(2 * (scores + values), rel=0.1)
    assert roof["bytes"] == 4 * (4 * 2 * 64 * 16 + 2 * 64)  # q, k, v, out and lse
    assert roof["reached"] == pytest.approx(roof["bound_ms"] / row["ms"]["median"])
    assert row["tokens_per_s"] == pytest.approx(64e3 / row["ms"]["median"])
    assert roof["bound_by"] in ("arithmetic", "L1", "L2", "L3", "DRAM")


def test_several_mechanisms_in_one_table():
    rows = bench_json("flash", "sigmoid", "--q", "1,2,32,16", "--options", "causal=1")["rows"]
    assert [row["op"] for row in rows] == ["flash_attention", "sigmoid_attention"]
    assert "did you mean 'sigmoid'" in error_of("flash", "sigmod")


def test_inputs_beside_queries_follow_their_shape():
    rows = bench_json("stochastic", "--q", "2,3,40,8")["rows"]
    assert rows and all(row["shapes"]["permutation"] == [40] for row in rows)
    rows = bench_json("feature_map", "--q", "1,5,20,16")["rows"]
    assert [5, 16, 16] in [row["shapes"].get("weight") for row in rows]
    rows = bench_json("affine_scaled", "--q", "2,3,40,8")["rows"]
    assert rows and all(row["shapes"]["alpha_mean"] == [3] for row in rows)
    rows = bench_json("relative", "--q", "1,2,600,8")["rows"]
    assert {row["shapes"]["rel_bias"][0] for row in rows} == {1198, 1200}


def test_every_mechanism_takes_other_shapes_or_says_what_it_needs():
    for mechanism in program.heed_json("list"):
        arguments = ["bench", mechanism["name"], "--backward", "--q", "2,3,20,8", *QUICK]
        done = subprocess.run(
            [program.PROGRAM, *arguments],
            capture_output=True,
            text=True,
            env=program.ENVIRONMENT,
            timeout=300,
        )
        assert done.returncode in (0, 2), (arguments, done.stderr)
        assert done.returncode == 0 or done.stderr.startswith("heed: ")
        assert done.stderr.count("\n") <= 1


@pytest.mark.parametrize(
    "arguments, name, shape",
    [
        (["attention_distillation_loss", "--q", "1,2,32,16", "--k", "1,1,48,16"], "feature_k",
         [1, 1, 48, 128]),
        (["relative", "--q", "1,2,1,16", "--k", "1,2,48,16"], "rel_key", [94, 2, 16]),
        (["na1d", "--q", "1,24,2,8", "--k", "1,24,1,8", "--options", "kernel_size=3"], "key",
         [1, 24, 1, 8]),
    ],
)  # fmt: skip
def test_inputs_of_the_keys_follow_their_shape(arguments, name, shape):
    assert bench_json(*arguments)["rows"][0]["shapes"][name] == shape


@pytest.mark.parametrize(
    "arguments",
    [["--dtype", "bf16", "flash"], ["--dtype", "bf16,f32", "--dtype", "f16", "flash"], ["flash"]],
)
def test_names_may_stand_behind_options_of_several_values(arguments):
    rows = bench_json("--options", "causal=1", *arguments, "--q", "1,2,32,8", "1,2,40,8", "sigmoid")
    assert {row["op"] for row in rows["rows"]} == {"flash_attention", "sigmoid_attention"}
    types = max(1, sum(len(text.split(",")) for text in arguments[1:-1:2]))
    assert len(rows["rows"]) == 2 * 2 * types


def test_what_a_kernel_refuses_is_one_error():
    assert "at most 16" in error_of("decode", "--q", "2,6,77,16")
    assert "it takes window, scale, splits" in error_of("decode", "--options", "windw=3")
    assert "stride=0" in error_of("na1d", "--options", "stride=0")
    assert "width=0" in error_of("magnitude_aware_linear", "--options", "width=0")


def test_grids_and_matrices_take_shapes_of_their_own_rank():
    (row,) = bench_json("na2d", "--q", "1,9,7,2,8", "--options", "kernel_size=3")["rows"]
    assert row["shapes"]["query"] == row["shapes"]["key"] == [1, 9, 7, 2, 8]
    assert bench_json("moh_router", "--q", "2,5,12")["rows"][0]["shapes"]["x"] == [2, 5, 12]
    message = error_of("na2d", "--q", "1,9,7,2")
    assert "--q: found 4 numbers, needed 5" in message
    assert "found '3', needed positive numbers" in error_of("flash", "--q", "3")


def test_rows_without_heads_stand_under_the_right_headings():
    header, row = bench("moh_router", "--q", "2,5,12", *QUICK).stdout.splitlines()[1:3]
    cells = dict(zip(header.split()[:10], row.split()[:10], strict=True))
    assert [cells[name] for name in ("B", "H", "Lq", "Lk", "D")] == ["2", "-", "5", "-", "12"]


def test_without_a_name_what_does_not_fit_is_left_out():
    done = bench("--q", "1,2,20,8", "--json", *QUICK)
    measured = {row["op"] for row in json.loads(done.stdout)["rows"]}
    assert "flash_attention" in measured and "na2d" not in measured
    assert "heed: na2d is left out: --q: found 4 numbers, needed 5" in done.stderr
    done = bench("--options", "nothing=1", "--backward", "--dtype", "f32,bf16", code=2)
    lines = done.stderr.splitlines()
    assert len(lines) == len(set(lines)), "each is said once"
    assert done.stderr.endswith("heed: no mechanism takes these arguments\n")


def test_options_choose_the_definition_that_has_them():
    rows = bench_json("flash", "--backward", "--q", "1,2,20,8", "--options", "softcap=0.5")["rows"]
    assert len(rows) == 2 and all(0 < row["max_error_over_bound"] <= 1 for row in rows)


@pytest.mark.parametrize("name", ["na2d", "na3d", "stochastic", "relative", "magnitude_aware_linear"])
def test_checks_of_large_cases_are_small(name):
    """The quick check of a call that takes seconds in float64 runs on a twin of it."""
    rows = bench_json(name)["rows"]
    assert rows and all(0 <= row["max_error_over_bound"] <= 1 for row in rows)


# --- PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["flash", "--q", "1,2,64,16"],
        ["sigmoid", "--q", "1,2,64,16"],
        ["parallax", "--q", "1,2,64,16", "--options", "causal=1"],
        ["affine_scaled", "--q", "1,2,64,16"],
        ["lightning", "--q", "1,2,200,16"],
        ["linear", "--q", "1,2,200,16"],
        ["relu_linear", "--q", "1,2,64,16"],
        ["magnitude_aware_linear", "--q", "1,2,200,16", "--options", "causal=1"],
        ["relative", "--q", "1,2,64,16"],
        ["recurrent_softmax", "--q", "1,2,64,16"],
        ["taylor_state", "--q", "1,2,64,8"],
        ["kernelized_rpe", "--q", "1,2,64,16"],
        ["feature_map", "--q", "1,2,64,16"],
        ["attention_distillation_loss", "--q", "1,2,64,16"],
    ],
)
def test_pytorch_beside_heed(arguments):
    found = bench_json(*arguments, "--vs", "torch", "--backward")
    if "versus" not in found:
        pytest.skip("built without libtorch")
    assert {row["pass"] for row in found["rows"]} == {"forward", "backward"}
    for row in found["rows"]:
        assert sound(row["torch"]["ms"]) and row["torch"]["title"]
        assert row["torch"]["ms"]["runs"] == row["ms"]["runs"] == row["torch"]["speed_up"]["runs"]


def test_the_table_says_what_pytorch_computes():
    text = bench("flash", "--q", "1,1,32,8", "--vs", "torch", *QUICK).stdout
    assert "flash_attention: scaled_dot_product_attention" in text


# --- time against length -------------------------------------------------------------------------


def test_sweep_of_lengths(tmp_path):
    path = tmp_path / "lengths.svg"
    found = bench_json("--sweep", "length", "--lengths", "128,32,64", "--q", "1,2,1,16",
                       "--plot", path)  # fmt: skip
    by_op = {}
    for row in found["rows"]:
        by_op.setdefault(row["op"], []).append(row["shapes"]["q"])
        assert row["tokens_per_s"] == pytest.approx(row["shapes"]["q"][2] * 1e3 / row["ms"]["median"])
    wanted = [[1, 2, length, 16] for length in (32, 64, 128)]
    assert by_op == {"flash_attention": wanted, "lightning_attention": wanted}
    assert {row["options"] for row in found["rows"] if row["op"] == "flash_attention"} == {"causal=1"}
    (crossing,) = found["crossings"]
    assert {crossing["faster"], crossing["slower"]} == set(by_op)
    assert crossing["from_tokens"] is None or 32 <= crossing["from_tokens"] <= 128
    times = {(r["op"], r["shapes"]["q"][2]): r["ms"]["median"] for r in found["rows"]}
    assert times[crossing["faster"], 128] <= times[crossing["slower"], 128]
    root = xml.etree.ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text()
    assert "Tokens a second" in text and "flash_attention" in text


def test_only_what_a_call_needs_counts():
    """Closed gates and an absent layer cost nothing, so the bound has nothing of them either."""
    rows = {r["data"]: r for r in bench_json("head_gated", "--q", "1,4,64,16")["rows"] if not r["options"]}
    assert set(rows) == {"all gates open", "half of the heads open", "half of the gates open"}
    operations = {data: row["roofline"]["operations"] for data, row in rows.items()}
    assert operations["half of the heads open"] == operations["all gates open"] / 2
    assert 0.4 < operations["half of the gates open"] / operations["all gates open"] < 0.6
    row = next(r for r in bench_json("feature_map", "--q", "1,4,64,16")["rows"] if r["options"] == "kind=elu1")
    assert row["roofline"]["operations"] <= 8 * math.prod(row["shapes"]["x"])


def test_sweep_of_named_mechanisms_and_passes():
    found = bench_json("sigmoid", "flash", "--sweep", "length", "--lengths", "16,48",
                       "--q", "2,2,1,8", "--backward")  # fmt: skip
    assert len(found["rows"]) == 2 * 2 * 2
    assert len(found["crossings"]) == 2, "forward with forward, backward with backward"
    text = bench("sigmoid", "flash", "--sweep", "length", "--lengths", "16,48", *QUICK).stdout
    assert "tokens/s" in text and "is faster than" in text


# --- tile plans ----------------------------------------------------------------------------------


def test_measured_beside_planned():
    """The counts of sheet and plan; 64x64, window 24x24, boxes 8x8, worst and mean of 64."""
    rows = bench_json("na2d", "--against-plan")["rows"]
    found = {row["options"]: row for row in rows}
    for options, worst, mean in [
        ("kernel_size=24", 25, 18.0625),
        ("kernel_size=24,stride=8", 9, 9),
        ("kernel_size=24,stride=16", 16, 12.25),
        ("kernel_size=24,stride=24", 9, 9),
    ]:
        row = found[options]
        assert row["analytical_speedup"] == pytest.approx(64 / worst)
        assert row["mean_speedup"] == pytest.approx(64 / mean)
        assert row["flop_speedup"] == pytest.approx(64**2 / 24**2)
        assert 1 < row["kernel"]["speedup"] <= row["flop_speedup"] * (1 + 1e-9)
        assert 1 < row["kernel"]["predicted"] < row["kernel"]["speedup"]
        assert row["kernel"]["visited_mean"] <= row["kernel"]["dense"]
        assert sound(row["ms"]) and sound(row["dense_ms"]) and sound(row["measured_speedup"])
    blocks = found["kernel_size=24,stride=8"]["kernel"]
    assert blocks["speedup"] == pytest.approx(64**2 / 24**2), "whole boxes leave nothing out"


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--sweep", "width"], "length"),
        (["flash", "--lengths", "64"], "--sweep length is needed"),
        (["--sweep", "length", "--lengths", "0"], "--lengths"),
        (["--sweep", "length", "--lengths", "8,x"], "'8,x'"),
        (["--sweep", "length", "--lengths", "99999999999"], "2^32"),
        (["--sweep", "length", "--q", "1,2,3"], "--q"),
        (["--sweep", "length", "--q", "1,2,1,8", "1,2,1,16"], "one shape"),
        (["--sweep", "length", "--k", "1,2,1,8"], "--k"),
        (["--sweep", "length", "--against-plan"], "--against-plan"),
        (["na2d", "--sweep", "length"], "B,H,L,D"),
        (["na1d", "--sweep", "length", "--options", "kernel_size=3"], "B,H,L,D"),
        (["merge_attention", "--sweep", "length"], "B,H,L,D"),
        (["na2d", "--against-plan", "--lengths", "5"], "--lengths"),
        (["flash", "--seconds", "nan"], "--seconds"),
        (["feature_map", "--k", "1,2,3,8"], "--k: the call has no keys"),
        (["merge", "--k", "1,2,3,8"], "its inputs are out_a"),
        (["--q", "flash", *QUICK], "found 'flash'"),
        (["flash", "--against-plan"], "na2d or na3d"),
        (["na2d", "--against-plan", "--vs", "torch"], "--vs"),
        (["na2d", "--against-plan", "--backward"], "--backward"),
        (["na2d", "--against-plan", "--plot", "x.svg"], "--plot"),
        (["flash", "--q", "1,1,8,8", "--plot", "/nowhere/x.svg", *QUICK], "cannot write"),
        # Found with the shapes as they are given, before PyTorch's composition writes past its end.
        (["na1d", "--q", "2,6,3,8", "--vs", "torch", *QUICK], "from 1 to length / dilation = 6"),
        (["decode", "--q", "2,6,100,8", *QUICK], "q [2,6,100,8] float32 has 100 queries"),
    ],
)
def test_bad_arguments(arguments, expected):
    assert expected in error_of(*arguments)


# --- figures and scripts -------------------------------------------------------------------------


def test_the_roofline_shows_rows_as_points(tmp_path):
    path = tmp_path / "roofline.svg"
    bench("flash", "--q", "1,1,32,8", "1,1,64,8", "--plot", path, *QUICK)
    text = path.read_text()
    assert "flash 32x8" in text and "flash 64x8 causal=1" in text and "prefers-color-scheme" in text
    xml.etree.ElementTree.fromstring(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_comparison_with_compiled_pytorch(dtype):
    heed = pytest.importorskip("heed")
    if not hasattr(heed, "relu_linear_attention"):
        pytest.skip("these operators are not built")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_vs_torch.py", "relu_linear_attention", "--eager",
         "--seconds", "0.001", "--json", "--dtype", dtype],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"], done.stderr
    assert all(math.isfinite(row["speed_up"]) and row["speed_up"] > 0 for row in rows)
