# %% [markdown]
# # Encoders and resolutions (MuSc, Table 8)
#
# **The claim.** MuSc lives on its encoder. The paper tries eleven: plain vision transformers with small patches and
# high resolution are best, self-supervised ones (DINO, DINOv2) nearly as good as CLIP, and Swin transformers, whose
# later stages are coarse, ten points worse.
#
# **Goals**
# - run the two encoders that need no download hub, a transformer and a small CNN, at resolutions from 224 px upwards;
# - see what the resolution is worth;
# - put both beside their nearest relatives in Table 8.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set; every category is scored by itself
encoder: str = "dinov2_vits14"  # the encoder of the verdict
image_size: int = 224  # the page's own resolution, in pixels
size: int = 112  # side in pixels of the maps and masks that pixel metrics compare
categories: list = ["gear"]  # categories to score
images: int = 20  # most test images per category, drawn at random
encoders: list = ["dinov2_vits14", "efficientnet_lite0"]  # frozen backbones to compare
encoder_layers: list = [["block6", "block9"], ["reduction8", "reduction16"]]  # the stages read from each
resolutions: list = [224, 280]  # sides in pixels; multiples of the patch of 14
seeds: list = [0]  # the first one draws the images

# %%
import pandas as pd

from hclib.book import musc_figures, report
from hclib.book.experiments import recorded
from hclib.book.figures import use_style
from hclib.book.musc_experiments import categories_of, zero_shot
from hclib.book.musc_extension_tables import encoder_beside_paper, encoder_table, paper_encoders, resolution_verdict
from hclib.data.datasets import load_index

use_style()

# %% [markdown]
# ## The setting

# %%
index = load_index(dataset, categories=categories or None)
report.setting(
    data=f"{dataset}: {report.describe(index)}; at most {images} test images per category, drawn at random",
    encoder="; ".join(f"{name} ({', '.join(layers)})" for name, layers in zip(encoders, encoder_layers, strict=True))
    + f"; {resolutions} px",
    training="none",
    thresholds="none; AUROC and AUPRO only",
    paper="MVTec AD and VisA, eleven encoders, the ends of four equal stages, all test images",
)

# %% [markdown]
# ## Two encoders, several resolutions
#
# The number of patches grows with the square of the side, and the cost of mutual scoring with its fourth power: from
# 224 to 518 px 28 times. Middle layers are taken, since the end of this transformer was shaped by another task (see the
# layers in [the ablation](21_musc_ablation.ipynb)).

# %%
base = {"profile": profile, "size": size, "method": "MuSc", "images": images, "draw": seeds[0], "windows": [1, 2, 3]}
base |= {"seed": seeds[0], "options": {"degrees": [1, 3, 5]}}
configs = [
    {**base, "encoder": name, "layers": layers, "image_size": side, "dataset": category}
    for name, layers in zip(encoders, encoder_layers, strict=True)
    for side in resolutions
    for category in categories_of(dataset, categories)
]
results = pd.concat([recorded("musc_encoders", c, zero_shot) for c in configs], ignore_index=True)

# %%
# NBVAL_CHECK_OUTPUT
encoder_table(results)

# %% [markdown]
# *Percent, means over categories.*
#
# ## Over the resolution

# %%
image = results[results["level"] == "image"]
panels = {name: image[image["encoder"] == name] for name in encoders}
figure = musc_figures.sweep(panels, "image_size", dict.fromkeys(panels, "side of the image (px)"), shared=True)

# %% [markdown]
# *Image AUROC over the side of the input. Thin lines: categories; thick: their mean.*
#
# ## Table 8 as printed

# %%
paper_encoders()

# %% [markdown]
# ## Ours, the paper's, the difference
#
# The nearest relatives: our ViT-S/14 of the DINOv2 kind beside the paper's smallest DINOv2; our CNN beside Swin-B,
# which shares its coarse stages and its lack of a class token.

# %%
encoder_beside_paper(results)

# %% [markdown]
# ## What holds, what does not

# %%
resolution_verdict(
    results, {**base, "dataset": dataset, "encoder": encoder, "image_size": image_size}, "25_musc_encoders"
)

# %% [markdown]
# ## Read with care
# - The images are resized to each resolution from what is on disk; a higher resolution than that of the file adds
#   patches, not detail.
# - `dinov2_vits14` is the encoder inside a saliency model; whether its authors changed it is not stated.
#   `efficientnet_lite0` was trained on ImageNet-1k. Neither is in the paper's table.
#
# ## Goals, answered
# - The first table has both encoders at every resolution.
# - The figure shows what a higher resolution gives per category.
# - The last table puts them beside their relatives.
