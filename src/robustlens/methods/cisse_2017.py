"""Cissé et al. 2017: Parseval networks.

The paper trains Wide ResNets 28-10 in which residual sums are convex combinations. That is an architecture and not part
of the preset: here the constraint acts on an ordinary network. With BatchNorm behind the convolutions their scale is
divided out again; what is left of the constraint is that the rows of a layer are orthogonal and equally long.
"""

from __future__ import annotations

from typing import Any

from robustlens.methods.preset import Preset

#: Of Zagoruyko and Komodakis 2016 (arXiv 1605.07146, §3), without weight decay: it would pull against the constraint.
WIDE: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
    "schedule": {"name": "multistep", "milestones": [60, 120, 160], "gamma": 0.2},
    "augment": ["pad-crop", "flip"],
}

PRESETS: tuple[Preset, ...] = tuple(
    Preset(
        name=f"parseval/{data}",
        reference="Cissé et al. 2017, arXiv 1704.08847, §5.2 (β; training as of Wide ResNets, arXiv 1605.07146)",
        data=data,
        model="preact-resnet18",
        threat="linf:8/255",
        paper={"objective": "standard", "constraints": [{"name": "parseval", "beta": 3e-4}], "training": WIDE},
    )
    for data in ("cifar10", "cifar100")
)
