"""Latency, throughput and memory of a checkpoint, beside its original in transformers, eager and compiled.

shapes      configs of well-known models, by name
synthetic   a model of a config with random weights, packed layer by layer
subject     what is measured: a checkpoint or a shape, and its original
task        one pass: a prompt, generated tokens, a batch through an encoder
clock       medians, peak memory
run         one child process for each engine; rows as they come
results     the JSON, ratios, the environment
plots       the figure
"""
