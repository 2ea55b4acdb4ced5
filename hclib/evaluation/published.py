"""The papers' own numbers: read one printed table, join it with ours, and say what to footnote.

The tables lie in `book/published`, one tidy CSV each; their README gives the columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from hclib.paths import published_dir

_SCALE = {"percent": 0.01}  # to the unit of our metrics; every other unit is left as it is


class PublishedError(ValueError):
    """A published table that does not exist, or a comparison that would not be one to one."""


def load_published(paper: str, table: str | int) -> pd.DataFrame:
    """Return one printed table in tidy form.

    Args:
        paper: "hiercore", "hiercore_readme", "meds", "funad" or "musc".
        table: its number as printed (4, "B.11"), for the README "config" or "datasets".

    Returns:
        The columns of `book/published/README.md`; `value` and `noise_ratio` as floats, text columns as str
        ("" where empty), and `printed`, the value with its printed decimals.

    Raises:
        PublishedError: no such table; those of the paper are named.
    """
    path = published_dir() / _file(paper, table)
    if not path.is_file():
        known = sorted(p.stem for p in published_dir().glob(f"{str(paper).lower()}_*.csv"))
        known = known or sorted({p.stem.rsplit("_table", 1)[0] for p in published_dir().glob("*_table*.csv")})
        raise PublishedError(f"no published table {table!r} of {paper!r} ({path.name}): there are {', '.join(known)}")
    return _read(path)


def compare(
    ours: pd.DataFrame,
    published: pd.DataFrame,
    on: Sequence[str] | Mapping[str, str],
    metric: str,
    *,
    column: str | None = None,
) -> pd.DataFrame:
    """Join our numbers with the paper's: ours | paper | difference.

    Args:
        ours: one row per number, the metrics as columns (what `evaluate` gives), in fractions.
        published: rows of `load_published`, already narrowed to what is compared (data set, setting, method
            ...).
        on: names of the columns to join on, or our name -> the paper's. The paper's `class` is found under
            our `category` without saying so.
        metric: the paper's metric.
        column: our column, if it has another name.

    Returns:
        The columns of `on` under our names, then `ours`, `paper` (percent turned into fractions),
        `difference` (ours - paper), in the order of `ours`. Rows of ours that the paper does not have keep
        NaN.

    Raises:
        PublishedError: a missing column or metric, several published values for one key (with the columns
            that tell them apart), or not a single row in common.
    """
    column = column or metric
    names = dict(on) if isinstance(on, Mapping) else {name: "class" if name == "category" else name for name in on}
    for frame, needed, whose in (
        (ours, [*names, column], "ours"),
        (published, list(names.values()), "published"),
    ):
        if lacking := sorted(set(needed) - set(frame.columns)):
            raise PublishedError(f"the frame {whose} lacks the columns {', '.join(lacking)}")
    paper = published[published["metric"] == metric]
    if paper.empty:
        raise PublishedError(f"metric {metric!r} is not published here; there are {sorted(set(published['metric']))}")
    keys = list(names.values())
    if (twice := paper.duplicated(keys, keep=False)).any():
        apart = [
            c
            for c in paper.columns
            if c not in (*keys, "value", "printed", "note") and paper.loc[twice, c].nunique() > 1
        ]
        first = paper.loc[twice, keys].iloc[0].to_dict()
        raise PublishedError(f"several published values for {first}: narrow {', '.join(apart) or 'the table'} first")
    paper = paper.assign(paper=paper["value"] * paper["unit"].map(_SCALE).fillna(1.0))
    paper = paper[[*keys, "paper"]].rename(columns={theirs: mine for mine, theirs in names.items()})
    both = ours[[*names, column]].rename(columns={column: "ours"}).merge(paper, on=list(names), how="left")
    if both["paper"].isna().all():
        raise PublishedError(f"no row in common on {', '.join(names)}: compare the spelling of their values")
    return both.assign(difference=both["ours"] - both["paper"])


def footnotes(paper: str, table: str | int, dataset: str | None = None) -> list[str]:
    """Return what a page must say under a published table; with `dataset`, only what concerns that data set.

    Raises:
        PublishedError: no such table.
    """
    load_published(paper, table)
    notes = _read_text(published_dir() / "corrections.csv")
    mine = notes[(notes["paper"] == paper.lower()) & (notes["table"].str.upper() == str(table).upper())]
    if dataset is not None:
        mine = mine[mine["dataset"].isin(["", dataset])]
    where = mine["dataset"].where(mine["dataset"] == "", mine["dataset"] + ": ")
    return (where + mine["note"]).tolist()


def _file(paper: str, table: str | int) -> str:
    paper, table = str(paper).lower(), str(table).lower().replace(".", "")
    return (
        f"{paper}_{table}.csv" if paper.endswith("_readme") else f"{paper}_table{'_' * table[:1].isalpha()}{table}.csv"
    )


def _read(path: Path) -> pd.DataFrame:
    frame = _read_text(path)
    frame["printed"] = frame["value"]
    for name in ("value", "noise_ratio"):
        frame[name] = pd.to_numeric(frame[name])
    return frame


def _read_text(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)
