# %% [markdown]
# # How many images, at what cost? (MuSc, Tables 6, 7 and 13)
#
# **The claim.** Every image is compared with every other, so time grows with the square of the pile. The paper's answer
# is to divide: score $s$ subsets apart and join the results. On MVTec AD three subsets halve the time and the AUROC
# falls by about a point; so small piles suffice, too.
#
# **Goals**
# - divide each category into two and three subsets, several times, and measure the loss (Table 7);
# - make the parts smaller still: how few images suffice?
# - measure time and memory over the number of images, and what multiplying each pair only once saves (Tables 6 and 13).

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set; every category is scored by itself
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
size: int = 112  # side in pixels of the maps and masks that pixel metrics compare
categories: list = ["blister", "brick", "gear"]  # categories to score; [] for all
layers: list = ["block6", "block9"]  # stages of the encoder; the paper ends four equal stages
images: int = 40  # most test images per category, drawn at random
references: int = 16  # normal training images that share the cached distances
subsets: list = [1, 2, 3]  # numbers of subsets, Table 7
sizes: list = [5, 10, 20]  # images in a pile that stands alone
timed: list = [12, 25, 50]  # numbers of images whose time and memory are measured
seeds: list = [0, 1, 2]  # divisions; the first one draws the images

# %%
import pandas as pd

from hclib.book import musc_figures, report
from hclib.book.experiments import recorded
from hclib.book.figures import use_style
from hclib.book.musc_experiments import categories_of, pile_sizes, timings
from hclib.book.musc_size_tables import cost_beside_paper, cost_verdict, few_images, size_table, size_verdict
from hclib.data.datasets import load_index

use_style()

# %% [markdown]
# ## The setting

# %%
index = load_index(dataset, categories=categories or None)
report.setting(
    data=f"{dataset}: {report.describe(index)}; at most {images} test images per category, drawn at random",
    encoder=f"{encoder} at {image_size} px, frozen; {', '.join(layers)}",
    training="none; subsets are drawn at random, without looking at labels",
    thresholds="none; AUROC only",
    paper="MVTec AD (42 to 167 images a class) and VisA (150 to 200), CLIP ViT-L/14-336 at 518 px, one RTX 3090. Its "
    "program divides evenly by defect folder, which uses the labels.",
)

# %% [markdown]
# ## Table 7 here: two and three subsets
#
# Patches are scored inside their subset; the image scores of all subsets are re-scored together and measured together,
# as in the paper. Each division is repeated with other seeds.

# %%
base = {"profile": profile, "encoder": encoder, "image_size": image_size, "size": size, "method": "MuSc"}
base |= {"layers": layers, "images": images, "references": references, "draw": seeds[0], "windows": [1, 2, 3]}
job = {"degrees": [1, 3, 5], "subsets": subsets, "sizes": sizes, "seeds": seeds}
configs = [{**base, **job, "dataset": name} for name in categories_of(dataset, categories)]
results = pd.concat([recorded("musc_sizes", c, pile_sizes) for c in configs], ignore_index=True)

# %%
# NBVAL_CHECK_OUTPUT
size_table(results)

# %% [markdown]
# *AUROC in percent, mean over categories, ± standard deviation over divisions. "Change" is against one pile; then the
# paper's change on its two benchmarks, and our change minus the mean of theirs.*

# %%
size_verdict(results, {**base, "dataset": dataset}, "23_musc_size_and_cost")

# %% [markdown]
# ## Beyond the paper: how few images suffice?
#
# Now the parts are on their own: re-scoring, too, sees only the images of the part. The left end is what MuSc can do
# with a handful of unlabelled images. Fewer than five cannot be scored at all: 30 % of four others is less than two,
# and of three less than one.

# %%
alone = few_images(results)
title = "piles on their own, and the whole"
curve = musc_figures.sweep({title: alone}, "wanted", {title: "images in a pile"}, logarithmic=True)

# %% [markdown]
# *Image AUROC over the size of the pile. All parts of a category are ranked together. Thin lines: categories; thick:
# their mean.*

# %%
# NBVAL_CHECK_OUTPUT
alone.groupby(["pile", "category"])["auroc"].mean().mul(100).unstack("category").round(1)

# %% [markdown]
# *Image AUROC in percent for piles of about 5, 10 ... images.*
#
# ## Tables 6 and 13 here: time and memory
#
# One layer and one degree of random unit vectors, one thread of a CPU: 256 patches an image, 384 channels.
# `mutual_scores` multiplies each pair of images once and reads the product in both directions; the plain way compares
# each image with all the others, as the reference program does.

# %%
cost = {"profile": profile, "dataset": "random vectors", "encoder": "none", "method": "MuSc", "seed": 0}
cost |= {"patches": 256, "channels": 384}
ways = [("mutual_scores", 1), ("each against all", 1)]
jobs = [{**cost, "images": n, "way": way, "subsets": s} for n in timed for way, s in ways]
jobs += [{**cost, "images": max(timed), "way": "mutual_scores", "subsets": s} for s in subsets if s > 1]
measured = pd.concat([recorded("musc_timings", job, timings) for job in jobs], ignore_index=True)

# %%
figure = musc_figures.growth(measured[measured["subsets"] == 1])

# %% [markdown]
# *CPU seconds and memory beyond the patches, per layer and degree, over the number of images. Twelve such passes (four
# stages, three degrees) make a score.*

# %%
cost_beside_paper(measured)

# %% [markdown]
# *Time of $s$ subsets relative to one pile. The paper's milliseconds include the encoder, which does not get cheaper by
# dividing; ours are the mutual scoring alone.*

# %%
cost_verdict(measured, "23_musc_size_and_cost", profile)

# %% [markdown]
# ## Read with care
# - A part of a few images holds few normal ones where anomalies are the majority; how high their share may rise is
#   asked in [why it works](27_musc_why.ipynb).
# - Subsets put scores of different piles on one scale. A pile with many anomalies scores lower than one with few.
# - Seconds are CPU seconds of one thread on a shared machine; read ratios.
#
# ## Goals, answered
# - The first table gives the loss of two and three subsets with its spread, beside the paper's.
# - The curve shows how few images suffice.
# - The last figure and table show how cost grows, and what dividing and pairing save.
