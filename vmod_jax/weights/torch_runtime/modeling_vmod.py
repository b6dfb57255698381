# type: ignore  # torch finds modules by name at run time, which a type checker cannot follow
"""VideoLLM-MoD (arXiv 2408.16730) in plain PyTorch, for inference: a Llama that watches a stream of frames.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    logits = model(input_ids, frames)                       # whole sequences
    session = model.stream(AutoTokenizer.from_pretrained(folder))
    reply = session.push(frame)                             # a text, or None: it stays silent

In a routed layer, only the text and a few tokens of each frame go through the block; its LayerExpert chooses them:

    x_out = x + gate(mu) * f(x)    for the kept tokens of a frame, mu = w . x
    x_out = x                      for its other tokens, which are neither queries nor keys there
    x_out = x + f(x)               for text

Dimensions: T tokens, F frames, n tokens a frame, k kept, d width, H heads of h channels, K key/value heads, S cached.
"""

from fractions import Fraction
from math import floor, pi

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .configuration_vmod import VideoLMConfig
from .streaming_vmod import Session

GATES = {
    "raw": lambda mu: mu,
    "tanh": lambda mu: 1 + 0.2 * torch.tanh(mu),
    "sigmoid": torch.sigmoid,
    "straight_through": torch.ones_like,
}


# --- which tokens a layer computes ------------------------------------------------------------------------------------


def num_kept(n, keep):
    """Tokens kept of a frame of n: those strictly above the (1 - keep)-th percentile; exact, in fractions."""
    r = Fraction(repr(float(keep)))
    return n * int(r) if r in (0, 1) else max(1, n - 1 - floor((1 - r) * (n - 1)))


def threefry(key, count):
    """Threefry-2x32 with 20 rounds (Salmon et al., 2011): two words of a key, two arrays u32 -> two arrays u32."""
    rotations = (13, 15, 26, 6), (17, 29, 16, 24)
    keys = [np.uint32(key[0]), np.uint32(key[1])]
    keys.append(keys[0] ^ keys[1] ^ np.uint32(0x1BD11BDA))
    x, y = (np.atleast_1d(np.asarray(word, np.uint32)) + k for word, k in zip(count, keys, strict=False))
    for i in range(5):
        for r in rotations[i % 2]:
            x = x + y
            y = x ^ (y << np.uint32(r) | y >> np.uint32(32 - r))
        x = x + keys[(i + 1) % 3]
        y = y + np.atleast_1d(keys[(i + 2) % 3]) + np.uint32(i + 1)
    return x, y


def random_scores(seed, layer, frame, n):
    """The scores of the random selector, f32[n] in [0, 1): JAX's uniform(fold_in(fold_in(key(seed), layer), frame))."""
    key = (seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF)
    for data in (layer, frame):
        key = tuple(int(word[0]) for word in threefry(key, (0, data)))
    high, low = threefry(key, (np.zeros(n), np.arange(n)))
    return ((high ^ low) >> np.uint32(9) | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)


def select(scores, k, always_keep_last):
    """The k highest of each frame, ascending; ties go to the lower index: f32[F, n] -> i64[F, k]."""
    if always_keep_last:
        scores = scores.clone()
        scores[:, -1] = torch.inf
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values


# --- the decoder ------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


def rope_frequencies(llama):
    """Radians a token of each pair of a head's channels: f32[h / 2]; with Llama 3's scaling or a linear one."""
    h, scaling = llama["head_dim"], llama.get("rope_scaling")
    power = np.float64(llama["rope_theta"]) ** (np.arange(0, h, 2, dtype=np.float32) / np.float32(h)).astype(np.float64)
    frequency = 1 / power.astype(np.float32)
    if scaling and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling:  # long wavelengths are stretched, short ones stay, those between are blended
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * pi)
        blend = np.clip((turns - low) / (high - low), 0, 1)
        frequency = (1 - blend) * frequency / scaling["factor"] + blend * frequency
    return torch.from_numpy(np.asarray(frequency, np.float32))


