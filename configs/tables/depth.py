"""The paper's table 2: which layers are routed.

vmod table configs/tables/depth.py --out runs/tables
"""

from vmod_jax.study.benchmark import BASES, Row
from vmod_jax.study.benchmark import benchmark_config as get_config

__all__ = ["ROWS", "get_config"]

ROWS = {
    **BASES,
    "interleaved": Row({"policy": "interleaved"}, seeds=3),
    "interleaved_deep": Row({"policy": "interleaved_deep"}),
    "all": Row({"policy": "all"}),
    "all_deep": Row({"policy": "all_deep"}),
}
