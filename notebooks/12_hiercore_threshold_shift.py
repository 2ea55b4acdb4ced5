# %% [markdown]
# # How far the optimal threshold moves (HierCore, Figure 2)
#
# **The claim.** A nearest-neighbour distance has no natural scale. In a tidy product with little variation a normal patch lies
# close to the memory bank; in a coarse texture it does not. The paper draws the score distributions of every class and marks the
# threshold that is best for the class (solid) beside the one that is best for all together: they lie apart, at image and at pixel
# level. This page puts numbers on "apart".
#
# **Goals**
# - see the distributions of normal and anomalous scores per category, for images and for pixels;
# - measure how far the best threshold moves from category to category, as a factor;
# - measure what a single threshold costs each category, in points of F1.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set, all of its categories together
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
size: int = 224  # side in pixels of the maps and masks that pixel metrics compare
ratio: float = 0.1  # coreset ratio, the paper's
bins: int = 60  # bins of the pixel histograms
seeds: list = [0]  # one PatchCore bank per seed; the figures show the first

# %%
import pandas as pd

from hclib.book import figures, report
from hclib.book.experiments import label_scenario, pixel_histograms, recorded, scenario_configs
from hclib.book.scenario_tables import shift_verdict, threshold_shift
from hclib.data.datasets import load_index

figures.use_style()

# %%
report.setting(
    data=f"{dataset}: {report.describe(load_index(dataset))}",
    encoder=f"{encoder} at {image_size} px, frozen",
    training="no class labels: one PatchCore bank for all categories",
    thresholds="chosen on the test labels, the best F1 that a threshold can reach (oracle), as in the paper",
    paper="MVTec AD and VisA, Wide-ResNet-50-2 at 256 px. Compare factors, not absolute values.",
)

# %% [markdown]
# ## Scores of one bank for all categories
#
# The Records are those of [the label scenarios](10_hiercore_label_scenarios.ipynb): nothing is computed twice.

# %%
base = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size, "size": size}
configs = [c for c in scenario_configs({**base, "options": {"ratio": ratio}}, seeds) if c["method"] == "PatchCore"]
results = pd.concat([recorded("label_scenarios", config, label_scenario) for config in configs], ignore_index=True)
shift = threshold_shift(results)

# %% [markdown]
# ## Images
#
# If one threshold could serve all, the solid lines would stand on top of each other.

# %%
first = results.query("seed == @seeds[0] and level == 'image'")
images = figures.score_distributions(first)

# %%
# NBVAL_CHECK_OUTPUT
shift.loc["image"].round(2)

# %% [markdown]
# *`own` is the threshold that is best for the category, `global` the one that is best for all images together. Lost points are
# the difference of the two F1 scores.*
#
# ## Pixels
#
# The same at pixel level. Each distribution is scaled to its own total, since anomalous pixels are rare.

# %%
histograms = recorded("pixel_histograms", {**configs[0], "bins": bins}, pixel_histograms)
pixels = figures.pixel_distributions(histograms, shift.loc["pixel"])

# %%
shift.loc["pixel"].round(2)

# %% [markdown]
# ## How far, in one number
#
# The largest own threshold divided by the smallest, per level, and the mean loss.

# %%
summary = shift.groupby("level").agg(smallest=("own", "min"), largest=("own", "max"), mean_loss=("lost points", "mean"))
summary.assign(factor=summary["largest"] / summary["smallest"]).round(2)

# %% [markdown]
# ## What holds

# %%
shift_verdict(shift, base)

# %% [markdown]
# ## Goals, answered
# - The figures show the distributions with both thresholds.
# - The last table gives the factor between the largest and the smallest threshold.
# - The two tables before give the price of a single threshold, category by category.
