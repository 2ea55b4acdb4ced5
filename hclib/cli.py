"""The console script `hclib`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hclib",
        description="Image anomaly detection without a trusted training set: the HierCore book's code.",
        epilog="Data are searched in $HCLIB_DATA (folders separated by ':'); weights and features are cached in "
        "$HCLIB_CACHE (default ~/.cache/hclib).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_detect(commands)
    _add_run(commands)
    _add_sweep(commands)
    _add_data(commands)
    _add_bench(commands)
    return parser


def _add_detect(commands: argparse._SubParsersAction) -> None:
    detect = commands.add_parser(
        "detect",
        help="score a folder of images against a folder of normal ones",
        description="Learn from the images below TRAIN_DIR (all taken as normal, of one or of many unknown products), "
        "score those below TEST_DIR, and write scores.csv, heatmaps/, report.html and the detector to OUT.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    detect.add_argument("train_dir", metavar="TRAIN_DIR", help="normal images, sub-folders included")
    detect.add_argument("test_dir", metavar="TEST_DIR", help="images to decide on, sub-folders included")
    detect.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    detect.add_argument("--method", choices=["hiercore", "patchcore"], default="hiercore", help="grouped or one bank")
    detect.add_argument(
        "--clustering",
        choices=["hdbscan", "finch"],
        default="hdbscan",
        help="how products are told apart; finch is the paper's",
    )
    detect.add_argument("--encoder", default="dinov2_vits14", help="dinov2_vits14, efficientnet_lite0 or any timm name")
    detect.add_argument("--image-size", type=int, default=224, help="side in pixels that images are resized to")
    detect.add_argument("--ratio", type=float, default=0.1, help="share of normal patches kept in memory")
    detect.add_argument("--holdout", type=float, default=0.2, help="share of normal images that sets the thresholds")
    detect.add_argument(
        "--quantile", type=float, help="threshold at this quantile of held-out normal scores; else median + 4.5 MAD"
    )
    detect.add_argument("--seed", type=int, default=0, help="seeds hold-out, clustering and coresets")
    detect.add_argument("--device", default="auto", help="auto, cpu or cuda")
    detect.add_argument("--report-images", type=int, default=200, help="images shown in report.html")
    detect.add_argument("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    detect.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run",
        help="execute notebooks of a profile",
        description="Execute the notebooks of a profile into book/results/PROFILE; what is current is left. With -p "
        "the outputs go to build/rerun/PROFILE and the committed results stay.",
    )
    run.add_argument("--profile", default="demo", choices=["demo", "real", "paper"], help="default: demo")
    run.add_argument("--only", action="append", metavar="NAME", help="notebook name or number; may be repeated")
    run.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        metavar=("NAME", "VALUE"),
        default=[],
        help="override a notebook parameter; VALUE is JSON, or text where it is not",
    )
    run.add_argument("--force", action="store_true", help="also run what is current")
    run.add_argument("--list", action="store_true", help="list the notebooks and their parameters, run nothing")


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="compute the experiments of a grid",
        description="Compute what is missing of the grid GRID.yml on a local Dask cluster and store it as Records. "
        "Starting it again resumes. The format is in hclib/book/sweep.py; grids lie in notebooks/sweeps.",
    )
    sweep.add_argument("grid", metavar="GRID.yml", help="the grid")
    sweep.add_argument("--workers", type=int, default=1, help="worker processes; 0: in this process (default: 1)")
    sweep.add_argument("--limit", type=int, help="compute at most so many experiments")


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="list, fetch and check data sets")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="data sets, and where they were found")
    get = actions.add_parser("get", help="fetch and verify data sets or encoder weights")
    get.add_argument("names", nargs="+", metavar="NAME", help="data sets, or 'weights' for the two offline encoders")
    get.add_argument("--root", help="folder to put data in (default: the first of $HCLIB_DATA, else the cache)")
    for action, text in (
        ("check", "compare image counts with the published ones (HierCore, Table 2)"),
        ("audit", "open every file: unreadable images, wrong masks, duplicates, leaks"),
    ):
        sub = actions.add_parser(action, help=text)
        sub.add_argument("name", help="a data set name, a folder in MVTec layout, or an index .csv")
        sub.add_argument("--root", help="folder of the data set")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the kernels against the plain way, here",
        description="Time coreset selection, nearest-neighbour search and mutual scoring on random points of the given "
        "size, each beside the plain way in the same run, and check that both give the same result.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument("--points", type=int, default=20_000, help="patches")
    bench.add_argument("--channels", type=int, default=384, help="width of a patch")
    bench.add_argument("--ratio", type=float, default=0.1, help="coreset ratio")
    bench.add_argument("--device", default="auto", help="auto, cpu or cuda")
    bench.add_argument("--seed", type=int, default=0, help="seeds the points")


def _bench(args: argparse.Namespace) -> int:
    from hclib.book.bench import bench

    print(bench(args.points, args.channels, args.ratio, args.device, args.seed).to_string(index=False))
    return 0


def _detect(args: argparse.Namespace) -> int:
    from hclib.detect import detect

    options = {k: v for k, v in vars(args).items() if k not in ("command", "train_dir", "test_dir", "out")}
    table = detect(args.train_dir, args.test_dir, args.out, **options)
    found = (table["decision"] == "anomalous").sum()
    print(f"{found} of {len(table)} images anomalous. Open {args.out}/report.html")
    return 0


def _run(args: argparse.Namespace) -> int:
    from hclib.book import run

    if args.list:
        for name, path in run.notebook_sources().items():
            print(name, run.declared_parameters(path))
        return 0
    written = run.execute(args.profile, args.only, {k: _value(v) for k, v in args.parameters}, force=args.force)
    if args.parameters:
        print("written:", *written, sep="\n  ")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from hclib.book import sweep

    done, total = sweep.run(args.grid, workers=args.workers, limit=args.limit)
    print(f"{done} of {total} experiments have Records")
    return 0


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _data(args: argparse.Namespace) -> int:
    from hclib.data import datasets, download

    if args.action == "list":
        print(datasets.list_datasets().to_string(index=False))
        return 0
    if args.action == "get":
        for name in args.names:
            if name == "weights":
                from hclib.kernels.encoders import OFFLINE_ENCODERS, load_encoder

                for encoder in OFFLINE_ENCODERS:
                    print(f"{encoder}: weights {load_encoder(encoder, device='cpu').weights_hash[:12]}, verified")
            elif name == "demo":
                print(f"demo: {len(datasets.load_index('demo'))} images rendered")
            else:
                print(f"{name}: in {download.get(name, args.root)}")
        return 0
    report = (
        datasets.check(args.name, args.root)
        if args.action == "check"
        else datasets.audit(datasets.load_index(args.name, args.root, allow_contaminated=True))
    )
    bad = report[report["problem"] != ""] if "problem" in report else report
    print(report.to_string(index=False) if len(report) else "no problem found")
    return 1 if len(bad) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script; returns the exit status, 2 for input that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        return {"detect": _detect, "run": _run, "sweep": _sweep, "data": _data, "bench": _bench}[args.command](args)
    except (ValueError, FileNotFoundError, FileExistsError, RuntimeError) as error:
        print(f"hclib {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
