"""Layer-by-layer knowledge distillation: a quantized block learns to answer as the float block did."""