def rope(x, position, frequencies):
    """Rotates the channel pairs (i, i + h/2) of x [T, heads, h] by position [T] * frequency."""
    angle = position[:, None, None].float() * frequencies.to(x.device)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, llama):
        super().__init__()
        d, h = llama["hidden_size"], llama["head_dim"]
        self.heads, self.kv_heads, self.size = llama["num_attention_heads"], llama["num_key_value_heads"], h
        bias, norm = llama.get("qkv_bias", False), llama.get("qk_norm", False)
        self.q_proj = nn.Linear(d, self.heads * h, bias=bias)
        self.k_proj = nn.Linear(d, self.kv_heads * h, bias=bias)
        self.v_proj = nn.Linear(d, self.kv_heads * h, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(h, llama["rms_norm_eps"]) if norm else nn.Identity() for _ in range(2))
        self.o_proj = nn.Linear(self.heads * h, d, bias=False)
        self.frequencies = rope_frequencies(llama)

    def forward(self, x, position, remember):
        """x: [T, d]; position: [T]; remember: (keys, values) [T, K, h] -> all those to look at and their positions."""
        q = self.q_norm(self.q_proj(x).view(len(x), self.heads, self.size))
        k = self.k_norm(self.k_proj(x).view(len(x), self.kv_heads, self.size))
        q, k = rope(q, position, self.frequencies), rope(k, position, self.frequencies)
        k, v, k_position = remember(k, self.v_proj(x).view(len(x), self.kv_heads, self.size))
        repeat = self.heads // self.kv_heads
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
        seen = k_position[None, :] <= position[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(out[0].transpose(0, 1).reshape(len(x), -1))


class MLP(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, llama):
        super().__init__()
        d, eps = llama["hidden_size"], llama["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.self_attn, self.mlp = Attention(llama), MLP(d, llama["intermediate_size"])
        self.expert = nn.Linear(d, 1, bias=False)

    def update(self, x, position, remember):
        """f: the sum of what attention and MLP add to x [T, d]."""
        a = self.self_attn(self.input_layernorm(x), position, remember)
        return a + self.mlp(self.post_attention_layernorm(x + a))

    def score(self, x):
        """mu of tokens x [..., d] in float32: bf16 scores tie often among the few tokens of a frame."""
        return (x.float() * self.expert.weight[0].float()).sum(-1)


class Decoder(nn.Module):
    def __init__(self, llama):
        super().__init__()
        self.embed_tokens = nn.Embedding(llama["vocab_size"], llama["hidden_size"])
        self.layers = nn.ModuleList(Block(llama) for _ in range(llama["num_hidden_layers"]))
        self.norm = RMSNorm(llama["hidden_size"], llama["rms_norm_eps"])


class Cache:
    """What a stream has shown so far: two caches under the method, that of full layers and that of routed ones.

    Layers that keep the same number of tokens a frame hold the same tokens. `position[k]` has the places in the stream
    of those; what a query sees and how far the stream is rolled back go by position, never by index.
    """

    def __init__(self, kept):
        self.kept = kept  # tokens a frame that each layer holds
        self.keys, self.values = [None] * len(kept), [None] * len(kept)
        self.position = {k: torch.zeros(0, dtype=torch.long) for k in kept}
        self.tokens = self.frames = 0

    def remember(self, layer, position):
        """A function that adds keys and values of a chunk at `position` to a layer's and returns all of them."""

        def add(k, v):
            if self.keys[layer] is not None:
                k, v = torch.cat([self.keys[layer], k]), torch.cat([self.values[layer], v])
            self.keys[layer], self.values[layer] = k, v
            before = self.position[self.kept[layer]].to(position.device)
            return k, v, torch.cat([before, position])

        return add

    def advance(self, positions, tokens, frames):
        """Once all layers have a chunk: positions {k: i64[S]} of its tokens in the layers that keep k a frame."""
        for k, new in positions.items():
            self.position[k] = torch.cat([self.position[k].to(new.device), new])
        self.tokens, self.frames = self.tokens + tokens, self.frames + frames

    def roll_back(self, tokens, frames):
        """Forgets all but the stream's first `tokens` tokens, among them `frames` whole frames."""
        for layer, k in enumerate(self.kept):
            if self.keys[layer] is not None:
                stays = self.position[k] < tokens
                self.keys[layer], self.values[layer] = self.keys[layer][stays], self.values[layer][stays]
        self.position = {k: position[position < tokens] for k, position in self.position.items()}
        self.tokens, self.frames = tokens, frames

    @property
    def num_bytes(self):
        held = [x for x in (*self.keys, *self.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)


# --- the vision tower -------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
HALF = (0.5, 0.5, 0.5)
NORMALISATION = {  # mean and standard deviation of pixel / 255
    "siglip": (HALF, HALF),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "patches": (HALF, HALF),
}


class VisionMLP(nn.Module):
    def __init__(self, vision):
        super().__init__()
        d, hidden, self.activation = vision["hidden_size"], vision["intermediate_size"], vision["hidden_act"]
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class VisionAttention(nn.Module):
    def __init__(self, vision):
        super().__init__()
        d, self.heads = vision["hidden_size"], vision["num_attention_heads"]
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in projections)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    def __init__(self, vision):
        super().__init__()
        d, eps = vision["hidden_size"], vision["layer_norm_eps"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
        self.self_attn, self.mlp = VisionAttention(vision), VisionMLP(vision)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class PoolingHead(nn.Module):
    """SigLIP's CLS token: a learned query looks at all patches."""

    def __init__(self, vision):
        super().__init__()
        d = vision["hidden_size"]
        self.probe = nn.Parameter(torch.zeros(1, 1, d))
        self.attention = nn.MultiheadAttention(d, vision["num_attention_heads"], batch_first=True)
        self.layernorm, self.mlp = nn.LayerNorm(d, vision["layer_norm_eps"]), VisionMLP(vision)

    def forward(self, x):
        pooled = self.attention(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class VisionTower(nn.Module):
    """SigLIP's or CLIP's: normalised pixels [F, 3, S, S] -> CLS [F, d] (None without a head), patches [F, G * G, d]."""

    def __init__(self, vision):
        super().__init__()
        d, p, eps = vision["hidden_size"], vision["patch_size"], vision["layer_norm_eps"]
        self.clip = vision["kind"] == "clip"
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, d, p, p, bias=not self.clip)
        self.embeddings.position_embedding = nn.Embedding((vision["image_size"] // p) ** 2 + self.clip, d)
        if self.clip:
            self.embeddings.class_embedding = nn.Parameter(torch.zeros(d))
            self.pre_layrnorm = nn.LayerNorm(d, eps)
        self.stop, self.whole = vision["num_hidden_layers"], vision.get("feature_layer") is None
        if not self.whole:  # a hidden state so far from the last, before any last norm
            self.stop += 1 + vision["feature_layer"]
        self.encoder.layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision["num_hidden_layers"]))
        self.post_layernorm = nn.LayerNorm(d, eps)
        self.head = PoolingHead(vision) if not self.clip and vision["head"] else None

    def forward(self, x):
        x = self.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)
        if self.clip:
            x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x + self.embeddings.position_embedding.weight
        if self.clip:
            x = self.pre_layrnorm(x)
        for layer in self.encoder.layers[: self.stop]:
            x = layer(x)
        if self.clip:
            return x[:, 0], x[:, 1:]
        if not self.whole:
            return None, x
        x = self.post_layernorm(x)
        return self.head(x) if self.head is not None else None, x


def patches(x, p, grid):
    """The encoder without parameters: x [F, 3, S, S] -> the cells' mean, the cells [F, h * w, 3 p^2 + 8].

    Each cell of the grid is shrunk to p x p pixels, and followed by a code of its row and column.
    """
    h, w = grid if all(grid) else (1, 1)
    small = F.adaptive_avg_pool2d(x, (h * p, w * p)).permute(0, 2, 3, 1)
    pixels = small.reshape(-1, h, p, w, p, 3).transpose(2, 3).reshape(-1, h * w, p * p * 3)
    places = np.concatenate([np.repeat(place_code(h), w, axis=0), np.tile(place_code(w), (h, 1))], axis=-1)
    cells = torch.cat([pixels, torch.from_numpy(places).to(pixels).expand(len(x), -1, -1)], -1)
    return cells.mean(1), cells


def place_code(count):
    """Sine and cosine of two frequencies along one axis: [count, 4]."""
    angle = np.pi / 2 * (np.linspace(-1, 1, count) if count > 1 else np.zeros(1))
    return np.stack([np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)], axis=-1)


# --- the whole model --------------------------------------------------------------------------------------------------


class VideoLM(PreTrainedModel):
    config_class = VideoLMConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "VisionLayer"]  # noqa: RUF012
    # Routers decide in float32, whatever the rest computes in.
    _keep_in_fp32_modules = ["expert"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["expert"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        c = self.video_lm = config.video_lm
        llama, vision = c["llama"], c["vision"]
        d = llama["hidden_size"]
        self.model = Decoder(llama)
        self.tied = llama["tie_word_embeddings"]
        self.lm_head = None if self.tied else nn.Linear(d, llama["vocab_size"], bias=False)
        self.connector = nn.Sequential(nn.Linear(c["vision_hidden_size"], d), nn.GELU(), nn.Linear(d, d))
        self.image_newline = nn.Parameter(torch.zeros(d)) if c.get("newline_token_id") is not None else None
        self.vision_model = VisionTower(vision) if vision and vision["kind"] != "patches" else None
        self.kept = [num_kept(config.tokens_per_frame, spec["keep"]) for spec in c["policy"]]
        self.post_init()

    def new_cache(self):
        """An empty stream."""
        return Cache(self.kept)

    def stream(self, tokenizer, threshold=0.725, **options):
        """A live session: see streaming_vmod.Session."""
        return Session(self, tokenizer, threshold, **options)

    @torch.no_grad()
    def features(self, frames, batch=16):
        """Pixels u8[F, S, S, 3] -> f32[F, n, d_v]: CLS first, then the pooled patches, row by row."""
        vision, cls, grid = self.video_lm["vision"], self.video_lm["cls"], self.video_lm["grid"]
        if vision is None:
            raise ValueError("this model has no vision tower: give it features [F, n, d_v]")
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in NORMALISATION[vision["kind"]])
        out = []
        for part in torch.as_tensor(frames).split(batch):
            x = (part.to(self.device).permute(0, 3, 1, 2).float() / 255 - mean) / std
            if self.vision_model is None:
                summary, cells = patches(x, vision["patch_size"], grid)
            else:
                summary, cells = self.vision_model(x.to(self.vision_model.post_layernorm.weight.dtype))
                side = vision["image_size"] // vision["patch_size"]
                if all(grid):
                    square = cells.float().transpose(1, 2).unflatten(-1, (side, side))
                    cells = F.adaptive_avg_pool2d(square, tuple(grid)).flatten(2).transpose(1, 2)
            tokens = ([summary[:, None].float()] if cls else []) + ([cells.float()] if all(grid) else [])
            out.append(torch.cat(tokens, 1))
        return torch.cat(out)

    @torch.no_grad()
    def extend(self, input_ids, frames=None, cache=None):
        """One row, or the next chunk of a stream: i64[T], features [F, n, d_v] or pixels or None -> hidden [T, d].

        The chunk holds whole frames, as many as `frames`; `cache` grows by it.
        """
        c, n = self.video_lm, self.config.tokens_per_frame
        cache = self.new_cache() if cache is None else cache
        ids = torch.as_tensor(input_ids, dtype=torch.long, device=self.device)
        is_vision = ids == c["frame_token_id"]
        count = int(is_vision.sum()) // n
        if int(is_vision.sum()) != count * n or (0 if frames is None else len(frames)) < count:
            raise ValueError(f"{int(is_vision.sum())} frame tokens do not fit the frames, of {n} tokens each")
        # The frame token has no row in the table: the connector's output takes its place.
        x = self.model.embed_tokens(ids.masked_fill(is_vision, 0))
        if self.image_newline is not None:
            x[ids == c["newline_token_id"]] = self.image_newline.to(x.dtype)
        if count:
            frames = torch.as_tensor(frames)[:count]
            features = self.features(frames) if frames.dtype == torch.uint8 else frames
            first = self.connector[0].weight
            tokens = self.connector(features.to(first.device, first.dtype))
            if c.get("pooled"):
                square = tokens.transpose(1, 2).unflatten(-1, tuple(c["grid"])).float()
                tokens = F.interpolate(square, tuple(c["pooled"]), mode="bilinear").flatten(2).transpose(1, 2)
            x[is_vision] = tokens.flatten(0, 1).to(x.dtype)
        starts = is_vision.nonzero()[:, 0][::n]
        position = torch.arange(cache.tokens, cache.tokens + len(ids), device=self.device)

        positions = {}
        for i, (layer, spec) in enumerate(zip(self.model.layers, c["policy"], strict=True)):
            if spec["selector"] is None and spec["keep"] == 1:
                x = x + layer.update(x, position, cache.remember(i, position))
                positions[n] = position
                continue
            kept = self.choose(i, x, starts, cache.frames)
            computed = ~is_vision
            computed[(starts[:, None] + kept).flatten()] = True
            index = computed.nonzero()[:, 0]
            positions[self.kept[i]] = position[index]
            if not len(index):
                continue
            part = x[index]
            update = layer.update(part, position[index], cache.remember(i, position[index]))
            if spec["selector"] == "learned":
                factor = torch.where(is_vision[index], GATES[c["gate"]](layer.score(part)), 1.0)
                update = (update.float() * factor[:, None]).to(update.dtype)
            x = x.index_copy(0, index, part + update)
        cache.advance(positions, len(ids), count)
        return x

    def choose(self, layer, x, starts, first_frame):
        """The tokens of each frame that a routed layer computes: i64[F, k]."""
        c, n, k = self.video_lm, self.config.tokens_per_frame, self.kept[layer]
        selector = c["policy"][layer]["selector"]
        if selector is None:
            return torch.zeros(len(starts), 0, dtype=torch.long, device=x.device)
        if selector == "uniform":
            even = torch.from_numpy(np.round(np.linspace(0, n - 1, k)).astype(np.int64))
            return even.to(x.device).expand(len(starts), k)
        if selector == "learned":
            scores = self.model.layers[layer].score(x[starts[:, None] + torch.arange(n, device=x.device)])
        else:
            frames = range(first_frame, first_frame + len(starts))
            drawn = [random_scores(c["router_seed"], layer, frame, n) for frame in frames]
            scores = torch.from_numpy(np.array(drawn, np.float32).reshape(-1, n)).to(x.device)
        return select(scores, k, c["always_keep_last"])

    @torch.no_grad()
    def logits(self, hidden):
        """Hidden states [..., d] -> f32[..., V]."""
        hidden = self.model.norm(hidden)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden, head.weight).float()

    def forward(self, input_ids, frames=None, length=None):
        """Whole sequences: i64[B, T], of which row b uses the first length[b] (default: all), frames [B, F, ...] as
        in `extend` -> f32[B, T, V], zeros behind a row's end. Rows are computed one by one.
        """
        rows = []
        for b, ids in enumerate(torch.as_tensor(input_ids)):
            used = len(ids) if length is None else int(length[b])
            logits = self.logits(self.extend(ids[:used], None if frames is None else frames[b]))
            rows.append(F.pad(logits, (0, 0, 0, len(ids) - used)))
        return torch.stack(rows)
