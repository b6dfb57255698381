"""`vmod table`: trains and scores the rows of a table under equal budgets, with seeds, and draws what came out.

A table is a file of configs/tables/: `get_config()`, what all rows share, and `ROWS = {name: {key: value}}`, what each
changes. `study/rows.py` says where runs live.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from vmod_jax.errors import ArgumentParser, UserError, user_path
from vmod_jax.study.rows import Row, chain, collect, markdown, run_row, write_results
from vmod_jax.training.config import Config
from vmod_jax.training.flags import find_config


def read_table(path: Path) -> tuple[Config, dict[str, Row]]:
    """A file of configs/tables/. Raises UserError where it is not one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one of configs/tables/")
    spec = importlib.util.spec_from_file_location("table", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(), module.ROWS
    except AttributeError as error:
        raise UserError(f"{path} is no table ({error}): it needs get_config() and ROWS") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser("vmod table", description=__doc__)
    of = lambda name: user_path(find_config(name))  # noqa: E731
    parser.add_argument("tables", nargs="+", type=of, metavar="FILE", help="of configs/tables/, or tables/NAME")
    parser.add_argument("--out", type=user_path, default=Path("runs/tables"), help="where the runs live (%(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these alone, with the bases they need")
    parser.add_argument("--seeds", nargs="+", type=int, help="these alone (default: as many as the table says)")
    parser.add_argument("--results", type=user_path, help="where tables and plots go (default: OUT)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    tables = {path.stem: read_table(path) for path in args.tables}
    every = {name: (config, row) for config, rows in tables.values() for name, row in rows.items()}
    if wrong := set(args.rows or ()) - every.keys():
        raise UserError(f"no row '{min(wrong)}' in {', '.join(map(str, args.tables))}: use one of {', '.join(every)}")
    for name in args.rows or every:
        config, row = every[name]
        for base in reversed(chain(every, name)):
            run_row(*every[base], args.out, base, 0)
        for seed in args.seeds or range(row.seeds):
            run_row(config, row, args.out, name, seed)
    results = collect(args.out, list(every))
    print("\n" + markdown(results))
    bases = {row.base for _, row in every.values()}
    shown = {
        title: {name: results[name] for name in rows if name in results and name not in bases}
        for title, (_, rows) in tables.items()
    }
    print(f"wrote {', '.join(map(str, write_results(results, shown, args.results or args.out)))}")
    name = "interleaved" if "interleaved" in results else next(iter(results))
    print(f"next: vmod routing --workdir {args.out}/{name}/seed-0, to see what its routers choose")
    return 0
