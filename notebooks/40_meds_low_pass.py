# %% [markdown]
# # Why few images are enough (MeDS, Theorem 1 and Figure 3)
#
# **The claim.** Score a contaminated training set by the distance to a memory made of itself, and every anomaly finds itself, or one like it: the
# score says nothing. Let the memory be small and random instead. A normal patch has so many like it that one of them is nearly always drawn; an anomalous
# patch has few, and they are usually missed. A sparse memory passes what is frequent and filters what is rare, and an average over many such memories is a
# clean score from dirty data. Theorem 1 gives the reason: the gap between the two kinds of patches is a sum over radii $r$, with a weight
#
# $$\omega(m, r) = m \, (1 - \pi_{norm}(r))^{m-1}$$
#
# that first grows and then falls with the number $m$ of features in memory ($\pi$ is the share of all features within $r$ of a patch). So there is a best
# memory, and it is neither the smallest nor the largest.
#
# **Goals**
# - see the weight, by formula and by drawing;
# - compute the theorem's gap on real patches, and ask how often its condition is met;
# - draw Figure 3: separation over the share of images in a memory, at three noise ratios;
# - check that 100 memories are close to infinitely many, for which there is a closed form.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set; every category has memories of its own
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
categories: list = ["brick", "gear"]  # categories; [] for all
memory_layers: list = ["block9"]  # layers that memories compare; the paper takes the last one after its norm
train_images: int = 40  # normal training images kept per category, drawn at random; 0 for all
test_images: int = 0  # test images kept per category, drawn at random; 0 for all
noises: list = [0.1, 0.2, 0.4]  # injected anomalies per normal training image
ratios: list = [0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0]  # share of the images in a memory
memories: int = 100  # memories that are really drawn for Figure 3, the paper's number; curves beside them are the limit
ensembles: list = [1, 3, 10, 30, 100, 300]  # numbers of memories compared with infinitely many
draws: int = 3  # ensembles of each size
queries: int = 100  # normal and anomalous patches each that the theorem is computed for
seeds: list = [0]  # the first one draws anomalies, images and queries

# %%

from hclib.book import figures, meds_figures, meds_tables, report
from hclib.book.meds_experiments import expected_gap, limit_agreement, low_pass
from hclib.book.noise_experiments import recorded
from hclib.data.datasets import load_index

figures.use_style()

# %% [markdown]
# ## The setting

# %%
index = load_index(dataset, categories=categories or None)
kept = f"; at most {train_images or 'all'} normal training and {test_images or 'all'} test images of each used, drawn at random"
report.setting(
    data=f"{dataset}: {report.describe(index)}{kept}",
    encoder=f"{encoder} at {image_size} px, frozen, {', '.join(memory_layers)}; patches normalised, distance 1 - cos",
    training="class labels, as in the paper: memories are per category; injected anomalies stay in the test set (overlap)",
    thresholds="none: AUROC only; masks are used to tell normal from anomalous patches",
    paper="MVTec AD, DINOv2-register ViT-B/14 at 392 px, last layer; 10, 20 and 40 % noise in the same sense",
)

# %% [markdown]
# ## The weight
#
# What is one more feature in reach worth to a memory of $m$? Exactly when it is the only one that is drawn, it changes the distance. That happens with
# the probability $\pi \, \omega(m, r)$, so the weight can be estimated by drawing memories and counting.

# %%
figure = meds_figures.weight_curves([0.001, 0.01, 0.1])

# %% [markdown]
# *Lines: the formula. Circles: random draws. Dotted: $m^* = -1 / \ln(1 - \pi)$. Dense surroundings ask for a small memory, sparse ones for a large one; a
# real image holds both, so the best size is a compromise.*
#
# ## The theorem on real patches
#
# Queries are patches of the contaminated training set at the largest noise ratio. For each, the distances to all other patches are sorted, which gives the
# expected distance to a random memory of any size in closed form, without drawing a single one.

