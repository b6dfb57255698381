"""The main job's model and data, which `vmod demo` trains under two policies; here under one.

vmod train --config configs/demo.py --workdir runs/demo_interleaved
"""

from vmod_jax.study.worlds import demo_config as get_config

__all__ = ["get_config"]
