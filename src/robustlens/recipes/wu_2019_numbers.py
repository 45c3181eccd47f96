"""What Wu and Yu 2019 print in Tables 1 and 2, as fractions; the average margin in ℓ2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from robustlens.claims.evidence import Ask
from robustlens.recipes.recipe import Printed
from robustlens.threats.lp import Lp

RADII: Mapping[str, tuple[float, ...]] = {"mnist": (0.5, 1.0, 1.5, 2.0), "cifar10": (0.1, 0.2, 0.3, 0.4)}

#: Clean accuracy, robust accuracy at the four radii, and, in Table 1, the average margin.
TABLE1: Mapping[tuple[str, str], Mapping[str, tuple[float, ...]]] = {
    ("mnist", "mlp"): {
        "Std": (0.9824, 0.8926, 0.4923, 0.1578, 0.0506, 0.80),
        "LCR": (0.9599, 0.9112, 0.8062, 0.6056, 0.3407, 1.36),
        "AMR": (0.9601, 0.9118, 0.8101, 0.6293, 0.3844, 1.41),
    },
    ("mnist", "cnn"): {
        "Std": (0.9914, 0.9595, 0.9048, 0.8872, 0.8752, 1.01),
        "LCR": (0.9929, 0.9721, 0.8783, 0.5830, 0.2696, 1.34),
        "AMR": (0.9925, 0.9790, 0.9760, 0.9751, 0.9733, 1.40),
    },
    ("cifar10", "mlp"): {
        "Std": (0.5404, 0.3977, 0.2667, 0.1677, 0.0995, 0.17),
        "LCR": (0.5009, 0.4623, 0.4165, 0.3709, 0.3262, 0.45),
        "AMR": (0.5036, 0.4628, 0.4281, 0.3906, 0.3567, 0.54),
    },
    ("cifar10", "cnn"): {
        "Std": (0.7877, 0.5432, 0.3981, 0.3714, 0.3627, 0.09),
        "LCR": (0.8054, 0.7084, 0.5872, 0.4482, 0.3254, 0.26),
        "AMR": (0.7812, 0.6959, 0.5984, 0.4902, 0.3865, 0.31),
    },
}
TABLE2: Mapping[tuple[str, str], Mapping[str, tuple[float, ...]]] = {
    ("mnist", "lenet"): {
        "Std": (0.9898, 0.9575, 0.8059, 0.4436, 0.2264),
        "DD": (0.9934, 0.9764, 0.9209, 0.8353, 0.7935),
        "Adv": (0.9948, 0.9745, 0.9199, 0.8888, 0.8751),
        "AMR": (0.9901, 0.9680, 0.9403, 0.9361, 0.9312),
    },
    ("mnist", "lenet-small"): {
        "MMR": (0.9743, 0.8990, 0.5886, 0.2395, 0.0680),
        "AMR": (0.9783, 0.9194, 0.7370, 0.3256, 0.0879),
    },
    ("cifar10", "convnet"): {
        "Std": (0.7661, 0.5647, 0.3737, 0.3017, 0.2889),
        "DD": (0.7910, 0.6895, 0.5951, 0.5684, 0.5638),
        "Adv": (0.7527, 0.6879, 0.6179, 0.5435, 0.4700),
        "AMR": (0.7677, 0.6800, 0.5787, 0.5238, 0.5003),
    },
    ("cifar10", "lenet-small"): {
        "MMR": (0.5907, 0.4901, 0.3942, 0.3041, 0.2253),
        "AMR": (0.6840, 0.6133, 0.5384, 0.4603, 0.3905),
    },
}

#: One point of clean accuracy; three of robust accuracy, which the end of training moves; a tenth of a margin of one.
CLEAN, ROBUST, MARGIN = 0.01, 0.03, 0.1


def threat(eps: float) -> str:
    return str(Lp("l2", eps))


def rows(
    data: str, printed: Mapping[str, tuple[float, ...]], labels: Iterable[str], *, study: int = 0, what: str = ""
) -> list[Printed]:
    """Every number of a table beside the methods ``labels``, of which the first word is the paper's row."""
    found = []
    for label in labels:
        values = printed[label.partition(",")[0]]
        row = f"{what}{label}"
        columns = [("clean", Ask("accuracy", "clean accuracy"), CLEAN)]
        for eps in RADII[data]:
            ask = Ask("accuracy", "robust accuracy", {"threat": threat(eps)})
            columns.append((f"ε = {eps:g}", ask, ROBUST))
        columns.append(("average margin", Ask("boundary-distance", "estimated average margin, test"), MARGIN))
        found += [
            Printed(row=row, column=name, value=value, method=label, ask=ask, tolerance=tolerance, study=study)
            for value, (name, ask, tolerance) in zip(values, columns, strict=False)
        ]
    return found
