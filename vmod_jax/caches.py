"""Where things are kept that can be made again: decoded frames, generated data, compiled programs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where decoded frames and generated data are kept: VMOD_CACHE, else ~/.cache/vmod_jax."""
    return Path(os.environ.get("VMOD_CACHE", Path.home() / ".cache" / "vmod_jax"))


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in the cache folder, unless the user has named another place."""
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
