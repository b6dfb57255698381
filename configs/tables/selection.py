"""The paper's table 3: who chooses the tokens, and how many.

vmod table configs/tables/selection.py --out runs/tables
"""

from vmod_jax.study.rows import BASES, Row
from vmod_jax.study.worlds import cluttered_config as get_config

__all__ = ["ROWS", "get_config"]

ROWS = {
    **BASES,
    "interleaved": Row({"policy": "interleaved"}, seeds=3),
    "random": Row({"policy": "random"}, seeds=3),
    "uniform": Row({"policy": "uniform"}, seeds=3),
    "interleaved_r10": Row({"policy": "interleaved", "keep": 0.1}),
    "interleaved_r30": Row({"policy": "interleaved", "keep": 0.3}),
}
