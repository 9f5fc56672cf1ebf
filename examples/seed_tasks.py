"""Self-Instruct seed tasks to Alpaca records, for model.train.

    python examples/seed_tasks.py seed_tasks.jsonl alpaca.jsonl

A seed task is a JSON object a line with an `instruction` and `instances`, a list of {"input", "output"}. Each
instance becomes a record of its own; one without an output is left out and counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path


def convert(lines: str) -> Iterator[dict[str, str]]:
    """The records of all tasks, in order. Raises ValueError that names the line and what is wrong there."""
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            task = json.loads(line)
            for instance in task["instances"]:
                record = {
                    "instruction": task["instruction"],
                    "input": instance["input"],
                    "output": instance["output"],
                }
                yield {field: text.strip() for field, text in record.items()}
        except KeyError as error:
            raise ValueError(f"line {number}: the field {error} is missing") from error
        except (ValueError, RecursionError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number}: not a seed task ({error})") from error


def refuse(path: Path, error: OSError | ValueError) -> int:
    """Says what is wrong with the file; the exit status."""
    reason = error.strerror if isinstance(error, OSError) else error
    print(f"error: {path}: {reason}", file=sys.stderr)
    return 2


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tasks", type=Path, help="seed_tasks.jsonl")
    parser.add_argument("records", type=Path, help="the JSONL file to write, a new one")
    options = parser.parse_args()
    try:
        records = list(convert(options.tasks.read_text(encoding="utf-8")))
        answered = [record for record in records if record["output"]]
    except (OSError, ValueError) as error:
        sys.exit(refuse(options.tasks, error))
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in answered)
    try:
        with open(options.records, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        sys.exit(refuse(options.records, error))
    print(
        f"{len(answered)} records in {options.records}; {len(records) - len(answered)} without an output left out"
    )


if __name__ == "__main__":
    main()
