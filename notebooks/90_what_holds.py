# %% [markdown]
# # What holds
#
# Every claim of a paper that this book has tested, with its verdict, the numbers behind it, and the page that tests it. The
# verdicts are Records written by those pages; this page only lists them.
#
# **Goals**
# - see at a glance which claims hold here, and on which data;
# - find the page with the evidence.

# %% tags=["parameters"]
profile: str = "demo"  # which set of Records this run belongs to
profiles: list = ["demo", "real"]  # profiles whose claims are listed

# %%
from hclib.book import report

claims = report.claims(profiles)

# %% [markdown]
# ## At a glance
#
# One row per claim, one column per profile. `demo` is rendered data: there a verdict shows that the effect can be
# reproduced, not that it is true of factories. `real` is the evidence.

# %%
report.claims_at_a_glance(claims)

# %% [markdown]
# ## Claims, verdicts, evidence

# %%
report.claims_in_full(claims)

# %% [markdown]
# ## How a verdict is made
#
# A claim is turned into a condition on numbers before the run (for example: the ratio of F1 without class labels to F1 with them
# is at least 0.99 at both levels). The page computes the numbers, the condition decides, and the sentence with the numbers in it is
# stored. "Not decided" means that the data here cannot tell.
#
# ## Goals, answered
# - The first table shows what holds where.
# - Every entry of the second names its page.
