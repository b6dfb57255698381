"""Configuration of an exported VideoLLM-MoD: everything is under `video_lm`."""

from transformers import PretrainedConfig


class VideoLMConfig(PretrainedConfig):
    """video_lm: a dictionary,

    llama: sizes of the decoder, in Hugging Face's names
    policy: [{keep, selector}] a layer: share of a frame's tokens that it computes, and who chooses them
    frame_token_id, cls, grid: a frame is its CLS token (if cls) and grid[0] x grid[1] patches, all written as that id
    gate, always_keep_last, router_seed: how routed layers choose and scale
    vision: sizes of the vision tower, or None; vision_hidden_size: of its features
    pooled: None, or the grid at which the connector's tokens are read
    newline_token_id: None, or of a token whose embedding is no row of the table
    interval, fps: what is written between frames, and how many of them there are a second
    """

    model_type = "videollm_mod"

    def __init__(self, video_lm=None, **kwargs):
        self.video_lm = video_lm or {}
        # The model ties its head itself; transformers 4 would do it unasked.
        super().__init__(**{**kwargs, "tie_word_embeddings": False})

    @property
    def tokens_per_frame(self):
        pooled = self.video_lm.get("pooled")
        if pooled:
            return pooled[0] * pooled[1]
        return int(self.video_lm["cls"]) + self.video_lm["grid"][0] * self.video_lm["grid"][1]
