"""Tables and verdicts of MeDS's inner life: ablation, options, review of the training set, selection."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown

from hclib.book import report
from hclib.book.meds_run_tables import COLUMNS, measured, named
from hclib.book.meds_runs import default
from hclib.book.meds_tables import percent
from hclib.evaluation.published import load_published

STAGES = {"own": "student alone", "memory": "MeDS, memory", "distilled": "MeDS, distilled", "final": "MeDS, final"}


def labelled(results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return `measured` rows of several settings as one frame, `name` being the key of each."""
    return pd.concat([measured(rows).assign(name=name) for name, rows in results.items()], ignore_index=True)


def ablation_table(results: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the layout of Tables 4 and 5: a row per setting, columns metric x noise, percent, mean over seeds.

    Args:
        results: description -> Records of `meds_run`.
    """
    rows = labelled(results)
    table = rows.groupby(["name", "metric", "noise"], sort=False)["value"].mean().unstack(["metric", "noise"])
    order = [(metric, noise) for metric in COLUMNS.values() for noise in sorted(rows["noise"].unique())]
    table = table.reindex(columns=order).reindex(list(results))
    table.columns = pd.MultiIndex.from_tuples([(metric, percent(noise)) for metric, noise in order])
    return table.rename_axis("percent").round(1).astype(object).fillna("")


def ablation_beside_paper(results: dict[str, pd.DataFrame], table: str = "4", metric: str = "I-AUROC") -> pd.DataFrame:
    """Return ours, the paper's and the difference for one metric, by setting and noise."""
    level, column = {label: key for key, label in COLUMNS.items()}[metric]
    paper = load_published("meds", table).query("level == @level and metric == @column")
    paper = paper.assign(
        noise=paper["noise_ratio"] / 100, name=paper["param_value"].replace("Memory only", "Memory ensemble")
    )
    ours = labelled(results).query("metric == @metric").groupby(["name", "noise"], as_index=False)["value"].mean()
    both = ours.merge(paper[["name", "noise", "value"]], on=["name", "noise"], suffixes=("", "_paper"))
    both = both.rename(columns={"value": "ours", "value_paper": "paper"})
    both["difference"] = both["ours"] - both["paper"]
    both["noise"] = both["noise"].map(percent)
    wide = both.pivot(index="name", columns="noise", values=["ours", "paper", "difference"]).swaplevel(axis=1)
    order = [(noise, kind) for noise in both["noise"].unique() for kind in ("ours", "paper", "difference")]
    return wide[order].reindex(list(results)).rename_axis(index=f"{metric} in %", columns=[None, None]).round(1)


def ablation_verdicts(results: dict[str, pd.DataFrame], config: dict, page: str) -> list[Markdown]:
    """Return the paper's claims about its parts at the largest noise: each step helps, and both choices are needed."""
    rows = labelled(results)
    top = rows["noise"].max()
    at = rows[rows["noise"] == top].groupby(["name", "metric"])["value"].mean().unstack("metric")
    steps = ["Baseline", "Memory ensemble", "Distilled model", "MeDS"]
    rest = ["Fine-tuned with memory", "Random init fine-tune"]

    def said(names: list[str], metric: str) -> str:
        return ", ".join(f"{name} {at.loc[name, metric]:.1f}" for name in names)

    claims = {
        "every-stage-helps": (
            "Under much noise every stage adds image AUROC: memory over the plain student, distillation over the "
            "memory, selection over distillation.",
            bool((at.loc[steps, "I-AUROC"].diff().dropna() > 0).all()),
            f"Image AUROC at {percent(top)}: {said(steps, 'I-AUROC')}.",
        ),
        "selection-refines-pixels": (
            "Training on the selected images adds most in pixel AP.",
            bool(at.loc["MeDS", "P-AP"] - at.loc["Distilled model", "P-AP"] > 2),
            f"Pixel AP at {percent(top)}: {said(steps, 'P-AP')}. Held to be so from 2 points over the distilled model.",
        ),
        "distilled-start-and-criterion": (
            "Starting from the distilled student and selecting by it is better than starting at random or selecting "
            "by the memory.",
            bool((at.loc[rest, "I-AUROC"] < at.loc["MeDS", "I-AUROC"]).all()),
            f"Image AUROC at {percent(top)}: {said(['MeDS', *rest], 'I-AUROC')}; pixel AP: "
            f"{said(['MeDS', *rest], 'P-AP')}.",
        ),
    }
    return [
        report.claim(name, statement, holds, evidence, source="MeDS, Tables 4 and 5", page=page, **config)
        for name, (statement, holds, evidence) in claims.items()
    ]


def option_rows(results: pd.DataFrame, option: str, kind: str) -> pd.DataFrame:
    """Return `value, kind` and the four metrics in percent for runs that differ in one option.

    Args:
        results: Records of `meds_run`; a run without the option has its default.
        option: its name.
        kind: which model they measure: "memory", "distilled" or "final".
    """
    column, found = f"options.{option}", []
    values = results[column] if column in results else pd.Series(float("nan"), results.index)
    for value, part in results.groupby(values.fillna(default(option)) if values.isna().any() else values):
        means = measured(part).groupby("metric")["value"].mean()
        found.append({"value": value, "kind": kind, **means})
    return pd.DataFrame(found)


def option_table(panels: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the numbers behind `option_panels`, a row per option, model and value."""
    rows = pd.concat([rows.assign(option=title) for title, rows in panels.items()], ignore_index=True)
    rows = rows.assign(value=rows["value"].map("{:g}".format))
    return rows.set_index(["option", "kind", "value"])[list(COLUMNS.values())].round(1)


def spread_verdict(rows: pd.DataFrame, name: str, statement: str, limit: float, config: dict, **place: str) -> Markdown:
    """Return whether the final model's image AUROC varies by less than `limit` points over the values of an option.

    Args:
        rows: from `option_rows`; those of kind "final" count.
        name: of the claim.
        statement: the claim.
        limit: points.
        config: what identifies the test.
        place: `source` and `page`.
    """
    final = rows[rows["kind"] == "final"].set_index("value")
    ranges = final[list(COLUMNS.values())].max() - final[list(COLUMNS.values())].min()
    evidence = ", ".join(f"{value:g}: {auroc:.1f}" for value, auroc in final["I-AUROC"].items())
    evidence = f"Image AUROC of the final model by value: {evidence}; largest differences: " + ", ".join(
        f"{metric} {value:.1f}" for metric, value in ranges.items()
    )
    return report.claim(name, statement, bool(ranges["I-AUROC"] <= limit), f"{evidence} points.", **config, **place)


def review_rows(results: pd.DataFrame, stages: tuple[str, ...] = ("own", "distilled", "final")) -> pd.DataFrame:
    """Return how well training images are ranked for review: `noise, seed, name, category, auprc, depth, least_depth`.

    Args:
        results: Records of `meds_run`, a student's alone and with MeDS.
        stages: whose scores.
    """
    rows = named(results).query("level == 'review' and stage in @stages and category not in ['mean', 'pooled']")
    rows = rows[rows["method"].isin(["MeDS", "StudentDetector"])]
    rows = rows.assign(name=rows["stage"].map(STAGES))
    order = {STAGES[stage]: place for place, stage in enumerate(stages)}
    rows = rows.sort_values("name", key=lambda names: names.map(order), kind="stable")
    return rows[["noise", "seed", "name", "category", "auprc", "depth", "least_depth"]].reset_index(drop=True)


def review_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the layout of Table 30's last rows: mean ± deviation over categories (and seeds), in percent.

    Args:
        rows: from `review_rows`.
    """
    long = rows.melt(["noise", "name", "category"], ["auprc", "depth"], "metric")
    long["metric"] = long["metric"].map({"auprc": "AUPRC", "depth": "inspection depth"})
    text = report.spread(long, ["metric", "name", "noise"], "value", scale=100, digits=1).unstack("noise")
    names = list(dict.fromkeys(rows["name"]))
    text = text.reindex([(metric, name) for metric in ("AUPRC", "inspection depth") for name in names])
    least = rows.groupby("noise")["least_depth"].mean().mul(100).map("{:.1f}".format)
    text.loc[("inspection depth", "least possible"), :] = least
    return text.rename(columns=percent).rename_axis(index=["percent", "ranked by"], columns=None)


def review_beside_paper(rows: pd.DataFrame) -> pd.DataFrame:
    """Return ours, the paper's (Table 30, Dinomaly on MVTec AD) and the difference, means over categories."""
    paper = load_published("meds", "30").query("`class` == 'mean'")
    names = {"Dinomaly": STAGES["own"], "Dinomaly + MeDS": STAGES["final"]}
    paper = paper.assign(name=paper["method"].map(names), noise=paper["noise_ratio"] / 100)
    paper["metric"] = paper["metric"].replace({"inspection_depth": "depth"})
    ours = rows.groupby(["name", "noise"])[["auprc", "depth"]].mean().mul(100).stack().rename("ours")
    ours.index.names = ["name", "noise", "metric"]
    both = ours.reset_index().merge(paper[["name", "noise", "metric", "value"]], on=["name", "noise", "metric"])
    both = both.rename(columns={"value": "paper"})
    both["difference"] = both["ours"] - both["paper"]
    both["noise"] = both["noise"].map(percent)
    both["metric"] = both["metric"].map({"auprc": "AUPRC", "depth": "inspection depth"})
    both = both.sort_values(["metric", "name", "noise"], ascending=[True, False, True])
    return both.set_index(["metric", "name", "noise"]).round(1)


def review_verdicts(rows: pd.DataFrame, config: dict, page: str) -> list[Markdown]:
    """Return whether MeDS's ranking beats the plain student's at every noise ratio, by AUPRC and by depth."""
    means = rows.groupby(["name", "noise"])[["auprc", "depth"]].mean().mul(100)
    plain, final = means.loc[STAGES["own"]], means.loc[STAGES["final"]]
    found = []
    for column, title, better in (("auprc", "AUPRC", 1), ("depth", "inspection depth", -1)):
        gain = (final[column] - plain[column]) * better
        words = ", ".join(
            f"{percent(noise)}: {plain.loc[noise, column]:.1f} alone, {final.loc[noise, column]:.1f} with MeDS"
            for noise in plain.index
        )
        statement = f"MeDS ranks a contaminated training set better for a reviewer than the plain student: {title}."
        place = {"source": "MeDS, Table 30 and Figure 7", "page": page}
        evidence = f"Means over categories in %, {words}."
        found.append(report.claim(f"review-{column}", statement, bool((gain > 0).all()), evidence, **place, **config))
    return found


def selection_rows(results: pd.DataFrame) -> pd.DataFrame:
    """Return stage 3's passes: `noise, seed, step, alpha, k, kept, precision, recall`, and `start`, the normal share.

    Args:
        results: Records of `meds_run` with MeDS.
    """
    found = []
    for _, run in results[results["history_stage"].notna()].iterrows():
        total = run["train_normal"] + run["train_anomalous"]
        keys = ("step", "alpha", "k", "precision", "recall")
        rows = pd.DataFrame({key: run[f"history_{key}"] for key in keys} | {"stage": run["history_stage"]})
        rows = rows.query("stage == 'select'").drop(columns="stage").astype(float)
        rows["kept"] = [
            (recall * run["train_normal"] / precision) / total if precision else 0.0
            for precision, recall in zip(rows["precision"], rows["recall"], strict=True)
        ]
        found.append(rows.assign(noise=run["noise.ratio"], seed=run["seed"], start=run["train_normal"] / total))
    return pd.concat(found, ignore_index=True)


def selection_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the selection at the first choice, half-way and at the end, per noise ratio, in percent."""
    places = {"first choice": rows["alpha"].gt(0) & rows["step"].gt(0)}
    found = []
    for (noise, seed), part in rows[places["first choice"]].groupby(["noise", "seed"]):
        middle = part.iloc[(part["alpha"] >= 1).to_numpy().argmax()]
        for place, row in (("first choice", part.iloc[0]), ("half-way", middle), ("end", part.iloc[-1])):
            found.append({"noise": noise, "seed": seed, "when": place, **row[["start", "kept", "precision", "recall"]]})
    table = pd.DataFrame(found).drop(columns="seed").groupby(["noise", "when"], sort=False).mean().mul(100)
    names = ["normal in training", "kept", "normal among the kept", "kept among the normal"]
    return table.set_axis(names, axis=1).rename(index=percent, level=0).rename_axis(["noise", "percent"]).round(1)


def selection_verdict(rows: pd.DataFrame, config: dict, page: str) -> Markdown:
    """Return whether the selected images are cleaner than the training set, at all ratios, from first choice to end."""
    chosen = rows[(rows["step"] > 0) & (rows["noise"] > 0)]
    first = chosen.groupby(["noise", "seed"]).first().groupby("noise").mean() * 100
    last = chosen.groupby(["noise", "seed"]).last().groupby("noise").mean() * 100
    words = "; ".join(
        f"{percent(noise)}: contaminated share {100 - first.loc[noise, 'start']:.1f} before, "
        f"{100 - first.loc[noise, 'precision']:.1f} in the first choice, {100 - last.loc[noise, 'precision']:.1f} in "
        f"the last, which keeps {last.loc[noise, 'recall']:.0f} % of the normal images"
        for noise in first.index
    )
    return report.claim(
        "selection-cleans",
        "The selected images are cleaner than the training set, and at the end of training most normal ones are back.",
        bool((last["precision"] > last["start"]).all() and (last["recall"] > 50).all()),
        f"In percent, {words}.",
        source="MeDS, section 4.3",
        page=page,
        **config,
    )


def review_by_category(rows: pd.DataFrame) -> pd.DataFrame:
    """Return AUPRC and depth per category in percent at the largest noise ratio, columns metric x ranking."""
    mine = rows[rows["noise"] == rows["noise"].max()]
    names = list(dict.fromkeys(rows["name"]))
    table = mine.groupby(["category", "name"])[["auprc", "depth"]].mean().mul(100).unstack("name")
    table = table.rename(columns={"auprc": "AUPRC", "depth": "inspection depth"}, level=0)
    order = [(metric, name) for metric in ("AUPRC", "inspection depth") for name in names]
    return table[order].rename_axis(columns=["percent", "ranked by"]).round(1)


def with_paths(review: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """Return Records of `meds_runs.reviewed` with the images' paths, in the order of review.

    Args:
        review: Records.
        index: of the training images.
    """
    review = review.sort_values("rank", ignore_index=True)
    paths = index["path"].to_numpy()[review["row"].astype(int)]
    table = review[["rank", "row", "category", "defect", "label", "score", "excess", "selected"]].assign(path=paths)
    table.attrs = dict(index.attrs)  # the data set's name decides which pixels may be shown
    return table.astype({"selected": bool})


def found_table(review: pd.DataFrame) -> pd.DataFrame:
    """Return how many images of one list are looked at until a share of the anomalies is found."""
    ranks = review.loc[review["label"] == 1, "rank"].to_numpy()
    rows = []
    for share in (0.25, 0.5, 0.75, 0.9, 1.0):
        count = max(1, round(share * len(ranks)))
        seen = int(ranks[count - 1])
        rows.append((percent(share), count, seen, 100 * seen / len(review)))
    columns = ["of the anomalies", "anomalies found", "images looked at", "of all images in %"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[0]).round(1)


def critical_table(results: pd.DataFrame) -> pd.DataFrame:
    """Return the last selection and the metrics by k, at the largest noise ratio and the first seed."""
    top = results[results["noise.ratio"] == results["noise.ratio"].max()]
    top = top[top["seed"] == top["seed"].min()]
    keys = top["options.k"].fillna(default("k")) if "options.k" in top else pd.Series(default("k"), top.index)
    found = []
    for k, part in top.groupby(keys):
        last = selection_rows(part).iloc[-1]
        means = measured(part).set_index("metric")["value"]
        shares = {"kept": last["kept"], "normal among the kept": last["precision"]}
        shares["kept among the normal"] = last["recall"]
        found.append({"k": f"{k:g}", **{name: value * 100 for name, value in shares.items()}, **means})
    return pd.DataFrame(found).set_index("k").round(1)


def selected_by_category(review: pd.DataFrame) -> pd.DataFrame:
    """Return, per category, how many normal and anomalous images the final student selects, of how many."""
    rows = []
    for category, part in review.groupby("category"):
        row = {"category": category}
        for label, name in ((0, "normal"), (1, "anomalous")):
            mine = part[part["label"] == label]
            row |= {f"{name} images": len(mine), f"{name}, selected": int(mine["selected"].sum())}
        rows.append(row)
    return pd.DataFrame(rows).set_index("category")
