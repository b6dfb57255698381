"""What pyproject.toml cannot say: configs/, which lies beside the package, is shipped as vmod_jax.configs."""

from setuptools import find_namespace_packages, setup

CONFIGS = ["vmod_jax.configs", *(f"vmod_jax.configs.{name}" for name in find_namespace_packages("configs"))]

setup(
    packages=[*find_namespace_packages(include=["vmod_jax", "vmod_jax.*"]), *CONFIGS],
    package_dir={"vmod_jax.configs": "configs"},
)
