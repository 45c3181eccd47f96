"""Wu and Yu 2019: what training does to margins, and what their average-margin regularizer (AMR) does.

Margins of linear networks are exact (lens `linear-margins`). Those of others are the distances to the nearest
adversarial images found (lens `boundary-distance`), and beside them the paper's own estimate (its Theorem 3).

The paper's attack stalls where gradients are below 1e-6. Claims that end in "-reported" are judged by what it reports,
alarms or not; the claims of robustness themselves by `standard-accuracy` and `health`.
"""

from __future__ import annotations

from robustlens.claims.evidence import Ask, AtEpoch, is_regularized, is_standard
from robustlens.claims.ledger import Claim, of_paper
from robustlens.claims.statistics import Judge, compare, value, within
from robustlens.claims.wu_2019_statistics import Lost, Reported, both, change, costs, network, several, towards
from robustlens.results.verdict import FALLS, RISES, Region

PAPER = "Wu & Yu 2019, arXiv 1907.11780"
claim = of_paper("003", PAPER)

is_lcr = is_regularized("orthogonality")
is_amr = is_regularized("average-margin", "orthogonality")
is_mmr = is_regularized("mmr")
SHALLOW = network("softmax-regression", "mlp")
CONVOLUTIONAL = network("mnist-cnn", "cifar-cnn")

#: "Until it approaches": at most a tenth is missing.
REACHED: Region = (0.9, float("inf"))
#: An error that never increases, up to half a point.
NO_MORE: Region = (float("-inf"), 0.005)
#: All checks of `health` together break up to 4.5 % of the images on honest networks.
REAL: Region = (float("-inf"), 0.05)
#: Accuracies within two points of each other are comparable.
SAME: Region = (-0.02, 0.02)
#: "Roughly the same": up to a quarter more.
AS_LONG: Region = (0.0, 1.25)
#: "2 ∼ 3 times" and "1.5 ∼ 2", with their rounding to whole numbers and to halves.
TWO_TO_THREE: Region = (1.5, 3.5)
UP_TO_TWICE: Region = (1.25, 2.25)
#: An average margin that is not sacrificed: at most 0.05 of it (ℓ2) is lost.
KEPT: Region = (-0.05, float("inf"))
MORE: Region = (1.0, float("inf"))

#: "Decreases drastically after a few epochs at the very beginning": margins of gradient descent from epoch 10 on.
SETTLED = 10
DISTANCE = Ask("boundary-distance", "average margin, test")
ESTIMATE = Ask("boundary-distance", "estimated average margin, test")
TRUE = Ask("standard-accuracy", "robust accuracy")
LARGEST = Reported("accuracy", "robust accuracy")
SMALLEST = Reported("accuracy", "robust accuracy", at="smallest")

LINEAR = "standard training of a linear network with linear-margins over epochs (003-figure1, 003-figures6-7)"
NETWORKS = "standard training with boundary-distance over epochs (003-figures6-7)"
TABLE1 = "standard training, LCR and AMR of one network (003-table1-mnist-mlp, 003-table1-mnist-cnn)"
TABLE2 = "MMR and AMR of one network (003-table2-mnist-lenet-small)"
HEALTH = "health with the paper's attack, whose grad_floor is 1e-6 (003-table1-mnist-cnn)"
HELD = "controlling Lipschitz constant alone may not be enough to train a robust model"


def overfitting(lens: str) -> Judge:
    """The test error after the last epoch looked at, minus the smallest after any of them."""
    name = "error, test"
    last, best = AtEpoch(lens, name, pick="last"), AtEpoch(lens, name, pick="smallest")
    return within(last, best, NO_MORE, member=several(lens, name, is_standard))


