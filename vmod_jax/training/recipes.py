"""What the experiments of `configs/` that train Llama-3-8B have in common."""

from vmod_jax.training.config import Config, defaults

BATCH = 64  # the paper's, of every task


def llama3_8b(init_from: str, features: str) -> Config:
    """The paper's recipe (appendix A): LoRA beside every linear layer of imported weights, on features from files.

    init_from: what `vmod import` wrote; features: what `vmod data --encoder` wrote. Two epochs over VideoLLM-online's
    113 thousand Ego4D narration streams are 3500 steps; `vmod data` says how many streams yours are.
    """
    config = defaults()
    config.init_from = init_from
    config.data.name = "prepared"
    config.data.path = features
    config.batch_size = BATCH
    config.steps = 3500
    config.checkpoint_every = 250
    config.policy = "interleaved"
    config.keep = 0.2
    config.remat = "attention"
    config.model.dtype = "bfloat16"
    config.model.lora = {"rank": 128, "alpha": 256.0, "dropout": 0.05}
    config.optimizer.learning_rate = 2e-4
    return config


def paper(root: str, features: str, epochs: float, learning_rate: float) -> Config:
    """One of the paper's four recipes: `llama3_8b` on the data sets below `root`, with the features of their videos."""
    config = llama3_8b("imported/llama3_8b", "")
    config.data.root, config.data.features = root, features
    config.epochs = epochs
    config.data.max_frames = 600
    config.mesh.update({"data": 1, "fsdp": -1})
    config.optimizer.learning_rate = learning_rate
    return config
