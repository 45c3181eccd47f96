"""Wen, Li and Jia 2020: adversarial training regularises, and makes networks less sure of themselves.

The paper compares networks trained at ℓ∞ radii 4, 8 and 16 / 255 ("AR strength"), so most trends leave out standard
training. Figure 3, on Tiny-ImageNet, has it, and so have the trends of its quantities: losses, errors and the loss gap.
All networks have to be attacked at one radius, whatever they were trained for. Networks of one layer are not judged,
and neither are those that training left no better than one answer for all images: gaps and margins are all but zero.

Margins in logits and probabilities depend on the scale of the logits, so beside the margins stand those divided by the
norm of the centred logits. Robust accuracy among the images that were right before can rise where fewer are right, so
beside it stands that of all images.
"""

from __future__ import annotations

from robustlens.claims.evidence import Ask, Part
from robustlens.claims.ledger import Claim, of_paper
from robustlens.claims.statistics import trend
from robustlens.claims.wen_2020_statistics import (
    FGSM,
    PGD,
    TRAINED,
    at_each_radius,
    at_one_radius,
    clipped,
    flips,
    on,
    share_of_layers,
    turns_down,
)
from robustlens.results.verdict import FALLS, RISES, Region

PAPER = "Wen, Li and Jia 2020, arXiv 2011.07478"
claim = of_paper("000", PAPER)

GAP = Ask("generalisation-gap", "loss gap")
ERROR_GAP = Ask("generalisation-gap", "error gap")
TRAIN_LOSS = Ask("generalisation-gap", "loss, train")
TEST_ERROR = Ask("generalisation-gap", "error, test")
TEST_LOSS = Ask("generalisation-gap", "loss, test")
MIDDLE = Ask("confidence", "share of middle probabilities, test, clean")
SPREAD = Ask("layer-spectra", "mean spread of singular values")


FELL = "change along the line fitted over the radii of training"
CLIPPED = "networks trained against PGD at two radii or more, with spectral-clip of norm 1 and without (000-mnist)"


def strengths(attack: str, lens: str) -> str:
    return f"networks trained against {attack} at two radii or more, several seeds, and the lens {lens} (000-mnist)"


def simple(
    name: str,
    section: str,
    sentence: str,
    ask: Ask,
    region: Region,
    *,
    member: Part = PGD,
    least: float = TRAINED,
    needs: str = "",
) -> Claim:
    """The trend of one quantity."""
    standard = "standard training left out" if least else "standard training at 0"
    measured = f"{FELL} ({standard}) of “{ask.quantity}”; {'below' if region == FALLS else 'above'} 0"
    needed = needs or strengths("FGSM" if member is FGSM else "PGD", ask.lens)
    return claim(name, section, sentence, measured, trend(ask, region, member=member, least=least), needed)


def key_results(member: Part, before: str = "", section: str = "") -> list[Claim]:
    """What the paper finds with PGD in section 5, and with FGSM in appendix B.6."""
    attack = "FGSM" if member is FGSM else "PGD"

    def found(name: str, home: str, sentence: str, ask: Ask, region: Region, least: float = TRAINED) -> Claim:
        return simple(before + name, section or home, sentence, ask, region, member=member, least=least)

    concentrate = "The distributions of margins, on training and test images, concentrate more around zero as AR grows."
    most = "For networks of stronger adversarial robustness the STD of singular values is smaller in most layers."
    margins = (
        ("margins-near-zero", "share near the boundary", RISES),
        ("margin-spread-falls", "spread of margins", FALLS),
        ("normalised-margins-fall", "mean normalised margin", FALLS),
    )
    return [
        found(
            "loss-gap-falls",
            "5.1, figure 3a",
            "The gaps between training and test losses decrease as strength of AR increases.",
            GAP,
            FALLS,
            0.0,
        ),
        found(
            "training-loss-rises",
            "5.1, figure 3b",
            "Training losses increase as AR strength increases.",
            TRAIN_LOSS,
            RISES,
            0.0,
        ),
        found(
            "test-error-rises",
            "5.1, figure 3b",
            "The end result of AR regularization is degraded test performance.",
            TEST_ERROR,
            RISES,
            0.0,
        ),
        *(
            found(f"{name}-{split}", "5.2.1, figure 4", concentrate, Ask("logit-margins", f"{what}, {split}"), region)
            for split in ("test", "train")
            for name, what, region in margins
        ),
        found(
            "confidence-moves-to-the-middle",
            "5.2.1, figure 5a",
            "Estimated probabilities of the target class concentrate more around middle values (here 0.1 to 0.9).",
            MIDDLE,
            RISES,
        ),
        found("mean-layer-spread-falls", "5.2.2, B.2, figure 5c", most, SPREAD, FALLS),
        claim(
            f"{before}spread-falls-in-most-layers",
            section or "5.2.2, figure 5c",
            most,
            "share of the layers whose singular values have a smaller standard deviation at the largest radius of "
            "training than at the smallest; above one half",
            share_of_layers(member),
            strengths(attack, "layer-spectra"),
        ),
    ]


