"""The program of docs/distributed.md, in two processes, prints what the document says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# PyTorch keeps meshes in caches of DTensors, so that gloo's threads outlive destroy_process_group(). One that still lets
# go of a tensor while the interpreter ends aborts the process, seldom: its output is whole by then.
ABORTED_AT_EXIT = "terminate called without an active exception"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def test_the_program_prints_what_the_document_says(tmp_path: Path) -> None:
    text = DOCUMENT.read_text()
    (source,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ((command, expected),) = re.findall(r"^\$ torchrun (.*) program\.py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    program = tmp_path / "program.py"
    program.write_text(source)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split(), str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout == expected, done.stderr
    aborted = f"{ABORTED_AT_EXIT}\n" in done.stderr and "exitcode  : -6" in done.stderr
    assert done.returncode == 0 or aborted, done.stderr
