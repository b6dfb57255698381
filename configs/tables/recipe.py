"""What the paper leaves open: the gate, the last token, how fast routers learn, and how soon they must choose.

vmod table configs/tables/recipe.py --out runs/tables
"""

from vmod_jax.study.rows import BASES, Row
from vmod_jax.study.worlds import cluttered_config as get_config

__all__ = ["ROWS", "get_config"]

TANH = {"gate": "tanh"}

ROWS = {
    **BASES,
    "interleaved": Row({"policy": "interleaved"}, seeds=3),  # straight_through, router's rate x 20
    "router_rate_1": Row({"optimizer.rates.expert": 1.0}),
    "router_rate_4": Row({"optimizer.rates.expert": 4.0}),
    "keep_last": Row({"model.always_keep_last": True}, seeds=3),
    "random_last": Row({"policy": "random", "model.always_keep_last": True}, seeds=3),
    "keep_warmup": Row({"keep_warmup": 0.5}),
    "gate_raw": Row({"gate": "raw"}),
    "gate_sigmoid": Row({"gate": "sigmoid"}),
    "gate_tanh": Row(TANH, seeds=3),
    "tanh_keep_last": Row(TANH | {"model.always_keep_last": True}, seeds=3),
    "tanh_rate_1": Row(TANH | {"optimizer.rates.expert": 1.0}),
    "tanh_rate_4": Row(TANH | {"optimizer.rates.expert": 4.0}),
    "tanh_keep_warmup": Row(TANH | {"keep_warmup": 0.5}),
}
