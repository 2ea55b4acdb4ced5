# %% [markdown]
# # Clustering, semantic layer, wrong labels: what HierCore depends on
#
# **The question.** HierCore's program offers three clusterings (`finch`, `kmeans`, `dbscan`), a layer for the semantic vectors and
# a switch for known classes. The paper reports FINCH on the last stage. Do the others do as well? And if class labels are known but
# some are *wrong*, is it better to use them or to throw them away?
#
# A wrong group has two costs. An image that is routed to another product's bank gets scores on the wrong scale; and a group of two
# products needs one threshold for both.
#
# **Goals**
# - compare clusterings, numbers of clusters and semantic layers: groups, misrouted images, F1 with and without classes;
# - flip a share of the training labels and compare K→K and K→U with U→U, which sees none;
# - say what routing errors cost.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set, all of its categories together
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
size: int = 224  # side in pixels of the maps and masks that pixel metrics compare
ratio: float = 0.1  # coreset ratio
train_per_category: int = 20  # training images of each category, a seeded draw
n_clusters: list = [3, 6, 12]  # numbers of clusters for k-means
semantic_layers: list = ["block6", "block9"]  # feature maps whose mean is tried as the image token
flips: list = [0, 0.2, 0.4]  # shares of wrong training labels
seeds: list = [0]  # one draw and coreset per seed

# %%
import pandas as pd
from IPython.display import display

from hclib.book import clustering_tables as tables
from hclib.book import figures, report
from hclib.book.experiments import recorded
from hclib.data.datasets import load_index

figures.use_style()

# %%
report.setting(
    data=f"{dataset}: {report.describe(load_index(dataset))}; at most {train_per_category} training images of each category drawn",
    encoder=f"{encoder} at {image_size} px, frozen",
    training="no class labels, except K→K and K→U in the last part",
    thresholds="chosen on the test labels (oracle): per class where classes are known, else per routed group",
    paper="HierCore's README lists the options; the paper reports FINCH on layer4 of a Wide-ResNet-50-2 only",
)

# %% [markdown]
# ## Clusterings
#
# Every row trains HierCore without labels. *Misrouted* images sit in a bank that mostly serves another category. *Known* F1 takes
# a threshold per class, *unknown* one per group.

# %%
base = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size, "size": size}
base |= {"method": "HierCore", "train_per_category": train_per_category, "rules": tables.RULES, "pixel": False}


def run(name, options, **extra):
    """Return the Records of one setting over all seeds."""
    config = {**base, **tables.SCENARIOS["U→U"], **extra, "options": {"ratio": ratio, **options}}
    frames = [recorded("clusterings", {**config, "seed": s}, tables.routed_scenario) for s in seeds]
    return pd.concat(frames).assign(setting=name)


# %%
settings = dict(tables.CLUSTERINGS)
settings |= {f"k-means, {k}": {"clustering": "kmeans", "clustering_options": {"n_clusters": k}} for k in n_clusters}
results = pd.concat([run(name, options, pixel=True) for name, options in settings.items()])
labelled = run("class labels given", {}, pixel=True, **tables.SCENARIOS["K→U"])
methods = tables.known_and_unknown(pd.concat([results, labelled]), ["setting"])

# %%
# NBVAL_CHECK_OUTPUT
tables.spread_table(methods, ["setting"])

# %% [markdown]
# *Image level; ratio: F1 unknown over F1 known. FINCH, and k-means without a number, take the highest silhouette. Mean ± standard
# deviation over seeds (a draw of the training images and a coreset each). AUROC is the mean of the categories'.*
#
# The same at pixel level, where every pixel of a misrouted image counts:

# %%
# NBVAL_CHECK_OUTPUT
tables.spread_table(tables.known_and_unknown(pd.concat([results, labelled]), ["setting"], "pixel"), ["setting"])

# %% [markdown]
# Compare a row with too few groups and one with too many: a group that mixes products costs the threshold, a product that is spread
# over groups costs almost nothing.
#
# ## Semantic layers
#
# The token that decides the group: the encoder's own, or the mean over positions of a feature map.

# %%
layers = {"token": {}} | {f"mean of {layer}": {"semantic_layer": layer} for layer in semantic_layers}
ways = {"FINCH": {}, "HDBSCAN": {"clustering": "hdbscan"}}
frames = [run(f"{way}, {layer}", {**a, **b}) for way, a in ways.items() for layer, b in layers.items()]
tables.spread_table(tables.known_and_unknown(pd.concat(frames), ["setting"]), ["setting"])

# %% [markdown]
# ## What routing errors cost
#
# The same banks, trained with correct labels, scored twice: with the image's own bank (K→K), and with the bank that its token is
# nearest to (K→U). Class thresholds in both, so the difference is the routing alone.

# %%
both = {name: run(name, {}, **tables.SCENARIOS[name]) for name in ("K→K", "K→U")}
rows = {name: part[part["thresholds"] == "class"].groupby("category")["f1"].mean() * 100 for name, part in both.items()}
share = 100 * both["K→U"][both["K→U"]["thresholds"] == "class"].groupby("category")["misrouted"].mean()
costs = pd.DataFrame({"misrouted, %": share, "F1, own bank": rows["K→K"], "F1, routed": rows["K→U"]})
costs.assign(cost=costs["F1, own bank"] - costs["F1, routed"]).round(1)

# %% [markdown]
# ## Wrong labels
#
# A share of the training labels is replaced by another category, at random. K→K then builds contaminated banks *and* looks images
# up by their class; K→U routes by keys that wrong members have dragged towards each other. U→U never sees a label.

# %%
frames = [
    run(name, {}, **tables.SCENARIOS[name], flip=flip).assign(scenario=name, flip=flip)
    for name in ("K→K", "K→U")
    for flip in flips
]
frames.append(results[results["setting"] == "FINCH"].assign(scenario="U→U", flip=0.0))
wrong = tables.flip_table(pd.concat(frames))

# %%
# NBVAL_CHECK_OUTPUT
wrong.groupby(["scenario", "flip"])[["F1", "auroc", "misrouted"]].mean().round(3)

# %%
panel = tables.flip_curves(wrong)

# %% [markdown]
# *Image F1 and AUROC against the share of wrong training labels; bars are standard deviations over seeds. Dashed: no labels at all.*
#
# ## What holds, what does not

# %%
display(*tables.clustering_verdicts(methods, wrong, base))

# %% [markdown]
# ## Goals, answered
# - The first two tables compare clusterings and semantic layers.
# - The cost table says what routing errors cost with everything else equal.
# - The curves show where wrong labels become worse than none.
