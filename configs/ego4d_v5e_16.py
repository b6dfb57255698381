"""The paper's Ego4D narration stream: Llama-3-8B, interleaved r = 0.2, 10 tokens a frame, on a TPU v5e-16.

    vmod import LLAMA --vision SIGLIP --out imported/llama3_8b               # Meta-Llama-3-8B-Instruct, SigLIP-L/16-384
    vmod data narration --root EGO4D --encoder SIGLIP --out prepared/ego4d
    bash launch/tpu.sh run ego4d --zone ZONE --type v5litepod-16 --bucket BUCKET --delete -- \
      vmod train --config configs/ego4d_v5e_16.py --workdir '~/bucket/runs/ego4d' \
      --config.init_from='~/bucket/imported/llama3_8b' --config.data.path='~/bucket/prepared/ego4d'
    vmod evaluate --workdir '~/bucket/runs/ego4d'

The baseline of equal training: --config.policy=full. Streams of up to 600 frames (5 minutes at 2 FPS), which with their
text are Llama-3's 8192 positions; longer ones are cut there.

Expected on the validation split, the paper's figures (not reproduced here):

                          LM-PPL   TimeDiff (s)   Fluency   LM-Correctness
    interleaved r = 0.2     2.41       2.04         45.2         48.9
    full                    2.40       2.05         45.3         49.0

Cost by the formula (`models/flops.py`, rows of 600 frames and 2000 text tokens): 13.1 PFLOP a step, 46 EFLOP in all; at
40% of the chips' peak 10 hours, full 15. Nothing of this was measured on a TPU.

It fits: `vmod bench aot 8b-v5e-16-600x10` says 9.9 of 16 GiB a chip (full: 9.8) for its longest streams, 29.5 GiB
received a chip for every 16 rows (docs/results/aot-8b-v5e-16-600x10.json). To that comes the vision tower of the
import, in float32 1.2 GiB and whole on every chip; without --vision there is none, and none is needed to train.
"""

from vmod_jax.training.config import Config
from vmod_jax.training.recipes import llama3_8b


def get_config() -> Config:
    config = llama3_8b("imported/llama3_8b", "prepared/ego4d")
    config.mesh.update({"data": 1, "fsdp": 16})
    config.accumulate = 4  # one row a chip at a time
    config.data.max_frames = 600
    config.data.buckets = ((150, 640, 520), (300, 1024, 840), (600, 2000, 1600))
    return config
