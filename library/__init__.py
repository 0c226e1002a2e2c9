"""JointDiT: joint RGB-and-depth diffusion transformer."""

from library.flux.text import TextFeatures
from library.jointdit.addons import load_jointdit

__all__ = ["TextFeatures", "load_jointdit"]
