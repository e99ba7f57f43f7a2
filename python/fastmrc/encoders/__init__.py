"""Encoders: what computes the logits that the readers search."""
