# %% [markdown]
# # Quickstart: one memory bank, one heat map, one number
#
# An anomaly detector of the PatchCore family has no training in the usual sense. A frozen, pretrained encoder turns
# every normal image into a grid of patch vectors; a *memory bank* keeps a well-spread tenth of them (the *coreset*);
# the score of a new patch is its distance to the nearest one kept. This page does that once, on data that come with
# the book, and then shows the question that the rest of the book is about: what happens when nobody says which
# product an image shows?
#
# **Goals**
# - look at the embedded demo data: six products, normal and defective;
# - see what the encoder sees, before any anomaly detection;
# - build one memory bank, draw heat maps, and compute one number;
# - see why one threshold for all products is a problem.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run belongs to
dataset: str = "demo"  # name, folder in MVTec layout, or index .csv
category: str = "gear"  # the product that gets a memory bank
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
seeds: list = [0]  # the first one seeds the coreset

# %%
import pandas as pd
from skimage import data

from hclib.book import figures
from hclib.book.experiments import pick_examples
from hclib.data.datasets import load_index
from hclib.evaluation.metrics import image_metrics
from hclib.evaluation.thresholds import best_f1_threshold
from hclib.kernels.encoders import load_encoder
from hclib.methods import PatchCore

figures.use_style()

# %% [markdown]
# ## Look at the data
#
# Every data set in this book is one table, the *index frame*: a row per image with its path, mask, category, split,
# label and defect type. Nothing else describes a data set.

# %%
index = load_index(dataset)
index.groupby(["category", "split", "label"]).size().unstack(["split", "label"], fill_value=0)  # fmt: skip

# %%
sheet = figures.contact_sheet(index)

# %% [markdown]
# *Each row is one category: normal test images left, defective ones right, the ground-truth mask outlined.* Three
# categories are photographed textures, three are rendered products. Defects range from obvious to hard.
#
# ## What the encoder sees
#
# The default encoder is a small vision transformer (DINOv2 ViT-S/14). It cuts an image into patches of 14 x 14 pixels
# and describes each by 384 numbers. Projected on the first principal component over one photograph, these numbers
# already tell the animal from the background, although nobody ever showed them a cat's outline. A detector that
# compares patches compares *things*, not grey values.

# %%
backbone = load_encoder(encoder, image_size)
photograph = data.chelsea()
component = figures.first_component(backbone, photograph)
picture = figures.side_by_side(photograph, component, "photograph", "first principal component of its patches")

# %% [markdown]
# ## Build one memory bank
#
# `extract` streams the images through the encoder once and keeps the result on disk; running this cell again costs
# nothing. `fit` sees only normal training images. `score` returns one value per patch and one per image.

# %%
product = load_index(dataset, categories=[category])
features = backbone.extract(product)
is_train = (product["split"] == "train").to_numpy()
train, test = features.subset(is_train), features.subset(~is_train)
detector = PatchCore(seed=seeds[0]).fit(train)
scores = detector.score(test)
print(f"{len(train)} images, {len(detector.bank.points)} patches kept, {scores.patch.shape[1:]} patches an image")

# %% [markdown]
# ## One heat map
#
# Four defective images, from the least to the most anomalous by score. The colour scale runs from half to
# one and a half times the decision threshold: dark is normal, orange and brighter is over the threshold.

# %%
labels = test.index["label"].to_numpy()
threshold = best_f1_threshold(labels, scores.image)
rows = pick_examples(test.index, scores.image, 4)
maps = scores.subset(rows).upsample(image_size)
panel = figures.heat_maps(test.index.iloc[rows], maps, [threshold] * len(rows))

# %% [markdown]
# ## One number
#
# The image AUROC is the probability that a random defective image scores higher than a random normal one: 0.5 is
# guessing, 1 is perfect. It needs no threshold. F1 needs one, and here, as in the papers, it is the best possible one,
# chosen on the test labels ("oracle"). Every table in this book says so where it applies.

# %%
# NBVAL_CHECK_OUTPUT
metrics = image_metrics(labels, scores.image)
print(f"{category}: image AUROC {metrics['auroc']:.3f}, best F1 {metrics['f1_max']:.3f}")

# %% [markdown]
# ## The problem with one threshold
#
# The same detector on two other products gives scores on another scale. A threshold that suits one product lets the
# defects of the next one pass, or rejects its good parts. With the class labels at hand each product gets its own
# threshold. Without them, HierCore first finds the groups itself.

# %%
rest = [name for name in sorted(index["category"].unique()) if name != category][-2:]
scales = {category: pd.Series(scores.image[labels == 0])}
for name in rest:
    part = backbone.extract(load_index(dataset, categories=[name]))
    normal = part.subset(((part.index["split"] == "test") & (part.index["label"] == 0)).to_numpy())
    bank = PatchCore(seed=seeds[0]).fit(part.subset((part.index["split"] == "train").to_numpy()))
    scales[name] = pd.Series(bank.score(normal).image)
pd.DataFrame({name: values.describe()[["min", "50%", "max"]] for name, values in scales.items()}).round(2)

# %% [markdown]
# *Scores of normal test images, minimum, median and maximum: a "normal" score of one product can be an alarm for
# another.*
#
# ## Goals, answered
# - The demo data hold six products with masks; the table and the contact sheet show them.
# - The encoder separates objects from background without any training here.
# - One memory bank gave a heat map and the AUROC printed above.
# - Score scales differ between products. [Label scenarios](10_hiercore_label_scenarios.ipynb) measures what that costs
#   and what HierCore does about it.
#
# **Next:** [the data sets](01_datasets.ipynb), or point `hclib detect TRAIN_DIR TEST_DIR --out DIR` at your own images.
