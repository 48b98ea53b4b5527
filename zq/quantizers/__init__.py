"""Methods that quantize a block, one algorithm a file; `zq/methods.py` lists them."""
