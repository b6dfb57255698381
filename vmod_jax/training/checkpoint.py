"""Checkpoints (Orbax, no pickles): WORKDIR/checkpoints/STEP, each complete in itself.

    params    the whole parameter tree (an imported folder has this alone)
    state     the optimiser's state and the random key
    data      the Grain iterator's state, JSON: a global step index, the same for any number of hosts
    metrics   {"val_loss": ...} where the step was evaluated: the best such checkpoint is kept beside the latest ones

Saving is asynchronous, each process writing its own shards: `save` returns when the arrays are copied, and a checkpoint
appears under its name only once it is whole, so a run that is killed leaves the one before. What was saved on one mesh,
by any number of processes, is restored onto another.
"""

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from vmod_jax.errors import UserError, few
from vmod_jax.training.sharding import placements

Tree = Any


class Checkpoints:
    """The checkpoints of a workdir. A context manager: leaving waits for what is being saved.

    keep: who trains opens them with the number of latest ones to keep beside the best one. Without it they are for
    reading, or for one save; nothing is removed.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        options = ocp.CheckpointManagerOptions()
        if keep is not None:
            best = BestN(get_metric_fn=_quality, n=1, keep_checkpoints_without_metrics=False)
            options = ocp.CheckpointManagerOptions(
                best_fn=_quality,
                preservation_policy=AnyPreservationPolicy([LatestN(n=keep), best]),
                cleanup_tmp_directories=True,  # left by a save that was killed
                single_host_load_and_broadcast=True,  # all processes see the same steps
            )
        self.manager = ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options)

    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        step = self.manager.latest_step()
        return None if step is None else int(step)  # NumPy's, where one process has told the others

    def best(self) -> tuple[int, float] | None:
        """(step, val_loss) of the best checkpoint, of those that were evaluated."""
        step = self.manager.best_step()
        metrics = (step is not None and self.manager.metrics(step)) or {}
        return (int(step), metrics["val_loss"]) if step is not None and "val_loss" in metrics else None

    def save(
        self,
        step: int,
        params: Tree,
        state: Tree = None,
        data: dict[str, Any] | None = None,
        val_loss: float | None = None,
    ) -> None:
        """Starts saving; waits first for the save before. With `state`: a training run's, else parameters alone."""
        items, metrics = {"params": ocp.args.StandardSave(params)}, None
        if state is not None:
            items |= {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data or {})}
            metrics = {} if val_loss is None else {"val_loss": val_loss}
        self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, params: Tree, state: Tree) -> tuple[Tree, Tree, dict[str, Any]]:
        """(params, state, data); the given trees say shapes, dtypes and placements (arrays or ShapeDtypeStructs)."""
        for name, tree in (("params", params), ("state", state)):
            _check_fits(self.manager.directory / str(step) / name, tree)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), state=ocp.args.StandardRestore(state), data=ocp.args.JsonRestore()
        )
        restored = self.manager.restore(step, args=args)
        return restored["params"], restored["state"], restored["data"]

    def wait(self) -> None:
        self.manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()


def _quality(metrics: dict[str, float]) -> float:
    return -metrics.get("val_loss", math.inf)


def load_params(workdir: str | Path, mesh: Mesh | None = None, step: int | None = None) -> Tree:
    """The parameters of a workdir's last (or the given) checkpoint, placed on a mesh or on one device.

    Raises UserError when there is none.
    """
    if not (Path(workdir) / "checkpoints").is_dir():
        _no_checkpoint(workdir)
    with Checkpoints(Path(workdir)) as checkpoints:
        step = checkpoints.latest() if step is None else step
        steps = sorted(checkpoints.manager.all_steps())
        if step is None:
            _no_checkpoint(workdir)
        if step not in steps:
            raise UserError(f"{workdir} has no checkpoint of step {step}; there are {few([*map(str, steps)])}")
        tree = _stored_arrays(checkpoints.manager.directory / str(step) / "params")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        one = SingleDeviceSharding(jax.devices()[0])
        where = placements(shapes, mesh) if mesh else jax.tree.map(lambda _: one, shapes)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
        return checkpoints.manager.restore(step, args=args)["params"]


def save_params(workdir: str | Path, params: Tree, step: int = 0) -> None:
    """A checkpoint of parameters alone, as an imported folder has it."""
    with Checkpoints(Path(workdir)) as checkpoints:
        checkpoints.save(step, params)


def _no_checkpoint(workdir: str | Path) -> Any:
    raise UserError(f"{workdir} has no checkpoint: train into it first, or name another folder")


def _check_fits(stored: Any, tree: Tree) -> None:
    """Compares the shapes of a stored tree with those of `tree`, before anything is read."""
    if not stored.exists():
        raise UserError(
            f"{stored.parent} has no {stored.name}: start a new run from it with init_from, in another --workdir"
        )
    there, here = _shapes(_stored_arrays(stored)), _shapes(tree)
    if different := sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path)):
        path = different[0]
        shapes = there.get(path, "absent"), here.get(path, "absent")
        raise UserError(
            f"{stored} does not fit this run: {len(different)} array(s) differ, {path} is {shapes[0]} "
            f"there and {shapes[1]} here; use another --workdir, or init_from to start from its parameters"
        )


def _stored_arrays(stored: Any) -> Tree:
    """The tree that lies in a folder: shapes and dtypes, no values."""
    return ocp.StandardCheckpointHandler().metadata(stored).tree


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in leaves}
