"""The paper's table 2: which layers are routed.

vmod table configs/tables/depth.py --out runs/tables
"""

from vmod_jax.study.rows import BASES, Row
from vmod_jax.study.worlds import cluttered_config as get_config

__all__ = ["ROWS", "get_config"]

ROWS = {
    **BASES,
    "interleaved": Row({"policy": "interleaved"}, seeds=3),
    "interleaved_deep": Row({"policy": "interleaved_deep"}),
    "all": Row({"policy": "all"}),
    "all_deep": Row({"policy": "all_deep"}),
    # Where nothing but what was kept has ever been computed, the choice matters most.
    "all_keep_last": Row({"policy": "all", "model.always_keep_last": True}),
    "all_keep_last_tanh": Row({"policy": "all", "model.always_keep_last": True, "gate": "tanh"}),
}
