# %% [markdown]
# # Which training images should a person look at first? (MeDS, section 5.5, Table 30 and Figure 7)
#
# **The claim.** A detector that was trained on a contaminated set can hand it back, sorted, to the person who collected it: worst image first. With MeDS's scores nearly all
# anomalies stand at the top (AUPRC 97.6 to 99.0 % against 91.5 to 92.9 % for a plain Dinomaly on MVTec AD), and all of them are found after a third of the images at 40 % noise, where the plain
# student needs half.
#
# **Goals**
# - rank the training images of every product by the plain student and by MeDS, and measure both rankings as Table 30 does;
# - see which of MeDS's stages ranks best;
# - look at the sheet that a reviewer would get.

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
noises: list = [0.4]  # injected anomalies per normal training image
seeds: list = [0]  # of the injected images and of the training
student: dict = {"width": 32, "depth": 2, "tokens": 32, "steps": 40, "learning_rate": 0.004}  # of StudentDetector
meds: dict = {"memory_layers": ["block9"], "distill_steps": 40, "passes": 4}  # further options of MeDS
sheet_noise: float = 0.4  # noise ratio of the contact sheet
sheet: int = 24  # images on it

# %%
import pandas as pd
from IPython.display import display

from hclib.book import figures, meds_figures, meds_review_tables, meds_run_figures, meds_run_tables
from hclib.book.meds_runs import alone, contaminated, meds_run, reviewed, runs, with_meds
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
    thresholds="none: a ranking is measured, and only here do the hidden labels come in",
    paper="MVTec AD, Dinomaly, 10, 20 and 40 % noise in the same sense",
)

# %% [markdown]
# ## The two measures
#
# The person goes through the list from the top and takes out what is defective. **AUPRC** (here average precision) is high when the anomalies come first. **Inspection depth** is the share of the images
# that has been looked at when the last anomaly is found; it cannot be less than the share of the anomalies, and a single well-hidden anomaly makes it large. Both are taken per product and
# averaged.

# %%
configs = runs(base, [alone(student), with_meds(student, meds)], noises, seeds)
results = pd.concat([recorded("meds_runs", config, meds_run) for config in configs], ignore_index=True)

# %%
# NBVAL_CHECK_OUTPUT
meds_run_tables.realised_table(results)

# %% [markdown]
# ## Table 30 here

# %%
stages = ("own", "memory", "distilled", "final")
rows = meds_review_tables.review_rows(results, stages)
meds_review_tables.review_table(rows)

# %% [markdown]
# *Percent; mean ± standard deviation over products and seeds, as in the paper's last rows.*

# %%
figure = meds_run_figures.review_bars(rows)

# %% [markdown]
# *Bars: means over products (and seeds). Lines: standard deviation. Dotted: the depth at which all anomalies stand at the top. A depth cannot be compared between noise
# ratios without it.*
#
# ## Ours, the paper's, the difference

# %%
meds_review_tables.review_beside_paper(rows)

# %% [markdown]
# ## Product by product

# %%
meds_review_tables.review_by_category(rows)

# %% [markdown]
# *Percent, at the largest noise ratio, mean over seeds.*

# %%
keys = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size}
display(*meds_review_tables.review_verdicts(rows, keys, "44_meds_label_correction"))

# %% [markdown]
# ## The reviewer's sheet
#
# `MeDS.rank_for_review(index)` gives the table behind it: every training image with its score and its *excess*, (score - median) / MAD of its product, which makes products comparable.

# %%
config = runs(base, [with_meds(student, meds)], [sheet_noise], seeds[:1])[0]
train = contaminated(config)[0].index
review = meds_review_tables.with_paths(recorded("meds_review", config, reviewed), train)
figure = meds_figures.review_sheet(review, count=sheet)

# %% [markdown]
# *The images that MeDS would show first, with rank and excess. Orange frames: injected anomalies; blue: normal images. The reviewer sees no frames. Ranks are those of
# the whole list: products whose pixels may not be published are left out.*

# %%
meds_review_tables.found_table(review)

# %% [markdown]
# *All products in one list, sorted by excess: how many images have been looked at when that share of the anomalies is found.*
#
# ## Read with care
# - AUPRC of a random order is the share of anomalies, so it rises with the noise by itself.
# - The depth is decided by the one anomaly that is ranked last. An injected image whose defect the features do not show keeps it near 100 % for any method.
# - All rankings are of images that the networks were trained on. The longer a plain student trains, the more of them it knows by heart, and the less its ranking says; the verdicts hold for the length
#   of training in the setting.
#
# ## Goals, answered
# - Table 30's layout holds both rankings and MeDS's earlier stages, beside the paper's numbers.
# - The bars show the stages side by side, with the least possible depth.
# - The sheet is what a reviewer would get, and the last table says how far he has to go.