# %%
base = {
    "profile": profile,
    "dataset": dataset,
    "encoder": encoder,
    "image_size": image_size,
    "method": "BootstrappedMemory",
}
base |= {"categories": categories, "memory_layers": memory_layers, "train_images": train_images, "noises": noises}
base |= {"test_images": test_images, "seed": seeds[0]}
gaps = recorded("meds_gap", {**base, "queries": queries, "points": 40}, expected_gap)
figure = meds_figures.gap_curves(gaps)

# %% [markdown]
# *Means over all pairs of a normal and an anomalous patch. Left: the expected gap. Right: the first-order part that carries the weight ω; what the
# theorem leaves over, the difference of the two panels, is never negative, and it need not be small.*

# %%
# NBVAL_CHECK_OUTPUT
meds_tables.gap_table(gaps)

# %%
keys = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size}
page = "40_meds_low_pass"
meds_tables.gap_verdict(gaps, keys, page)

# %% [markdown]
# The condition asks that a normal patch has at least as many neighbours as the anomalous one at *every* radius. The table says for how many pairs that is so.
# Where it fails, δ is negative at some radii, the first-order part may be negative, and the weight alone does not decide where the gap is largest.
#
# ## Figure 3 here
#
# MeDS draws whole images, not single patches. The distance of a patch to such a memory is the least of its distances to the drawn images; so
# one tensor of patch-to-image distances serves every ratio, and the average over infinitely many draws is a weighted sum of the sorted distances.

# %%
separation = recorded("meds_low_pass", {**base, "ratios": ratios, "memories": memories}, low_pass)
figure = meds_figures.separation_curves(separation)

# %% [markdown]
# *Top: mean scores of the training patches, bands from the 10 to the 90 % quantile. Bottom: how well the scores separate. Images are drawn with replacement; black:
# infinitely many memories, green: the paper's number. Means over categories. Image scores are means of the top 1 % of patches.*

# %%
# NBVAL_CHECK_OUTPUT
meds_tables.separation_table(separation)

# %% [markdown]
# Two things happen as memories grow. The difference of the mean scores shrinks at once, as the theorem has it. And a training image meets *itself* more often: its
# score is then 0, how often that happens is a matter of luck, and luck differs from image to image. Infinitely many draws treat all images alike, so in the limit this
# noise is gone; what then remains of the optimum is the effect of sparsity alone.

# %%
meds_tables.separation_verdict(separation, keys, page)

# %%
meds_tables.detector_verdict(separation, keys, page)

# %% [markdown]
# ## Ours, the paper's, the difference
#
# Figure 3 prints no numbers. The nearest that are printed belong to the memory ensemble as a detector, the second row of Table 4: image AUROC on the test set
# with a tenth of the images in each memory. The data differ, so it is the slope over the noise that can be compared.

# %%
# NBVAL_CHECK_OUTPUT
meds_tables.beside_memory_row(separation, 0.1)

# %% [markdown]
# ## How many memories?
#
# The authors draw 100 memories. The closed form has no seed and costs one sort; how far from it are B memories?

# %%
job = {**base, "ratio": 0.1, "ensembles": ensembles, "draws": draws}
agreement = recorded("meds_limit", job, limit_agreement)
figure = meds_figures.agreement_curves(agreement)

# %%
# NBVAL_CHECK_OUTPUT
meds_tables.agreement_table(agreement)

# %% [markdown]
# *Errors of patch scores in percent of the mean score, over categories and draws; AUROC of training images. ± is the standard deviation over draws.*
#
# ## Read with care
# - The training set is scored under memories drawn from itself, so a drawn image is at distance 0 from itself. With infinitely many draws that multiplies every
#   score by the same factor, the chance of not being drawn, and changes no ranking.
# - Patch AUROC counts a patch as anomalous when at least half of it lies in the mask, or when it is the one that keeps a small mask from vanishing.
# - With few images a ratio of 3 % is one or two images: the left end of the curves is as sparse as a memory can be.
#
# ## Goals, answered
# - Formula and draws agree on the weight and its maximum.
# - The gap on real patches is in the left panel, the verdict says whether it has the theorem's shape, and the table for how many pairs its condition is met.
# - Figure 3 is drawn with closed-form memories, and its verdict is computed.
# - The table of errors says what 100 memories leave to chance.
