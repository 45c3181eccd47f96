"""Roth, Kilcher & Hofmann 2020: adversarial training is data-dependent spectral norm regularization.

"SNR" is spectral norm regularization. Every comparison is made at equal threats. "≈", "no effect" and "levels off" are
regions with the tolerance that ``measured`` states; "strongly" and "≫" are stated factors.

The Jacobian and what derives from it scale with the logits. Where that could be all there is to a claim, a companion
that ends in "-relative" has the same in units of the mean logit margin, or of the linear change.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf

from robustlens.claims.evidence import Ask, Part, is_standard
from robustlens.claims.ledger import Claim, of_paper
from robustlens.claims.roth_2020_statistics import (
    Quotient,
    at_each_radius,
    in_its_ball,
    is_adversarial,
    is_data_dependent,
    is_global,
    over_steps,
    over_threats,
)
from robustlens.claims.statistics import Judge, at_each_threat, compare, value, within
from robustlens.results.runs import Run
from robustlens.results.verdict import FALLS, RISES, Region

PAPER = "Roth, Kilcher & Hofmann 2020, arXiv 1906.01527"
told = of_paper("001", PAPER)
LESS: Region = (0.0, 1.0)


def claim(name: str, section: str, sentence: str, measured: str, judge: Judge, needs: str) -> Claim:
    return told(name, section, sentence, measured, judge, f"{needs}: `robustlens reproduce 001-mnist`")


def compared(lens: str, quantity: str, region: Region, first: Part, second: Part) -> Judge:
    """Ratios at each threat that the lens was used with."""
    return at_each_threat(
        lens, lambda at: compare(Ask(lens, quantity, at), region, first=first, second=second, ratio=True)
    )


def robust_accuracy(at: Mapping[str, str]) -> Ask:
    """At the threat's radius (with ``radii`` of its own, the lens says it for the largest of those), by the lens's own
    attack, which is the same for all networks: 50 steps on the margin."""
    return Ask("accuracy", "robust accuracy", {**at, "radii": None, "attack": None, "split": "test"})


def robust(region: Region, first: Part, second: Part) -> Judge:
    return at_each_threat("accuracy", lambda at: compare(robust_accuracy(at), region, first=first, second=second))


def alignment(quantity: str, at: Mapping[str, str]) -> Ask:
    """As figure 1 has it, with an untrained copy beside it: further radii are for figure 3."""
    return Ask("alignment", quantity, {**at, "untrained": True})


def anyone(run: Run) -> bool:
    return True


LEADING, LAST = "alignment with the leading direction", "alignment with the last direction"
SPECTRUM = Ask("jacobian-spectrum", "Frobenius norm, clean")
SPECTRUM_RELATIVE = Quotient(SPECTRUM.lens, SPECTRUM.quantity, by=Ask("logit-margins", "mean margin, test"))
DEVIATION, RELATIVE = "deviation, features, adversarial", "relative deviation, features, adversarial"
AWAY = "largest singular value, adversarial"

DAMPED = "The spectrum of adversarially trained and data-dependent SNR models is significantly damped after training."
LINEAR = (
    "Adversarial training and data-dependent SNR give rise to models that are considerably more linear than the "
    "clean trained one, in random and in adversarial directions."
)
VICINITY = (
    "The naturally trained network develops large dominant singular values around the data point, while the "
    "adversarially trained and data-dependent SNR models keep the dominant singular value low in the vicinity of x."
)
ACCURATE = (
    "The adversarial accuracy of the data-dependent SNR model is comparable to that of the adversarially trained "
    "model, while global SNR does not seem to robustify the model."
)
SAME = "Performing 10 iterations makes no difference to the method of Yoshida and Miyato."
BOTH: tuple[tuple[str, str, Part], ...] = (
    ("adversarial", "adversarial training", is_adversarial),
    ("data-dependent", "data-dependent SNR", is_data_dependent),
)


def growth(at: Mapping[str, str]) -> Ask:
    return Quotient("local-linearity", AWAY, at, by=Ask("local-linearity", "largest singular value at the image", at))


def beside_standard(name: str, who: str, part: Part) -> list[Claim]:
    """What the paper says of adversarial training and of data-dependent SNR alike."""
    needs = f"standard training and {who}, with the lens"

    def told(what: str, section: str, sentence: str, measured: str, judge: Judge, lens: str) -> Claim:
        return claim(f"{what}-{name}", section, sentence, measured, judge, f"{needs} {lens}")

    over = f"{who} over standard training: ratio below 1"
    return [
        told(
            "spectrum-damped",
            "§5.2, figure 1 (left)",
            DAMPED,
            f"Frobenius norm of the Jacobian (root of the sum of its squared singular values) at test images, {over}.",
            compare(SPECTRUM, LESS, first=part, second=is_standard, ratio=True),
            "jacobian-spectrum",
        ),
        told(
            "spectrum-damped-relative",
            "§5.2, figure 1 (left)",
            DAMPED,
            f"Frobenius norm of the Jacobian over the mean logit margin, which has no scale: {over}.",
            compare(SPECTRUM_RELATIVE, LESS, first=part, second=is_standard, ratio=True),
            "jacobian-spectrum and logit-margins",
        ),
        *(
            told(
                f"linear-{way}",
                "§5.3, figure 2 (left)",
                LINEAR,
                f"‖φ(x + z) − φ(x) − Jz‖ of the features φ at the threat's radius, {way} z, {over}.",
                compared("local-linearity", f"deviation, features, {way}", LESS, part, is_standard),
                "local-linearity",
            )
            for way in ("random", "adversarial")
        ),
        told(
            "linear-relative",
            "§5.3, figure 2 (left)",
            LINEAR,
            f"The same over the linear change ‖Jz‖, which has no scale, adversarial z: {over}.",
            compared("local-linearity", RELATIVE, LESS, part, is_standard),
            "local-linearity",
        ),
        told(
            "top-value-stays-low",
            "§5.3, figure 2 (right)",
            VICINITY,
            f"Largest singular value of the Jacobian at x + z, z adversarial and of the threat's length, {over}; at "
            "several lengths where the lens was used with several threats.",
            compared("local-linearity", AWAY, LESS, part, is_standard),
            "local-linearity",
        ),
        told(
            "top-value-stays-low-relative",
            "§5.3, figure 2 (right)",
            VICINITY,
            f"Growth of the largest singular value from x to x + z, which has no scale, z adversarial: {over}.",
            at_each_threat(
                "local-linearity", lambda at: compare(growth(at), LESS, first=part, second=is_standard, ratio=True)
            ),
            "local-linearity",
        ),
        told(
            "alignment-larger",
            "§5.4, figure 3 (right)",
            "The alignment is similar for adversarially trained and data-dependent SNR models and for both larger than "
            "that of global SNR and naturally trained models.",
            f"|cos| of adversarial perturbations with the leading singular vector, {who} minus standard: above 0.",
            at_each_threat(
                "alignment",
                lambda at: compare(alignment(f"{LEADING}, adversarial", at), RISES, first=part, second=is_standard),
            ),
            "alignment",
        ),
        told(
            "robust-beats-global",
            "§5.4, figure 3 (left)",
            ACCURATE,
            f"Robust accuracy at the threat's radius, {who} minus global SNR: above 0.1.",
            robust((0.1, inf), part, is_global(1)),
            "accuracy, and global SNR with it",
        ),
    ]


CLAIMS: tuple[Claim, ...] = (
    claim(
        "perturbations-align",
        "§5.2, figure 1 (right)",
        "For all training methods adversarial perturbations are strongly aligned with the dominant singular vectors.",
        "|cos| with the leading right singular vector, adversarial over random perturbations: above 2.",
        at_each_threat(
            "alignment",
            lambda at: within(
                alignment(f"{LEADING}, adversarial", at),
                alignment(f"{LEADING}, random", at),
                (2.0, inf),
                member=anyone,
                ratio=True,
            ),
        ),
        "trained networks with the lens alignment",
    ),
    claim(
        "alignment-falls-with-rank",
        "§5.2, figure 1 (right)",
        "The alignment decreases towards the bottom-ranked singular vectors.",
        "|cos| of adversarial perturbations with the last right singular vector minus that with the first: below 0.",
        at_each_threat(
            "alignment",
            lambda at: within(
                alignment(f"{LAST}, adversarial", at),
                alignment(f"{LEADING}, adversarial", at),
                FALLS,
                member=anyone,
            ),
        ),
        "trained networks with the lens alignment",
    ),
    claim(
        "random-network-no-rank",
        "§5.2, figure 1 (right)",
        "For the random network, the alignment is roughly constant with respect to rank.",
        "|cos| of adversarial perturbations of an untrained copy with its own first over its own last singular vector: "
        "between 2/3 and 3/2.",
        at_each_threat(
            "alignment",
            lambda at: within(
                alignment(f"{LEADING}, untrained, adversarial", at),
                alignment(f"{LAST}, untrained, adversarial", at),
                (2 / 3, 3 / 2),
                member=is_standard,
                ratio=True,
            ),
        ),
        "standard training with the lens alignment",
    ),
    *(each for name, who, part in BOTH for each in beside_standard(name, who, part)),
    claim(
        "spectrum-global-unchanged",
        "§5.2, figure 1 (left)",
        "Global SNR has almost no effect compared to standard training.",
        "Frobenius norm of the Jacobian, global SNR over standard training: between 0.8 and 1.25.",
        compare(SPECTRUM, (0.8, 1.25), first=is_global(1), second=is_standard, ratio=True),
        "standard training and global SNR, with the lens jacobian-spectrum",
    ),
    claim(
        "spectrum-data-dependent-below-adversarial",
        "§5.2, figure 1 (left)",
        "Data-dependent SNR seems to dampen the singular values even slightly more effectively than adversarial "
        "training.",
        "Frobenius norm of the Jacobian, data-dependent SNR over adversarial training of equal radius: below 1.",
        at_each_radius(compare(SPECTRUM, LESS, first=is_data_dependent, second=is_adversarial, ratio=True)),
        "adversarial training and data-dependent SNR of equal radius, with the lens jacobian-spectrum",
    ),
    claim(
        "linear-global-as-standard",
        "§5.3, figure 2 (left)",
        "The global SNR model behaves similar to the normally trained one.",
        "‖φ(x + z) − φ(x) − Jz‖ of the features, z adversarial, global SNR over standard training: between 2/3 and "
        "3/2.",
        compared("local-linearity", DEVIATION, (2 / 3, 3 / 2), is_global(1), is_standard),
        "standard training and global SNR, with the lens local-linearity",
    ),
    claim(
        "robust-data-dependent-as-adversarial",
        "§5.4, figure 3 (left)",
        ACCURATE,
        "Robust accuracy at the threat's radius, data-dependent SNR minus adversarial training of equal radius: within "
        "±0.05.",
        at_each_radius(robust((-0.05, 0.05), is_data_dependent, is_adversarial)),
        "adversarial training and data-dependent SNR of equal radius, with the lens accuracy",
    ),
    claim(
        "robust-global-as-standard",
        "§5.4, figure 3 (left)",
        ACCURATE,
        "Robust accuracy at the threat's radius, global SNR minus standard training: within ±0.05.",
        robust((-0.05, 0.05), is_global(1), is_standard),
        "standard training and global SNR, with the lens accuracy",
    ),
    claim(
        "alignment-falls-with-radius",
        "§5.4, figure 3 (right)",
        "For all training methods, the larger the perturbation magnitude ε, the lesser the adversarial perturbation "
        "aligns with the dominant singular vector.",
        "Change of |cos| with the leading singular vector along the line over the radii of the attack: below 0.",
        over_threats("alignment", f"{LEADING}, adversarial", FALLS, member=anyone),
        "trained networks with the lens alignment at two threats or more",
    ),
    claim(
        "large-steps-rise-first",
        "A.9, figure 8",
        "Raising the step size α of adversarial training, the adversarial robustness initially rises.",
        "Robust accuracy against a fixed attack, trained with the smallest α ≥ ε minus with the smallest α: above 0.",
        at_each_threat("accuracy", lambda at: over_steps(robust_accuracy(at), RISES, huge=False)),
        "adversarial training with several step sizes, with the lens accuracy",
    ),
    claim(
        "large-steps-level-off",
        "A.9, figure 8",
        "After some threshold it levels out and does not change significantly even at very large values.",
        "Change of the robust accuracy against a fixed attack along the line over log α, from α = ε on: within ±0.05.",
        at_each_threat("accuracy", lambda at: over_steps(robust_accuracy(at), (-0.05, 0.05), huge=True)),
        "adversarial training with several step sizes, with the lens accuracy",
    ),
    claim(
        "theorem-1",
        "§4.2, Theorem 1",
        "For small enough ε and in the limit α → ∞, ℓ2-constrained projected gradient ascent based adversarial "
        "training with a sum-of-squares loss on the logits is equivalent to data-dependent SNR.",
        "Share of test images for which the attack, α = 10⁸ in a ball of radius 10⁻⁵, ends within 10⁻⁶ of the power "
        "method's direction: above 0.9.",
        value(Ask("pga-power-iteration", "share that agrees, small balls", {"small": 1e-5}), (0.9, inf), member=anyone),
        "trained networks with the lens pga-power-iteration",
    ),
    claim(
        "theorem-1-beyond-the-cell",
        "§4.2",
        "The correspondence between adversarial training and data-dependent SNR holds approximately in a region much "
        "larger than the ReLU cell.",
        "Cosine of the attack's direction with the power method's in the ball that the network was made robust in: "
        "above 0.8, for adversarial training and data-dependent SNR.",
        value(
            Ask("pga-power-iteration", "cosine, the threat's ball", where=in_its_ball),
            (0.8, inf),
            member=lambda run: is_adversarial(run) or is_data_dependent(run),
        ),
        "adversarial training or data-dependent SNR, with the lens pga-power-iteration",
    ),
    claim(
        "global-iterations-robustness",
        "A.7, figure 7 (left)",
        SAME,
        "Robust accuracy at the threat's radius, global SNR with 10 iterations minus with 1: within ±0.03.",
        robust((-0.03, 0.03), is_global(10), is_global(1)),
        "global SNR with 1 and with 10 iterations, with the lens accuracy",
    ),
    claim(
        "global-iterations-linearity",
        "A.7, figure 6 (left)",
        SAME,
        "‖φ(x + z) − φ(x) − Jz‖ of the features, z adversarial, 10 iterations over 1: between 0.8 and 1.25.",
        compared("local-linearity", DEVIATION, (0.8, 1.25), is_global(10), is_global(1)),
        "global SNR with 1 and with 10 iterations, with the lens local-linearity",
    ),
    claim(
        "global-iterations-top-value",
        "A.7, figure 6 (right)",
        SAME,
        "Largest singular value of the Jacobian at x + z, z adversarial, 10 iterations over 1: between 0.8 and 1.25.",
        compared("local-linearity", AWAY, (0.8, 1.25), is_global(10), is_global(1)),
        "global SNR with 1 and with 10 iterations, with the lens local-linearity",
    ),
)
