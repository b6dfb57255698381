"""gamma-MoD (arXiv 2410.13859) at the method's FLOPs: layers placed by the rank of attention maps, one router for all.

vmod table configs/tables/gamma_mod.py --out runs/tables

The layers are what `vmod arank --workdir runs/tables/base/seed-0 --count 2 --videos 16` says.
"""

from vmod_jax.study.rows import BASES, Row
from vmod_jax.study.worlds import cluttered_config as get_config

__all__ = ["ROWS", "get_config"]

RANKED = {"policy": "explicit", "model.routed_layers": (2, 3)}
SHARED = {"model.shared_router": True}

ROWS = {
    **BASES,
    "interleaved": Row({"policy": "interleaved"}, seeds=3),
    "ranked": Row(RANKED),
    "shared_router": Row(SHARED),
    "ranked_shared": Row(RANKED | SHARED),
}
