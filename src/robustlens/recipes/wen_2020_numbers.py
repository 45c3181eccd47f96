"""The numbers that Wen, Li and Jia 2020 print, as they print them: accuracies and gaps in percent, losses in nats.

Columns are the strengths 4, 8 and 16; table 5 begins with 0. The PGD accuracy of ResNet-56 at strength 4 in table 3
breaks the order of all other rows and may be a misprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Measure → its row of a table.
Numbers = Mapping[str, Sequence[float]]


def table(
    train_accuracy: Sequence[float],
    test_accuracy: Sequence[float],
    error_gap: Sequence[float],
    losses: tuple[Sequence[float], Sequence[float], Sequence[float]],
    pgd: Sequence[float],
) -> Numbers:
    """Table 3's rows in its order."""
    errors = [round(100 - accuracy, 2) for accuracy in train_accuracy]
    names = ("train error", "test accuracy", "error gap", "train loss", "test loss", "loss gap", "PGD")
    return dict(zip(names, (errors, test_accuracy, error_gap, *losses, pgd), strict=True))


TABLE3 = {
    "ResNet-56": table(
        (99.51, 98.45, 95.97),
        (88.86, 87.51, 84.89),
        (10.65, 10.94, 11.08),
        ((0.014, 0.043, 0.105), (0.683, 0.649, 0.650), (0.669, 0.606, 0.545)),
        (65.92, 65.24, 72.16),
    ),
    "ResNet-110": table(
        (99.95, 99.62, 98.42),
        (89.20, 87.09, 85.02),
        (10.75, 12.53, 13.40),
        ((0.002, 0.010, 0.044), (0.825, 0.813, 0.729), (0.823, 0.803, 0.685)),
        (58.02, 66.94, 72.40),
    ),
}
TABLE4 = {
    "ResNet-56": table(
        (88.73, 86.97, 82.17),
        (61.31, 60.87, 59.43),
        (27.42, 26.10, 22.74),
        ((0.357, 0.413, 0.570), (2.063, 2.106, 1.978), (1.706, 1.693, 1.408)),
        (30.52, 40.99, 48.81),
    ),
    "ResNet-110": table(
        (96.91, 94.55, 90.90),
        (61.48, 61.26, 59.56),
        (35.43, 33.29, 31.34),
        ((0.098, 0.171, 0.278), (2.645, 2.413, 2.323), (2.547, 2.241, 2.045)),
        (33.33, 42.08, 50.99),
    ),
}
TABLE5 = table(
    (79.12, 73.71, 66.17, 60.73),
    (63.43, 62.09, 61.09, 57.36),
    (15.69, 11.62, 5.08, 3.37),
    ((0.874, 1.080, 1.384, 1.641), (1.561, 1.637, 1.689, 1.806), (0.687, 0.557, 0.305, 0.165)),
    (0.00, 32.26, 41.20, 53.12),
)
TABLE6 = {
    1: table(
        (96.91, 94.38, 90.58),
        (90.47, 88.87, 85.82),
        (6.44, 5.51, 4.76),
        ((0.092, 0.159, 0.265), (0.316, 0.353, 0.432), (0.224, 0.194, 0.168)),
        (57.93, 69.98, 75.98),
    ),
    3: table(
        (99.65, 98.51, 95.94),
        (90.02, 88.07, 85.43),
        (9.63, 10.44, 10.51),
        ((0.010, 0.039, 0.107), (0.606, 0.580, 0.577), (0.596, 0.541, 0.470)),
        (56.83, 67.73, 73.41),
    ),
    5: table(
        (99.57, 98.33, 95.96),
        (89.53, 88.09, 85.32),
        (10.04, 10.24, 10.64),
        ((0.012, 0.045, 0.105), (0.649, 0.602, 0.611), (0.638, 0.557, 0.506)),
        (54.91, 65.96, 72.37),
    ),
}
#: Measures of table 2 and of table 1 by data set.
TABLE2: dict[str, Numbers] = {
    "CIFAR-10": {
        "test accuracy": (89.32, 86.67, 82.83),
        "train loss": (0.038, 0.086, 0.252),
        "test loss": (0.467, 0.495, 0.637),
        "loss gap": (0.429, 0.409, 0.385),
    },
    "CIFAR-100": {
        "test accuracy": (62.01, 59.78, 56.30),
        "train loss": (0.469, 0.656, 0.822),
        "test loss": (1.776, 1.723, 1.797),
        "loss gap": (1.307, 1.067, 0.975),
    },
}
TABLE1: dict[str, Numbers] = {
    "CIFAR-10": {
        "mean loss variation, ε = 1": (0.0273, 0.0236, 0.0215),
        "spread of loss variation, ε = 1": (0.0989, 0.0778, 0.0588),
        "mean loss variation, ε = 2": (0.0590, 0.0477, 0.0443),
        "spread of loss variation, ε = 2": (0.1637, 0.1337, 0.1102),
        "mean loss variation, ε = 4": (0.1337, 0.1006, 0.0888),
        "spread of loss variation, ε = 4": (0.2494, 0.2137, 0.1816),
    },
    "CIFAR-100": {
        "mean loss variation, ε = 1": (0.0550, 0.0430, 0.0379),
        "spread of loss variation, ε = 1": (0.1276, 0.1043, 0.0886),
        "mean loss variation, ε = 2": (0.1072, 0.0839, 0.0732),
        "spread of loss variation, ε = 2": (0.2138, 0.1802, 0.1568),
        "mean loss variation, ε = 4": (0.1868, 0.1563, 0.1355),
        "spread of loss variation, ε = 4": (0.2946, 0.2712, 0.2494),
    },
}
