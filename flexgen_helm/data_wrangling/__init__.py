"""Data wrangling (Narayan et al. 2022, "Can Foundation Models Wrangle Your Data?") as a scenario of HELM's."""
