"""The scripts that make the embedded model import one another as neighbours; so do their tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "tiny"))
