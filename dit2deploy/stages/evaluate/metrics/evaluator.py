"""Evaluators that are programs of their own, in an environment of theirs: run without a network, their error told."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit2deploy.base.errors import Misuse

# They fetch what they miss, by wget, git and urllib. What is known of that is looked for before; this stops the rest.
_NOWHERE = "http://127.0.0.1:9"
_OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), _NOWHERE) | {
    "no_proxy": "",
    "NO_PROXY": "",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


def require_modules(python: Path, modules: Sequence[str], *, install: str) -> None:
    """Raises Misuse where the interpreter is missing or cannot import one of the modules."""
    _run([str(python), "-c", f"import {', '.join(modules)}"], f"{python} cannot import {', '.join(modules)}", install)


def run(python: Path, script: Path, arguments: Sequence[str], *, job: Any = None, cwd: Path, what: str) -> None:
    """Runs the script in `cwd`, with `job` as JSON on its stdin. Raises Misuse with its last words where it fails."""
    command = [str(python), str(script), *arguments]
    _run(command, f"{what} failed", "Run it as its own documentation says.", stdin=json.dumps(job), cwd=cwd)


def _run(command: Sequence[str], failed: str, cure: str, *, stdin: str = "", cwd: Path | None = None) -> None:
    env = {**os.environ, **_OFFLINE}
    try:
        done = subprocess.run(command, input=stdin, cwd=cwd, env=env, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise Misuse(f"{failed}: {error.strerror}.", cure) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Misuse(f"{failed}: {lines[-1].strip() if lines else f'exit code {done.returncode}'}.", cure)
