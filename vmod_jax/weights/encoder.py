"""A vision tower of a Hugging Face folder as a function of frames: what `vmod data` prepares features with."""

from pathlib import Path

import numpy as np


def encoder(folder: str | Path, grid: tuple[int, int], cls: bool, group: int = 16):
    """The frozen tower of a Hugging Face folder: (u8[F, S, S, 3] -> f16[F, n, d_v], what `meta.json` records)."""
    import jax
    import jax.numpy as jnp

    from vmod_jax.models.vision import VisionConfig, VisionTower
    from vmod_jax.weights import huggingface as hf

    config = VisionConfig.from_hf_config(hf.read_config(Path(folder)))
    params = jax.tree.map(jnp.asarray, hf.vision_params(hf.TensorReader(Path(folder)), config))
    tower = VisionTower(config, cls=cls, grid=grid)
    run = jax.jit(lambda params, pixels: tower.apply({"params": params}, pixels))

    def encode(frames: np.ndarray) -> np.ndarray:
        out = []
        for start in range(0, len(frames), group):  # always `group` frames a call: one compile
            part = frames[start : start + group]
            padded = np.zeros((group, *frames.shape[1:]), frames.dtype)
            padded[: len(part)] = part
            out.append(np.asarray(run(params, padded))[: len(part)].astype(np.float16))
        return np.concatenate(out)

    return encode, {"encoder": Path(folder).name, "kind": config.kind, "image_size": config.image_size, "cls": cls}
