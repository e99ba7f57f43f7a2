"""Readers: question and passages in, answer out."""