CLAIMS: tuple[Claim, ...] = (
    claim(
        "minimum-margin-rises",
        "§3, figure 1a; appendix C",
        "The minimum margin continues to increase during training.",
        "Exact minimum margin of all training images after the last epoch looked at, minus that after the first one "
        "from epoch 10 on: above 0.",
        change("linear-margins", "minimum margin, train", RISES, since=SETTLED),
        LINEAR,
    ),
    claim(
        "average-margin-falls",
        "§3, figure 1a; appendix C",
        "The average margin decreases drastically after a few epochs at the very beginning, and then keeps decreasing.",
        "Exact average margin of all training images after the last epoch looked at, minus that after the first one "
        "from epoch 10 on: below 0.",
        change("linear-margins", "average margin, train", FALLS, since=SETTLED),
        LINEAR,
    ),
    claim(
        "average-margin-falls-on-test",
        "§3",
        "We observe that the average margin decreases on both training and test sets.",
        "The same of the test images: below 0.",
        change("linear-margins", "average margin, test", FALLS, since=SETTLED),
        LINEAR,
    ),
    claim(
        "reaches-the-svm",
        "§3, figure 1a",
        "The minimum margin continues to increase during training until it approaches that of hard-margin SVM.",
        "Minimum margin of all training images after the last epoch over the largest that a hyperplane has: above 0.9; "
        "undecided while it is less and still grows.",
        towards("linear-margins", "share of the largest minimum margin", REACHED),
        "standard training on two separable classes with linear-margins over epochs (003-figure1)",
    ),
    claim(
        "not-by-overfitting",
        "§3; appendix B, figure 4",
        "The error rate on both training set and test set never increase; the trade-off between minimum and average "
        "margin cannot be caused by overfitting.",
        "Test error after the last epoch looked at, minus the smallest after any: below 0.005.",
        overfitting("linear-margins"),
        LINEAR,
    ),
    claim(
        "not-by-overfitting-networks",
        "appendix B, figure 5",
        "Although there exists a generalization gap, the test errors never increase.",
        "Test error after the last epoch looked at, minus the smallest after any: below 0.005.",
        overfitting("generalisation-gap"),
        "standard training with generalisation-gap over epochs (003-figures6-7)",
    ),
    claim(
        "minimum-margin-rises-networks",
        "§5.2, figure 2; appendix C, figure 6",
        "The minimum margin continues increasing while at the same time the average margin keeps decreasing.",
        "Smallest margin of the sampled training images by the paper's estimate (its Theorem 3), last epoch looked at "
        "minus the first: above 0.",
        change("boundary-distance", "estimated minimum margin, train", RISES),
        NETWORKS,
    ),
    claim(
        "average-margin-falls-networks",
        "§5.2, figure 2; appendix C, figure 6",
        "The minimum margin continues increasing while at the same time the average margin keeps decreasing.",
        "Mean distance from training images to the nearest adversarial ones found, last epoch looked at minus the "
        "first: below 0.",
        change("boundary-distance", "average margin, train", FALLS),
        NETWORKS,
    ),
    claim(
        "amr-keeps-the-average-margin",
        "§5.3, figure 3",
        "With our average margin regularizer, the regularized models no longer sacrifice the average margin during "
        "training.",
        "Mean distance from training images to the nearest adversarial ones found, AMR, last epoch looked at minus the "
        "first: above −0.05.",
        change("boundary-distance", "average margin, train", KEPT, member=is_amr),
        "AMR with boundary-distance over epochs (003-figures6-7)",
    ),
    claim(
        "amr-raises-the-average-margin",
        "§5.3, figure 3",
        "For all six models, adding the average margin regularizer significantly improves adversarial robustness.",
        "Mean distance from test images to the nearest adversarial ones found, AMR over standard: above 1.",
        compare(DISTANCE, MORE, first=is_amr, second=is_standard, ratio=True),
        TABLE1,
    ),
    claim(
        "amr-raises-the-estimated-margin",
        "§5.3, Table 1",
        "For all six models, adding the average margin regularizer significantly improves adversarial robustness.",
        "The paper's own estimate of the average margin (its Theorem 3) on test images, AMR over standard: above 1.",
        compare(ESTIMATE, MORE, first=is_amr, second=is_standard, ratio=True),
        TABLE1,
    ),
    claim(
        "amr-two-to-three-times",
        "§5.3",
        "The average margin of LR and MLP become 2 ∼ 3 times more than those of models with standard training.",
        "Mean distance from test images to the nearest adversarial ones found, AMR over standard, of softmax "
        "regressions and MLPs: between 1.5 and 3.5, which is 2 to 3 with rounding.",
        compare(DISTANCE, TWO_TO_THREE, first=both(is_amr, SHALLOW), second=is_standard, ratio=True),
        "standard training and AMR of a softmax regression or an MLP (003-figures6-7, 003-table1-mnist-mlp)",
    ),
    claim(
        "amr-up-to-twice",
        "§5.3",
        "For CNN, the average margin is increased by a factor of 1.5 ∼ 2.",
        "Mean distance from test images to the nearest adversarial ones found, AMR over standard, of mnist-cnn and "
        "cifar-cnn: between 1.25 and 2.25, which is 1.5 to 2 with rounding.",
        compare(DISTANCE, UP_TO_TWICE, first=both(is_amr, CONVOLUTIONAL), second=is_standard, ratio=True),
        "standard training and AMR of a CNN (003-table1-mnist-cnn, 003-cifar10-table1)",
    ),
    claim(
        "amr-like-lcr-at-small-radii",
        "§5.3, Table 1",
        "When ε is small, the accuracy of our average margin regularizer is comparable to that of the Lipschitz "
        "constant regularizer.",
        "Robust accuracy as the paper's attack reports it, smallest radius, AMR minus LCR: within ±0.02.",
        compare(SMALLEST, SAME, first=is_amr, second=is_lcr),
        TABLE1,
    ),
    claim(
        "amr-beats-lcr-reported",
        "§5.3, Table 1",
        "As ε becomes larger, the average margin regularizer consistently outperforms the latter.",
        "Robust accuracy as the paper's attack reports it, largest radius, AMR minus LCR: above 0.",
        compare(LARGEST, RISES, first=is_amr, second=is_lcr),
        TABLE1,
    ),
    claim(
        "amr-beats-lcr",
        "§5.3, Table 1",
        f"As ε becomes larger, the average margin regularizer consistently outperforms the latter; {HELD}.",
        "Robust accuracy under AutoAttack-standard at the study's radius, AMR minus LCR: above 0.",
        compare(TRUE, RISES, first=is_amr, second=is_lcr),
        TABLE1,
    ),
    claim(
        "amr-beats-mmr-reported",
        "§5.3, Table 2",
        "Our method consistently outperforms MMR on both datasets.",
        "Robust accuracy as the paper's attack reports it, largest radius, AMR minus MMR: above 0.",
        compare(LARGEST, RISES, first=is_amr, second=is_mmr),
        TABLE2,
    ),
    claim(
        "amr-beats-mmr",
        "§5.3, Table 2",
        "Our method consistently outperforms MMR on both datasets.",
        "Robust accuracy under AutoAttack-standard at the study's radius, AMR minus MMR: above 0.",
        compare(TRUE, RISES, first=is_amr, second=is_mmr),
        TABLE2,
    ),
    claim(
        "amr-costs-a-standard-step",
        "§5.3",
        "The training time of our method is roughly the same as the standard training.",
        "Seconds per epoch (validation included) on the same kind of device, AMR over standard: below 1.25.",
        costs(AS_LONG, first=is_amr, second=is_standard),
        TABLE1,
    ),
    claim(
        "amr-is-real",
        "ours, on §5.3 and Table 1",
        "PGD … whose success serves as a good approximation of robust accuracy.",
        "Share of test images that the paper's attack leaves standing and the checks of health break, AMR: below 0.05.",
        value(Lost("health", ""), REAL, member=is_amr),
        HEALTH,
    ),
    claim(
        "lcr-is-real",
        "ours, on §5.3 and Table 1",
        "PGD … whose success serves as a good approximation of robust accuracy.",
        "The same for LCR: below 0.05.",
        value(Lost("health", ""), REAL, member=is_lcr),
        HEALTH,
    ),
)
