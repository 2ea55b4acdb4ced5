# %% [markdown]
# # Why distances can label patches (FUN-AD, supplementary Figure 1)
#
# **The claim.** FUN-AD labels patches without labels because of a statistical fact about spread: normal features are many and
# close together, anomalies are few and *different from each other*. Of all pairs, those of two normal features are the most
# likely to be short. A feature whose nearest neighbour in a mixed memory is far away is then probably anomalous. The supplement
# shows it as histograms: for two Gaussians, and for image and patch features of MVTec AD's *bottle*.
#
# In the histograms the three kinds of pairs should be ordered: normal-normal (NN) leftmost, the kinds with an anomaly (AN, AA) to
# its right. One category is one draw. This page measures every category, and puts a number on "more likely".
#
# **Goals**
# - redo the synthetic experiment, and the real one at image and patch level;
# - measure for every category the chance that a pair with an anomaly is longer than a normal pair;
# - find where the assumption fails.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set, all of its categories
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
layers: list = ["block9"]  # the layer of the patches
category: str = "brick"  # the category of the histograms
limit: int = 1000  # vectors of each kind, at most: all pairs among them
seeds: list = [0]  # the first one draws the vectors

# %%
from IPython.display import display

from hclib.book import figures, noise_distances, report
from hclib.book.noise_experiments import recorded
from hclib.data.datasets import load_index

figures.use_style()

# %% [markdown]
# ## The setting

# %%
report.setting(
    data=f"{dataset}: {report.describe(load_index(dataset))}",
    encoder=f"{encoder} at {image_size} px, frozen; image tokens, and patches of {', '.join(layers)}",
    training="none; labels and masks say which features are anomalous",
    thresholds="none",
    paper="1,000 + 1,000 Gaussian vectors in 16 dimensions; MVTec AD bottle, 209 normal and 63 anomalous images, DINO ViT-B/8",
)

# %% [markdown]
# ## The experiment
#
# Normal features come from training images, anomalous ones from test images. At patch level a feature is anomalous when the mask
# covers at least half of the patch; the paper does not say whether it also counts the intact patches of anomalous images. All
# pairs are taken; P(AN > NN) is the chance that a random anomalous-normal pair is longer than a random normal pair, which is an
# AUROC: 0.5 means that distances say nothing.

# %%
base = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size, "layers": layers}
config = {**base, "limit": limit, "bins": 60, "seed": seeds[0]}
results = recorded("pairwise_distances", config, noise_distances.distance_run)

# %%
# NBVAL_CHECK_OUTPUT
noise_distances.distance_table(results)

# %% [markdown]
# *Vectors used; medians over the median of the normal pairs; chances.*
#
# ## Figure 1 here

# %%
panels = noise_distances.histograms(results, category)

# %% [markdown]
# *Left: the synthetic Gaussians. Middle and right: image tokens and patches of one category. In the paper's figure the curve of
# normal pairs lies to the left of both others in all three panels.*
#
# ## Every category

# %%
dots = noise_distances.chances(results)

# %% [markdown]
# *Right of the dotted line a pair with an anomaly is usually longer than a normal pair. Left of it, the assumption is turned
# around: those anomalies are more alike than normal features are.*
#
# ## Ours and the paper's
#
# The paper prints histograms and no number to subtract. What can be compared is its conclusion, "normal pairs are consistently the
# most likely to yield shorter pairwise distances":

# %%
display(*noise_distances.distance_verdicts(results, base, "33_funad_pairwise_distances"))

# %% [markdown]
# ## Read with care
# - A defect spans several neighbouring patches, so anomalous pairs include many from the *same* defect. These are short, and they are
#   the ones that a memory with one contaminated image would match first.
# - The claim concerns random pairs; a detector looks at *nearest* neighbours. A few short anomalous pairs are enough to hide a defect.
# - The supplement names the case that breaks it: "when one type of anomaly dominates". Categories with few types of defect, and
#   categories whose normal images vary a lot, are where to look.
#
# ## Goals, answered
# - The panels repeat Figure 1 on synthetic and measured features.
# - The table and the dots give the chances for every category at both levels.
# - The verdicts name the weakest category.
#
# **Next:** [what FUN-AD makes of it](../demo/34_funad_ablation.ipynb).
