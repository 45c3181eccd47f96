"""Parseval networks: weight matrices are kept near tight frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from robustlens.results.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Parseval:
    """W ← (1 + β) W − β W Wᵀ W for every Linear and Conv2d layer: a gradient step on β/4·‖W Wᵀ − I‖_F².

    Every singular value moves by σ ← (1 + β) σ − β σ³, towards 1 from anywhere in (0, √(1 + 2/β)); 0 and 1 are fixed.
    Where W has more rows than columns it is the columns that become orthonormal. W is the kernel as a matrix
    (c_out, c_in·k_h·k_w), each group of channels by itself.

    An image's pixel is seen by up to k_h·k_w windows, so a convolution whose W has norm 1 can stretch the image by
    √(k_h·k_w). The paper therefore divides its output by that; with ``overlap`` the division is part of the kernel,
    K = W / √(k_h·k_w), and the layer is a contraction.

    The authors retract a random part of the rows, to save time; all rows are taken here, which is what the equation
    says. Their convex combinations in place of residual sums are an architecture and not part of it. It costs two
    matrix products a layer and step, small beside one forward pass.

    Attributes:
        beta: β.
        overlap: make convolutions themselves contractions; without, only their matrices are.
        every: "step" or "epoch".

    Raises:
        InputError: β outside [0, 1).
    """

    name: ClassVar[str] = "parseval"
    reference: ClassVar[str] = "Cissé et al. 2017, arXiv 1704.08847, §4, algorithm 1"

    beta: float = 3e-4
    overlap: bool = True
    every: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise InputError("parseval beta", expected="a number in [0, 1)", got=str(self.beta), fix="The paper: 3e-4.")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(beta=0.05, overlap=False, every="epoch")]

    @torch.no_grad()
    def apply(self, model: nn.Module, x: Tensor) -> Mapping[str, float]:
        """One retraction of every layer; "parseval_gap": the largest ‖W Wᵀ − I‖_F over the layers before it.

        Of a tall W it is ‖Wᵀ W − I‖_F, which can reach 0.
        """
        gaps = []
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                weight, groups, scale = module.weight, 1, 1.0
                if isinstance(module, nn.Conv2d):
                    groups = module.groups
                    scale = weight[0, 0].numel() ** 0.5 if self.overlap else 1.0
                w = scale * weight.reshape(groups, weight.shape[0] // groups, -1)
                wide = w.shape[1] <= w.shape[2]
                gram = w @ w.mT if wide else w.mT @ w
                gaps.append((gram - torch.eye(gram.shape[-1]).to(gram)).norm())
                cubed = gram @ w if wide else w @ gram
                retracted = (1 + self.beta) * w - self.beta * cubed
                weight.copy_((retracted / scale).reshape(weight.shape))
        return {"parseval_gap": float(torch.stack(gaps).max()) if gaps else 0.0}
