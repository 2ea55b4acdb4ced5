# %% [markdown]
# # How much do the knobs of MeDS matter, and how long may a student train? (MeDS, Figures 2, 4, 5, 6 and 8)
#
# **The claim.** The memory by itself depends on the share of images it holds and on how many memories there are; the final model does so much less. It hardly
# depends on the length of distillation, the critical value k or the robust maximum either. That matters: with an unlabelled, contaminated set there is nothing to tune on.
#
# **Goals**
# - vary five options one at a time, everything else fixed, at one noise ratio;
# - vary the length of training: a student alone remembers anomalies only when it is trained long enough, so when does it break?
# - say for each option how far the final model moves.

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
noise: float = 0.4  # injected anomalies per normal training image
seeds: list = [0]  # of the injected images and of the training
student: dict = {"width": 32, "depth": 2, "tokens": 32, "steps": 40, "learning_rate": 0.004}  # of StudentDetector
meds: dict = {"memory_layers": ["block9"], "distill_steps": 40, "passes": 4}  # further options of MeDS
ratios: list = [0.1, 0.5]  # share of the images in a memory
ensembles: list = [1, 100]  # memories
distillations: list = [20, 40]  # steps of stage 2
critical: list = [1.0, 3.0]  # final critical value k
percents: list = [1.0, 10.0]  # share of the patches in the robust maximum, percent
lengths: list = [20, 40]  # steps of the student alone and of stage 3
clean_lengths: list = [20, 40]  # those that are also measured without noise
alone_lengths: list = []  # further lengths for the student alone

# %%
import pandas as pd
from IPython.display import display

from hclib.book import figures, meds_review_tables, meds_run_figures, meds_run_tables
from hclib.book.meds_runs import alone, meds_run, memory_alone, runs, varied, with_meds
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
    thresholds="none: AUROC, AP and AUPRO, means over the categories",
    paper="MVTec AD, Dinomaly, 10,000 steps; the figures print no numbers, so the statements are compared, not the values",
)

# %% [markdown]
# ## When does a student alone break?
#
# A network learns what is common before what is rare. So noise does little harm to a short training, and much to a long one; but nobody can see from an unlabelled
# set when to stop.


# %%
def measured_runs(settings: list, ratio: float = noise) -> pd.DataFrame:
    """Return the Records of the settings at one noise ratio."""
    return pd.concat(
        [recorded("meds_runs", config, meds_run) for config in runs(base, settings, [ratio], seeds)], ignore_index=True
    )


def of_length(steps: int) -> list:
    """Return the student alone and with MeDS, trained for so many steps; distillation keeps its length."""
    longer = {**student, "steps": steps}
    return [alone(longer)] + ([with_meds(longer, meds)] if steps not in alone_lengths else [])


trained = [measured_runs(of_length(steps)) for steps in lengths + alone_lengths]
trained += [measured_runs(of_length(steps), 0) for steps in clean_lengths]
trained = pd.concat(trained, ignore_index=True)
figure = meds_run_figures.length_curves(trained)

# %% [markdown]
# *Orange: with noise. Blue: without. Dashed: the student alone. Solid: with MeDS, the steps being those of its last stage.*

# %%
meds_run_tables.length_table(trained)

# %%
keys = {"profile": profile, "dataset": dataset, "encoder": encoder, "image_size": image_size}
place = {"source": "MeDS, section 5.4 and Figure 5", "page": "43_meds_hyperparameters"}
meds_run_tables.length_verdict(trained, keys, **place)

# %% [markdown]
# ## One option at a time
#
# Everything else stays as in the setting. Grey is the memory of stage 1 as a detector, light blue the distilled student of stage 2, black the final model.


# %%
def finals(option: str, values: list) -> pd.DataFrame:
    """Return what the final model does for every value of an option."""
    settings = [with_meds(student, varied(meds, option, value)) for value in values]
    return meds_review_tables.option_rows(measured_runs(settings), option, "final")


def memories(option: str, values: list) -> pd.DataFrame:
    """Return what the memory of stage 1 does for every value of an option."""
    settings = [memory_alone(varied(meds, option, value)) for value in values]
    return meds_review_tables.option_rows(measured_runs(settings), option, "memory")


# %%
distilled = [
    with_meds(student, {**varied(meds, "distill_steps", steps), "selection": False}) for steps in distillations
]
distilled = meds_review_tables.option_rows(measured_runs(distilled), "distill_steps", "distilled")
panels = {
    "memory share ρ": pd.concat([memories("ratio", ratios), finals("ratio", ratios)]),
    "memories B": pd.concat([memories("ensembles", ensembles), finals("ensembles", ensembles)]),
    "distillation steps": pd.concat([distilled, finals("distill_steps", distillations)]),
    "critical value k": finals("k", critical),
    "top patches in %": finals("percent", percents),
}
panels = {title: rows for title, rows in panels.items() if rows["value"].nunique() > 1}  # the others were not varied
figure = meds_run_figures.option_panels(panels)

# %% [markdown]
# *Values are evenly spaced, whatever their size. Left to right: Figures 2, 4, 5, 6 and 8 of the paper. In the last panel the image score changes with the selection, since both are
# the mean of the highest patches.*

# %%
meds_review_tables.option_table(panels)

# %% [markdown]
# ## The claims

# %%
statements = {
    "memory share ρ": (
        "memory-share",
        "The final model hardly depends on the share of images in a memory.",
    ),
    "memories B": ("memory-count", "The final model hardly depends on the number of memories."),
    "distillation steps": ("distillation-length", "The final model hardly depends on the length of distillation."),
    "critical value k": ("critical-value", "The final model hardly depends on the critical value k."),
    "top patches in %": (
        "robust-maximum",
        "The final model hardly depends on the share of patches in the robust maximum.",
    ),
}
place["source"] = "MeDS, Figures 2, 4, 5, 6 and 8"
verdicts = [
    meds_review_tables.spread_verdict(panels[t], *words, 2, keys, **place)
    for t, words in statements.items()
    if t in panels
]
display(*verdicts)

# %% [markdown]
# *"Hardly" is 2 points of image AUROC between the best and the worst value tried.*
#
# ## Read with care
# - One draw of the noise, one training for each point: the curves carry the scatter of a single run.
# - The critical value changes how much is kept and how clean that is, in opposite directions; [the page on selection](45_meds_selection.ipynb) shows both.
# - Lengths are counted in steps of the small student here; how many the paper's student needs to remember a set depends on its size and on the set's.
#
# ## Goals, answered
# - The five panels and their table vary one option each.
# - The first figure has the length as its axis and noise as its colour; the verdict below it says where the student alone breaks.
# - The verdicts give the largest movement of the final model for each option.
