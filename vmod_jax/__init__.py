"""VideoLLM-MoD in JAX: a language model that watches a video stream and speaks when there is something to say."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load"]

if TYPE_CHECKING:
    from vmod_jax.lm import LanguageModel, load


def __getattr__(name: str):
    # JAX is imported when it is needed, so that `vmod --help` answers at once.
    if name in __all__:
        from vmod_jax import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'vmod_jax' has no attribute '{name}'")
