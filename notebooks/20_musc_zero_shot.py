# %% [markdown]
# # MuSc: unlabelled images judge each other (MuSc, Tables 1, 2, 14, 17 and 18)
#
# **The claim.** No training set, no labels, no text prompts: MuSc takes a pile of unlabelled test images and lets them
# score each other. A normal patch finds similar patches in many other images, a defect in few. The paper reports an
# image AUROC of 97.8 % on MVTec AD and 92.8 % on VisA, above all zero-shot and most few-shot methods, and not far below
# methods that see every normal training image.
#
# **Goals**
# - score every category by MuSc alone and read the seven metrics of Tables 17 and 18;
# - stand beside the paper's means, and beside its class where we have the same images;
# - compare with PatchCore, which was given all normal training images (Table 2);
# - find out what goes wrong where it goes wrong;
# - beyond the paper: a pile of several unknown products.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set; every category is scored by itself
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
size: int = 224  # side in pixels of the maps and masks that pixel metrics compare
categories: list = ["blister", "brick", "gear"]  # categories to score; [] for all
layers: list = ["block6", "block9"]  # stages of the encoder; the paper ends four equal stages
other_layers: list = ["block6"]  # a second choice of layers, to see what the first one costs
second_look: list = ["brick", "gear"]  # categories to score with those
degrees: list = [1, 3, 5]  # neighbourhood sides of LNAMD
windows: list = [1, 2, 3]  # windows of RsCIN, the image itself included
sharper: list = []  # [category, image_size, images]: to score at another resolution as well, so many images of it
largest: int = 160  # test images of a category; from larger ones so many are drawn at random
complete: list = []  # categories whose whole test set is scored, whatever its size
mixed: int = 12  # images per category in the mixed pile
seeds: list = [0]  # the first one draws parts and piles

# %%
import pandas as pd
from IPython.display import Markdown, display

from hclib.book import musc_figures, report
from hclib.book.experiments import one_class, recorded, scenario_configs
from hclib.book.figures import use_style
from hclib.book.musc_experiments import categories_of, drawn, examples, mixed_pile, zero_shot
from hclib.book.musc_pools import pile
from hclib.book.musc_tables import (
    classes_beside_paper,
    diagnosis,
    layer_table,
    many_shot_gap,
    means_beside_paper,
    mixed_table,
    mixed_verdict,
    weakness,
    zero_shot_table,
    zero_shot_verdicts,
)
from hclib.data.datasets import load_index

use_style()

# %% [markdown]
# ## The setting

# %%
index = load_index(dataset, categories=categories or None)
report.setting(
    data=f"{dataset}, test images only: {report.describe(index)}; at most {largest} test images of a category"
    f"{', but all of ' + ', '.join(complete) if complete else ''}. Of the "
    "training images MuSc sees none.",
    encoder=f"{encoder} at {image_size} px, frozen; {', '.join(layers)}",
    training="none; the class of a test image is known, as in the paper, its label is not",
    thresholds="F1-max at the best threshold per category, chosen on the test labels (oracle), as in the paper",
    paper="MVTec AD, VisA and BTAD; CLIP ViT-L/14-336 at 518 px. Only MVTec AD's screw is among our images.",
)

# %% [markdown]
# ## The method in four steps
#
# 1. `aggregate`: patch vectors are averaged over 1 x 1, 3 x 3 and 5 x 5 neighbours (*LNAMD*);
# 2. `mutual_scores`: a patch's distance to another image is that to its nearest patch there; the patch scores the mean
#    of the smallest 30 % of these distances (*MSM with the interval average*);
# 3. layers and degrees are averaged, the map is upsampled, and its maximum is the image score;
# 4. `rescore`: the image score is averaged with those of the most similar images (*RsCIN*).
#
# The [method page](../../methods/musc.md) has the equations. Of categories with more test images than `largest` so many
# are drawn at random. More than 167 images, the size of MVTec AD's largest class, are scored in equal parts that do not
# see each other, as the paper does for large sets (Table 7).

# %%
base = {"profile": profile, "encoder": encoder, "image_size": image_size, "size": size, "method": "MuSc"}
base |= {"layers": layers, "windows": windows, "seed": seeds[0], "options": {"degrees": degrees}}
configs = [{**base, "dataset": name, **drawn(name, largest, complete)} for name in categories_of(dataset, categories)]
results = pd.concat([recorded("musc_zero_shot", c, zero_shot) for c in configs], ignore_index=True)

# %% [markdown]
# ## Tables 17 and 18 here: every category by itself

# %%
# NBVAL_CHECK_OUTPUT
zero_shot_table(results)

# %% [markdown]
# *Percent. Image level: AUROC, best F1, average precision. Pixel level: the same and the per-region overlap (AUPRO).*
#
# ## Ours, the paper's, the difference
#
# Other products, another encoder, a quarter of the patches: the means say whether we are in the same region, not who is
# better.

