"""Depth policies: which share of a frame's tokens each layer computes, and who chooses them.

A policy is data: one `LayerSpec(keep, selector)` a layer. The method, its baselines and its ablations are rows of
`POLICIES` (paper, section 3.2 and tables 1-3); the model never asks for a policy's name.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from vmod_jax.errors import UserError

SELECTORS = ("learned", "random", "uniform")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer does with the vision tokens of a frame.

    keep: share of a frame's tokens that the layer computes, in [0, 1].
    selector: "learned", "random", "uniform", or None where there is nothing to choose (keep is 0 or 1).
    """

    keep: float = 1.0
    selector: str | None = None

    def __post_init__(self):
        if not 0 <= self.keep <= 1:
            raise UserError(f"keep ratio {self.keep} is outside [0, 1]: give the share of tokens to keep, such as 0.2")
        if self.selector is None and self.keep not in (0, 1):
            raise UserError(f"keep ratio {self.keep} needs a selector: one of {', '.join(SELECTORS)}")
        if self.selector is not None and self.selector not in SELECTORS:
            raise UserError(f"unknown selector '{self.selector}': use one of {', '.join(SELECTORS)}")

    @property
    def routed(self) -> bool:
        """Whether the layer gathers some tokens, computes those and adds them back."""
        return self.keep < 1 or self.selector is not None


Policy = tuple[LayerSpec, ...]
FULL = LayerSpec(1.0)
SKIP = LayerSpec(0.0)


def num_kept(n: int, keep: float | Fraction) -> int:
    """Tokens kept of a frame of `n`: those strictly above the (1 - keep)-th interpolated percentile (paper, eq. 1).

    Computed with the exact decimal that `keep` is written as: in floats n = 26, keep = 0.8 is off by one.
    """
    r = keep if isinstance(keep, Fraction) else Fraction(repr(float(keep)))
    if r in (0, 1):
        return n * int(r)
    return max(1, n - 1 - math.floor((1 - r) * (n - 1)))


def kept_counts(policy: Policy, n: int) -> tuple[int, ...]:
    """Tokens of a frame of `n` that each layer computes."""
    return tuple(num_kept(n, spec.keep) for spec in policy)


def default_deep(num_layers: int) -> int:
    """The layer from which `early_exit` and the deep variants begin: 2 of 32 in the paper, scaled to other depths."""
    return max(1, num_layers // 16)


def _alternate(num_layers: int, other: LayerSpec, after: int = -1) -> Policy:
    return tuple(other if i % 2 and i > after else FULL for i in range(num_layers))


def _from(num_layers: int, first: int, rest: LayerSpec) -> Policy:
    return tuple(FULL if i < first else rest for i in range(num_layers))


# name -> (num_layers, keep, deep) -> policy
POLICIES: dict[str, Callable[[int, float, int], Policy]] = {
    "full": lambda layers, keep, deep: (FULL,) * layers,
    "early_exit": lambda layers, keep, deep: _from(layers, deep, SKIP),
    "layer_skip": lambda layers, keep, deep: _alternate(layers, SKIP),
    "interleaved": lambda layers, keep, deep: _alternate(layers, LayerSpec(keep, "learned")),
    "interleaved_deep": lambda layers, keep, deep: _alternate(layers, LayerSpec(keep, "learned"), after=deep),
    "all": lambda layers, keep, deep: (LayerSpec(keep, "learned"),) * layers,
    "all_deep": lambda layers, keep, deep: _from(layers, deep, LayerSpec(keep, "learned")),
    "random": lambda layers, keep, deep: _alternate(layers, LayerSpec(keep, "random")),
    "uniform": lambda layers, keep, deep: _alternate(layers, LayerSpec(keep, "uniform")),
}


def make_policy(name: str, num_layers: int, keep: float = 0.2, deep: int | None = None) -> Policy:
    """A named policy for a model of `num_layers` layers.

    deep: first layer of `early_exit` and of the deep variants (default: `default_deep(num_layers)`).
    Raises UserError for an unknown name or a keep ratio outside [0, 1].
    """
    if name not in POLICIES:
        raise UserError(f"unknown policy '{name}': use one of {', '.join(POLICIES)}, or an explicit list of layers")
    LayerSpec(keep, "learned")  # the ratio is checked even where the policy does not use it
    return POLICIES[name](num_layers, float(keep), default_deep(num_layers) if deep is None else deep)


def explicit_policy(
    num_layers: int, layers: Sequence[int], keep: float | Sequence[float] = 0.2, selector: str = "learned"
) -> Policy:
    """A policy that routes just the listed layers, with one keep ratio or one a listed layer."""
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise UserError(f"layers {wrong} do not exist in a model of {num_layers} layers (0 to {num_layers - 1})")
    ratios = list(keep) if isinstance(keep, Sequence) else [keep] * len(layers)
    if len(ratios) != len(layers):
        raise UserError(f"{len(layers)} layers but {len(ratios)} keep ratios: give one ratio, or one a layer")
    chosen = {i: LayerSpec(float(r), selector) for i, r in zip(layers, ratios, strict=True)}
    return tuple(chosen.get(i, FULL) for i in range(num_layers))


def loosened(policy: Policy, doublings: int) -> Policy:
    """The policy with the keep ratio of every layer that chooses doubled so many times, up to 1."""
    loose = lambda spec: dataclasses.replace(spec, keep=min(1.0, spec.keep * 2**doublings))  # noqa: E731
    return tuple(loose(spec) if spec.selector else spec for spec in policy)


def doublings_at(step: int, warmup_steps: float, policy: Policy) -> int:
    """How much looser the policy is at a step: from keeping all it halves, in equal stages, to what it is at the end.

    warmup_steps: of the lowering, over which the stages are spread; 0 for none.
    """
    tightest = min((spec.keep for spec in policy if spec.selector and spec.keep), default=1.0)
    stages = math.ceil(-math.log2(tightest))
    return max(0, stages - math.floor(step * stages / warmup_steps)) if warmup_steps else 0


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` runs of `unit`, beginning at layer `start`."""

    start: int
    unit: Policy
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + len(self.unit) * self.repeats


def segments(policy: Policy, longest_unit: int = 8) -> tuple[Segment, ...]:
    """The policy as few traced layers as possible: runs of a repeating unit, each of which becomes one scan.

    Minimises first the layers traced (the sum of the units' lengths, which compile time follows), then the number of
    scans, by dynamic programming from the last layer to the first.
    """
    best: dict[int, tuple[tuple[int, int], tuple[Segment, ...]]] = {len(policy): ((0, 0), ())}
    for start in range(len(policy) - 1, -1, -1):
        options = []
        for size in range(1, min(longest_unit, len(policy) - start) + 1):
            unit, repeats = policy[start : start + size], 0
            while policy[start + size * repeats : start + size * (repeats + 1)] == unit:
                repeats += 1
                (traced, scans), rest = best[start + size * repeats]
                options.append(((traced + size, scans + 1), (Segment(start, unit, repeats), *rest)))
        best[start] = min(options, key=lambda option: option[0])
    return best[0][1]
