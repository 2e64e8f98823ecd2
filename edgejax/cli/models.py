"""``edgejax models``: what is known by name. It looks at caches only, never at the network."""

import argparse
import dataclasses
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax models``."""
    parser.epilog = (
        "Any GGUF file or Hugging Face folder of a supported family can be named by its path instead."
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0."""
    from edgejax.weights.presets import list_presets

    presets = list_presets()
    if args.json:
        print(json.dumps([dataclasses.asdict(preset) for preset in presets]))
        return 0
    rows = [("NAME", "FAMILY", "PARAMETERS", "HERE", "LICENCE", "COMES FROM")]
    rows += [
        (p.name, p.family, f"{p.n_params / 1e6:,.0f} M", "yes" if p.cached else "no", p.licence, p.comes_from)
        for p in presets
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column == 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    return 0
