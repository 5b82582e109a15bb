"""docs/deploy.md, and its commands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "deploy.md"


def shell_blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
