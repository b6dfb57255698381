"""The benchmarks of `vmod bench`: one module each, with `add_arguments(parser)` and `run(args) -> {"rows": [...]}`."""
