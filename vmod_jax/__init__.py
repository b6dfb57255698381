"""VideoLLM-MoD in JAX: a language model that watches a video stream and speaks when there is something to say."""

__version__ = "0.1.0"
