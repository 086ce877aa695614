"""The script ./run: its functions and what it says, on folders made here; nothing is built or installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("bash")


@pytest.fixture
def checkout(tmp_path):
    """A folder with the script and nothing else."""
    shutil.copy(ROOT / "run", tmp_path / "run")
    return tmp_path


def run(folder, *command, **environment):
    """`./run COMMAND` there; within no repository that the folder itself is not."""
    outside = {"GIT_CEILING_DIRECTORIES": str(folder.parent), **environment}
    return subprocess.run(
        [SHELL, folder / "run", *command], capture_output=True, text=True, cwd=folder,
        stdin=subprocess.DEVNULL, env={**os.environ, **outside},
    )  # fmt: skip


def call(folder, script, **environment):
    """What a script prints that has the functions of ./run."""
    done = subprocess.run(
        [SHELL, "-c", f"source {folder}/run; {script}"], capture_output=True, text=True, cwd=folder,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def program(folder, name, text):
    """An executable script in a folder of its own, and PATH with that folder first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{SHELL}\n{text}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("all_files", [[], ["--all"]])
def test_lint_fails_where_git_does(checkout, all_files):
    said = "fatal: detected dubious ownership in repository"
    broken = program(checkout / "bin", "git", f"echo '{said}' >&2; exit 128")
    outcomes = [run(checkout, "lint", *all_files), run(checkout, "lint", *all_files, PATH=broken)]
    for done in outcomes:
        assert done.returncode == 1, done.stdout
        assert "git does not say which files there are" in done.stderr
    assert said in outcomes[1].stderr


def test_lint_takes_what_differs_from_main(checkout):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    me = "-c user.name=me -c user.email=me@localhost"
    (checkout / "same.h").write_text("")
    (checkout / "changed.cpp").write_text("")
    call(checkout, f"git init -q -b main; git add .; git {me} commit -q -m first")
    assert "No C++ file differs from main" in run(checkout, "lint").stdout
    (checkout / "changed.cpp").write_text("int changed;\n")
    (checkout / "new one.cpp").write_text("")
    (checkout / "new.txt").write_text("")
    assert call(checkout, "lint_files 0").splitlines() == ["changed.cpp", "new one.cpp"]
    assert call(checkout, "lint_files 1").splitlines() == ["changed.cpp", "same.h"]


def test_a_build_folder_that_a_person_configured(checkout):
    path = program(checkout / "bin", "cmake", 'echo "$@"')
    configured = "configure build -DHEED_TESTS=OFF"
    start = "-S . -B build -G Ninja -DHEED_TORCH=ON"
    assert call(checkout, configured, PATH=path) == f"{start} -DHEED_TESTS=OFF\n"
    last = call(checkout, "configure build -DHEED_TORCH=OFF", PATH=path)
    assert last.rindex("-DHEED_TORCH=OFF") > last.index("-DHEED_TORCH=ON")
    (checkout / "build").mkdir()
    for home, generator, anew in [
        (checkout, "Ninja", False),
        (checkout, "Unix Makefiles", True),
        (checkout / "elsewhere", "Ninja", True),
    ]:
        (checkout / "build" / "CMakeCache.txt").write_text(
            f"CMAKE_GENERATOR:INTERNAL={generator}\nCMAKE_HOME_DIRECTORY:INTERNAL={home}\n"
        )
        fresh = " --fresh" if anew else ""
        assert call(checkout, configured, PATH=path) == f"{start}{fresh} -DHEED_TESTS=OFF\n"


@pytest.mark.parametrize(
    "own, files, jobs",
    [
        ("0::/a/b", {"a/cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": "250000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "400000 100000"}, 1),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/a", {"a/memory.max": str(4 << 30)}, 2),
        ("0::/a", {"a/memory.max": "1000000", "a/cpu.max": "200000 100000"}, 1),
        ("0::/a", {"a/memory.max": "max", "a/cpu.max": "900000 100000"}, 8),
        ("4:cpuacct,cpu:/x\n5:memory:/y", {
            "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
            "memory/y/memory.limit_in_bytes": str(5 << 30),
        }, 3),
        ("4:cpu,cpuacct:/x", {
            "cpu/x/cpu.cfs_quota_us": "150000", "cpu/x/cpu.cfs_period_us": "100000",
        }, 2),
        ("", {}, 8),
    ],
)  # fmt: skip
def test_no_more_jobs_than_control_groups_grant(checkout, own, files, jobs):
    for name, text in files.items():
        file = checkout / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    (checkout / "own").write_text(own + "\n")
    path = program(checkout / "bin", "nproc", "echo 8")
    program(checkout / "bin", "awk", f"echo {64 << 30}")  # bytes of free memory
    here = f"groups={checkout}/groups own_groups={checkout}/own"
    assert call(checkout, f"{here}; jobs_at_once", PATH=path) == f"{jobs}\n"


def test_python_packages_are_installed_again_for_another_python(checkout):
    (checkout / "packages").mkdir()
    (checkout / "packages" / "python.txt").write_text("torch==1\n")
    folder = checkout / ".venv" / "bin"
    folder.mkdir(parents=True)

    def steps(version, pip=0):
        """The steps taken with this Python in .venv, for which pip is there or not."""
        program(folder, "python", f'case $1 in -c) echo {version};; *) exit {pip};; esac')
        return call(checkout, 'step() { echo "${@:3}"; }; python_packages').splitlines()

    assert steps("3.11") == ["install_python_packages"]
    assert steps("3.11") == []
    assert steps("3.13", pip=1) == ["python3 -m venv --clear .venv", "install_python_packages"]
    assert steps("3.13") == []
    (checkout / "packages" / "python.txt").write_text("torch==2\n")
    assert steps("3.13") == ["install_python_packages"]
    assert steps("3.13") == []
