"""Package layout; metadata and dependencies are in pyproject.toml.

`kernels/` stands at the root and has no ``__init__.py``: a root package called ``kernels`` would shadow PyPI's, which
transformers imports when it finds one. The folder below it installs as ``hive_ds.kernels``, and the ZeRO policies of
`ds_configs/` as data in ``hive_ds/ds_configs`` (`hive_ds.training.ds_config` finds them in a checkout and in a wheel).
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["hive_ds", "hive_ds.*"]), "hive_ds.kernels", "hive_ds.ds_configs"],
    package_dir={
        "hive_ds": "hive_ds",
        "hive_ds.kernels": "kernels/hive_kernels",
        "hive_ds.ds_configs": "ds_configs",
    },
)
