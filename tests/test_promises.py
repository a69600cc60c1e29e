"""Promises about the code as a whole: its size, its floors, its words, and what it loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jaxtyping import TypeCheckError

from report_world import make_run

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
FORBIDDEN = {"config", "configs", "args", "params", "utils", "util", "helper", "helpers", "manager", "handler"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|root|Users|opt|mnt)/[\w.]|shared/(?:assets|reference|design)")
MAY_NAME_THE_ASSETS = {"Makefile", ".ci/run"}

COMMAND = """
import sys
from loralab.cli import main
sys.argv = ["loralab", *sys.argv[1:]]
try:
    code = main()
except SystemExit as end:
    code = end.code
slow = [name for name in ("torch", "lm_eval", "scipy", "transformers") if name in sys.modules]
print("code:", code or 0, "loaded:", *slow, file=sys.stderr)
"""


def _words(name):
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def _tracked_files():
    """Names of all files that are, or would be, in the repository."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this folder is no git checkout: nothing is tracked")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_every_file_is_read_at_one_sitting():
    long = {str(path.relative_to(ROOT)): n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400}
    assert SOURCES
    assert not long


def test_imports_point_down_only(tmp_path):
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--cache-dir", str(tmp_path)]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_and_classes_are_named_for_what_they_are():
    named = [(path, path.stem) for path in SOURCES]
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named += [(path, node.name) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [(str(path.relative_to(ROOT)), name) for path, name in named if _words(name) & FORBIDDEN] == []


def test_the_search_for_forbidden_words_finds_them():
    assert all(_words(name) & FORBIDDEN for name in ("TrainConfig", "data_utils", "HTTPHandler", "_args"))
    assert not _words("ConfigurableTargets") & FORBIDDEN


@pytest.mark.parametrize("words", [["--help"], ["runs"], ["recipes"], ["report", "."]], ids=" ".join)
def test_reading_commands_answer_without_torch(tmp_path, words):
    make_run(tmp_path, "lora-r4")
    command = [sys.executable, "-c", COMMAND, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1:] == ["code: 0 loaded:"], done.stderr


def test_the_lowest_floors_load_no_torch():
    files = [ROOT / "src/loralab/errors.py", *ROOT.glob("src/loralab/spec/*.py"), *ROOT.glob("src/loralab/run/*.py")]
    modules = [".".join(file.relative_to(ROOT / "src").with_suffix("").parts) for file in files]
    program = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_shapes_and_types_are_checked_in_tests(tmp_path):
    from loralab.run.folder import read_lines

    assert read_lines(tmp_path / "none") == []
    with pytest.raises(TypeCheckError):
        read_lines(3)


def test_the_readme_names_both_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [command for command in ("make demo", "make test") if command not in readme] == []


def test_no_file_names_a_place_on_one_machine():
    found = []
    for name in _tracked_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits = {hit for hit in MACHINE_PATH.findall(text) if name not in MAY_NAME_THE_ASSETS}
        found += [(name, hit) for hit in hits]
    assert found == []


def test_constraints_pin_what_every_machine_can_install():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert "torch==2.13.0" in lines
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert [line for line in lines if line.startswith(("loralab", "nvidia", "triton", "cuda"))] == []