# %%
means_beside_paper(results)

# %% [markdown]
# The same images as the paper's, where we have them:

# %%
finer = [{**base, "dataset": f"{dataset}:{name}", "image_size": a, "images": n} for name, a, n in sharper]
finer = [recorded("musc_zero_shot", c, zero_shot) for c in finer]
everything = pd.concat([results, *finer], ignore_index=True)
same = classes_beside_paper(everything)
same if len(same) else Markdown("*None of these categories is in the paper.*")

# %% [markdown]
# ## Table 2 here: what do all normal training images add?
#
# PatchCore (coreset of 10 %, one bank per category) on the same encoder and resolution, given the complete training
# set and measured on the complete test set. Its Records are those of
# [one class or many](11_hiercore_one_vs_multi.ipynb).

# %%
shared = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size, "size": size}
trained = scenario_configs({**shared, "options": {"ratio": 0.1}}, seeds[:1])[0]
full_shot = recorded("one_class", {**trained, "setting": "one-class", "rules": []}, one_class)
many_shot_gap(results, full_shot)

# %% [markdown]
# ## Where it works and where it does not
#
# Image scores of every category before and after re-scoring. What counts is the overlap of the two colours.

# %%
panels = musc_figures.score_histograms(results)

# %%
diagnosis(results)

# %% [markdown]
# *Percent, weakest category first. "Hits" is the share of anomalous images whose highest-scoring patch lies inside the
# ground-truth mask. A low image AUROC with a high share of hits means that defects are found but normal images score as
# high; with a low share, that something else in the image looks rarer than the defect.*
#
# ## Which layers
#
# The paper averages the ends of four equal stages. That presumes that the last block still describes the image locally;
# [the ablation](21_musc_ablation.ipynb) measures each layer by itself. Here the same images with other layers:

# %%
again = [c for c in configs if c["dataset"].partition(":")[2] in second_look]
other = [{**c, "layers": other_layers} for c in again]
other = pd.concat([recorded("musc_zero_shot", c, zero_shot) for c in other], ignore_index=True)
first = results[results["category"].isin(second_look)]
layer_table({", ".join(layers): first, ", ".join(other_layers): other})

# %% [markdown]
# *AUROC in percent.*
#
# ## The weakest category, looked at
#
# Anomalous images from the lowest to the highest score, then normal ones likewise; above each its score. Where the
# pixels may not be published, the maps stand alone. A defect should be a bright spot. Where a whole part lights up,
# brighter in some positions than in others, it is the position that is rare in the pile, not the defect; what can be
# done about that is tried in [turned parts](26_musc_orientation.ipynb).

# %%
weakest = diagnosis(results).index[0]
name = f"{dataset}:{weakest}"
chosen = {**base, "dataset": name, **drawn(name, largest, complete), "count": 4, "normals": 3}
found = recorded("musc_examples", chosen, examples)
maps = musc_figures.example_maps(pile(chosen).index, found)

# %%
weakness(results)

# %% [markdown]
# ## Beyond the paper: a pile of several unknown products
#
# MuSc is told the product: each class is a pile of its own. A real pile may mix products. If nobody sorts them, the
# nearest 30 % of the images reach beyond a patch's own product, and the average fills with distances to things that
# were never alike. Two remedies need no labels: take a smaller share, one product's, or let FINCH cluster the image
# tokens first (as HierCore does for its memory banks) and score inside the clusters.

# %%
count = index["category"].nunique()
mix = {**base, "dataset": dataset, "categories": sorted(index["category"].unique()), "images": mixed}
mix["fraction"] = round(0.3 / count, 3)
piles = recorded("musc_mixed", mix, mixed_pile)

# %%
# NBVAL_CHECK_OUTPUT
mixed_table(piles)

# %% [markdown]
# *AUROC in percent, mean over categories. "One scale" is the image AUROC over all products together, which is what a
# single threshold sees.*
#
# ## What holds, what does not

# %%
display(*zero_shot_verdicts(results, everything, full_shot, shared))

# %%
mixed_verdict(piles, shared)

# %% [markdown]
# ## Read with care
# - F1-max is an oracle: its threshold saw the test labels. AUROC, AP and AUPRO use none.
# - MuSc is transductive. An image's score depends on the others in the pile, and a pile of one image cannot be scored
#   at all.
# - The share of anomalous images differs a lot between categories (table above). [Why it works](27_musc_why.ipynb) asks
#   how high it may rise.
#
# ## Goals, answered
# - The first table has the seven metrics of every category, the next two the paper's beside them.
# - The gap to full-shot PatchCore stands beside the paper's gap.
# - The diagnosis and the maps show what goes wrong in the weakest category.
# - The mixed pile shows whether clusters can replace the class labels that MuSc takes for granted.
