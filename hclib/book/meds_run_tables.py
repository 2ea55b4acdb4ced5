"""Tables and verdicts of MeDS's trainings: noise sweep, ablation, training length, review, selection."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.book.meds_runs import drawn_set
from hclib.book.meds_tables import percent
from hclib.evaluation.published import load_published

STUDENTS = {"dinomaly": "Dinomaly", "inpformer": "INP-Former", "hvq": "HVQ"}
NAMES = {"FunAD": "FUN-AD", "BootstrappedMemory": "memory ensemble"}
COLUMNS = {
    ("image", "auroc"): "I-AUROC",
    ("image", "ap"): "I-AP",
    ("pixel", "aupro"): "P-AUPRO",
    ("pixel", "ap"): "P-AP",
}
"""The four metrics of MeDS's tables, in their order."""
SHORT = 250  # steps below which a student has not had the time to remember single images
LITTLE = 2.0  # points of image AUROC that count as little; the paper's MeDS loses 0.3 or less


def setting(base: dict, student: dict, meds: dict, seeds: list[int], *, thresholds: str, paper: str) -> Markdown:
    """Return the box that opens a page about trained students.

    Args:
        base: what all runs share: data, encoder, sizes and the draw.
        student: options of `StudentDetector`.
        meds: further options of `MeDS`.
        seeds: of the noise and the training.
        thresholds: how thresholds were chosen.
        paper: data, encoder and sizes of the paper.
    """
    words = [", ".join(f"{key} {value}" for key, value in part.items()) for part in (student, meds)]
    return report.setting(
        data=f"{base['dataset']}, the part that is used: {report.describe(drawn_set(base).index)}; one model for all "
        "categories",
        encoder=f"{base['encoder']} at {base['image_size']} px, frozen; the student rebuilds its layers",
        training="normal images and injected anomalies, unmarked; injected images stay in the test set (overlap). MeDS "
        f"and its memory know the product of each training image, no other method does. Student: {words[0]}; MeDS: "
        f"{words[1]}; {len(seeds)} seed{'s' * (len(seeds) > 1)}",
        thresholds=thresholds,
        paper=paper,
    )


