"""Figures of MeDS's trainings: over the noise, over the length, over one option, and what is selected."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from hclib.book.figures import METHOD_COLOURS
from hclib.book.meds_run_tables import COLUMNS, STUDENTS, by_length, measured
from hclib.book.meds_tables import percent

STUDENT_COLOURS = dict(zip(STUDENTS.values(), ("#000000", "#5B3A8E", "#8C6D31"), strict=True))
RATIO_COLOURS = ["#0072B2", "#009E73", "#E69F00", "#D55E00"]


def style(name: str) -> dict:
    """Return colour and line of a method: a student alone dashed, the same with MeDS solid, everything else dotted."""
    student = name.split(" + ")[0]
    if student in STUDENT_COLOURS:
        return {"color": STUDENT_COLOURS[student], "ls": "-" if " + " in name else "--", "lw": 1.8, "marker": "o"}
    return {"color": METHOD_COLOURS.get(name, "grey"), "ls": ":", "lw": 1.4, "marker": "s"}


def noise_curves(results: pd.DataFrame, *, metrics: tuple[str, ...] = ("I-AUROC", "P-AP")) -> Figure:
    """Draw metrics over the noise ratio, a line per method, with the range over seeds.

    Args:
        results: Records of `meds_run`.
        metrics: a panel each.
    """
    rows = measured(results)
    figure, axes = plt.subplots(1, len(metrics), figsize=(7.0, 3.8), squeeze=False)
    for ax, metric in zip(axes[0], metrics, strict=True):
        for name in dict.fromkeys(rows["name"]):
            mine = rows[(rows["name"] == name) & (rows["metric"] == metric)].groupby("noise")["value"]
            mean = mine.mean()
            ax.plot(mean.index * 100, mean, ms=3, label=name, **style(name))
            if mine.size().max() > 1:
                ax.fill_between(mean.index * 100, mine.min(), mine.max(), color=style(name)["color"], alpha=0.12, lw=0)
        ax.set_title(f"{metric} in %")
        ax.set_xlabel("injected anomalies per normal image in %")
        ax.set_xticks(sorted(rows["noise"].unique() * 100))
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=7.5, handlelength=3.2)
    return figure


def length_curves(results: pd.DataFrame, *, metrics: tuple[str, ...] = ("I-AUROC", "P-AP")) -> Figure:
    """Draw metrics over the length of training, student alone and with MeDS, a colour per noise ratio.

    Args:
        results: Records of `meds_run` with several `options.steps`.
        metrics: a panel each.
    """
    rows = by_length(results)
    figure, axes = plt.subplots(1, len(metrics), figsize=(7.0, 3.4), squeeze=False)
    ratios = sorted(rows["noise"].unique())
    for ax, metric in zip(axes[0], metrics, strict=True):
        for ratio, colour in zip(ratios, (RATIO_COLOURS[0], RATIO_COLOURS[-1]), strict=False):
            for name in dict.fromkeys(rows["name"]):
                mine = rows.query("name == @name and metric == @metric and noise == @ratio")
                mean = mine.groupby("steps")["value"].mean()
                line = "-" if " + " in name else "--"
                ax.plot(mean.index, mean, line, color=colour, marker="o", ms=3, label=f"{name}, {percent(ratio)}")
        _steps(ax, sorted(rows["steps"].unique()))
        ax.set_title(f"{metric} in %")
        ax.set_xlabel("steps of training")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=7.5, handlelength=3.2)
    return figure


def _steps(ax: plt.Axes, values: list[float]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(values))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticklabels([f"{value:g}" for value in values])


def option_panels(panels: dict[str, pd.DataFrame], *, metrics: tuple[str, ...] = ("I-AUROC", "P-AP")) -> Figure:
    """Draw metrics over the values of one option each, in columns (Figures 2, 4, 5, 6 and 8).

    Args:
        panels: title -> rows `value` (of the option), `kind` (which model is measured), and the metrics in percent.
        metrics: a row of axes each.
    """
    figure, axes = plt.subplots(len(metrics), len(panels), figsize=(7.0, 1.9 * len(metrics) + 0.6), sharey="row")
    axes, colours = np.atleast_2d(axes), {"memory": "grey", "distilled": "#56B4E9", "final": "#000000"}
    for column, (title, rows) in zip(axes.T, panels.items(), strict=True):
        values = sorted(rows["value"].unique())
        for ax, metric in zip(column, metrics, strict=True):
            for kind, part in rows.groupby("kind", sort=False):
                part = part.groupby("value")[metric].mean()
                places = [values.index(value) for value in part.index]
                ax.plot(places, part, marker="o", ms=3.5, color=colours[kind], label=kind)
            ax.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        column[-1].set_xlabel(title)
    for ax, metric in zip(axes[:, 0], metrics, strict=True):
        ax.set_ylabel(f"{metric} in %")
    found = {}
    for ax in axes.flat:
        found |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3, fontsize=7.5)
    return figure


def ablation_dots(results: dict[str, pd.DataFrame]) -> Figure:
    """Draw the settings of an ablation at the largest noise ratio, a row each, a panel per metric.

    Args:
        results: description -> Records of `meds_run`, the baseline first.
    """
    rows = pd.concat([measured(part).assign(name=name) for name, part in results.items()])
    rows = rows[rows["noise"] == rows["noise"].max()]
    means = rows.groupby(["name", "metric"])["value"].mean().unstack("metric").reindex(list(results)[::-1])
    figure, axes = plt.subplots(1, 4, figsize=(7.0, 2.6), sharey=True)
    for ax, metric in zip(axes, COLUMNS.values(), strict=True):
        ax.plot(means[metric], means.index, "o", color="black", ms=5)
        ax.axvline(means[metric].iloc[-1], color="grey", lw=0.8)
        for name, value in means[metric].items():
            ax.annotate(f"{value:.1f}", (value, name), (0, 4), textcoords="offset points", fontsize=6.5, ha="center")
        ax.margins(x=0.2, y=0.12)
        ax.set_title(f"{metric} in %")
    return figure


def selection_curves(history: pd.DataFrame) -> Figure:
    """Draw stage 3's selection over the training: precision, recall and kept share, a colour per noise ratio.

    Args:
        history: `meds_review_tables.selection_rows`.
    """
    panels = {"precision": "normal share of\nthe selected in %", "recall": "selected share of\nthe normal in %"}
    panels["kept"] = "selected share of\nall images in %"
    figure, axes = plt.subplots(1, 3, figsize=(7.0, 2.9))
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        for noise, colour in zip(sorted(history["noise"].unique()), RATIO_COLOURS, strict=False):
            rows = history[history["noise"] == noise]
            for number, (_, part) in enumerate(rows.groupby("seed")):
                label = percent(noise) if not number else None
                ax.plot(part["step"], part[column] * 100, color=colour, marker="o", ms=2, lw=1, label=label)
            start = rows["start"].mean() * 100
            if column == "precision":
                ax.axhline(start, color=colour, lw=0.8, ls=":")
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_ylim(top=101)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5)
    return figure


def review_bars(table: pd.DataFrame) -> Figure:
    """Draw Figure 7: AUPRC and inspection depth, means over categories as bars, deviations as lines.

    Args:
        table: `meds_review_tables.review_rows` of the stages to compare: `noise, name, category, auprc, depth,
            least_depth`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(7.0, 3.2))
    noises, names = sorted(table["noise"].unique()), list(dict.fromkeys(table["name"]))
    width = 0.8 / len(names)
    for ax, (column, title) in zip(
        axes, {"auprc": "AUPRC in %", "depth": "inspection depth in %"}.items(), strict=True
    ):
        for number, name in enumerate(names):
            mine = table[table["name"] == name].groupby("noise")[column]
            places = np.arange(len(noises)) + (number - (len(names) - 1) / 2) * width
            colour = plt.get_cmap("viridis")(0.15 + 0.7 * number / max(1, len(names) - 1))
            ax.bar(places, mine.mean() * 100, width * 0.92, color=colour, label=name)
            low = np.minimum(mine.std(ddof=1), mine.mean()) * 100
            high = np.minimum(mine.std(ddof=1), 1 - mine.mean()) * 100
            ax.errorbar(places, mine.mean() * 100, [low, high], fmt="none", ecolor="black", lw=1)
        ax.set_xticks(range(len(noises)), [percent(noise) for noise in noises])
        ax.set_xlabel("injected anomalies per normal image")
        ax.set_title(title)
        ax.set_ylim(0, 101)
    least = table.groupby("noise")["least_depth"].mean() * 100
    axes[1].hlines(least, np.arange(len(noises)) - 0.45, np.arange(len(noises)) + 0.45, color="black", ls=":", lw=1)
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(plt.Line2D([], [], color="black", ls=":"))
    figure.legend(handles, [*labels, "least possible depth"], loc="outside lower center", ncols=3, fontsize=7.5)
    return figure
