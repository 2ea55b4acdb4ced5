# %% [markdown]
# # The data sets, and Table 2 beside them
#
# Claims about anomaly detection are claims about data sets. This page says what there is in this book, what of it is
# real, and how it relates to the four benchmarks of the HierCore paper, whose Table 2 lists their image counts.
#
# **Goals**
# - know which data sets this run found, and what they hold;
# - compare image counts with the paper's Table 2 where they can be compared;
# - know which pixels may be shown, and what to be careful about.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run belongs to
datasets: list = ["demo"]  # data sets to look at, each must be found
seeds: list = [0]  # the first one picks the images on the contact sheets

# %%
import pandas as pd
from IPython.display import Markdown, display

from hclib.book import figures, report
from hclib.data.datasets import list_datasets, load_index
from hclib.evaluation.published import load_published

figures.use_style()

# %% [markdown]
# ## What there is
#
# `demo` is rendered on the reader's machine and stands in for real data in continuous integration. `mtd` (Magnetic Tile
# Defects) and `realmix` (six categories from small public data sets, one of them the complete MVTec AD screw) are real.
# The papers' four benchmarks are read from the reader's disk, in their published layouts.

# %%
list_datasets()[["name", "description", "where"]].replace(
    {"where": r"^/.*"}, {"where": "found on this machine"}, regex=True
)

# %% [markdown]
# ## What each one holds

# %%
# NBVAL_CHECK_OUTPUT
indices = {name: load_index(name) for name in datasets}
counts = pd.concat({name: report.image_counts(index) for name, index in indices.items()}, names=["data set"])
counts

# %% [markdown]
# Half of these categories have far more anomalous test images than a factory would see, and some have few normal ones:
# with 6 normal test images an AUROC moves in large steps. Masks exist for every anomalous image unless the table says
# otherwise.

# %%
for name, index in indices.items():
    display(Markdown(f"**{name}**"), figures.contact_sheet(index, seed=seeds[0]))
    figures.plt.close()

# %% [markdown]
# *Normal test images left, anomalous ones right, masks outlined. Categories whose licence does not allow showing their
# pixels are named above the sheet; their numbers are used all the same.*
#
# ## Table 2: the paper's benchmarks
#
# Where a data set of the paper is on this machine the table below compares counts; elsewhere it gives the paper's.

# %%
table2 = report.counts_beside_paper(indices)
table2

# %%
paper = load_published("hiercore", "2").pivot_table(index=["dataset", "class"], columns="metric", values="value")
totals = paper.groupby("dataset").sum().astype(int).drop(columns="anomaly_type_count", errors="ignore")
totals

# %% [markdown]
# Two remarks of the paper do not fit its own table: it says that all data sets except BTAD have several defect types per
# class, but toothbrush (MVTec AD), connector and tubes (MPDD) have one.
#
# ## Read with care
# - `mtd`: the same tile region appears under several exposures, so a random split has near-duplicates in training and
#   test. Masks are soft grey-scale and are binarised at > 127; four `uneven` masks are empty at the source.
# - `realmix/ball_screw` is a time lapse of 26 places on one spindle, training earlier than test; `glassfiber` and `cookie`
#   are small, with consecutive frames. Only `screw` and `mtd` map onto tables of the papers.
# - `demo` is rendered. It shows that code works and where a claim *can* appear; it is no evidence about real factories.
#
# ## Goals, answered
# - The tables list every data set of this run with its image counts.
# - Counts stand beside Table 2 wherever a category of the paper is here.
# - The contact sheets show what may be shown.
#
# **Next:** [what happens without class labels](10_hiercore_label_scenarios.ipynb).