def named(results: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with `name`, the method as the paper's tables call it, and `noise`, the ratio asked for."""
    student = results["options.student"].map(STUDENTS) if "options.student" in results else pd.Series("", results.index)
    name = results["method"].replace(NAMES)
    name = name.mask(results["method"] == "StudentDetector", student)
    name = name.mask(results["method"] == "MeDS", student + " + MeDS")
    return results.assign(name=name, noise=results["noise.ratio"])


def measured(results: pd.DataFrame, category: str = "mean") -> pd.DataFrame:
    """Return one row per name, noise, seed and metric: `name, noise, seed, metric, value` in percent."""
    rows = named(results).query("category == @category and test_set == 'all' and level in ['image', 'pixel']")
    parts = [
        rows[rows["level"] == level].assign(metric=label, value=rows[metric] * 100)
        for (level, metric), label in COLUMNS.items()
    ]
    return pd.concat(parts, ignore_index=True)[["name", "noise", "seed", "metric", "value"]]


def noise_table(results: pd.DataFrame, metrics: tuple[str, ...]) -> pd.DataFrame:
    """Return Tables 1 to 3: a row per metric and method, a column per noise ratio, mean ± deviation over seeds.

    Args:
        results: Records of `meds_run`.
        metrics: labels of `COLUMNS`.
    """
    rows = measured(results)
    text = report.spread(rows, ["metric", "name", "noise"], "value", digits=1).unstack("noise")
    names = list(dict.fromkeys(rows["name"]))
    text = text.reindex([(metric, name) for metric in metrics for name in names])
    return text.rename(columns=percent).rename_axis(index=["percent", "method"], columns=None)


def realised_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return what the training sets really held: counts and both ratios, by the ratio asked for."""
    rows = results.drop_duplicates("noise.ratio").set_index("noise.ratio").sort_index()
    table = rows[["train_normal", "train_anomalous", "realised_per_normal", "realised_of_total"]].copy()
    table[["realised_per_normal", "realised_of_total"]] *= 100
    names = ["normal images", "injected", "anomalies / normals in %", "anomalies / all in %"]
    return table.set_axis(names, axis=1).rename(index=percent).rename_axis("asked for").round(1)


def beside_paper(results: pd.DataFrame, table: str = "1", metrics: tuple[str, ...] = ("I-AUROC",)) -> pd.DataFrame:
    """Return ours (mean over seeds), the paper's and the difference by noise ratio, for the methods that both have.

    Args:
        results: Records of `meds_run`.
        table: of the MeDS paper: "1" MVTec AD (0, 10, 20, 40 %), "3" Real-IAD.
        metrics: labels of `COLUMNS`.
    """
    paper = load_published("meds", table).assign(noise=lambda rows: rows["noise_ratio"] / 100)
    keys = {label: key for key, label in COLUMNS.items()}
    ours = measured(results).groupby(["name", "metric", "noise"], sort=False)["value"].mean()
    rows = []
    for (name, metric, noise), value in ours.items():
        level, column = keys[metric]
        theirs = paper.query("method == @name and level == @level and metric == @column and noise == @noise")["value"]
        if metric in metrics and len(theirs):
            number = float(theirs.iloc[0])
            row = {"metric": metric, "method": name, "noise": percent(noise)}
            rows.append(row | {"ours": value, "paper": number, "difference": value - number})
    found = pd.DataFrame(rows).set_index(["metric", "method", "noise"]).rename_axis(columns="percent").stack()
    order = list(dict.fromkeys(found.index.get_level_values("noise")))
    wide = found.unstack("noise")[order].rename_axis(columns=None).round(1)
    kinds = ("ours", "paper", "difference")
    return wide.reindex([(*key, kind) for key in dict.fromkeys(key[:2] for key in wide.index) for kind in kinds])


def losses(results: pd.DataFrame) -> pd.DataFrame:
    """Return what each method has on clean data and loses up to the largest ratio, in points, per metric."""
    means = measured(results).groupby(["name", "metric", "noise"], sort=False)["value"].mean().unstack("noise")
    low, high = means.columns.min(), means.columns.max()
    table = pd.DataFrame({"clean": means[low], "lost": means[low] - means[high]})
    table = table.unstack("metric").swaplevel(axis=1)
    return table.reindex(columns=list(COLUMNS.values()), level=0).rename_axis(None)


def loss_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return `losses` for reading, methods in the order of the results."""
    return (
        losses(results).reindex(list(dict.fromkeys(named(results)["name"]))).rename_axis(columns=[None, None]).round(1)
    )


def noise_verdicts(results: pd.DataFrame, config: dict, page: str, student: str = "Dinomaly") -> list[Markdown]:
    """Return the three claims of Tables 1 to 3 about one student: it breaks, MeDS does not, and costs little.

    Args:
        results: Records of `meds_run`, the student's alone and with MeDS among them.
        config: what identifies the test.
        page: of the claim.
        student: name of the student.
    """
    table, both = losses(results), f"{student} + MeDS"
    top, seeds = percent(results["noise.ratio"].max()), report.seeds(results)
    lost = {name: {m: table.loc[name, (m, "lost")] for m in COLUMNS.values()} for name in (student, both)}
    words = {name: ", ".join(f"{m} {v:+.1f}" for m, v in values.items()) for name, values in lost.items()}
    clean = {m: table.loc[both, (m, "clean")] - table.loc[student, (m, "clean")] for m in COLUMNS.values()}
    breaks, little = lost[student]["I-AUROC"] >= 5, lost[both]["I-AUROC"] <= LITTLE
    short = results["options.steps"].max() < SHORT
    judged = {
        f"{student.lower()}-breaks": (
            f"A student trained alone ({student}-style) loses much when anomalies enter its training set.",
            None if short and not breaks else bool(breaks),
            f"Lost from 0 to {top}, points: {words[student]} ({seeds}). Much: 5 points of image AUROC; the paper's "
            f"loses 12.3. Trained for {results['options.steps'].max():g} steps.",
        ),
        f"{student.lower()}-meds-holds": (
            f"With MeDS the {student}-style student loses little when anomalies enter its training set.",
            None if little and not breaks else bool(little),
            f"Lost from 0 to {top}, points: {words[both]} ({seeds}); the student alone: {words[student]}. Little: "
            f"{LITTLE:g} points of image AUROC; not decided where the student alone does not break.",
        ),
        f"{student.lower()}-meds-clean": (
            f"On clean data MeDS costs the {student}-style student little.",
            bool(clean["I-AUROC"] >= -1),
            "MeDS minus student alone at 0 %, points: "
            + ", ".join(f"{m} {v:+.1f}" for m, v in clean.items())
            + f" ({seeds}). Little: 1 point of image AUROC; in the paper it is 0.3.",
        ),
    }
    return [
        report.claim(name, statement, holds, evidence, source="MeDS, Tables 1 to 3", page=page, **config)
        for name, (statement, holds, evidence) in judged.items()
    ]


def seen_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return image AUROC in percent on anomalies that were in the training set too, and on the others.

    Args:
        results: Records of `meds_run`; means over seeds and the categories that have such anomalies.
    """
    rows = named(results).query("category == 'mean' and level == 'image' and test_set in ['seen', 'unseen']")
    table = rows.groupby(["name", "test_set", "noise"], sort=False)["auroc"].mean().mul(100).unstack("noise")
    table = table.rename({"seen": "in training too", "unseen": "not in training"}, level=1)
    table = table.rename(columns=percent).rename_axis(index=["method", "test anomalies"], columns=None)
    return table.round(1).astype(object).fillna("")


def category_table(results: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Return image AUROC in percent per category, columns method x noise (Tables 6 to 29 in short)."""
    rows = named(results).query("level == 'image' and test_set == 'all' and name in @names")
    table = rows.groupby(["category", "name", "noise"], sort=False)["auroc"].mean().mul(100).unstack(["name", "noise"])
    order = [(name, noise) for name in names for noise in sorted(rows["noise"].unique())]
    table = table.reindex(columns=order)
    table.columns = pd.MultiIndex.from_tuples([(name, percent(noise)) for name, noise in order])
    return table.rename_axis("image AUROC in %").round(1)


def by_length(results: pd.DataFrame) -> pd.DataFrame:
    """Return `measured` rows with `steps`, the length of training."""
    parts = [measured(rows).assign(steps=int(steps)) for steps, rows in results.groupby("options.steps")]
    return pd.concat(parts, ignore_index=True)


def length_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return image AUROC and pixel AP in percent by method and noise (rows) and steps of training (columns).

    Args:
        results: Records of `meds_run` with several `options.steps`.
    """
    rows = by_length(results).query("metric in ['I-AUROC', 'P-AP']")
    table = rows.groupby(["metric", "name", "noise", "steps"])["value"].mean().unstack("steps")
    table = table.rename(index=percent, level="noise").rename_axis(index=["percent", "method", "noise"])
    return table.round(1).astype(object).fillna("")


def length_verdict(results: pd.DataFrame, config: dict, *, source: str, page: str) -> Markdown:
    """Return whether longer training harms the noisy student alone by more than it harms it with MeDS.

    Args:
        results: Records of `meds_run` with several `options.steps`; a claim about the noisy runs.
        config: what identifies the test.
        source: paper and place.
        page: of the claim.
    """
    noisy = results[results["noise.ratio"] == results["noise.ratio"].max()]
    means = by_length(noisy).query("metric == 'I-AUROC'").groupby(["name", "steps"])["value"].mean().unstack("name")
    alone, both = (means[name].dropna() for name in ("Dinomaly", "Dinomaly + MeDS"))
    lost = {name: row.max() - row.iloc[-1] for name, row in (("alone", alone), ("both", both))}
    words = [
        f"{name}: " + ", ".join(f"{value:.1f} at {steps}" for steps, value in row.items())
        for name, row in (("student alone", alone), ("with MeDS", both))
    ]
    return report.claim(
        "long-training-breaks-the-student",
        "The longer a student trains on a contaminated set the more it loses, unless MeDS selects its images.",
        None if alone.index.max() < SHORT else bool(lost["alone"] >= 3 and lost["both"] < lost["alone"] / 2),
        f"Image AUROC in % by steps, {'; '.join(words)}. From the best length to the last the student alone loses "
        f"{lost['alone']:.1f} points, with MeDS {lost['both']:.1f}. Held to be so from 3 points, and less than half of "
        "it with MeDS.",
        source=source,
        page=page,
        **config,
    )
