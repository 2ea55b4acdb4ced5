# %% [markdown]
# # What "10 % noise" means (MeDS, FUN-AD, SoftPatch, InReaCh, open-iad)
#
# **The claim.** Papers on contaminated training sets compare their numbers in one table, column "10 %". But ten percent *of
# what*? MeDS defines the noise ratio as anomalies over *all* training images and publishes lists that hold anomalies over
# *normal* ones. SoftPatch and FUN-AD (one of its two settings) take the injected images out of the test set; MeDS and FUN-AD's
# other setting leave them in, so that the detector is tested on images it was trained on. open-iad never takes more than three
# quarters of a category's anomalies. InReaCh's program always moves 40 test images, whatever the category's size.
#
# None of these is wrong. They are different experiments, and this page runs them all on the same images.
#
# **Goals**
# - inject anomalies by the rule of each paper, and count what came of it, category by category;
# - check MeDS's published training lists against their nominal ratios;
# - measure how much the rule alone changes a detector's AUROC.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set, all of its categories
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
size: int = 112  # side in pixels of the maps and masks that pixel metrics compare
layers: list = ["block9"]  # the encoder's layers that the detectors see
components: int = 64  # principal components of the patches; 0 for all channels
ratio: float = 0.1  # coreset ratio of both detectors
trained: str = ""  # data set of the detectors, NAME:CATEGORY takes one category; empty: all of `dataset`
nominal: float = 0.1  # the ratio that every paper would print
manifests: list = []  # MeDS's published lists to check, by name: "train_mvtec_nr40_seed_0"
methods: list = ["PatchCore", "SoftPatch"]  # detectors that are trained under every protocol
seeds: list = [0]  # which anomalies are injected

# %%
import pandas as pd
from IPython.display import Markdown, display

from hclib.book import figures, noise_protocols, report
from hclib.book.noise_experiments import noise_run, recorded
from hclib.data.contamination import contaminate, realised
from hclib.data.datasets import load_index

figures.use_style()
index = load_index(dataset)

# %% [markdown]
# ## The setting

# %%
report.setting(
    data=f"{dataset}: {report.describe(index)}",
    encoder=f"{encoder} at {image_size} px, frozen, {', '.join(layers)}; pixels compared at {size} px",
    training="no labels; anomalies injected by the rule of each protocol, stratified by defect type, from one seeded order; "
    f"detectors trained on {trained or 'all categories at once'}, coresets of {ratio:.0%}",
    thresholds="none: AUROC only",
    paper="the papers' own protocols, as their texts and programs state them",
)

# %% [markdown]
# ## One specification for all
#
# `contaminate(index, ratio, seed, overlap, definition, cap=)` returns a contaminated index and a *manifest*: which image
# moved, and the ratio that was realised. A manifest can be saved, sent to somebody else, and applied to their copy of the data.

# %%
noisy, manifest = contaminate(index, nominal, seed=seeds[0], overlap=False)
manifest[
    ["category", "defect", "definition", "ratio", "normals", "available", "asked", "moved", "realised_ratio"]
].head()

# %%
# NBVAL_CHECK_OUTPUT
realised(manifest).round(3)

# %% [markdown]
# ## Five protocols, one folder

# %%
# NBVAL_CHECK_OUTPUT
noise_protocols.protocol_table(index, nominal, seeds[0])

# %% [markdown]
# *All rows are called by the same nominal ratio in their papers, InReaCh's apart, which has no ratio. "Ran out": fewer anomalies
# were there than asked for. "Trained on": anomalous test images that are in the training set too.*

# %%
bars = noise_protocols.ratio_bars(noise_protocols.category_table(index, nominal, seeds[0]), nominal)

# %% [markdown]
# *The share of training images that is anomalous, per category. A fixed count contaminates a small category heavily and a large one
# hardly.*
#
# ## MeDS's published lists
#
# MeDS's authors publish the file lists of their contaminated training sets. Each loads as a manifest.

# %%
published = noise_protocols.published_table(manifests) if manifests else pd.DataFrame()
published if manifests else Markdown("Not read here: the lists are not part of this repository.")

# %% [markdown]
# *Nominal and realised ratios.*
#
# ## What the rule alone changes
#
# The same detectors, encoder and images; only the rule differs. "Clean" is the training set without injected images. The setting above
# says which categories the detectors are trained on.

# %%
base = {"profile": profile, "dataset": trained or dataset, "encoder": encoder, "image_size": image_size, "size": size}
base |= {"layers": layers, "components": components}
rules = {"clean": {"ratio": 0}, **noise_protocols.protocols(nominal)}
frames = []
for seed in seeds:
    for name, noise in rules.items():
        for method in methods:
            config = {**base, "method": method, "noise": {**noise, "seed": seed}, "seed": seed}
            config["options"] = {"ratio": ratio}
            frames.append(recorded("noise_protocols", config, noise_run).assign(protocol=name))
results = pd.concat(frames, ignore_index=True)

# %%
# NBVAL_CHECK_OUTPUT
noise_protocols.effect_table(results).reindex(list(rules))

# %% [markdown]
# *Mean AUROC over categories, in percent, ± standard deviation over seeds where there are several. With overlap the nearest neighbour of an injected test image is the image itself: its
# patches are in the bank, and its score falls to nearly nothing. That is a test of memorisation, and a memory bank without
# defence fails it by construction.*
#
# ## What holds

# %%
display(*noise_protocols.protocol_verdicts(results, base, nominal, "30_noise_protocols"))
if len(published):
    display(noise_protocols.published_verdict(published, base, "30_noise_protocols"))

# %% [markdown]
# ## Read with care
# - SoftPatch's program stops where anomalies are too few, and draws them before it sets its seed; here the ratio is capped and the
#   manifest says so.
# - InReaCh's program draws its 40 images from *all* test images, normal ones included; here all of them are anomalous, the harder
#   case.
# - Without overlap the test set loses its injected images; rows of the last table are then measured on fewer anomalies. The
#   [sweep](31_noise_sweep_mtd.ipynb) shows both readings.
# - Glass fibre and cookies, in the real profile, are small sets of consecutive frames: a test image can have a near twin in training,
#   also where overlap is ruled out.
#
# ## Goals, answered
# - The protocol table counts what each rule injects; the bars show it per category.
# - The published lists load as manifests, and their realised ratios stand beside the nominal ones.
# - The last table holds everything fixed but the rule.
#
# **Next:** [six ratios, five methods](31_noise_sweep_mtd.ipynb).
