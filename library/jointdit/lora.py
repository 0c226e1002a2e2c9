"""LoRA on the depth modality only (Hu et al., arXiv 2106.09685; JointDiT, section 3.1).

Shape suffixes: M modality (RGB, depth), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.modality import MODALITIES

DEPTH = MODALITIES["depth"].index
ALPHA_OVER_RANK = 0.5  # the released add-ons have alpha = rank / 2 everywhere


class LoRALinear(nn.Linear):
    """A frozen linear layer whose depth modality also sees a trained low-rank branch: W x + 1/2 B A x.

    The first axis of the input is the modality. A starts Xavier-uniform and B at zero: a fresh branch changes nothing.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, rank: int):
        super().__init__(in_features, out_features, bias=bias)
        self.lora_A = nn.Linear(in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (M, ..., in_features) to (M, ..., out_features)."""
        out = self.frozen(x)
        out[DEPTH] += ALPHA_OVER_RANK * self.lora_B(self.lora_A(x[DEPTH]))
        return out

    def frozen(self, x: Tensor) -> Tensor:
        """The layer without its branch; replaced where the weight is packed into fewer bits."""
        return F.linear(x, self.weight, self.bias)

    def reset_branch(self, generator: torch.Generator) -> None:
        """Start afresh: A Xavier-uniform, B zero."""
        nn.init.xavier_uniform_(self.lora_A.weight, generator=generator)
        nn.init.zeros_(self.lora_B.weight)


def add_branch(parent: nn.Module, name: str, *, rank: int) -> None:
    """Put a `LoRALinear` in the place of the linear layer `parent.name`, keeping its weights' names."""
    layer = parent.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{name} is no linear layer")
    owner, _, leaf = name.rpartition(".")
    wrapped = LoRALinear(layer.in_features, layer.out_features, bias=layer.bias is not None, rank=rank)
    setattr(parent.get_submodule(owner) if owner else parent, leaf, wrapped)
