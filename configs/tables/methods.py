"""The paper's table 1: full computation, CLS alone, early exit, layer skip, and the method.

vmod table configs/tables/methods.py --out runs/tables
"""

from vmod_jax.study.rows import BASES, Row, bases
from vmod_jax.study.worlds import cluttered_config as get_config

__all__ = ["ROWS", "get_config"]

CLS = {"model.grid": (0, 0)}

ROWS = {
    **BASES,
    **bases("base_cls", **CLS),
    "full": Row({"policy": "full"}, seeds=3),
    "cls_only": Row({"policy": "full", **CLS}, base="base_cls", seeds=3),
    "early_exit": Row({"policy": "early_exit"}, seeds=3),
    "layer_skip": Row({"policy": "layer_skip"}, seeds=3),
    "interleaved": Row({"policy": "interleaved"}, seeds=3),
}
