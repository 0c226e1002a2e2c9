"""Evaluation: named alignments, metrics, baselines, and the measures of the embedded model as rows of one table."""
