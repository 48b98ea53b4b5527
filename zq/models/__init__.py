"""What zq knows about models: typed descriptions, name mapping, one block at a time in memory, capture.

`arch` is the vocabulary, `families` one literal per architecture, `find` picks the literal for a
config, `names` maps checkpoint keys to module names, `skeleton` builds the model on meta and fills
in one block at a time, `capture` records what transformers passes to each block.
"""
