"""What notebooks print around their numbers: the setting, tables beside the paper's, claims and their verdicts."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.evaluation import records

VERDICTS = {True: "holds", False: "does not hold", None: "not decided"}
CLAIMS = "claims"


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
    name: str, statement: str, holds: bool | None, evidence: str, *, profile: str, source: str, page: str, **config: object
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
