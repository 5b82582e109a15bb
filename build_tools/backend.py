"""The build backend that pyproject.toml names: setuptools', except that it asks for torch and the CUDA compiler only
where they are needed.
"""

from __future__ import annotations

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

from build_tools import environment, fail

environment.check_setuptools()


def get_requires_for_build_wheel(config_settings=None):
    """What pip installs for a build in isolation, besides pyproject.toml's list: what the environment lacks."""
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    torch = environment.installed_torch()
    major: int | None = 13  # PyPI's torch is a build for CUDA 13
    if torch is None:
        requires.append("torch>={}.{}".format(*environment.MIN_TORCH))
    elif problem := torch.problem():
        fail(problem)  # now, and not when what was built for another one is imported
    else:
        major = torch.cuda_major
    setting = os.environ.get("FUSED_CONV_BN_CUDA", "").strip()
    wants_13 = {"": major == 13, "0": False, "1": major in (13, None)}.get(setting, "13" in setting)
    if wants_13 and 13 not in environment.find_cuda():
        requires.append(environment.CUDA_REQUIREMENT)
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel
