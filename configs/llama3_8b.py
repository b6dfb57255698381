"""Llama-3-8B on Ego4D's narration streams, the paper's recipe (interleaved r = 0.2), on a machine of the table below.

    vmod import LLAMA --vision SIGLIP --out imported/llama3_8b               # Meta-Llama-3-8B-Instruct, SigLIP-L/16-384
    vmod data narration --root EGO4D --encoder SIGLIP --out prepared/ego4d
    bash launch/gpu.sh vmod train --config configs/llama3_8b.py:h100_8 --workdir runs/ego4d
    bash launch/tpu.sh run ego4d --zone ZONE --type v5litepod-16 --bucket BUCKET --delete -- \\
      vmod train --config configs/llama3_8b.py:v5e_16 --workdir '~/bucket/runs/ego4d' \\
      --config.init_from='~/bucket/imported/llama3_8b' --config.data.path='~/bucket/prepared/ego4d'
    vmod evaluate --workdir '~/bucket/runs/ego4d'

The baseline of equal training: --config.policy=full. Streams are cut at the longest that a row names; 600 frames x 10
tokens (5 minutes at 2 FPS) are, with their text, Llama-3's 8192 positions. v5p_8 is for rows of 62 thousand tokens, ten
minutes at five times the paper's tokens a frame, of which the paper has no run: Llama-3.1 (131072 positions), and
`--grid 7x7` at the import, `--grid 7 7` with the data. Its 671 EFLOP want a larger slice, whose mesh.fsdp is its chips.

    machine  TPU type     chips   streams     PFLOP a step   hours: MoD, full   GiB a chip: MoD, full, has
    v5e_16   v5litepod-16    16   600 x 10        13.1          10     15            9.9    9.8   16
    v6e_8    v6e-8            8   600 x 10        13.1         4.4    6.4           10.0   11.2   32
    h100_8   (GPUs)           8   600 x 10        13.1         4.0    5.9            9.0    9.9   79
    v5p_8    v5p-8            4   1200 x 50        192         254    456           55.0   62.0   95

FLOPs are the formula's (`models/flops.py`, rows of the longest stream and 2000 text tokens), hours those of 3500 steps
at 40% of the chips' peak: none was measured on a TPU or GPU (`vmod bench train-step --llama-3-8b` measures a step on
one). GiB are what XLA's compiler says of the longest streams: `vmod bench aot` for each machine's case, in
docs/results/aot-8b-v5e-16-600x10.json, aot-8b-h100-8-600x10.json, aot-quick-8b-v6e-8-600x10.json and
aot-quick-8b-v5p-8-1200x50.json. To that come gradients that are accumulated, and the vision tower of the import, in
float32 1.2 GiB and whole on every chip; without --vision there is none, and none is needed to train.

Expected on the validation split, the paper's figures (not reproduced here):

                          LM-PPL   TimeDiff (s)   Fluency   LM-Correctness
    interleaved r = 0.2     2.41       2.04         45.2         48.9
    full                    2.40       2.05         45.3         49.0
"""

from typing import NamedTuple

from vmod_jax.errors import UserError
from vmod_jax.training.config import Config
from vmod_jax.training.recipes import BATCH, llama3_8b

TEN = ((150, 640, 520), (300, 1024, 840), (600, 2000, 1600))
FIFTY = ((300, 640, 520), (600, 1024, 920), (1200, 2000, 2200))


class Machine(NamedTuple):
    """chips: that parameters and rows are split over; buckets: (frames, text tokens, labels)."""

    chips: int
    init_from: str = "imported/llama3_8b"
    features: str = "prepared/ego4d"
    buckets: tuple[tuple[int, int, int], ...] = TEN


MACHINES = {
    "v5e_16": Machine(16),
    "v6e_8": Machine(8),
    "h100_8": Machine(8),
    "v5p_8": Machine(4, "imported/llama3.1_8b_7x7", "prepared/ego4d_7x7", FIFTY),
}


def get_config(machine: str = "") -> Config:
    """machine: what stands behind the colon, a name of MACHINES. Raises UserError for another."""
    if machine not in MACHINES:
        raise UserError(f"llama3_8b:MACHINE: '{machine}' is none of {', '.join(MACHINES)}")
    row = MACHINES[machine]
    config = llama3_8b(row.init_from, row.features)
    config.mesh.update({"data": 1, "fsdp": row.chips})
    config.accumulate = BATCH // row.chips  # one row a chip at a time
    config.data.buckets, config.data.max_frames = row.buckets, row.buckets[-1][0]
    return config
