"""Put the embedded model's figures into the README, from the JSON of scripts/evaluate_tiny.py.

python scripts/readme_figures.py --json assets/tiny/evaluation.json
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from library.args import Flags, flag, parse
from library.cli import run_main, say
from library.errors import UserError
from library.evaluation.report import markdown_table
from library.files import write_text

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


@dataclass(frozen=True, kw_only=True)
class FiguresArgs(Flags):
    """README figures."""

    json: Path = flag(Path("assets/tiny/evaluation.json"), help="result of scripts/evaluate_tiny.py", metavar="FILE")
    readme: Path = flag(Path("README.md"), help="file whose table between the two marks is replaced", metavar="FILE")


def with_figures(text: str, values: dict) -> str:
    """Return the text with the table of these figures between the marks."""
    table = f"{BEGIN}\n{markdown_table(values)}\n{END}"
    return re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL)


def main() -> None:
    """Read the flags and rewrite the table."""
    args = parse(sys.argv[1:], FiguresArgs, description="Put the embedded model's figures into the README.")
    if not args.json.exists():
        raise UserError(f"--json {args.json}: no such file; run scripts/evaluate_tiny.py --json {args.json}")
    text = args.readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"--readme {args.readme}: lacks the marks {BEGIN} and {END}")
    write_text(args.readme, with_figures(text, json.loads(args.json.read_text(encoding="utf-8"))))
    say(f"{args.readme}: figures of {args.json}")


if __name__ == "__main__":
    run_main(main)
