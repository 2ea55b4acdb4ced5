# %% [markdown]
# # How much of the memory is needed? Coreset ratios from 100 % to 0.1 %
#
# **The question.** Both PatchCore and HierCore keep a tenth of the patches, picked greedily so that every patch has a near
# representative. Memory and scoring time are proportional to what is kept. How far can one go, and is the greedy choice worth its
# time against a random one?
#
# The expectation: a plateau from all patches down to a few percent, then a fall; greedy falls later, because it covers the rare
# patches, while a random choice forgets them first. What greedy covers also includes outliers, which matters once the training
# set is contaminated.
#
# **Goals**
# - measure accuracy and cost for ratios from 1 to 0.001, greedy and random, over seeds;
# - test that a tenth is enough.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set, all of its categories together
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
size: int = 224  # side in pixels of the maps and masks that pixel metrics compare
train_per_category: int = 20  # training images of each category, a seeded draw
ratios: list = [1.0, 0.1, 0.01, 0.001]  # shares of the patches that are kept
seeds: list = [0]  # one draw, projection and coreset per seed

# %%
import pandas as pd
from IPython.display import display

from hclib.book import clustering_tables as tables
from hclib.book import figures, report
from hclib.book.experiments import recorded, scenario_metrics
from hclib.data.datasets import load_index

figures.use_style()

# %%
report.setting(
    data=f"{dataset}: {report.describe(load_index(dataset))}; at most {train_per_category} training images of each category drawn",
    encoder=f"{encoder} at {image_size} px, frozen",
    training="no class labels; FINCH's groups, one bank each",
    thresholds="F1 at its best threshold per category, chosen on the test labels (oracle)",
    paper="HierCore uses 10 % throughout; PatchCore's own study (MVTec AD) has 100 %, 10 % and 1 %",
)

# %% [markdown]
# ## The sweep
#
# The draw of the training images, the projection and the first pick change with the seed; the test set does not. At 100 % there is
# nothing to choose, so both samplers are the same run.

# %%
base = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size, "size": size}
base |= {"method": "HierCore", "train_labels": "unknown", "test_labels": "unknown", "rules": ["class/class"]}
base |= {"train_per_category": train_per_category}

frames = []
for ratio in ratios:
    for sampler in ("greedy", "random"):
        options = {"ratio": ratio, "sampler": "greedy" if ratio == 1 else sampler}
        runs = [recorded("coreset_ratios", {**base, "options": options, "seed": s}, scenario_metrics) for s in seeds]
        frames.append(pd.concat(runs).assign(ratio=ratio, sampler=sampler))
results = pd.concat(frames, ignore_index=True)

# %% [markdown]
# ## Image level, and what it costs

# %%
accuracy = tables.ratio_table(results, "image")
accuracy.drop(columns=["fit_seconds", "score_seconds"])

# %%
accuracy[["bank_entries", "fit_seconds", "score_seconds"]]

# %% [markdown]
# ## Pixel level

# %%
# NBVAL_CHECK_OUTPUT
tables.ratio_table(results, "pixel")

# %% [markdown]
# *Means over categories; ± is the standard deviation over seeds. Ratios in percent of all patches.*

# %%
panel = tables.ratio_curves(results)

# %% [markdown]
# *Accuracy (left, middle) and scoring time (right) against the share of patches kept, on a logarithmic axis; bars are standard
# deviations over seeds. Seconds are of this machine; their slope is what counts.*
#
# ## What holds, what does not

# %%
display(*tables.ratio_verdicts(results, base))

# %% [markdown]
# ## Goals, answered
# - The tables and curves show accuracy and cost for every ratio, greedy beside random.
# - The sentences above say whether a tenth is enough on these data.
#
# **Next:** [what memory banks cost](14_hiercore_cost.ipynb).
