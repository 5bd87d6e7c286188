"""The objective of the paper: advantages, ratios, surrogates, KL, reductions and recipes."""
