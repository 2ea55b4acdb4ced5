# %% [markdown]
# # Status: versions, data and Records
#
# With which software the pages of this edition were made, and from which Records their numbers come.
#
# **Goals**
# - know the versions behind the numbers;
# - see every set of Records with its settings, run time, and whether the code has changed since.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run belongs to
profiles: list = ["demo", "real"]  # profiles whose Records are listed

# %%
from hclib.book import report

# %% [markdown]
# ## Versions

# %%
report.versions()

# %% [markdown]
# ## Records
#
# A Record is one configuration, computed once. `seconds` is the time that its numbers took on the machine that computed them: two
# shared CPU cores, so read ratios, not absolute values. `code unchanged` says how many were made by exactly today's source of the
# rooms data, kernels, methods and evaluation (comments and docstrings apart).

# %%
report.record_status(profiles)

# %% [markdown]
# ## Goals, answered
# - The first table lists the versions.
# - The second lists the Records behind the pages.
