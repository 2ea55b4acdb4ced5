"""What notebooks print around their numbers: the setting, tables beside the paper's, claims and their verdicts."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.evaluation import records

VERDICTS = {True: "holds", False: "does not hold", None: "not decided"}
CLAIMS = "claims"


def image_counts(index: pd.DataFrame) -> pd.DataFrame:
    """Return image counts per category, with the number of defect types and of masks for anomalous test images."""
    test = index["split"] == "test"
    anomalous = test & (index["label"] == 1)
    columns = {
        "train normal": ~test & (index["label"] == 0),
        "test normal": test & (index["label"] == 0),
        "test anomalous": anomalous,
        "masks": anomalous & (index["mask_path"] != ""),
    }
    table = pd.DataFrame({name: rows.groupby(index["category"]).sum() for name, rows in columns.items()})
    table.insert(3, "defect types", index[anomalous].groupby("category")["defect"].nunique())
    return table


def describe(index: pd.DataFrame) -> str:
    """Return a data set's size in words, for the box at the top of a page."""
    counts = image_counts(index)
    total = counts[["train normal", "test normal", "test anomalous"]].sum()
    return (
        f"{len(counts)} categories ({', '.join(counts.index)}), {total.iloc[0]} normal training images, "
        f"{total.iloc[1]} normal and {total.iloc[2]} anomalous test images"
    )


def setting(*, data: str, encoder: str, training: str, thresholds: str, paper: str) -> Markdown:
    """Return the box that opens a table page: what was measured here, and where that differs from the paper.

    Args:
        data: data set, categories and image counts.
        encoder: encoder, weights and resolution.
        training: which labels training saw.
        thresholds: how thresholds were chosen.
        paper: data, encoder and resolution of the paper's table.
    """
    lines = {
        "Data here": data,
        "Encoder here": encoder,
        "Training saw": training,
        "Thresholds": thresholds,
        "The paper used": paper,
    }
    return Markdown("\n".join(f"> **{name}.** {text}  " for name, text in lines.items()))


def claim(
    name: str,
    statement: str,
    holds: bool | None,
    evidence: str,
    *,
    profile: str,
    source: str,
    page: str,
    **config: object,
) -> Markdown:
    """Record a tested claim of a paper and return its verdict as one sentence.

    Args:
        name: short unique name of the claim.
        statement: the claim, in our words.
        holds: the verdict, computed by the caller; None where the data here cannot decide.
        evidence: the numbers behind it.
        profile: profile of the run, part of the Record's identity.
        source: paper and place, such as "HierCore, Table 4".
        page: name of the notebook that tests it.
        config: what else identifies the test (data set, encoder, seeds).
    """
    row = {"statement": statement, "verdict": VERDICTS[holds], "evidence": evidence, "source": source, "page": page}
    records.cached(CLAIMS, profile, {"claim": name, **config}, lambda: [row], refresh=True)
    return Markdown(f"**{VERDICTS[holds].capitalize()}.** {statement} ({source}). {evidence}")


def claims(profiles: list[str]) -> pd.DataFrame:
    """Return every recorded claim of the given profiles, one row each, in the order of their pages."""
    frames = [records.load(CLAIMS, profile).assign(profile=profile) for profile in profiles]
    frame = pd.concat([f for f in frames if len(f)] or [pd.DataFrame()], ignore_index=True)
    return frame.sort_values(["page", "claim", "profile"], ignore_index=True) if len(frame) else frame


def spread(frame: pd.DataFrame, by: list[str], value: str, *, scale: float = 1.0, digits: int = 3) -> pd.Series:
    """Return `mean ± sample standard deviation` over seeds as text; a single seed has no spread and says so."""

    def text(values: pd.Series) -> str:
        values = values.dropna() * scale
        if values.empty:
            return "-"
        if len(values) == 1:
            return f"{values.iloc[0]:.{digits}f}"
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"

    return frame.groupby(by, sort=False)[value].agg(text)


def seeds(frame: pd.DataFrame) -> str:
    """Return how many seeds the rows of a frame come from, in words."""
    count = frame["seed"].nunique()
    return f"{count} seed" + "s" * (count != 1)


def _page_link(row: pd.Series) -> str:
    return f"../{row['profile']}/{row['page']}.ipynb"


