"""What the paper leaves open: the gate, the last token, how fast routers learn, and how soon they must choose.

vmod table configs/tables/recipe.py --out runs/tables
"""

from vmod_jax.study.benchmark import BASES, Row
from vmod_jax.study.benchmark import benchmark_config as get_config

__all__ = ["ROWS", "get_config"]

ROWS = {
    **BASES,
    "interleaved": Row({"policy": "interleaved"}, seeds=3),  # tanh gate, router's rate x 20
    "gate_raw": Row({"gate": "raw"}),
    "gate_sigmoid": Row({"gate": "sigmoid"}),
    "keep_last": Row({"model.always_keep_last": True}),
    "router_rate_1": Row({"optimizer.rates.expert": 1.0}),
    "router_rate_4": Row({"optimizer.rates.expert": 4.0}),
    "straight_through": Row({"gate": "straight_through"}),
    "straight_through_last": Row({"gate": "straight_through", "model.always_keep_last": True}),
    "random_last": Row({"policy": "random", "model.always_keep_last": True}),
    "keep_warmup": Row({"keep_warmup": 0.5}),
}
