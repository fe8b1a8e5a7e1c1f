"""Measurements of engines, as functions: teacher forcing, comparisons, audits."""