CLAIMS: tuple[Claim, ...] = (
    *key_results(PGD),
    *key_results(FGSM, "fgsm-", "B.6, figures 8 to 10, Table 2"),
    simple(
        "test-loss-falls",
        "5.1, figure 3b",
        "On CIFAR-10 and CIFAR-100 the test losses decrease even when test error rates increase.",
        TEST_LOSS,
        FALLS,
        member=on("cifar10", "cifar100"),
        needs="CIFAR-10 or CIFAR-100 (000-cifar10, 000-table3, 000-table4)",
    ),
    simple(
        "error-gap-grows-on-cifar10",
        "5.1, B.3, figure 3a",
        "On CIFAR-10 the error rate gap actually increases.",
        ERROR_GAP,
        RISES,
        member=on("cifar10"),
        needs="CIFAR-10 (000-cifar10, 000-table3)",
    ),
    claim(
        "conditional-robust-accuracy-rises",
        "1.1, figure 1c",
        "The adversarial robustness of the network increases with AR strength (Tables 3 to 6: of the images that were "
        "right before the attack).",
        f"{FELL} of “conditional robust accuracy”, all attacked at one radius; above 0",
        at_one_radius("conditional robust accuracy", RISES, PGD),
        strengths("PGD", "accuracy"),
    ),
    claim(
        "robust-accuracy-rises",
        "1.1, figure 1c",
        "The same of all images, which the paper does not print: being right less often lifts the other number.",
        f"{FELL} of “robust accuracy”, all attacked at one radius; above 0",
        at_one_radius("robust accuracy", RISES, PGD),
        strengths("PGD", "accuracy"),
    ),
    claim(
        "loss-variation-falls",
        "B.5, figure 7, Table 1",
        "The average loss variation decreases with adversarial robustness.",
        f"{FELL} of the mean over test images of max ℓ(x + δ) − ℓ(x), ℓ the cross-entropy, at each radius; below 0",
        at_each_radius("mean loss variation", FALLS, PGD),
        strengths("PGD", "confidence"),
    ),
    claim(
        "spread-of-loss-variation-falls",
        "B.5, figure 7, Table 1",
        "The standard deviation decreases with network adversarial robustness as well.",
        f"{FELL} of the standard deviation over test images of max ℓ(x + δ) − ℓ(x), at each radius; below 0",
        at_each_radius("spread of loss variation", FALLS, PGD),
        strengths("PGD", "confidence"),
    ),
    claim(
        "clipping-flips-error-gap",
        "B.4, figure 6a, Table 6",
        "As the capacity decreases, the error gap gradually changes from an increasing trend to a decreasing trend.",
        "the lesser of the rise of the error gap without clipping, and of its fall where operator norms are clipped to "
        "1; above 0",
        flips(ERROR_GAP),
        CLIPPED,
    ),
    claim(
        "clipping-turns-error-gap-down",
        "B.4, figure 6a, Table 6",
        "The same, where the error gap need not rise without clipping.",
        "change of the error gap over the radii of training without clipping, minus the change where operator norms "
        "are clipped to 1; above 0",
        turns_down(ERROR_GAP),
        CLIPPED,
    ),
    simple(
        "clipped-loss-gap-falls",
        "B.4, figure 6a, Table 6",
        "As the capacity of networks decreases, the loss gap keeps a consistent decreasing trend.",
        GAP,
        FALLS,
        member=clipped(),
        needs=CLIPPED,
    ),
)
