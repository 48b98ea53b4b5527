"""A grid of quantizations, measured, and what is on its front.

grid        which cells there are, as recipes; no torch
subjects    the models, their tokens, and what all figures depend on
store       results.jsonl: one line per finished cell, appended
measure     one cell: quantize by the real pipeline, load, compare, count bytes
run         all cells that are missing, over devices
front       intervals by bootstrap, Pareto fronts, which width wins at which budget
summary     the findings in words and tables
plots, page     figures for a paper; one HTML file
report      writes these
"""
