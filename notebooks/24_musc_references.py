# %% [markdown]
# # With a few normal images: MuSc and MuSc+ (MuSc, Tables 15 and 16)
#
# **The claim.** If some normal reference images are at hand, they can simply join the pile; that changes little,
# because the unlabelled images already hold plenty of normal patches (Table 15: 97.8 % without, 97.8 % with eight). Or
# the unlabelled images can be left out and patches measured by their nearest reference patch, which the paper calls
# MuSc+ (Table 16): that is worse with few references and better with many.
#
# **Goals**
# - let k reference images join the scoring (Table 15);
# - score by the references alone (Table 16);
# - find out where the two cross.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run reads and writes
dataset: str = "demo"  # data set; every category is scored by itself
encoder: str = "dinov2_vits14"  # frozen backbone
image_size: int = 224  # side in pixels that images are resized to
size: int = 112  # side in pixels of the maps and masks that pixel metrics compare
categories: list = ["blister", "brick", "gear"]  # categories to score; [] for all
layers: list = ["block6", "block9"]  # stages of the encoder; the paper ends four equal stages
images: int = 40  # most test images per category, drawn at random
references: int = 16  # normal training images per category that references are drawn from
shots: list = [0, 1, 4, 16]  # numbers k of references
seeds: list = [0, 1, 2]  # draws of the references; the first one draws the images

# %%
import pandas as pd
from IPython.display import display

from hclib.book import musc_figures, report
from hclib.book.experiments import recorded
from hclib.book.figures import use_style
from hclib.book.musc_experiments import categories_of
from hclib.book.musc_extension_tables import reference_table, reference_verdicts
from hclib.book.musc_extensions import reference_images
from hclib.data.datasets import load_index

use_style()

# %% [markdown]
# ## The setting

# %%
index = load_index(dataset, categories=categories or None)
report.setting(
    data=f"{dataset}: {report.describe(index)}; at most {images} test images per category, drawn at random; references are "
    f"drawn from at most {references} normal training images",
    encoder=f"{encoder} at {image_size} px, frozen; {', '.join(layers)}",
    training="none; k normal reference images",
    thresholds="none; AUROC only",
    paper="MVTec AD, CLIP ViT-L/14-336 at 518 px",
)

# %%
base = {"profile": profile, "encoder": encoder, "image_size": image_size, "size": size, "method": "MuSc"}
base |= {"layers": layers, "images": images, "references": references, "draw": seeds[0], "windows": [1, 2, 3]}
job = {"degrees": [1, 3, 5], "shots": shots, "seeds": seeds}
configs = [{**base, **job, "dataset": name} for name in categories_of(dataset, categories)]
results = pd.concat([recorded("musc_references", c, reference_images) for c in configs], ignore_index=True)

# %% [markdown]
# ## Table 15 here: references join the pile
#
# With $N$ test images and $k$ references, a patch of a test image is compared with $N - 1 + k$ images, and the nearest
# 30 % of them count.

# %%
# NBVAL_CHECK_OUTPUT
reference_table(results, "MuSc", 15)

# %% [markdown]
# *AUROC in percent, mean over categories, ± standard deviation over draws of the references (where k is all that may be
# drawn, every draw is the same). "Change" is against k = 0, the paper's change likewise.*
#
# ## Table 16 here: references alone
#
# A patch scores its distance to the nearest patch of any reference image (Eqs. 9 to 11); the other test images only
# take part in the re-scoring.

# %%
# NBVAL_CHECK_OUTPUT
reference_table(results, "MuSc+", 16)

# %% [markdown]
# *As above; the change is against MuSc without references.*
#
# ## Where they cross
#
# MuSc should be a flat line, MuSc+ a rising one.

# %%
few = results[(results["shots"] > 0) & (results["level"] == "image")]
panels = {name: few[few["variant"] == name] for name in ("MuSc", "MuSc+")}
figure = musc_figures.sweep(panels, "shots", dict.fromkeys(panels, "reference images k"), logarithmic=True, shared=True)

# %% [markdown]
# *Image AUROC over the number of reference images, means over draws. Thin lines: categories; thick: their mean.*
#
# ## A category at a time

# %%
most = few[few["shots"] == max(shots)].groupby(["category", "variant"], sort=False)["auroc"].mean().unstack() * 100
start = results[(results["shots"] == 0) & (results["level"] == "image")].set_index("category")["auroc"] * 100
most.assign(**{"MuSc, k = 0": start}).round(1).rename(columns="{} ".format).rename_axis(columns=f"k = {max(shots)}")

# %% [markdown]
# ## What holds, what does not

# %%
display(*reference_verdicts(results, {**base, "dataset": dataset}, "24_musc_references"))

# %% [markdown]
# ## Read with care
# - References are normal for sure, unlabelled images are not. Where anomalies are the majority of the test set, a
#   handful of references changes the balance more than the paper's table suggests.
# - Training and test images of some sets were not taken under the same conditions; a test patch can then be far from
#   every reference although it is normal.
#
# ## Goals, answered
# - The first table shows what k references add to MuSc.
# - The second shows what they are worth alone.
# - The figure shows from which k on the unlabelled images are no longer needed.
