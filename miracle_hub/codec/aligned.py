"""How differences to a base are scaled: what they are for lies in few directions, their errors lie in all.

At low rates the values of least squared error are too small: of a difference d they are (1 - D)·d and noise
of D·(1 - D)·‖d‖², D being the share of its square that coding leaves. A model's answers depend on d itself,
whose direction training chose, far more than on noise in a random one: κ times as much, per square. With a
gain g on the values the cost is

    κ·(1 - g·(1 - D))² + g²·D·(1 - D), least for g = κ / (κ·(1 - D) + D), where it is κ·D / (κ·(1 - D) + D).

κ = 1 is least squares, κ = ∞ no bias, as DARE has it (Yu et al. 2024, arXiv:2311.03099), which drops nine of
ten differences and multiplies the others by ten.
"""

# κ, chosen on three fine-tunes (benchmarks/delta_gain.py). Divergence over the base's at two rates each, with
# 1, 10, 30 and 300: MiniLM on SST-2 .016 .0056 .0038 .0035 and .048 .030 .029 .028; stories260K on plays .16
# .070 .073 .077 and .45 .17 .20 .22; ResNet-20 on JPEG images .044 .0082 .0084 .010 and .15 .074 .068 .078.
# Not chosen by: ResNet-44 .030 .0073 .0057 .0058 and .094 .059 .054 .047.
ALIGNMENT = 30.0


def gain(left: float) -> float:
    """By which values of least squared error are multiplied.

    Args:
        left: of the square of a difference, by coding; at most 1.
    """
    return ALIGNMENT / (ALIGNMENT * (1 - left) + left)


def cost(left: float) -> float:
    """What a difference costs that is coded and multiplied so, over what it costs to have none of it."""
    return left / (ALIGNMENT * (1 - left) + left)
