"""``python -m polyattn_sta``: make a mask strategy from a search, or look at one."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from polyattn.errors import PolyattnError
from polyattn_sta.strategy import load_strategy
from polyattn_sta.tuning import tune
from polyattn_sta.windows import counted, words

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "tune":
            _tune(given)
        else:
            _show(given)
    except PolyattnError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m polyattn_sta", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tuning = commands.add_parser("tune", help="choose windows from the records of a search")
    tuning.add_argument("folder", help="where STA_searching wrote (search_output_path)")
    tuning.add_argument("--output", metavar="FILE", help="strategy to write [in the folder]")
    tuning.add_argument(
        "--skip-time-steps",
        type=_count_or_share,
        default=15,
        metavar="N",
        help="first steps with the full window, a count or a share [15]",
    )
    tuning.add_argument(
        "--dense-layers",
        type=_count_or_share,
        default=0,
        metavar="N",
        help="first layers with the full window, a count or a share [0]",
    )
    tuning.add_argument("--cfg", action="store_true", help="average over both guidance branches")
    tuning.add_argument("--max-density", type=float, metavar="D", help="leave out denser windows")
    tuning.add_argument(
        "--overwrite", action="store_true", help="replace a file that tuning did not write itself"
    )
    showing = commands.add_parser("show", help="check a strategy, and say what is in it")
    showing.add_argument("file")
    return parser


def _count_or_share(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a count (3) or a share (0.2) is wanted, found {text!r}"
        ) from None


def _tune(given: argparse.Namespace) -> None:
    tuned = tune(
        given.folder,
        given.output,
        skip_time_steps=given.skip_time_steps,
        dense_layers=given.dense_layers,
        both_branches=given.cfg,
        max_density=given.max_density,
        overwrite=given.overwrite,
    )
    print(
        f"{tuned.path}: from {counted(tuned.runs, 'run')}, first "
        f"{counted(tuned.full_steps, 'step')} full, mean density "
        f"{tuned.density:.3f}, mean squared error {tuned.mean_squared_error:.3g}"
    )


def _show(given: argparse.Namespace) -> None:
    strategy = load_strategy(given.file)
    print(
        f"{strategy.steps} steps, {strategy.layers} layers, {strategy.heads} heads; windows in "
        "tiles:"
    )
    for number, count in Counter(strategy.choices).most_common():
        share = count / len(strategy.choices)
        print(f"  {words(strategy.windows[number]):10} {count:7} {share:6.1%}")


if __name__ == "__main__":
    sys.exit(main())
