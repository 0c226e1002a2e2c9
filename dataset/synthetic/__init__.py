"""Synthetic scenes: simple solids in rooms and on open ground, with exact depth and true captions."""

from dataset.synthetic.render import GENERATOR_VERSION, HELD_OUT_SEED, SceneBatch, render_batch

__all__ = ["GENERATOR_VERSION", "HELD_OUT_SEED", "SceneBatch", "render_batch"]
