"""The house keeps its own rules: import contracts, and no file beyond the size where a noun is missing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_imports_keep_the_contracts():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_loading_the_edge_imports_no_torch():
    code = (
        "import sys, dit2deploy, dit2deploy.artefacts.bundle, dit2deploy.targets, dit2deploy.sampling, "
        "dit2deploy.stages.sample, dit2deploy.stages.profile; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_no_file_is_too_long():
    files = [*ROOT.glob("dit2deploy/**/*.py"), *ROOT.glob("plugins/**/*.cc"), *ROOT.glob("plugins/**/*.cu")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 500} == {}