def _where(row: pd.Series) -> str:
    """Return the data of a claim, and encoder and resolution where it has them."""
    encoder = [] if row["encoder"] == "none" else [row["encoder"]]
    pixels = [] if pd.isna(row["image_size"]) else [f"{row['image_size']:g} px"]
    return ", ".join([row["dataset"], *encoder, *pixels])


def claims_at_a_glance(claims: pd.DataFrame) -> Markdown:
    """Return a table of verdicts: a row per claim, a column per profile; each verdict with its data and encoder."""
    if claims.empty:
        return Markdown("*No claim has been tested yet.*")
    profiles = list(dict.fromkeys(claims["profile"]))
    lines = ["| claim | " + " | ".join(profiles) + " |", "|---" * (len(profiles) + 1) + "|"]
    for statement, rows in claims.groupby("statement", sort=False):
        cells = []
        for profile in profiles:
            mine = rows[rows["profile"] == profile]
            where = [_where(row) for _, row in mine.iterrows()]
            cells.append("; ".join(f"**{v}** ({w})" for v, w in zip(mine["verdict"], where, strict=True)))
        lines.append(f"| {statement} | " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def claims_in_full(claims: pd.DataFrame) -> Markdown:
    """Return every claim with its evidence, its source and a link to its page."""
    lines = []
    for statement, rows in claims.groupby("statement", sort=False):
        lines += [f"**{statement}** ({rows['source'].iloc[0]})", ""]
        for _, row in rows.iterrows():
            lines.append(f"- *{row['profile']}*: **{row['verdict']}**. {row['evidence']} [Page]({_page_link(row)})")
        lines.append("")
    return Markdown("\n".join(lines))


def versions() -> pd.DataFrame:
    """Return the versions of what the numbers and pages depend on."""
    from importlib.metadata import version

    names = ["torch", "timm", "faiss-cpu", "finch-clust", "numpy", "scikit-learn", "scikit-image", "pandas"]
    names += ["jupyter-book", "sphinx", "myst-nb", "papermill", "jupytext", "nbval"]
    return pd.DataFrame([(name, version(name)) for name in names], columns=["package", "version"])


def record_status(profiles: list[str]) -> pd.DataFrame:
    """Return one row per experiment and profile: configurations, data, encoders, seconds, and how many are current."""
    rows = []
    for profile in profiles:
        for path in sorted((records.records_dir() / profile).glob("*.jsonl")):
            if path.stem == CLAIMS:
                continue
            frame = records.load(path.stem, profile)
            configs = frame.drop_duplicates("config_hash")
            rows.append(
                {
                    "profile": profile,
                    "experiment": path.stem,
                    "configurations": len(configs),
                    "rows": len(frame),
                    "data": ", ".join(sorted(frame["dataset"].unique())),
                    "encoders": ", ".join(sorted(frame["encoder"].unique())),
                    "minutes": round(configs["seconds"].sum() / 60, 1),
                    "code unchanged": f"{len(configs) - len(records.stale(configs))} of {len(configs)}",
                }
            )
    return pd.DataFrame(rows)


def counts_beside_paper(indices: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return our image counts beside HierCore's Table 2 for the categories that both have: ours, paper, difference.

    Args:
        indices: data set name -> index frame; `realmix` stands for MVTec AD where a category has its name.
    """
    from hclib.evaluation.published import load_published

    names = {"mvtec": "MVTec AD", "visa": "VisA", "mpdd": "MPDD", "btad": "BTAD", "realmix": "MVTec AD"}
    kinds = {
        "train normal": "train_normal_count",
        "test normal": "test_normal_count",
        "test anomalous": "test_abnormal_count",
    }
    paper = load_published("hiercore", "2")
    rows = []
    for name, index in indices.items():
        for category, ours in image_counts(index).iterrows():
            theirs = paper[(paper["dataset"] == names.get(name)) & (paper["class"] == category)].set_index("metric")[
                "value"
            ]
            for kind, metric in kinds.items() if len(theirs) else ():
                value = int(float(theirs[metric]))
                rows.append((name, category, kind, int(ours[kind]), value, int(ours[kind]) - value))
    columns = ["data set", "category", "images", "ours", "paper", "difference"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[:3])
