"""Evaluation: what a quantized checkpoint lost. Functions of models, none of which knows of files.

A decoder is a function input_ids [B, L] -> logits [B, L, V]; an encoder is a function
(input_ids, attention_mask) -> last hidden state [B, L, H]; `adapt` makes both from transformers.

    from zq.eval.adapt import decoder_logits, encode_sentences, encoder_states, split_sentences
    from zq.eval.divergence import divergence
    from zq.eval.encoder import encoder_agreement
    from zq.eval.perplexity import perplexity

Nothing is exported from here: a function `zq.eval.perplexity` would hide the module of that name.
"""
