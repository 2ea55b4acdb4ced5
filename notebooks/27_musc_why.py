# %% [markdown]
# # Why it works, and when it stops (MuSc, Figures 4 and 10)
#
# **The claim.** Take all distances from normal patches to the other images: most are small. Take those from anomalous
# patches: most are large, with a small heap at the left where another image happens to hold something similar. The mean
# over all images already separates the two; but some normal patches look like only a part of the pile, since good parts
# vary, and the mean punishes them. The mean over the *nearest 30 %* forgives them.
#
# **Goals**
# - draw the histograms of Figure 4 for our categories;
# - measure the overlap that the interval average removes;
# - beyond the paper: raise the share of anomalous images until the idea breaks.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set; every category is scored by itself
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
categories: list = ["blister", "brick", "gear"]  # categories to score; [] for all
shown: str = "brick"  # category of the histograms
layers: list = ["block6", "block9"]  # stages of the encoder; the paper ends four equal stages
layer: str = "block6"  # layer of the histograms; the paper takes its second stage
degree: int = 3  # degree of the histograms, the paper's
images: int = 40  # most test images per category, drawn at random
references: int = 16  # normal training images that may fill the piles
pile_size: int = 20  # images in a pile of the share experiment
shares: list = [0.05, 0.2, 0.5, 0.8]  # shares of anomalous images
draws: int = 5  # random piles per share
seeds: list = [0]  # the first one draws images and piles

# %%
import pandas as pd

from hclib.book import musc_figures, report
from hclib.book.experiments import recorded
from hclib.book.figures import use_style
from hclib.book.musc_experiments import anomaly_shares, categories_of, patch_histograms
from hclib.book.musc_extension_tables import interval_verdict, overlap_table, share_table, share_verdict
from hclib.data.datasets import load_index

use_style()

# %% [markdown]
# ## The setting

# %%
index = load_index(dataset, categories=categories or None)
report.setting(
    data=f"{dataset}: {report.describe(index)}; at most {images} test images per category, drawn at random",
    encoder=f"{encoder} at {image_size} px, frozen; histograms: {layer}, degree {degree}; shares: {', '.join(layers)}",
    training="none",
    thresholds="none; masks are used to colour the histograms",
    paper="second of four stages of CLIP ViT-L/14-336 at 518 px, degree 3; data set not named",
)

# %% [markdown]
# ## Figure 4 here

# %%
base = {"profile": profile, "encoder": encoder, "image_size": image_size, "method": "MuSc", "layers": layers}
base |= {"images": images, "references": references, "draw": seeds[0]}
job = {**base, "layer": layer, "degree": degree, "bins": 60}
names = categories_of(dataset, categories)
rows = [recorded("musc_histograms", {**job, "dataset": name}, patch_histograms) for name in names]
histograms = pd.concat([r.assign(category=r["dataset"].str.partition(":")[2]) for r in rows], ignore_index=True)
figure = musc_figures.patch_score_histograms(histograms[histograms["category"] == shown])

# %% [markdown]
# *Top: distances from every patch to every other image, as a share of all such distances. Bottom: their average per
# patch, over all images and over the nearest 30 %. Each colour sums to 100 %. A patch is anomalous when at least half
# of it lies in the mask, or when it is the one that keeps a small mask from vanishing.*
#
# ## The overlap, per category

# %%
# NBVAL_CHECK_OUTPUT
overlap_table(histograms)

# %% [markdown]
# *Percent. Overlap: area that the two densities share, 100 for equal ones. Patch AUROC: how well the average ranks
# anomalous patches above normal ones.*

# %%
interval_verdict(histograms, {**base, "dataset": dataset}, "27_musc_why")

# %% [markdown]
# ## Beyond the paper: how many anomalies may there be?
#
# The idea needs normal images in the nearest 30 %. A pile is filled with random images at a given share of anomalous
# ones, many times over. Two things can go wrong with a rising share: a normal image finds too few others, and defects
# of one kind find each other. What protects MuSc is that an anomalous image is mostly normal: all of its patches
# outside the defect still vouch for the good parts.

# %%
mixed = {**base, "degrees": [1, 3, 5], "windows": [1, 2, 3], "pile_size": pile_size, "shares": shares}
mixed |= {"draws": draws, "seed": seeds[0]}
piles = [recorded("musc_shares", {**mixed, "dataset": name}, anomaly_shares) for name in names]
piles = pd.concat([r.assign(category=r["dataset"].str.partition(":")[2]) for r in piles], ignore_index=True)

# %%
# NBVAL_CHECK_OUTPUT
share_table(piles)

# %%
piles["percent"] = piles["nominal_share"] * 100
panels = {"image AUROC": piles, "patch AUROC": piles.assign(auroc=piles["patch_auroc"])}
figure = musc_figures.sweep(panels, "percent", dict.fromkeys(panels, "anomalous images in the pile (%)"))

# %% [markdown]
# *AUROC over the share of anomalous images, means over random piles. Thin lines: categories; thick: their mean.*
#
# ## What holds, what does not

# %%
share_verdict(piles, {**base, "dataset": dataset}, "27_musc_why")

# %% [markdown]
# ## Read with care
# - At a share of 5 % a pile holds one anomalous image; the image AUROC of a single pile then only says where that one
#   ranks.
# - Normal images are drawn from test and training images, so that there are enough of them; where the two were taken
#   under different conditions, that makes normal images more varied than a real pile would be.
# - Anomalies are drawn from all kinds of a category's defects. A pile with one single kind is harder, since its defects
#   find each other.
#
# ## Goals, answered
# - The histograms show both halves of the claim, and where they overlap.
# - The table says what the interval average removes.
# - The share experiment says how far the pile may go bad.
