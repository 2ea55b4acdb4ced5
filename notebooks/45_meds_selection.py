# %% [markdown]
# # What does MeDS keep, and what does it throw away? (MeDS, section 4.3, Eqs. 11 to 13)
#
# **The claim.** The last stage trains on the images whose score lies below median + k_t MAD of their product. The threshold starts at the median and rises, the score moves from the distilled student's to
# the student's own. So the training set is at first half of all images, and clean, and later most of the normal ones, and still clean.
#
# **Goals**
# - follow precision and recall of the selected images through the training, at every noise ratio;
# - see what the selection costs on clean data, where everything it throws away is normal;
# - look at what was thrown away by mistake and what slipped through.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set; one model for all its categories
encoder: str = "dinov2_vits14"  # frozen backbone, the teacher
image_size: int = 224  # side in pixels that images are resized to
layers: list = []  # layers of the encoder that are read; [] for its default ones
size: int = 112  # side in pixels of the maps and masks that pixel metrics compare
train_images: int = 16  # normal training images kept per category, drawn once; 0 for all
test_normal: int = 12  # normal test images kept per category
test_anomalous: int = 7  # anomalous test images kept per category; the injected ones are among them
noises: list = [0, 0.4]  # injected anomalies per normal training image
seeds: list = [0]  # of the injected images and of the training
student: dict = {"width": 32, "depth": 2, "tokens": 32, "steps": 40, "learning_rate": 0.004}  # of StudentDetector
meds: dict = {"memory_layers": ["block9"], "distill_steps": 40, "passes": 4}  # further options of MeDS
critical: list = []  # values of k beside that of `meds`, at the largest noise ratio and the first seed
shown: int = 16  # images on each sheet

# %%
import pandas as pd

from hclib.book import figures, meds_figures, meds_review_tables, meds_run_figures, meds_run_tables
from hclib.book.meds_runs import contaminated, meds_run, reviewed, runs, varied, with_meds
from hclib.book.noise_experiments import recorded

figures.use_style()

# %% [markdown]
# ## The setting

# %%
base = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size, "size": size}
base |= {"train_images": train_images, "test_normal": test_normal, "test_anomalous": test_anomalous, "draw_seed": 0}
base |= {"layers": layers} if layers else {}
meds_run_tables.setting(
    base,
    student,
    meds,
    seeds,
    thresholds="median + k_t MAD of the training scores of a product, k_t rising to k (1 in the paper): no label is used",
    paper="MVTec AD; the paper shows no such curves",
)

# %%
configs = runs(base, [with_meds(student, meds)], noises, seeds)
results = pd.concat([recorded("meds_runs", config, meds_run) for config in configs], ignore_index=True)

# %%
# NBVAL_CHECK_OUTPUT
meds_run_tables.realised_table(results)

# %% [markdown]
# ## Precision and recall over the training

# %%
rows = meds_review_tables.selection_rows(results)
figure = meds_run_figures.selection_curves(rows)

# %% [markdown]
# *Every point is a selection; between two of them the student trains on what was selected. Dotted: the normal share of the whole training set. The first pass sees all images (algorithm 1, S₀ = D), so all
# curves begin there.*

# %%
meds_review_tables.selection_table(rows)

# %% [markdown]
# *Percent, means over seeds. "Half-way" is where the score is the student's own for the first time (α = 1).*

# %%
keys = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size}
meds_review_tables.selection_verdict(rows, keys, "45_meds_selection")

# %% [markdown]
# ## Where to stop: the critical value
#
# The threshold ends at median + k MAD. A larger k brings more normal images back and lets more anomalies in.

# %%
others = [with_meds(student, varied(meds, "k", k)) for k in critical]
others = [recorded("meds_runs", c, meds_run) for c in runs(base, others, [max(noises)], seeds[:1])]
meds_review_tables.critical_table(pd.concat([results, *others], ignore_index=True))

# %% [markdown]
# *Percent, at the largest noise ratio, first seed, the last selection of the training.*
#
# ## What was thrown away by mistake
#
# Normal images that the final student would not select, the highest score first: what it takes for defects.

# %%
config = configs[len(noises) - 1]
review = meds_review_tables.with_paths(recorded("meds_review", config, reviewed), contaminated(config)[0].index)
lost = review[(review["label"] == 0) & ~review["selected"]]
figure = meds_figures.review_sheet(lost, count=shown)

# %% [markdown]
# *Rank among all training images, and excess, (score - median) / MAD of the product. Products whose pixels may not be published are left out.*
#
# ## What slipped through
#
# Injected anomalies that the final student would still select, the lowest score first.

# %%
kept = review[(review["label"] == 1) & review["selected"]].iloc[::-1]
figure = meds_figures.review_sheet(kept, count=shown) if len(kept) else None

# %%
meds_review_tables.selected_by_category(review)

# %% [markdown]
# *The final selection at the largest noise ratio, first seed. What slips through belongs mostly to the products whose defects the features do not show; there the median itself is no
# safe ground.*
#
# ## Read with care
# - Precision and recall use the hidden labels and serve as evidence only; the method does not see them.
# - On clean data the selection can only throw away normal images. By the definition of the median at least half stay, and at k = 1 about three quarters of a symmetric distribution.
# - A pass here is several rounds over the selected images (`passes`), so that choosing costs less than training.
#
# ## Goals, answered
# - The curves follow the selection, the table gives its beginning, middle and end.
# - The row for clean data, where the profile has it, is the price.
# - The sheets show both kinds of mistakes, and the last table counts them.
