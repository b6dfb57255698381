"""How sure a score is: bootstrap over groups, what shares a video being drawn together."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vmod_jax.evaluation.documents import Document

DRAWS = 1000


def intervals(
    documents: Sequence[Document], score: Callable[[Sequence[Document]], Mapping[str, float | None]]
) -> dict[str, list[float] | None]:
    """{metric: [2.5%, 97.5%]} of `score` over groups drawn with repetition; null where there is no second group.

    A draw in which a metric is None or absent (nothing there to average) is left out for it. Always the same draws:
    groups stand in order of first appearance, the generator's seed is 0.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(document.group, []).append(document)
    found, count = list(groups.values()), len(groups)
    names = list(score(documents))
    if count < 2:
        return dict.fromkeys(names)
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(DRAWS):
        drawn = score([document for index in rng.integers(0, count, count) for document in found[index]])
        for name in names:
            if (value := drawn.get(name)) is not None:
                draws[name].append(value)
    return {name: np.percentile(values, (2.5, 97.5)).tolist() if values else None for name, values in draws.items()}
