# %% [markdown]
# # How fast is it? (FUN-AD, supplementary Table 2)
#
# **The claim.** At inference FUN-AD has no memory: one pass of a small network per patch. SoftPatch searches a coreset for every
# patch, InReaCh searches everything that its channels kept. On an RTX 4090 and VisA the authors measure 113 images per second
# against 22.5 and 8.8: factors of 5 and 13.
#
# Frames per second belong to a machine. Ratios measured in one run on one machine can be compared, if it is said what they
# include: the encoder is the same for all, and the more it costs, the closer all methods come to each other.
#
# **Goals**
# - measure scoring time of the three methods on the same features, in one process;
# - add the encoder, and compare the ratios with the paper's.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo:brick"  # data set; NAME:CATEGORY takes one category
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
layers: list = ["block9"]  # the encoder's layers that every method sees
repeats: int = 3  # scoring runs, the fastest counts
epochs: int = 1  # of FUN-AD: speed does not depend on training
seeds: list = [0]  # the first one seeds everything

# %%
from hclib.book import figures, noise_ablation, report
from hclib.book.noise_experiments import recorded
from hclib.data.datasets import load_index

figures.use_style()
index = load_index(dataset.split(":")[0], categories=dataset.split(":")[1:] or None)

# %% [markdown]
# ## The setting

# %%
report.setting(
    data=f"{dataset}: {report.describe(index)}",
    encoder=f"{encoder} at {image_size} px, frozen, {', '.join(layers)}, all channels; on a CPU",
    training="10 % anomalies per normal image injected, no overlap",
    thresholds="none",
    paper="VisA, RTX 4090; FUN-AD with DINO ViT-B/8, the others with Wide-ResNet-50-2",
)

# %% [markdown]
# ## The measurement
#
# FUN-AD has the supplement's network here: all channels, layers of 1024 and 128. SoftPatch keeps a tenth of the patches,
# InReaCh all patches of its channels, as their programs do.
#
# What should come out can be counted. A patch of $C$ channels costs FUN-AD a product with an adaptor of $D^2$ weights ($D$: token and
# patch together) and with layers of $1024 D + 1024 \cdot 128$; for $D = 768$ that is about 1.5 million multiplications. A search costs $M C$ for a
# bank of $M$ entries: with $C = 384$ the two are equal at a bank of about 4,000 entries. Below that the memory bank is *faster* than
# the network; above it, slower in proportion to its size. SoftPatch's bank is a tenth of the training patches, so the break-even is a
# training set of about 150 images at this resolution; InReaCh's lies at a tenth of that. The paper's training sets (VisA: 400 to 900
# images a category, at 784 patches each) lie far above both, which is why its factors are large.
#
# Every method scores the same test features, already in memory, several times; the fastest run counts. The encoder is timed on sixteen
# images without its cache. Seconds are those of whatever else the machine was doing, which is why only ratios are discussed.

# %%
base = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size, "layers": layers}
funad = {"epochs": epochs, "refresh": None, "tokens": 64, "memory_patches": 4096}
methods = {"FunAD": funad, "SoftPatch": {"ratio": 0.1}, "InReaCh": {"ratio": 1.0}}
noise = {"ratio": 0.1, "overlap": False, "seed": seeds[0]}
config = {**base, "noise": noise, "methods": methods, "repeats": repeats, "seed": seeds[0]}
results = recorded("throughput", config, noise_ablation.throughput_run)
encoding = recorded("encoding_seconds", {**base, "seed": seeds[0]}, noise_ablation.encoding_seconds)

# %%
table = noise_ablation.throughput_table(results, encoding["encode_seconds_per_image"].iloc[0])
table

# %% [markdown]
# *Images per second in this run; ratios to SoftPatch, without and with the time of the encoder; the paper's ratios, which include
# it; the difference.*
#
# ## Where the time goes

# %%
parts = results.set_index(results["method"].replace("FunAD", "FUN-AD"))["seconds_per_image"].mul(1000).rename("scoring")
parts = parts.to_frame().assign(encoder=encoding["encode_seconds_per_image"].iloc[0] * 1000)
ax = parts[["encoder", "scoring"]].plot.barh(stacked=True, figsize=(7, 2.2), color=["#999999", "#D55E00"])
ax.set_xlabel("milliseconds per image")
ax.set_ylabel("")
ax.invert_yaxis()
legend = ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=2)

# %% [markdown]
# *Time per image. The grey part is the same for all three methods.*
#
# ## What holds

# %%
noise_ablation.throughput_verdict(table, base, "35_funad_throughput")

# %% [markdown]
# ## Read with care
# - The sizes of the memory banks grow with the training set, and with them the times of SoftPatch and InReaCh; FUN-AD's does not. On
#   a small training set the difference is small.
# - Without an accelerator the encoder dominates. On the authors' GPU it does not.
# - FUN-AD trains for minutes to hours before it is fast; the memory banks are built in seconds. For a line that changes products often,
#   that is the cost that counts, and the table does not show it.
# - A coreset makes any memory bank faster at a price in accuracy that the reader can choose
#   ([coreset ratio](16_hiercore_coreset_ratio.ipynb)); InReaCh with a coreset of a tenth, as in the sweeps of this chapter, would stand
#   near SoftPatch.
#
# ## What it means
#
# The claim of the table is about *searching*. Where the bank is large, a network that compresses it into fixed weights wins, and the
# factor grows with the training set. Where it is small, or where the encoder runs on the same slow processor, nobody notices.
#
# ## Goals, answered
# - The table gives images per second and ratios, with and without the encoder, beside the paper's.
#
# **Next:** [what FUN-AD's parts contribute](../demo/34_funad_ablation.ipynb).
